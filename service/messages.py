"""What a server is sent, in which pieces, and what its responses mean.

Knows no connection, and not in which order or how often they are sent.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from service.errors import ServerError
from service.tensors import DTYPE

Arrays = dict[str, NDArray[np.generic]]  # by name, (rows, ...) each

BATCH_ROWS = 128  # sent in one request to a server that does not say what it takes
PICTURE_BYTES = 2 << 20  # in one request; so few bytes seldom have more pixels than a server takes
FRAMING_BYTES = 4096  # of a message, beside its tensor: names, shapes, tags
PICTURES = "BYTES"  # datatype of an input that is PNG or JPEG files


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request was answered; its arrays share the response's memory."""

    version: str
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said about some images."""

    model: str
    version: str
    labels: tuple[str, ...]  # of the classes, in the order of the columns
    outputs: Arrays

    @property
    def probabilities(self) -> NDArray[np.generic]:
        """Float32 (rows, classes); each row adds up to 1."""
        return self.outputs["probabilities"]

    @property
    def logits(self) -> NDArray[np.generic]:
        """Float32 (rows, classes), before the softmax."""
        return self.outputs["logits"]


def tensor_requests(
    array: NDArray[np.generic], max_message_bytes: int, about: pb.ModelMetadataResponse
) -> Iterator[pb.ModelInferRequest]:
    """Cut images into requests that, like their answers, are within the limits of both sides."""
    expected = _dtype(about.inputs[0].datatype)
    if array.dtype != expected:
        raise ValueError(f"images is {array.dtype}, {about.name} takes {expected}; convert it")
    row_bytes = max(array.nbytes // len(array), _answer_bytes(about), 1)
    rows = max(1, min(max_rows(about), (max_message_bytes - FRAMING_BYTES) // row_bytes))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        yield _request(about, about.inputs[0].datatype, part.shape, part.tobytes())


def picture_requests(
    contents: Sequence[bytes], about: pb.ModelMetadataResponse
) -> Iterator[pb.ModelInferRequest]:
    """Put picture files into requests, in their order."""
    together, size = list[bytes](), 0
    for content in contents:
        framed = len(content).to_bytes(4, "little") + content
        size += len(framed)
        if together and (len(together) == max_rows(about) or size > PICTURE_BYTES):
            yield _request(about, PICTURES, (len(together),), b"".join(together))
            together, size = [], len(framed)
        together.append(framed)
    yield _request(about, PICTURES, (len(together),), b"".join(together))


def one_by_one(request: pb.ModelInferRequest) -> Iterator[pb.ModelInferRequest]:
    """Cut a request of pictures into one for each."""
    raw, start = request.raw_input_contents[0], 0
    while start < len(raw):
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        yield like(request, 1, raw[start:end])
        start = end


def like(request: pb.ModelInferRequest, rows: int, raw: bytes) -> pb.ModelInferRequest:
    """Return a request for other rows of the same kind."""
    other = pb.ModelInferRequest(
        model_name=request.model_name,
        model_version=request.model_version,
        inputs=request.inputs,
        raw_input_contents=[raw],
    )
    other.inputs[0].shape[0] = rows
    return other


def rows_in(request: pb.ModelInferRequest) -> int:
    """Return how many rows a request asks about."""
    return request.inputs[0].shape[0]


def max_rows(about: pb.ModelMetadataResponse) -> int:
    """Return the most rows that the server takes in one request."""
    return max(1, int(about.properties.get("max_batch_rows", BATCH_ROWS)))


def labels(about: pb.ModelMetadataResponse) -> tuple[str, ...]:
    """Return what the classes are called; nothing if the server does not say."""
    return tuple(json.loads(about.properties.get("labels", "[]")))


def read(response: pb.ModelInferResponse, rows: int) -> Reply:
    """View a response's outputs as arrays, and make sure that each has all the rows."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise ServerError("the server did not answer in raw_output_contents", code="UNIMPLEMENTED")
    outputs: Arrays = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        shape, dtype = tuple(output.shape), _dtype(output.datatype)
        if shape[:1] != (rows,) or math.prod(shape) * dtype.itemsize != len(raw):
            raise ServerError(
                f"the server answered {rows} rows with {len(raw)} bytes as output "
                f"'{output.name}' of shape {list(shape)} {dtype}",
                code="INTERNAL",
            )
        outputs[output.name] = np.frombuffer(raw, dtype).reshape(shape)
    return Reply(response.model_version, outputs)


def concatenated(replies: Sequence[Reply]) -> Arrays:
    """Return the rows of all replies, in their order."""
    return {
        name: np.concatenate([reply.outputs[name] for reply in replies])
        for name in replies[0].outputs
    }


def _request(
    about: pb.ModelMetadataResponse, datatype: str, shape: Sequence[int], raw: bytes
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=about.name, raw_input_contents=[raw])
    request.inputs.add(name=about.inputs[0].name, datatype=datatype, shape=shape)
    return request


def _answer_bytes(about: pb.ModelMetadataResponse) -> int:
    """Return the bytes of the answer to one row, as far as its shape is known."""
    return sum(
        math.prod(output.shape[1:]) * _dtype(output.datatype).itemsize
        for output in about.outputs
        if all(size > 0 for size in output.shape[1:])
    )


def _dtype(datatype: str) -> np.dtype[np.generic]:
    if datatype not in DTYPE:
        raise ServerError(
            f"the model has the datatype {datatype}, this client knows {', '.join(DTYPE)}",
            code="UNIMPLEMENTED",
        )
    return DTYPE[datatype]
