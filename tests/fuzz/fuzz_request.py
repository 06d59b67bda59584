"""Bytes as a request: answered, or refused as the client's fault without telling of the inside."""

import contextlib
import io
import math
import random
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from protos import inference_pb2
from service import model_config, version
from service.call import Call, CallError, Status
from service.repository import Repository
from service.rpc import INFER, Rpc
from service.settings import Settings
from service.tensors import DTYPE
from tests.fuzz import mutate
from tests.fuzz.promise import check_told

Request = inference_pb2.ModelInferRequest
ALLOWED = {
    Status.INVALID_ARGUMENT,
    Status.NOT_FOUND,
    Status.UNIMPLEMENTED,
    Status.FAILED_PRECONDITION,  # rows are not sampled, or were not
}
# Where the server may not be able to: a wait that the request itself cuts short, and model control.
UNABLE = ("Request timeout expired", "explicit model load / unload is not allowed")
MAX_PIXELS = 100_000
MAX_REPAIRED = 1 << 12  # bytes
WAIT_S = 60


class Asked(Call):
    """A call whose outcome is waited for."""

    def __init__(self, path: str, content: bytes) -> None:
        super().__init__(path, content, metadata={})
        self.outcome: Future[bytes | CallError] = Future()

    def _send(self, content: bytes) -> None:
        self.outcome.set_result(content)

    def _send_error(self, error: CallError) -> None:
        self.outcome.set_result(error)


@contextlib.contextmanager
def running(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Serve the bundle; yield what asks for an inference with bytes, and for something else."""
    settings = Settings(
        repository=path.parents[1], max_batch_rows=8, threads=1, instances=1, priority_levels=3
    )
    repository = Repository(
        settings.folder, defaults=model_config.of_server(settings, cores=1), load=version.load
    )
    repository.reconcile()
    rpc = Rpc(repository, max_image_pixels=MAX_PIXELS)
    others = [other for other in rpc.paths if other != INFER]

    def ask(called: str, content: bytes) -> bytes | None:
        call = Asked(called, content)
        rpc.begin(call)
        outcome = call.outcome.result(WAIT_S)
        if isinstance(outcome, bytes):
            return outcome
        message = str(outcome)
        assert outcome.status in ALLOWED or message.endswith(UNABLE) or UNABLE[1] in message, (
            message
        )
        check_told(message.replace(called, "").replace("/ unload", ""), content, path.parents[1])
        return None

    def one(content: bytes) -> None:
        answer = ask(INFER, content)
        if answer is not None:
            check_answer(Request.FromString(content), answer)
        ask(others[zlib.crc32(content) % len(others)], content)

    yield one
    rpc.close()
    repository.close()


def check_answer(request: Request, answer: bytes) -> None:
    """Hold an answer against its request: as many rows, and as many bytes as its shapes say."""
    response = inference_pb2.ModelInferResponse.FromString(answer)
    assert response.id == request.id
    assert len(response.outputs) == len(response.raw_output_contents) == (len(request.outputs) or 2)
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        assert output.shape[0] == request.inputs[0].shape[0]
        if output.datatype != "BYTES":
            assert len(content) == math.prod(output.shape) * DTYPE[output.datatype].itemsize


def seeds(path: Path) -> list[bytes]:
    """Return requests of every kind: raw, typed, pictures, classes, parameters; and short ones."""
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    raw = Request(model_name="tiny", id="1", raw_input_contents=[pixels.tobytes()])
    raw.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    typed = Request(model_name="tiny", model_version="1")
    typed.inputs.add(name="image", datatype="UINT8", shape=[1, 2, 2, 1])
    typed.inputs[0].contents.uint_contents.extend([0, 1, 254, 255])
    classes = Request()
    classes.CopyFrom(raw)
    classes.outputs.add(name="probabilities").parameters["classification"].int64_param = 2
    classes.outputs.add(name="logits")
    queued = Request()
    queued.CopyFrom(raw)
    queued.parameters["priority"].uint64_param = 1
    queued.parameters["timeout"].int64_param = 10_000_000
    queued.parameters["other"].string_param = "x"
    files = pictures()
    framed = Request(model_name="tiny", raw_input_contents=[mutate.framed(files)])
    framed.inputs.add(name="image", datatype="BYTES", shape=[len(files)])
    listed = [Request(model_name="tiny") for _ in files]
    for request, file in zip(listed, files, strict=True):
        request.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
        request.inputs[0].contents.bytes_contents.append(file)
    made = [raw, typed, classes, queued, framed, *listed]
    return [request.SerializeToString() for request in made] + [
        b"",
        b"\n\x04tiny",
        b"\n\x04tiny\x12\x011",
    ]


def pictures() -> list[bytes]:
    """Return small PNG and JPEG files of different kinds."""
    gray = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (gray, "PNG", {}),
        (gray.convert("RGBA"), "PNG", {"exif": exif}),
        (gray.convert("P"), "PNG", {"transparency": 3}),
        (gray.convert("I;16"), "PNG", {}),
        (gray, "JPEG", {}),
        (gray.convert("RGB"), "JPEG", {"exif": exif, "progressive": True}),
    ]
    files = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def change(content: bytes, rng: random.Random, some: mutate.Bytes) -> bytes:
    """Change a request's fields or a picture in it, and mostly make its sizes agree again."""
    request = mutate.message(content, Request, rng, lambda part: _change_part(part, rng, some))
    assert isinstance(request, Request)
    if rng.random() < 0.6:
        _repair(request)
    return request.SerializeToString()


def _change_part(part: bytes, rng: random.Random, some: mutate.Bytes) -> bytes:
    if part.startswith(mutate.PNG):
        return mutate.png(part, rng, some)
    files = mutate.unframed(part)
    if files:
        place = rng.randrange(len(files))
        files[place] = _change_part(files[place], rng, some)
        return mutate.framed(files)
    return some(part)


def _repair(request: Request) -> None:
    """Give the input the rows that its data have, or as many bytes as its shape asks for."""
    if not request.inputs:
        return
    tensor = request.inputs[0]
    raw = request.raw_input_contents
    if tensor.datatype == "BYTES":
        files = mutate.unframed(raw[0]) if raw else tensor.contents.bytes_contents
        tensor.shape[:] = [len(files)]
    elif tensor.datatype in DTYPE and raw:
        size = math.prod(tensor.shape) * DTYPE[tensor.datatype].itemsize
        if 0 <= size < MAX_REPAIRED:
            raw[0] = raw[0][:size].ljust(size, b"\0")
