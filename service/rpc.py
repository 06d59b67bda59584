"""From (method, request bytes) to response bytes, or an error with its status.

Knows the protocol, not the transport: no socket, no event loop, no gRPC library. A front takes
calls off the wire and asks `Rpc.call`.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import version as package_version

from google.protobuf.message import DecodeError, Message

from protos import inference_pb2, parity_pb2
from service import errors, tensors
from service.parity_rpc import get_parity, properties
from service.repository import Repository, Version

log = logging.getLogger(__name__)
SERVICES = ("inference.GRPCInferenceService", "train_export.v1.ParityService")
SERVER_NAME = "train-export"
EXTENSIONS = ("binary_tensor_data", "model_repository")
PLATFORM = "onnxruntime_onnx"
# A message repeats what the client sent. gRPC's clients refuse trailers over 8 KiB, and would show
# RESOURCE_EXHAUSTED instead of our status; percent-encoded, a character takes up to 12 bytes.
MAX_MESSAGE_CHARACTERS = 600


class Status(IntEnum):
    """The status codes of gRPC that this server answers with, by their numbers on the wire."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    INTERNAL = 13
    UNAVAILABLE = 14


STATUS: dict[type[errors.ServiceError], Status] = {
    errors.InvalidRequestError: Status.INVALID_ARGUMENT,
    errors.ModelNotFoundError: Status.NOT_FOUND,
    errors.ModelNotReadyError: Status.UNAVAILABLE,
}


class CallError(Exception):
    """A call that is answered with a status instead of a response."""

    def __init__(self, status: Status, message: str) -> None:
        cut = len(message) > MAX_MESSAGE_CHARACTERS
        super().__init__(message[: MAX_MESSAGE_CHARACTERS - 1] + "…" if cut else message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Method:
    """How one RPC is answered; `computes` says that it runs a model and so takes its time."""

    parse: Callable[[bytes], Message]
    answer: Callable[..., Message]
    computes: bool = False


class Rpc:
    """Every RPC of this server, by its full path. Safe to call from several threads at once."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        inference = f"/{SERVICES[0]}/"
        pb = inference_pb2
        self.methods = {
            f"{inference}ServerLive": Method(pb.ServerLiveRequest.FromString, self._live),
            f"{inference}ServerReady": Method(pb.ServerReadyRequest.FromString, self._ready),
            f"{inference}ModelReady": Method(pb.ModelReadyRequest.FromString, self._model_ready),
            f"{inference}ServerMetadata": Method(
                pb.ServerMetadataRequest.FromString, self._server_metadata
            ),
            f"{inference}ModelMetadata": Method(
                pb.ModelMetadataRequest.FromString, self._model_metadata
            ),
            f"{inference}ModelInfer": Method(
                pb.ModelInferRequest.FromString, self._infer, computes=True
            ),
            f"{inference}RepositoryIndex": Method(
                pb.RepositoryIndexRequest.FromString, self._index
            ),
            f"/{SERVICES[1]}/GetParity": Method(
                parity_pb2.GetParityRequest.FromString,
                lambda request: get_parity(repository, request),
            ),
        }

    def call(self, path: str, content: bytes) -> bytes:
        """Answer one call; blocks while a model runs.

        Args:
            path: the RPC's full path, one of `methods`.
            content: the serialised request.

        Returns:
            The serialised response.

        Raises:
            CallError: the call was refused, or failed.
        """
        method = self.methods[path]
        try:
            return method.answer(method.parse(content)).SerializeToString()
        except DecodeError as error:
            raise CallError(
                Status.INVALID_ARGUMENT, f"the request is not a message of {path}"
            ) from error
        except errors.ServiceError as error:
            if type(error) in STATUS:
                raise CallError(STATUS[type(error)], str(error)) from error
            raise _internal(path, error) from error
        except Exception as error:
            raise _internal(path, error) from error

    def _live(self, _: inference_pb2.ServerLiveRequest) -> inference_pb2.ServerLiveResponse:
        return inference_pb2.ServerLiveResponse(live=True)

    def _ready(self, _: inference_pb2.ServerReadyRequest) -> inference_pb2.ServerReadyResponse:
        return inference_pb2.ServerReadyResponse(ready=self._repository.is_ready())

    def _model_ready(
        self, request: inference_pb2.ModelReadyRequest
    ) -> inference_pb2.ModelReadyResponse:
        try:
            self._repository.get(request.name, request.version)
        except (errors.ModelNotFoundError, errors.ModelNotReadyError):
            return inference_pb2.ModelReadyResponse(ready=False)
        return inference_pb2.ModelReadyResponse(ready=True)

    def _server_metadata(
        self, _: inference_pb2.ServerMetadataRequest
    ) -> inference_pb2.ServerMetadataResponse:
        return inference_pb2.ServerMetadataResponse(
            name=SERVER_NAME,
            version=package_version(SERVER_NAME),
            extensions=EXTENSIONS,
        )

    def _model_metadata(
        self, request: inference_pb2.ModelMetadataRequest
    ) -> inference_pb2.ModelMetadataResponse:
        served = self._repository.get(request.name, request.version)
        ready = [other for other in self._repository.versions() if other.name == served.name]
        response = inference_pb2.ModelMetadataResponse(
            name=served.name,
            versions=[str(other.number) for other in ready],
            platform=PLATFORM,
            properties=properties(served, self._repository.max_batch_rows),
        )
        for listing, specs in (
            (response.inputs, [served.manifest.input]),
            (response.outputs, served.manifest.outputs),
        ):
            for spec in specs:
                listing.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response

    def _infer(self, request: inference_pb2.ModelInferRequest) -> inference_pb2.ModelInferResponse:
        try:
            served = self._repository.get(request.model_name, request.model_version)
            return self._answered(request, served)
        except errors.ServiceError as error:
            # Triton's clients find their request in a message by this prefix.
            error.args = (f"[request id: {request.id or '<id_unknown>'}] {error}",)
            raise

    def _answered(
        self, request: inference_pb2.ModelInferRequest, served: Version
    ) -> inference_pb2.ModelInferResponse:
        names = tensors.requested(request, list(served.manifest.outputs))
        batch = tensors.decode(request, served.manifest.input, self._repository.max_batch_rows)
        answers = served.session.run(batch)
        response = inference_pb2.ModelInferResponse(
            model_name=served.name, model_version=str(served.number), id=request.id
        )
        for name in names:
            tensors.append_output(response, name, answers[name])
        return response

    def _index(
        self, request: inference_pb2.RepositoryIndexRequest
    ) -> inference_pb2.RepositoryIndexResponse:
        response = inference_pb2.RepositoryIndexResponse()
        for served in self._repository.versions():
            response.models.add(name=served.name, version=str(served.number), state="READY")
        if not request.ready:
            for name, number in self._repository.loading():
                response.models.add(name=name, version=str(number), state="LOADING")
            for (name, number), reason in self._repository.refused().items():
                response.models.add(
                    name=name, version=str(number), state="UNAVAILABLE", reason=reason
                )
        return response


def _internal(path: str, error: Exception) -> CallError:
    """Log what went wrong and tell the client no more than where to find it in the log."""
    token = secrets.token_hex(4)
    log.error("call failed: %s, request %s", path, token, exc_info=error)
    return CallError(Status.INTERNAL, f"internal error, request {token}")
