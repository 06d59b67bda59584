"""What each RPC answers, and which status an error becomes.

Knows the protocol, not the transport: no socket, no event loop, no gRPC library. A front takes
calls off the wire and hands each to `Rpc.begin`; the answer comes back on the call, at once or
from another thread.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from google.protobuf.message import Message

from protos import inference_pb2, parity_pb2
from service import bundle, errors, model_config
from service.batcher import Expect, ignore
from service.call import Call, CallError, Request, Status, Stream, parsed, refusal
from service.inference import Inference
from service.parity_rpc import Streams, get_parity, properties, report_shadow
from service.repository import Repository
from service.statistics_rpc import statistics

MAX_ASKED_BYTES = 1 << 20  # of any request but those with tensors
SLOW_CALLS = 4  # loads, which take turns, and looks at the folder between them
INFERENCE = "inference.GRPCInferenceService"
PARITY = "train_export.v1.ParityService"
SERVICES = (INFERENCE, PARITY)
INFER = f"/{INFERENCE}/ModelInfer"
STREAM = f"/{INFERENCE}/ModelStreamInfer"
SAMPLE = f"/{PARITY}/SampleTraffic"
WATCH = f"/{PARITY}/StreamParity"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
NOT_DONE = {
    **dict.fromkeys(
        (
            f"/{INFERENCE}/{kind}SharedMemory{method}"
            for kind in ("System", "Cuda")
            for method in ("Status", "Register", "Unregister")
        ),
        "this server does not use shared memory; send tensors in raw contents",
    ),
    f"/{INFERENCE}/TraceSetting": "traces are set up by OpenTelemetry's environment variables",
    f"/{INFERENCE}/LogSettings": "logging is set up when the server is started",
}


class Method(NamedTuple):
    """How one RPC is answered; a slow one is answered by a thread of its own."""

    parse: Callable[[bytes], Message]
    answer: Callable[..., Message]
    slow: bool = False


class Rpc:
    """Every RPC of this server, by its full path. Safe to call from several threads at once."""

    def __init__(
        self,
        repository: Repository,
        *,
        server_name: str = "train-export",
        max_image_pixels: int = 16_000_000,
        control: bool = False,
    ) -> None:
        """Store the parts.

        Args:
            repository: what is served.
            server_name: what ServerMetadata answers.
            max_image_pixels: of all encoded pictures in one request.
            control: whether models are loaded and unloaded by request.
        """
        self._repository = repository
        self._server_name = server_name
        self._control = control
        self._stopping = False
        self._inference = Inference(repository, max_image_pixels=max_image_pixels)
        self._slow = ThreadPoolExecutor(SLOW_CALLS, thread_name_prefix="control")
        self._methods = self._make_methods()
        self.paths = (INFER, *self._methods, *NOT_DONE)
        self.streamed = INFER  # what every request of a stream is
        streams, pb = Streams(repository), parity_pb2
        self._streams: dict[str, tuple[Callable[[bytes], Message], Callable[..., Stream]]] = {
            SAMPLE: (pb.SampleTrafficRequest.FromString, streams.sample),
            WATCH: (pb.GetParityRequest.FromString, streams.watch),
        }
        self.streaming = tuple(self._streams)  # what is asked once and answered again and again

    def begin(self, call: Call) -> None:
        """Answer or refuse one call, now or later and from any thread; never raises."""
        if call.path == INFER:
            self._inference.begin(call)
        elif call.path in NOT_DONE:
            call.refuse(CallError(Status.UNIMPLEMENTED, NOT_DONE[call.path]))
        elif self._methods[call.path].slow:
            self._slow.submit(self._answer, call)
        else:
            self._answer(call)

    def open(self, call: Call) -> Stream:
        """Begin one of the calls that are `streaming`.

        Raises:
            CallError: it is refused.
        """
        parse, begin = self._streams[call.path]
        try:
            return begin(_parsed(call, parse))
        except Exception as error:
            raise refusal(call.path, error) from error

    def run(self, calls: Sequence[Call], longest_s: float, expect: Expect = ignore) -> None:
        """Begin calls that came together, and run what is short of them on this thread.

        As `begin` of each, but that no other thread need wake up to answer them.

        Args:
            calls: from one thread or loop.
            longest_s: expected seconds of a call of the model from which on it is left to others.
            expect: told of those of every other, on this thread, before it is made.
        """
        asked = [call for call in calls if call.path == INFER]
        if len(asked) < len(calls):
            for call in calls:
                if call.path != INFER:
                    self.begin(call)
        self._inference.run(asked, longest_s, expect)

    def show_stopping(self) -> None:
        """Say that neither the server nor a model is ready, for good; requests are answered on."""
        self._stopping = True

    def drain(self) -> None:
        """Refuse inference from now on; what was accepted is answered."""
        self._inference.drain()

    def is_idle(self) -> bool:
        """Tell whether everything that was accepted has been answered."""
        return self._inference.is_idle()

    def close(self) -> None:
        """Let go of the threads."""
        self._inference.close()
        self._slow.shutdown(wait=False, cancel_futures=True)

    def _make_methods(self) -> dict[str, Method]:
        pb, repository = inference_pb2, self._repository
        inference = {
            "ServerLive": Method(pb.ServerLiveRequest.FromString, self._live),
            "ServerReady": Method(pb.ServerReadyRequest.FromString, self._ready),
            "ModelReady": Method(pb.ModelReadyRequest.FromString, self._model_ready),
            "ServerMetadata": Method(pb.ServerMetadataRequest.FromString, self._server_metadata),
            "ModelMetadata": Method(pb.ModelMetadataRequest.FromString, self._model_metadata),
            "ModelConfig": Method(pb.ModelConfigRequest.FromString, self._model_config),
            "ModelStatistics": Method(pb.ModelStatisticsRequest.FromString, self._statistics),
            "RepositoryIndex": Method(
                pb.RepositoryIndexRequest.FromString, self._index, slow=self._control
            ),
            "RepositoryModelLoad": Method(
                pb.RepositoryModelLoadRequest.FromString, self._load, slow=True
            ),
            "RepositoryModelUnload": Method(
                pb.RepositoryModelUnloadRequest.FromString, self._unload, slow=True
            ),
        }
        parity = {
            "GetParity": Method(
                parity_pb2.GetParityRequest.FromString,
                lambda request: get_parity(repository, request),
            ),
            "ReportShadow": Method(
                parity_pb2.ReportShadowRequest.FromString,
                lambda request: report_shadow(repository, request),
            ),
        }
        return {
            **{f"/{INFERENCE}/{name}": method for name, method in inference.items()},
            **{f"/{PARITY}/{name}": method for name, method in parity.items()},
        }

    def _answer(self, call: Call) -> None:
        method = self._methods[call.path]
        try:
            content = method.answer(_parsed(call, method.parse)).SerializeToString()
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            call.refuse(refusal(call.path, error))
        else:
            call.answer(content)

    def _live(self, _: inference_pb2.ServerLiveRequest) -> inference_pb2.ServerLiveResponse:
        return inference_pb2.ServerLiveResponse(live=True)

    def _ready(self, _: inference_pb2.ServerReadyRequest) -> inference_pb2.ServerReadyResponse:
        ready = self._repository.is_ready() and not self._stopping
        return inference_pb2.ServerReadyResponse(ready=ready)

    def _model_ready(
        self, request: inference_pb2.ModelReadyRequest
    ) -> inference_pb2.ModelReadyResponse:
        try:
            self._repository.get(request.name, request.version)
        except (errors.ModelNotFoundError, errors.ModelNotReadyError):
            return inference_pb2.ModelReadyResponse(ready=False)
        return inference_pb2.ModelReadyResponse(ready=not self._stopping)

    def _server_metadata(
        self, _: inference_pb2.ServerMetadataRequest
    ) -> inference_pb2.ServerMetadataResponse:
        from importlib.metadata import version  # noqa: PLC0415  slow, and seldom asked

        unload = ("model_repository(unload_dependents)",) if self._control else ()
        return inference_pb2.ServerMetadataResponse(
            name=self._server_name,
            version=version("train-export"),
            extensions=sorted((*EXTENSIONS, *unload)),
        )

    def _model_metadata(
        self, request: inference_pb2.ModelMetadataRequest
    ) -> inference_pb2.ModelMetadataResponse:
        served = self._repository.get(request.name, request.version)
        ready = [other for other in self._repository.versions() if other.name == served.name]
        response = inference_pb2.ModelMetadataResponse(
            name=served.name,
            versions=[str(other.number) for other in ready],
            platform=model_config.PLATFORM,
            properties=properties(served),
        )
        for listing, specs in (
            (response.inputs, [served.manifest.input]),
            (response.outputs, served.manifest.outputs),
        ):
            for spec in specs:
                listing.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response

    def _model_config(
        self, request: inference_pb2.ModelConfigRequest
    ) -> inference_pb2.ModelConfigResponse:
        served = self._repository.get(request.name, request.version)
        return inference_pb2.ModelConfigResponse(
            config=model_config.message(served.manifest, served.options)
        )

    def _statistics(
        self, request: inference_pb2.ModelStatisticsRequest
    ) -> inference_pb2.ModelStatisticsResponse:
        if request.name and request.version:  # which may be an alias, or wrong
            served = self._repository.get(request.name, request.version)
            request.version = str(served.number)
        try:
            return statistics(self._repository.statistics, request)
        except errors.ModelNotFoundError:
            self._repository.get(request.name, "")  # says so where it is only not ready
            raise

    def _index(
        self, request: inference_pb2.RepositoryIndexRequest
    ) -> inference_pb2.RepositoryIndexResponse:
        if self._control:  # nobody else looks at the folder
            with suppress(errors.RepositoryError):
                self._repository.list_folder()
        response = inference_pb2.RepositoryIndexResponse()
        for name, number, state, reason in self._repository.states():
            if state == "READY" or not request.ready:
                response.models.add(name=name, version=str(number), state=state, reason=reason)
        return response

    def _load(
        self, request: inference_pb2.RepositoryModelLoadRequest
    ) -> inference_pb2.RepositoryModelLoadResponse:
        self._check_control()
        _check_name(request.model_name)
        unknown = sorted(set(request.parameters) - {"config"})
        if unknown:
            raise errors.UnimplementedError(
                f"the parameter '{unknown[0][:64]}' is not done here: models come from the "
                "repository with their manifest; 'config' may change how one is served"
            )
        config = None
        if "config" in request.parameters:
            parameter = request.parameters["config"]
            if parameter.WhichOneof("parameter_choice") != "string_param":
                raise errors.InvalidRequestError("the parameter 'config' must be a string_param")
            config = parameter.string_param
        self._repository.load(request.model_name, config)
        return inference_pb2.RepositoryModelLoadResponse()

    def _unload(
        self, request: inference_pb2.RepositoryModelUnloadRequest
    ) -> inference_pb2.RepositoryModelUnloadResponse:
        self._check_control()
        _check_name(request.model_name)
        self._repository.unload(request.model_name)
        return inference_pb2.RepositoryModelUnloadResponse()

    def _check_control(self) -> None:
        if not self._control:
            raise errors.ControlError(
                "explicit model load / unload is not allowed if polling is enabled; "
                "start the server with --model-control explicit"
            )


def stream_answer(content: bytes) -> bytes:
    """Return a ModelStreamInferResponse around a serialised ModelInferResponse."""
    response = inference_pb2.ModelStreamInferResponse()
    response.infer_response.MergeFromString(content)
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


def stream_refusal(error: CallError, request_id: str) -> bytes:
    """Return a ModelStreamInferResponse that says why one request of a stream was refused."""
    response = inference_pb2.ModelStreamInferResponse(error_message=str(error))
    response.infer_response.id = request_id
    return response.SerializeToString()


def _parsed(call: Call, parse: Callable[[bytes], Request]) -> Request:
    if len(call.content) > MAX_ASKED_BYTES:
        raise errors.InvalidRequestError(
            f"the request has {len(call.content)} bytes, expected at most {MAX_ASKED_BYTES}"
        )
    return parsed(call, parse)


def _check_name(name: str) -> None:
    if not bundle.NAME.fullmatch(name):
        raise errors.InvalidRequestError(
            f"'{name}' is not the name of a model; expected letters, digits, '.', '_' and '-', "
            "with a letter or digit first, 128 at most"
        )
