"""Servers on the tiny model: in this process, and as a process of their own."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from protos import inference_pb2
from service.front.grpcio import GrpcioFront
from service.repository import Repository
from service.rpc import Rpc

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


@pytest.fixture
def load() -> Callable[..., Repository]:
    """Return a function that loads the repository above a bundle's folder."""

    def load(bundle: Path, *, max_batch_rows: int = 8) -> Repository:
        repository = Repository(bundle.parents[1], threads=1, max_batch_rows=max_batch_rows)
        repository.load()
        return repository

    return load


@pytest.fixture
def repository(make_bundle, load: Callable[..., Repository]) -> Repository:
    return load(make_bundle())


@pytest.fixture
def rpc(repository) -> Rpc:
    return Rpc(repository)


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run one event loop in a thread; grpc.aio works best with one a process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def listen(loop) -> Iterator[Callable[..., str]]:
    """Return a function that serves an Rpc on a free port and returns its address."""
    fronts = []

    def listen(rpc: Rpc, *, serving: bool = True, address: str = "127.0.0.1:0") -> str:
        async def start() -> tuple[GrpcioFront, str]:
            front = GrpcioFront(rpc, model_threads=2)
            taken = await front.start(address)
            if serving:
                await front.set_serving()
            return front, taken

        front, taken = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        fronts.append(front)
        return taken

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
def start_server(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a server process; what is left of it is killed."""
    started: list[Process] = []

    def start(*options: str, **environment: str) -> Process:
        log = tmp_path / f"server-{len(started)}.log"
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **environment},
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
