"""The servers that are measured beside each other, and how each is started and asked.

All of them serve the same ONNX file. Each is a process, or a tree of them, on a port of 127.0.0.1.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Request, tree
from protos import inference_pb2

ROOT = Path(__file__).parents[1]
INFER = "/inference.GRPCInferenceService/ModelInfer"
OUTPUT = "probabilities"
GRPC_HEADERS = (("content-type", "application/grpc"), ("te", "trailers"))
NAIVE_AIO, NAIVE_SYNC = "naive grpc.aio", "naive grpcio"
NATIVE, NATIVE_2 = "ours, native", "ours, native, 2 I/O threads, 1 CPU"
GRPCIO, GRPCIO_2 = "ours, grpcio", "ours, grpcio, 2 workers"
START_S = 120.0
STOP_S = 60.0
LOOK_S = 0.005
WRONG = 1e-6  # in a probability, from the same file in the same onnxruntime


@dataclass(frozen=True, slots=True)
class Contender:
    """One server: what is started, what is sent, what its answer means."""

    name: str
    command: Callable[[int], list[str]]  # by its port
    body: Callable[[NDArray[np.uint8]], bytes]  # with gRPC's prefix, where it is gRPC
    probabilities: Callable[[bytes], NDArray[np.float32]]  # of an answer's body, prefix included
    path: str = INFER
    headers: tuple[tuple[str, str], ...] = GRPC_HEADERS
    http2: bool = True


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that answers."""

    contender: Contender
    port: int
    pid: int
    first_answer_s: float  # from its launch

    def request(self, images: NDArray[np.uint8], expected: NDArray[np.float32]) -> Request:
        """Return the request for some images, whose answer has been checked.

        Raises:
            SystemExit: the answer is another.
        """
        body = self.contender.body(images)
        answer = _ask(self.contender, self.port, body)
        apart = np.abs(self.contender.probabilities(answer) - expected).max()
        if not apart <= WRONG:
            raise SystemExit(
                f"error: {self.contender.name} answers {apart:.2g} apart from the model"
            )
        url = f"http://127.0.0.1:{self.port}{self.contender.path}"
        return Request(url, self.contender.headers, body, len(answer), self.contender.http2)


def ours(name: str, repository: Path, *options: str) -> Contender:
    """Return our server with some options."""
    command = [sys.executable, "-m", "service", "serve", "--repository", str(repository)]
    model = next(path.name for path in repository.iterdir())
    return Contender(
        name,
        lambda port: [*command, "--address", f"127.0.0.1:{port}", *options],
        lambda images: message(images, model),
        grpc_probabilities,
    )


def naive(kind: str, model: Path) -> Contender:
    """Return a server of benchmarks/naive.py: `aio` or `sync`."""
    command = [sys.executable, "benchmarks/naive.py", kind, "--model", str(model), "--port"]
    return Contender(
        NAIVE_AIO if kind == "aio" else NAIVE_SYNC,
        lambda port: [*command, str(port)],
        lambda images: message(images, "any"),
        grpc_probabilities,
    )


@contextmanager
def running(contender: Contender, images: NDArray[np.uint8]) -> Iterator[Running]:
    """Start a contender, wait for its first answer, and end it and all that came from it.

    Raises:
        SystemExit: it does not answer, or not all of it ended with SIGTERM.
    """
    port = free_port()
    started_s = time.monotonic()
    with subprocess.Popen(
        contender.command(port),
        cwd=ROOT,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            _wait_for_answer(contender, port, process, contender.body(images[:1]))
            yield Running(contender, port, process.pid, time.monotonic() - started_s)
        finally:
            left = _end(process)
    if left:
        raise SystemExit(f"error: {contender.name} left {left} processes behind; they were killed")


def _environment() -> dict[str, str]:
    """Return ours, but that bytecode is kept, as that of installed packages is.

    Otherwise every launch of ours would compile all our modules; the naive servers have one.
    """
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def message(images: NDArray[np.uint8], model: str) -> bytes:
    """Return the ModelInferRequest for some images, as gRPC sends it."""
    request = inference_pb2.ModelInferRequest(
        model_name=model, raw_input_contents=[images.tobytes()]
    )
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.outputs.add(name=OUTPUT)
    content = request.SerializeToString()
    return struct.pack(">BI", 0, len(content)) + content


def grpc_probabilities(answer: bytes) -> NDArray[np.float32]:
    """Return what a ModelInferResponse says, as gRPC sends it."""
    response = inference_pb2.ModelInferResponse.FromString(answer[5:])
    places = [output.name for output in response.outputs]
    raw = response.raw_output_contents[places.index(OUTPUT)]
    return np.frombuffer(raw, np.float32).reshape(tuple(response.outputs[0].shape))


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _end(process: "subprocess.Popen[bytes]") -> int:
    """End a process and all that came from it; return how many of those had to be killed."""
    started = [Path(f"/proc/{pid}") for pid in tree(process.pid)]
    process.terminate()
    until_s = time.monotonic() + STOP_S
    while time.monotonic() < until_s and (process.poll() is None or any(map(_lives, started))):
        time.sleep(LOOK_S)
    left = [path for path in started if _lives(path)]
    for path in left:
        with suppress(ProcessLookupError):
            os.kill(int(path.name), signal.SIGKILL)
    return len(left)


def _lives(path: Path) -> bool:
    """Tell whether a process runs, and does not only wait to be reaped."""
    try:
        return path.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for_answer(
    contender: Contender, port: int, process: "subprocess.Popen[bytes]", body: bytes
) -> None:
    until_s = time.monotonic() + START_S
    while True:
        try:
            # A gRPC channel that was refused waits a second before it tries again.
            socket.create_connection(("127.0.0.1", port), 1).close()
            _ask(contender, port, body)
        except (OSError, grpc.RpcError):
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"error: {contender.name} does not answer") from None
            time.sleep(LOOK_S)
        else:
            return


def _ask(contender: Contender, port: int, body: bytes) -> bytes:
    """Ask once, with a client in Python; return the body of the answer."""
    if contender.http2:
        options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            call: Any = channel.unary_unary(contender.path)
            content: bytes = call(body[5:], timeout=30)
        return struct.pack(">BI", 0, len(content)) + content
    url = f"http://127.0.0.1:{port}{contender.path}"
    asked = urllib.request.Request(url, body, dict(contender.headers), method="POST")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        found: bytes = answer.read()
        return found
