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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
READY_S = 120.0  # Ray Serve starts a dozen processes
ANSWER_S = 30.0
END_S = 30.0


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
        python, program = ROOT / f".venv-peers/{self.key}/bin/python", HERE / f"{self.key}_server.py"
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
        message = request.SerializeToString()
        return b"\0" + len(message).to_bytes(PREFIX_BYTES - 1, "big") + message

    def probabilities(self, answer: bytes) -> NDArray[np.float32]:
        """Return the rows in the body of a response, which for gRPC has the prefix too.

        Raises:
            ValueError: they are not whole rows.
        """
        if self.grpc:
            response = inference_pb2.ModelInferResponse.FromString(answer[PREFIX_BYTES:])
            [answer] = response.raw_output_contents
        return np.frombuffer(answer, np.float32).reshape(-1, CLASSES)


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
    """Return a peer's probabilities, of a connection of its own.

    Raises:
        OSError, http.client.HTTPException, grpc.RpcError: there is no proper answer.
        ValueError: the answer is not one row an image.
    """
    send = _ask_grpc if peer.grpc else _ask_http
    answers = peer.probabilities(send(peer, port, peer.body(images)))
    if len(answers) != len(images):
        raise ValueError(f"{peer.name} answered {len(answers)} rows, expected {len(images)}")
    return answers


def ready(peer: Peer, port: int, timeout_s: float) -> None:
    """Wait until a peer answers a request properly.

    Raises:
        TimeoutError: it does not; why the last try failed is its cause.
    """
    image = np.zeros((1, 28, 28, 1), np.uint8)
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            ask(peer, port, image)
        except (OSError, http.client.HTTPException, grpc.RpcError, ValueError) as error:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{peer.name} did not answer in {timeout_s} s") from error
            time.sleep(0.05)
        else:
            return
