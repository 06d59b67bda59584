"""Servers on the tiny model: in this process, and as a process of their own; and imitations."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings

from protos import inference_pb2, parity_pb2
from service import model_config, version
from service.access import Access
from service.call import Call, CallError
from service.client import Client
from service.front import idle
from service.front.grpcio import GrpcioFront, Transport
from service.front.native import NativeFront
from service.model_config import ModelOptions
from service.repository import Repository
from service.rpc import INFERENCE, PARITY, Rpc
from service.settings import Settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def infer_request(images, **fields) -> inference_pb2.ModelInferRequest:
    """Ask the tiny model about images; `fields` are the message's own."""
    request = inference_pb2.ModelInferRequest(
        **{"model_name": "tiny", "raw_input_contents": [images.tobytes()], **fields}
    )
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    return request


@pytest.fixture(scope="session")
def infer() -> Callable[..., inference_pb2.ModelInferRequest]:
    return infer_request


@pytest.fixture(scope="session")
def options() -> Callable[..., ModelOptions]:
    """Return a function that makes the options a model is served with."""

    def options(**changes) -> ModelOptions:
        usual = model_config.of_server(
            Settings(repository=Path(), max_batch_rows=8, instances=1, threads=1), cores=1
        )
        return replace(usual, **changes)

    return options


@pytest.fixture
def open_repository(options) -> Iterator[Callable[..., Repository]]:
    """Return a function that makes a repository on a folder; `look` loads what is there."""
    opened = []

    def open_repository(
        root: Path, *, look: bool = True, load=version.load, sampling=None, **changes
    ):
        repository = Repository(root, defaults=options(**changes), load=load, sampling=sampling)
        opened.append(repository)
        if look:
            repository.reconcile()
        return repository

    yield open_repository
    for repository in opened:
        served = repository.versions()
        repository.close()
        for one in served:
            assert one.batcher.join(30)


@pytest.fixture
def repository(make_bundle, open_repository) -> Repository:
    return open_repository(make_bundle().parents[1])


@pytest.fixture
def rpc(repository) -> Iterator[Rpc]:
    rpc = Rpc(repository)
    yield rpc
    rpc.close()


SLOW_S = 0.006  # of a call


class Gate:
    """Models whose every call waits until it is let go on; checks at loading do not.

    They are known to be slow: no front runs them on a thread that takes calls.
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []  # that the models were given
        self._begun = threading.Condition()
        self._opened = threading.Event()

    def load(self, path: Path, options: ModelOptions) -> version.Version:
        loaded = version.load(path, options)
        run = partial(self._run, loaded.session.run)
        slow = dict.fromkeys(loaded.warmed, SLOW_S)
        return replace(loaded, session=cast("Any", SimpleNamespace(run=run)), warmed=slow)

    def open(self) -> None:
        self._opened.set()

    def wait(self, calls: int = 1) -> None:
        """Wait until that many calls have begun."""
        with self._begun:
            assert self._begun.wait_for(lambda: len(self.batches) >= calls, 60)

    def _run(self, run, batch):
        with self._begun:
            self.batches.append(batch.copy())
            self._begun.notify_all()
        assert self._opened.wait(60)
        return run(batch)


@pytest.fixture
def gate(open_repository) -> Iterator[Gate]:
    """Give what `open_repository` takes as `load`; left open in the end."""
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def fails_on_white(tiny) -> bytes:
    """Give a model like the tiny one, which fails on an image whose pixels are all 255."""
    model = onnx.load_from_string(tiny.model())
    graph = model.graph
    gemm = next(node for node in graph.node if node.op_type == "Gemm")
    gemm.output[0] = "plain"
    added = [
        onnx.helper.make_node("ReduceMin", ["flat"], ["darkest"], axes=[1], keepdims=1),
        onnx.helper.make_node("Div", ["darkest", "white"], ["share"]),
        onnx.helper.make_node("Floor", ["share"], ["place"]),
        onnx.helper.make_node("Cast", ["place"], ["index"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Gather", ["nothing", "index"], ["gathered"]),  # of one element
        onnx.helper.make_node("Add", ["plain", "gathered"], ["logits"]),
    ]
    nodes = list(graph.node)
    at = nodes.index(gemm) + 1
    del graph.node[:]
    graph.node.extend([*nodes[:at], *added, *nodes[at:]])
    for name, value in (("white", np.float32(255)), ("nothing", np.zeros(1, np.float32))):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


class Asked(Call):
    """A call whose outcome a test waits for."""

    def __init__(self, path: str, content: bytes, **fields) -> None:
        super().__init__(path, content, **{"metadata": {}, **fields})
        self.outcome: Future[bytes | CallError] = Future()

    def _send(self, content: bytes) -> None:
        self.outcome.set_result(content)

    def _send_error(self, error: CallError) -> None:
        self.outcome.set_result(error)

    def result(self) -> bytes:
        """Wait for the response; raise the status if it is one."""
        outcome = self.outcome.result(60)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome


@pytest.fixture(scope="session")
def asked() -> type[Asked]:
    return Asked


@pytest.fixture
def ask(rpc) -> Callable[..., Message]:
    """Return a function that asks `rpc` and waits: ask("ModelInfer", request) -> the response."""

    def ask(name: str, request: Message | bytes, **fields) -> Message:
        path = name if name.startswith("/") else f"/{INFERENCE}/{name}"
        content = request if isinstance(request, bytes) else request.SerializeToString()
        call = Asked(path, content, **fields)
        rpc.begin(call)
        method = path.rpartition("/")[2]
        module = parity_pb2 if path.startswith(f"/{PARITY}/") else inference_pb2
        return getattr(module, f"{method}Response").FromString(call.result())

    return ask


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run one event loop in a thread; grpc.aio works best with one a process."""
    loop = idle.Loop()  # as a server's
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def listen(loop, front_kind) -> Iterator[Callable[..., str]]:
    """Return a function that serves an Rpc on a free port and returns its address."""
    fronts: list[Any] = []
    # A server's native front has one such thread; with two, more can go wrong.
    kinds: dict[str, Any] = {
        "grpcio": GrpcioFront,
        "native": partial(NativeFront, io_threads=2),
    }
    kind = kinds[front_kind]

    def listen(rpc: Rpc, *, ready: bool = True, access: Access | None = None, **transport) -> str:
        front = kind(
            rpc,
            Transport(**{"address": "127.0.0.1:0", "max_message_bytes": 64 << 20, **transport}),
            access=access or Access((), ()),
        )

        async def start() -> str:
            taken = await front.start()
            front.show_health(ready=ready, models={"tiny": ready})
            return taken

        fronts.append(front)
        return asyncio.run_coroutine_threadsafe(start(), loop).result(30)

    yield listen
    for front in fronts:
        asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


@dataclass(frozen=True)
class Process:
    """`serve-export serve` as a process of its own."""

    popen: subprocess.Popen[str]
    log: Path

    def address(self) -> str:
        """Wait for the line that says where it serves."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("serving on "), self.log.read_text()
        return line.removeprefix("serving on ").strip()

    def wait(self) -> int:
        return self.popen.wait(60)


@pytest.fixture
def start_server(tmp_path: Path, front_kind) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a server process; what is left of it is killed."""
    started: list[Process] = []
    usual = {"SERVE_EXPORT_FRONT": front_kind}

    def start(*options: str, **environment: str) -> Process:
        log = tmp_path / f"server-{len(started)}.log"
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **usual, **environment},
            )
        started.append(Process(popen, log))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait(30)
        for pipe in (process.popen.stdin, process.popen.stdout):
            assert pipe is not None
            pipe.close()


class Model:
    """The tiny model as methods of a server, and what they were asked.

    A picture is a file of its four pixels.
    """

    def __init__(self, tiny) -> None:
        self._tiny = tiny
        self.properties = {"max_batch_rows": "8", "labels": '["a", "b", "c"]'}
        self.version = "1"
        self.shape = (2, 2, 1)
        self.asked: list[tuple[str, int]] = []  # (version, rows) of every ModelInfer
        self.metadata: list[str] = []  # versions of every ModelMetadata

    def methods(self) -> dict[str, Any]:
        return {"ModelMetadata": self.about, "ModelInfer": self.infer}

    def about(self, request, context):
        self.metadata.append(request.version)
        response = inference_pb2.ModelMetadataResponse(
            name=request.name, properties=self.properties
        )
        response.inputs.add(name="image", datatype="UINT8", shape=[-1, *self.shape])
        return response

    def infer(self, request, context):
        tensor, raw = request.inputs[0], request.raw_input_contents[0]
        rows = tensor.shape[0]
        self.asked.append((request.model_version, rows))
        if tensor.datatype == "BYTES":
            raw = b"".join(raw[start + 4 : start + 8] for start in range(0, len(raw), 8))
        pixels = np.frombuffer(raw, np.uint8).reshape(rows, -1)[:, :4]
        return self.respond(self._tiny.logits(pixels), request.model_version or self.version)

    def respond(self, logits, version="1"):
        response = inference_pb2.ModelInferResponse(model_name="tiny", model_version=version)
        response.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        response.raw_output_contents.append(logits.tobytes())
        return response

    @property
    def rows(self) -> list[int]:
        return [rows for _, rows in self.asked]


@pytest.fixture
def model(tiny) -> Model:
    return Model(tiny)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves methods, functions of (request, context), by their names."""
    servers = []

    def serve(*, address="127.0.0.1:0", credentials=None, options=(), **methods) -> str:
        server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0), *options])
        for name, method in methods.items():
            parity = "Parity" in name or name in {"SampleTraffic", "ReportShadow"}
            service, messages = (PARITY, parity_pb2) if parity else (INFERENCE, inference_pb2)
            lasts = name in {"SampleTraffic", "StreamParity"}
            asked = "GetParity" if name == "StreamParity" else name
            make: Any = (
                grpc.unary_stream_rpc_method_handler
                if lasts
                else grpc.unary_unary_rpc_method_handler
            )
            handler = make(
                method,
                getattr(messages, f"{asked}Request").FromString,
                lambda response: response.SerializeToString(),
            )
            server.add_generic_rpc_handlers(
                [grpc.method_handlers_generic_handler(service, {name: handler})]
            )
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(0).wait(30)


@pytest.fixture
def client(serve, model) -> Iterator[Client]:
    with Client(serve(**model.methods())) as client:
        yield client


class Refusing:
    """A method that refuses its first calls, and notes how many it had."""

    def __init__(
        self, answer, *, times=10**9, code=grpc.StatusCode.UNAVAILABLE, pushback=None
    ) -> None:
        self._answer = answer
        self._times = times
        self._code = code
        self._trailer = [] if pushback is None else [("grpc-retry-pushback-ms", str(pushback))]
        self._counter = itertools.count(1)
        self.calls = 0

    def __call__(self, request, context):
        self.calls = next(self._counter)
        if self.calls <= self._times:
            context.set_trailing_metadata(self._trailer)
            context.abort(self._code, "Exceeds maximum queue size")
        return self._answer(request, context)


@pytest.fixture(scope="session")
def refusing() -> type[Refusing]:
    return Refusing


class Held:
    """A method that holds its calls until they are let through."""

    def __init__(self, method) -> None:
        self._method = method
        self._passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.left: list[float] = []  # seconds until the deadline of each call

    def __call__(self, request, context):
        self.left.append(context.time_remaining())
        self.entered.release()
        self._passes.acquire(timeout=30)
        return self._method(request, context)

    def open(self, calls=1000) -> None:
        self._passes.release(calls)


@pytest.fixture(scope="session")
def held() -> type[Held]:
    return Held
