"""Every status that a client can be given, by code and phrase, as Triton's users know them."""

import dataclasses
import queue
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc
from service.access import Access
from service.model_config import VersionPolicy
from service.repository import Repository
from service.rpc import Rpc
from service.statistics import Figure

USER, ADMIN = "a-token-of-a-user", "a-token-of-an-admin"
REAL_STATUS = (("triton_grpc_error", "true"),)
LARGE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
DRAINING = "GRPC server is shutting down and has stopped accepting new requests."
FULL = r"Exceeds maximum queue size: 8 rows are already waiting; try again later"
WAIT_S = 60
FRONTS = ("grpcio", "native")


def own(**fields):
    """Return an edit of a request's own fields."""

    def edit(request):
        for name, value in fields.items():
            setattr(request, name, value)

    return edit


def tensor(shape=None, raw=None, **fields):
    """Return an edit of a request's input."""

    def edit(request):
        for name, value in fields.items():
            setattr(request.inputs[0], name, value)
        if shape is not None:
            request.inputs[0].shape[:] = shape
        if raw is not None:
            request.raw_input_contents[:] = raw

    return edit


def typed(**contents):
    def edit(request):
        request.inputs[0].contents.CopyFrom(inference_pb2.InferTensorContents(**contents))

    return edit


def outputs(*names, **parameter):
    def edit(request):
        for name in names:
            output = request.outputs.add(name=name)
            for key, value in parameter.items():
                kind = "string_param" if isinstance(value, str) else "int64_param"
                setattr(output.parameters[key], kind, value)

    return edit


def parameter(name, **value):
    def edit(request):
        request.parameters[name].CopyFrom(inference_pb2.InferParameter(**value))

    return edit


def inputs(count):
    def edit(request):
        more = [request.inputs[0]] * (count - 1)
        request.inputs.extend(more)
        if not count:
            del request.inputs[:]

    return edit


def shared_memory(request):
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"


def pictures(*files):
    def edit(request):
        tensor(
            [len(files)],
            [b"".join(struct.pack("<I", len(file)) + file for file in files)],
            datatype="BYTES",
        )(request)

    return edit


def white(request):
    """Ask what onnxruntime fails on."""
    request.model_name = "fails"
    request.raw_input_contents[:] = [b"\xff" * 4]


UNKNOWN = "Request for unknown model: "
ROWS = {
    "unknown model": (own(model_name="m"), "NOT_FOUND", f"{UNKNOWN}'m' is not found"),
    "no name": (own(model_name=""), "NOT_FOUND", f"{UNKNOWN}'' is not found"),
    "unknown version": (
        own(model_version="4"),
        "NOT_FOUND",
        f"{UNKNOWN}'tiny' version 4 is not found",
    ),
    "version that is no number": (
        own(model_version="one"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'one'; "
        "expected a whole number, or an alias",
    ),
    "version that is not ready": (
        own(model_version="2"),
        "UNAVAILABLE",
        f"{UNKNOWN}'tiny' version 2 is not at ready state",
    ),
    "model without a ready version": (
        own(model_name="broken"),
        "UNAVAILABLE",
        f"{UNKNOWN}'broken' has no available versions",
    ),
    "wrong datatype": (
        tensor(datatype="INT8"),
        "INVALID_ARGUMENT",
        "inference input 'image' data-type is 'INT8', but model 'tiny' expects 'UINT8'",
    ),
    "wrong shape": (
        tensor([1, 2, 2]),
        "INVALID_ARGUMENT",
        "unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [1,2,2]",
    ),
    "wildcard": (
        tensor([-1, 2, 2, 1]),
        "INVALID_ARGUMENT",
        "unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [-1,2,2,1]",
    ),
    "empty batch": (
        tensor([0, 2, 2, 1], [b""]),
        "INVALID_ARGUMENT",
        "unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [0,2,2,1]",
    ),
    "wrong byte count": (
        tensor(raw=[b"abc"]),
        "INVALID_ARGUMENT",
        "input byte size mismatch for input 'image' for model 'tiny'. Expected 4, got 3",
    ),
    "no contents": (
        tensor(raw=[]),
        "INVALID_ARGUMENT",
        "raw_input_contents has 0 entries for model 'tiny', expected 1 for input 'image'",
    ),
    "batch over the limit": (
        tensor([9, 2, 2, 1], [bytes(36)]),
        "INVALID_ARGUMENT",
        "inference request batch-size must be <= 8 for 'tiny', got 9; "
        "split it into smaller requests",
    ),
    "batch that overflows": (
        tensor([2**62, 2, 2, 1]),
        "INVALID_ARGUMENT",
        f"inference request batch-size must be <= 8 for 'tiny', got {2**62}; "
        "split it into smaller requests",
    ),
    "missing input": (
        inputs(0),
        "INVALID_ARGUMENT",
        "expected 1 inputs but got 0 inputs for model 'tiny'; its input is 'image'",
    ),
    "extra input": (
        inputs(2),
        "INVALID_ARGUMENT",
        "expected 1 inputs but got 2 inputs for model 'tiny'; its input is 'image'",
    ),
    "unknown input": (
        tensor(name="pixels"),
        "INVALID_ARGUMENT",
        "unexpected inference input 'pixels' for model 'tiny'; expected 'image'",
    ),
    "unknown output": (
        outputs("boxes"),
        "INVALID_ARGUMENT",
        "unexpected inference output 'boxes' for model 'tiny'; it has probabilities, logits",
    ),
    "duplicate output": (
        outputs("logits", "logits"),
        "INVALID_ARGUMENT",
        "inference output 'logits' is requested twice for model 'tiny'",
    ),
    "no number of classes": (
        outputs("logits", classification=0),
        "INVALID_ARGUMENT",
        "the parameter 'classification' of output 'logits' must be a positive int64_param: "
        "how many classes to return",
    ),
    "contents beside raw contents": (
        typed(uint_contents=[0] * 4),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'image' "
        "for model 'tiny'",
    ),
    "name that triton keeps": (
        parameter("triton_x", bool_param=True),
        "INVALID_ARGUMENT",
        "parameter keys starting with 'triton_' are reserved for Triton; "
        "this server knows no 'triton_x'",
    ),
    "negative priority": (
        parameter("priority", int64_param=-1),
        "INVALID_ARGUMENT",
        "the parameter 'priority' is -1, expected 0 or more",
    ),
    "timeout that is text": (
        parameter("timeout", string_param="1"),
        "INVALID_ARGUMENT",
        "the parameter 'timeout' is given as string_param, expected int64_param or uint64_param",
    ),
    "no picture": (
        pictures(b"hello"),
        "INVALID_ARGUMENT",
        "picture 0 is not a PNG or JPEG picture",
    ),
    "input in shared memory": (
        shared_memory,
        "UNIMPLEMENTED",
        "'image' is said to be in shared memory, which this server does not do; "
        "send it in raw contents",
    ),
    "output in shared memory": (
        outputs("logits", shared_memory_region="region"),
        "UNIMPLEMENTED",
        "'logits' is said to be in shared memory, which this server does not do; "
        "send it in raw contents",
    ),
    "failure of the model": (white, "INTERNAL", None),
}


@dataclasses.dataclass
class Served:
    """A server in this process, and how it is asked."""

    rpc: Rpc
    repository: Repository
    stub: inference_pb2_grpc.GRPCInferenceServiceStub

    def rows_waiting(self):
        return sum(one[Figure.PENDING_ROWS] for one in self.repository.statistics.snapshots())


@pytest.fixture
def served(make_bundle, open_repository, listen, fails_on_white):
    """Return a function that gives a stub of a server on good, bad and failing models."""
    channels = []

    def served(**options):
        for name, number in (("tiny", 2), ("broken", 1)):
            make_bundle(name=name, version=number).joinpath("model.onnx").unlink()
        make_bundle(name="fails", model=fails_on_white)
        make_bundle(version=3)
        root = make_bundle().parents[1]
        repository = open_repository(root, policy=VersionPolicy(), **options)
        rpc = Rpc(repository)
        channel = grpc.insecure_channel(listen(rpc), options=LARGE)
        channels.append((channel, rpc))
        return Served(rpc, repository, inference_pb2_grpc.GRPCInferenceServiceStub(channel))

    yield served
    for channel, rpc in channels:
        channel.close()
        rpc.close()


def refusal(call):
    """Return the code, message and trailers of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value  # the stubs know only half of it
    return error.code().name, error.details(), dict(error.trailing_metadata() or ())


class Stream:
    """A stream of ModelStreamInfer: send as you like, and read its answers."""

    def __init__(self, stub, metadata=(), timeout=WAIT_S):
        self._requests: queue.Queue[inference_pb2.ModelInferRequest | None] = queue.Queue()
        self.answers = stub.ModelStreamInfer(
            iter(self._requests.get, None), metadata=metadata, timeout=timeout
        )

    def send(self, *requests):
        for request in requests:
            self._requests.put(request)

    def end(self):
        self._requests.put(None)

    def read(self):
        return next(self.answers)


def is_so(message, phrase):
    """Tell whether a message is the request's id and the phrase; None: what hides an error."""
    if phrase is None:
        return re.fullmatch(r"internal error, request [0-9a-f]{8}", message)
    return re.fullmatch(rf"\[request id: call-7\] {phrase}", message)


@pytest.mark.parametrize("row", ROWS)
def test_request_is_refused_with_its_code_and_phrase_alone_and_in_a_stream(
    served, infer, tiny, row
):
    edit, code, phrase = ROWS[row]
    stub = served().stub
    request, good = infer(tiny.images(1), id="call-7"), infer(tiny.images(1), id="good")
    edit(request)

    found, message, trailers = refusal(lambda: stub.ModelInfer(request, timeout=WAIT_S))
    assert found == code
    assert is_so(message, phrase and re.escape(phrase))
    assert "grpc-retry-pushback-ms" not in trailers

    stream = Stream(stub)
    stream.send(good, request, good)
    stream.end()
    before, refused, after = stream.answers
    assert is_so(refused.error_message, phrase and re.escape(phrase))
    assert refused.infer_response == inference_pb2.ModelInferResponse(id="call-7")
    for answer in (before, after):
        assert not answer.error_message
        assert answer.infer_response.id == "good"

    stream = Stream(stub, REAL_STATUS)
    stream.send(good, request, good)
    assert stream.read().infer_response.id == "good"
    found, message, _ = refusal(stream.read)
    assert found == code
    assert is_so(message, phrase and re.escape(phrase))


def test_refusal_of_a_request_without_an_id_says_that_it_has_none(served, infer, tiny):
    stub = served().stub

    message = refusal(lambda: stub.ModelInfer(infer(tiny.images(9)), timeout=WAIT_S))[1]

    assert message.startswith("[request id: <id_unknown>] inference request batch-size must be")


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


UNARY, IN_BAND, WITH_STATUS = "unary", "in band", "with status"
WAYS = pytest.mark.parametrize("way", [UNARY, IN_BAND, WITH_STATUS])


def ask(stub, way, request, timeout=WAIT_S):
    """Ask in one way for what is refused: the code (none in band), the message, the trailers."""
    if way == UNARY:
        return refusal(lambda: stub.ModelInfer(request, timeout=timeout))
    stream = Stream(stub, REAL_STATUS if way == WITH_STATUS else (), timeout)
    stream.send(request)
    if way == WITH_STATUS:
        return refusal(stream.read)
    return None, stream.read().error_message, {}


@pytest.fixture
def busy(served, gate, infer, tiny):
    """Return a function that gives a server whose one instance is busy with a request."""

    def busy(**options):
        server = served(**{"load": gate.load, "max_queue_rows": 8, **options})
        running = server.stub.ModelInfer.future(infer(tiny.images(1)), timeout=WAIT_S)
        gate.wait()
        return server, running

    return busy


@WAYS
def test_full_queue_is_said_to_be_full_and_when_to_come_back(
    busy, front_kind, gate, infer, tiny, way
):
    server, running = busy()
    waiting = server.stub.ModelInfer.future(infer(tiny.images(8)), timeout=WAIT_S)
    until(lambda: server.rows_waiting() == 8)

    code, message, trailers = ask(server.stub, way, infer(tiny.images(1), id="call-7"))

    assert code == (None if way == IN_BAND else "UNAVAILABLE")
    assert is_so(message, FULL)
    if way != IN_BAND and front_kind == "grpcio":  # the native front may not send it
        assert int(trailers["grpc-retry-pushback-ms"]) >= 1
    gate.open()
    assert running.result().outputs
    assert waiting.result().outputs
    assert [len(batch) for batch in gate.batches] == [1, 8]


@WAYS
def test_request_that_waited_as_long_as_it_may_is_said_to_be_late(busy, gate, infer, tiny, way):
    server, running = busy()
    request = infer(tiny.images(2), id="call-7")
    request.parameters["timeout"].int64_param = 1
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, server.stub, way, request)
        until(lambda: server.rows_waiting() == 2)
        gate.open()
        code, message, trailers = asked.result(WAIT_S)

    assert code == (None if way == IN_BAND else "UNAVAILABLE")
    assert is_so(message, "Request timeout expired")
    assert "grpc-retry-pushback-ms" not in trailers
    assert running.result().outputs
    assert [len(batch) for batch in gate.batches] == [1]


@WAYS
def test_request_whose_deadline_passes_is_never_run(busy, gate, infer, tiny, way):
    server, running = busy()

    if way == IN_BAND:  # the deadline is the stream's
        stream = Stream(server.stub, timeout=0.5)
        stream.send(infer(tiny.images(2)))
        code = refusal(stream.read)[0]
    else:
        code = ask(server.stub, way, infer(tiny.images(2)), timeout=0.5)[0]
    until(lambda: server.rows_waiting() == 0)
    gate.open()

    assert code == "DEADLINE_EXCEEDED"
    assert running.result().outputs
    until(server.rpc.is_idle)
    assert [len(batch) for batch in gate.batches] == [1]


@WAYS
def test_request_that_cannot_be_answered_before_its_deadline_is_refused_at_once(
    busy, front_kind, gate, infer, tiny, way
):
    def load(path, options):
        return dataclasses.replace(gate.load(path, options), warmed={8: 3600.0})

    server, running = busy(load=load)

    code, message, trailers = ask(server.stub, way, infer(tiny.images(2), id="call-7"))

    assert code == (None if way == IN_BAND else "UNAVAILABLE")
    assert is_so(
        message,
        r"Exceeds maximum queue size for its deadline: 0 rows are waiting, "
        r"an answer would take about \d+ ms",
    )
    if way != IN_BAND and front_kind == "grpcio":  # the native front may not send it
        assert int(trailers["grpc-retry-pushback-ms"]) > 3600_000
    gate.open()
    assert running.result().outputs
    assert [len(batch) for batch in gate.batches] == [1]


@pytest.mark.parametrize("streamed", [False, True])
def test_request_that_is_cancelled_while_it_waits_is_never_run(busy, gate, infer, tiny, streamed):
    server, running = busy()
    if streamed:
        stream = Stream(server.stub)
        stream.send(infer(tiny.images(2)), infer(tiny.images(3)))
        call = stream.answers
    else:
        call = server.stub.ModelInfer.future(infer(tiny.images(5)), timeout=WAIT_S)
    until(lambda: server.rows_waiting() == 5)

    call.cancel()

    assert call.code() is grpc.StatusCode.CANCELLED
    until(lambda: server.rows_waiting() == 0)
    gate.open()
    assert running.result().outputs
    until(server.rpc.is_idle)
    assert [len(batch) for batch in gate.batches] == [1]


@WAYS
def test_request_is_refused_while_the_server_shuts_down(served, infer, tiny, way):
    server = served()
    server.rpc.drain()

    code, message, _ = ask(server.stub, way, infer(tiny.images(1), id="call-7"))

    assert code == (None if way == IN_BAND else "UNAVAILABLE")
    assert is_so(message, re.escape(DRAINING))


@WAYS
def test_message_over_the_limit_is_refused_by_grpc_itself(served, infer, tiny, way):
    stub = served().stub
    over = infer(tiny.images(1), raw_input_contents=[bytes(64 << 20)])

    if way == IN_BAND:  # there is no message to answer with
        stream = Stream(stub)
        stream.send(over)
        code, message, _ = refusal(stream.read)
    else:
        code, message, _ = ask(stub, way, over)

    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in message


UNIMPLEMENTED = {
    "/inference.GRPCInferenceService/Nonsense": "Method not found!",
    "/inference.model_repository.ModelRepositoryService/RepositoryIndex": "Method not found!",
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister": (
        "this server does not use shared memory; send tensors in raw contents"
    ),
    "/inference.GRPCInferenceService/CudaSharedMemoryStatus": (
        "this server does not use shared memory; send tensors in raw contents"
    ),
    "/inference.GRPCInferenceService/TraceSetting": (
        "traces are set up by OpenTelemetry's environment variables"
    ),
    "/inference.GRPCInferenceService/LogSettings": "logging is set up when the server is started",
}


@pytest.mark.parametrize("path", UNIMPLEMENTED)
def test_method_that_is_unknown_or_not_done_is_unimplemented(listen, rpc, path):
    with grpc.insecure_channel(listen(rpc)) as channel:
        call: Any = channel.unary_unary(path)
        found = refusal(lambda: call(b"", timeout=WAIT_S))[:2]

    assert found == ("UNIMPLEMENTED", UNIMPLEMENTED[path])


@pytest.mark.parametrize(("name", "version"), [("m", ""), ("tiny", "4"), ("tiny", "2")])
def test_model_that_is_unknown_or_not_ready_is_not_ready_and_no_error(served, name, version):
    request = inference_pb2.ModelReadyRequest(name=name, version=version)

    assert not served().stub.ModelReady(request).ready


CONTROL = [
    ("Load", True, "none", "INTERNAL", "failed to load 'none', no version is available"),
    ("Load", True, "broken", "INTERNAL", "failed to load 'broken', broken/1/model.onnx is missing"),
    ("Load", True, "../tiny", "INVALID_ARGUMENT", "'../tiny' is not the name of a model"),
    ("Unload", True, "", "INVALID_ARGUMENT", "'' is not the name of a model"),
    ("Unload", True, "none", "NOT_FOUND", "Request for unknown model: 'none' is not found"),
    *(
        (
            method,
            False,
            "tiny",
            "UNAVAILABLE",
            "explicit model load / unload is not allowed if polling is enabled",
        )
        for method in ("Load", "Unload")
    ),
]


@pytest.mark.parametrize(("method", "control", "name", "code", "phrase"), CONTROL)
def test_model_that_cannot_be_loaded_or_unloaded_is_refused(
    make_bundle, repository, listen, method, control, name, code, phrase
):
    make_bundle(name="broken").joinpath("model.onnx").unlink()
    rpc = Rpc(repository, control=control)
    request = inference_pb2.RepositoryModelLoadRequest(model_name=name)
    path = f"/inference.GRPCInferenceService/RepositoryModel{method}"

    with grpc.insecure_channel(listen(rpc, access=Access((), (ADMIN,)))) as channel:
        call: Any = channel.unary_unary(path)
        metadata = (("authorization", f"Bearer {ADMIN}"),)
        found, message, _ = refusal(
            lambda: call(request.SerializeToString(), metadata=metadata, timeout=WAIT_S)
        )
    rpc.close()

    assert found == code
    assert message.startswith(phrase)


@pytest.mark.parametrize(
    ("method", "metadata", "code"),
    [
        ("ModelInfer", (), "UNAUTHENTICATED"),
        ("ModelStreamInfer", (), "UNAUTHENTICATED"),
        ("Nonsense", (), "UNAUTHENTICATED"),
        ("RepositoryModelLoad", (), "UNAUTHENTICATED"),
        ("RepositoryModelLoad", (("authorization", f"Bearer {USER}"),), "PERMISSION_DENIED"),
    ],
)
def test_call_without_the_token_it_needs_is_refused(listen, rpc, method, metadata, code):
    address = listen(rpc, access=Access((USER,), (ADMIN,)))

    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        found = refusal(lambda: call(b"", metadata=metadata, timeout=WAIT_S))[0]

    assert found == code
