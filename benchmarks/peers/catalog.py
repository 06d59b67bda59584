"""Other inference servers, and how each is started and asked.

    python -m benchmarks.peers.catalog --model MODEL.onnx

All serve the same file, `image` uint8 (batch, 28, 28, 1) to `probabilities` float32 (batch, 10),
each in its own environment, .venv-peers/NAME, which `benchmarks/peers/setup.sh NAME` makes.
Measures nothing: run as a program it tells whether each answers as onnxruntime does in this
process, and whether it ends with SIGTERM.
"""

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import onnxruntime
import typer
from numpy.typing import NDArray

from protos import inference_pb2

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLASSES = 10
PREFIX_BYTES = 5  # of a gRPC message: whether it is compressed, and its length
ALLOWED = 1e-6  # between the same runtime's answers to batches of other sizes
ROWS = (1, 32, 128)
READY_S = 120.0  # Ray Serve starts a dozen processes
ANSWER_S = 30.0
END_S = 30.0
LOG_BYTES = 4000
START_FIELD = 17  # of /proc/PID/stat, after the parent's


@dataclass(frozen=True, slots=True)
class Peer:
    """A server of others.

    A request is one fixed body with fixed headers, so that any load generator can repeat it.
    """

    name: str
    key: str  # of its lock, its environment and its program
    grpc: bool  # over HTTP/2 with prior knowledge; else over HTTP/1.1
    path: str
    headers: tuple[tuple[str, str], ...]

    def command(self, model: Path, port: int) -> list[str]:
        """Return what serves a model on 127.0.0.1, in the foreground, until SIGTERM."""
        python, program = (
            ROOT / f".venv-peers/{self.key}/bin/python",
            HERE / f"{self.key}_server.py",
        )
        return [str(python), str(program), "--model", str(model), "--port", str(port)]

    def body(self, images: NDArray[np.uint8]) -> bytes:
        """Return the body of a request, for gRPC with the prefix that frames a message."""
        if not self.grpc:
            return images.tobytes()
        request = inference_pb2.ModelInferRequest(
            model_name="conv10", raw_input_contents=[images.tobytes()]
        )
        request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
        request.outputs.add(name="probabilities")
        return _framed(request.SerializeToString())

    def probabilities(self, answer: bytes) -> NDArray[np.float32]:
        """Return the rows in the body of a response, which for gRPC has the prefix too.

        Raises:
            ValueError: they are not whole rows.
        """
        if self.grpc:
            response = inference_pb2.ModelInferResponse.FromString(answer[PREFIX_BYTES:])
            [answer] = response.raw_output_contents
        return np.frombuffer(answer, np.float32).reshape(-1, CLASSES)


@dataclass(frozen=True, slots=True)
class Started:
    """A peer that is ready."""

    port: int
    pid: int  # of the process that was started; see `tree` for its others
    first_answer_s: float  # since it was started


def _over_grpc(name: str, key: str) -> Peer:
    path = "/inference.GRPCInferenceService/ModelInfer"
    headers = (("content-type", "application/grpc"), ("te", "trailers"))
    return Peer(name, key, grpc=True, path=path, headers=headers)


def _over_http(name: str, key: str, path: str) -> Peer:
    headers = (("content-type", "application/octet-stream"),)
    return Peer(name, key, grpc=False, path=path, headers=headers)


PEERS = (
    _over_http("mosec", "mosec", "/inference"),
    _over_grpc("MLServer", "mlserver"),
    _over_grpc("KServe", "kserve"),
    _over_http("LitServe", "litserve", "/predict"),
    _over_http("BentoML", "bentoml", "/predict"),
    _over_http("Ray Serve", "ray", "/"),
)


def ask(peer: Peer, port: int, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a peer's probabilities, over a connection of its own.

    Raises:
        OSError, http.client.HTTPException, grpc.RpcError: there is no answer, or a refusal.
        ValueError: the answer is not one row an image.
    """
    send = _over_http2 if peer.grpc else _over_http1
    answers = peer.probabilities(send(peer, port, peer.body(images)))
    if len(answers) != len(images):
        raise ValueError(f"{peer.name} answered {len(answers)} rows, expected {len(images)}")
    return answers


def ready(
    peer: Peer, port: int, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until a peer answers a request properly, or until its process has ended.

    Raises:
        TimeoutError: it does not answer; why the last try failed is the cause.
    """
    image = np.zeros((1, 28, 28, 1), np.uint8)
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            ask(peer, port, image)
        except (OSError, http.client.HTTPException, grpc.RpcError, ValueError) as error:
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > end_s:
                within = "before it ended" if ended else f"within {timeout_s} s"
                raise TimeoutError(f"{peer.name} did not answer {within}") from error
            time.sleep(0.05)
        else:
            return


@contextmanager
def running(peer: Peer, model: Path) -> Iterator[Started]:
    """Serve a model by a peer that is ready, and end it, with all that it started.

    Raises:
        TimeoutError: it did not become ready; the end of its log is printed.
        RuntimeError: not all of it ended with SIGTERM; what was left has been killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            peer.command(model, port), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            ready(peer, port, READY_S, process)
            yield Started(port, process.pid, time.monotonic() - started_s)
        except TimeoutError:
            log.seek(0)
            print(log.read()[-LOG_BYTES:].decode(errors="replace"))
            raise
        finally:
            left = _end(process)
    if left:
        raise RuntimeError(f"{peer.name} left {left} processes behind, which were killed")


def tree(pid: int) -> dict[int, int]:
    """Return a process and all that descend from it, each with its start time in clock ticks.

    What has ended and only waits to be reaped is left out.
    """
    running_now = _processes()
    found = {pid: running_now[pid][1]} if pid in running_now else {}
    before = 0
    while before != len(found):
        before = len(found)
        found |= {child: start for child, (up, start) in running_now.items() if up in found}
    return found


def _processes() -> dict[int, tuple[int, int]]:
    """Return the parent and the start time of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended in between
            state, parent, *rest = stat.read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(stat.parent.name)] = int(parent), int(rest[START_FIELD])
    return found


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process with SIGTERM; return how many of its tree had to be killed."""
    started = tree(process.pid)
    process.terminate()
    end_s = time.monotonic() + END_S
    while left := _left(started):
        if time.monotonic() > end_s:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        process.poll()
        time.sleep(0.05)
    process.wait()
    return len(left)


def _left(started: Mapping[int, int]) -> list[int]:
    """Return which of these processes still run: a number may be another's by now."""
    running_now = _processes()
    return [pid for pid, start in started.items() if running_now.get(pid, (0, 0))[1] == start]


def _over_http1(peer: Peer, port: int, body: bytes) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:
        connection.request("POST", peer.path, body, dict(peer.headers))
        response = connection.getresponse()
        answer = response.read()
    if response.status != HTTPStatus.OK:
        raise http.client.HTTPException(f"status {response.status}: {answer[:200]!r}")
    return answer


def _over_http2(peer: Peer, port: int, body: bytes) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(peer.path)
        return _framed(call(body[PREFIX_BYTES:], timeout=ANSWER_S))


def _framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(PREFIX_BYTES - 1, "big") + message


def main(
    model: Annotated[Path, typer.Option(help="ONNX file of the shape that is served.")],
    only: Annotated[list[str] | None, typer.Option(help="Peers to try, by key; all.")] = None,
) -> None:
    """Start each peer in turn, compare its answers, and see it end."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    failed = False
    for peer in PEERS:
        if only and peer.key not in only:
            continue
        subprocess.run([HERE / "setup.sh", peer.key], check=True)
        try:
            print(f"{peer.name:10} {_checked(peer, model, session)}", flush=True)
        except (OSError, RuntimeError, ValueError, grpc.RpcError) as error:
            failed = True
            print(f"{peer.name:10} FAILED: {error}", flush=True)
    if failed:
        raise SystemExit(1)


def _checked(peer: Peer, model: Path, session: onnxruntime.InferenceSession) -> str:
    rng = np.random.default_rng(0)
    differences = []
    with running(peer, model) as started:
        for rows in ROWS:
            images = rng.integers(0, 256, (rows, 28, 28, 1), np.uint8)
            [expected] = session.run(["probabilities"], {"image": images})
            differences.append(np.abs(ask(peer, started.port, images) - expected).max())
        processes = len(tree(started.pid))
        ended_s = time.monotonic()
    ended_s = time.monotonic() - ended_s
    if not max(differences) <= ALLOWED:
        raise ValueError(f"differs by {max(differences):.1e}, allowed are {ALLOWED:.0e}")
    return (
        f"answered after {started.first_answer_s:4.1f} s, differs by {max(differences):.0e}, "
        f"ended {processes} processes in {ended_s:.1f} s"
    )


if __name__ == "__main__":
    typer.run(main)
