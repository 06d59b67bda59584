"""Ask a server: numpy images in, labels and arrays out.

A small synchronous client over the generated stubs. It speaks Triton's dialect and so works with
any server that does; only `parity` needs ours.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from protos import inference_pb2, inference_pb2_grpc, parity_pb2, parity_pb2_grpc
from service.errors import ServerError
from service.tensors import DTYPE

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
MAX_MESSAGE_BYTES = 64 << 20  # as the server's
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
BATCH_ROWS = 128  # sent in one request to a server that does not say what it takes
# How gRPC's own core words it when there was no server to refuse the call.
UNREACHABLE = (
    "failed to connect",
    "DNS resolution failed",
    "Connection reset",
    "Socket closed",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said about some images."""

    model: str
    version: str
    labels: tuple[str, ...]  # of the classes, in the order of the columns
    outputs: dict[str, NDArray[np.generic]]  # by name, (rows, ...) each

    @property
    def probabilities(self) -> NDArray[np.generic]:
        """Float32 (rows, classes); each row adds up to 1."""
        return self.outputs["probabilities"]

    @property
    def logits(self) -> NDArray[np.generic]:
        """Float32 (rows, classes), before the softmax."""
        return self.outputs["logits"]


class Client:
    """One connection to one server; may be used from several threads.

    Every method raises ServerError when the server refuses the call or none answers.
    """

    def __init__(self, address: str, *, timeout_s: float = 30.0) -> None:
        """Store where the server is; connects with the first call.

        Args:
            address: `HOST:PORT`.
            timeout_s: longest wait for one call.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._inference = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._parity = parity_pb2_grpc.ParityServiceStub(self._channel)

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self._channel.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server says that it is ready.

        Raises:
            ServerError: it did not within `timeout_s` seconds; says what it last answered.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                if self._call(
                    self._inference.ServerReady, inference_pb2.ServerReadyRequest()
                ).ready:
                    return
                last = "it answers that it is not ready"
            except ServerError as error:
                last = str(error)
            if time.monotonic() > until_s:
                raise ServerError(
                    f"{self._address} is not ready after {timeout_s:g} s: {last}",
                    code="UNAVAILABLE",
                )
            time.sleep(0.05)

    def models(self) -> list[inference_pb2.RepositoryIndexResponse.ModelIndex]:
        """Return every model and version that the server found, with its state."""
        request = inference_pb2.RepositoryIndexRequest()
        return list(self._call(self._inference.RepositoryIndex, request).models)

    def metadata(self, model: str, version: str = "") -> inference_pb2.ModelMetadataResponse:
        """Return a model's tensors, versions and properties."""
        request = inference_pb2.ModelMetadataRequest(name=model, version=version)
        return self._call(self._inference.ModelMetadata, request)

    def parity(self, model: str = "", version: str = "") -> parity_pb2.GetParityResponse:
        """Return what the server says about its own parity; of everything if none is named."""
        request = parity_pb2.GetParityRequest(model=model, version=version)
        return self._call(self._parity.GetParity, request)

    def predict(self, images: NDArray[np.generic], *, model: str, version: str = "") -> Answer:
        """Ask a model about some images, in as many requests as the server's limit needs.

        Args:
            images: of the model's dtype and shape, (rows, height, width, channels) for images;
                at least one row.
            model: its name.
            version: decimal; empty: the server's choice, which is then kept for all of them.

        Raises:
            ValueError: there are no rows, or their dtype is not the model's.
            ServerError: the call was refused, or nobody answered.
        """
        if not len(images):
            raise ValueError("images has no rows, expected at least one")
        about = self.metadata(model, version)
        expected = _dtype(about.inputs[0].datatype)
        if images.dtype != expected:
            raise ValueError(f"images is {images.dtype}, {model} takes {expected}; convert it")
        rows = int(about.properties.get("max_batch_rows", BATCH_ROWS))
        parts: list[dict[str, NDArray[np.generic]]] = []
        for start in range(0, len(images), rows):
            response = self._infer(images[start : start + rows], about, version)
            version = response.model_version
            parts.append(_arrays(response))
        return Answer(
            model=model,
            version=version,
            labels=tuple(json.loads(about.properties.get("labels", "[]"))),
            outputs={name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        )

    def _infer(
        self,
        batch: NDArray[np.generic],
        about: inference_pb2.ModelMetadataResponse,
        version: str,
    ) -> inference_pb2.ModelInferResponse:
        datatype = about.inputs[0].datatype
        request = inference_pb2.ModelInferRequest(
            model_name=about.name,
            model_version=version,
            raw_input_contents=[batch.tobytes()],
        )
        request.inputs.add(name=about.inputs[0].name, datatype=datatype, shape=batch.shape)
        return self._call(self._inference.ModelInfer, request)

    def _call(self, rpc: Callable[..., Response], request: Message) -> Response:
        try:
            return rpc(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            if code == "UNAVAILABLE" and any(phrase in details for phrase in UNREACHABLE):
                details = (
                    f"no server answers at {self._address}; "
                    "start one with: serve-export serve --repository models"
                )
            raise ServerError(details or code, code=code) from error


def _arrays(response: inference_pb2.ModelInferResponse) -> dict[str, NDArray[np.generic]]:
    if len(response.raw_output_contents) != len(response.outputs):
        raise ServerError("the server did not answer in raw_output_contents", code="UNIMPLEMENTED")
    return {
        output.name: np.frombuffer(content, _dtype(output.datatype)).reshape(output.shape)
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _dtype(datatype: str) -> np.dtype[np.generic]:
    if datatype not in DTYPE:
        raise ServerError(
            f"the model has the datatype {datatype}, this client knows {', '.join(DTYPE)}",
            code="UNIMPLEMENTED",
        )
    return DTYPE[datatype]
