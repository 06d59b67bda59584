"""Versions that take each other's place while clients go on asking."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

from protos import inference_pb2
from service import aliases
from service.rpc import INFER, Rpc

SWAPS = 100
CHECKED_SWAPS = 25  # each in a process of its own first, which takes seconds
CLIENTS = 6
WAIT_S = 120
FRONTS = ("grpcio", "native")
ROWS = 64  # of images that requests are cut from


@dataclass
class Hammer:
    """Clients that ask without a version, one request after the other, and judge every answer."""

    address: str
    tiny: object
    infer: Callable[..., inference_pb2.ModelInferRequest]
    seconds: list[float] = field(default_factory=list)  # of every request
    versions: set[int] = field(default_factory=set)
    latest: int = 0
    failures: list[str] = field(default_factory=list)
    longest_pause_s: float = 0.0  # of the clients' event loop, where it is the server's as well
    over: bool = False
    asking: Future[None] | None = None  # what runs the clients

    def end(self) -> None:
        """Ask no more, and wait until what was asked is answered."""
        self.over = True
        assert self.asking is not None
        self.asking.result(WAIT_S)

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            ask = channel.unary_unary(
                INFER,
                inference_pb2.ModelInferRequest.SerializeToString,
                inference_pb2.ModelInferResponse.FromString,
            )
            await asyncio.gather(self.pulse(), *(self.client(ask, n) for n in range(CLIENTS)))

    async def pulse(self) -> None:
        while not self.over:
            before_s = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest_pause_s = max(self.longest_pause_s, time.perf_counter() - before_s)

    async def client(self, ask, seed: int) -> None:
        images = self.tiny.images(ROWS, seed)  # type: ignore[attr-defined]
        logits = self.tiny.logits(images)  # type: ignore[attr-defined]
        number = 0
        while not self.over:
            rows = slice(number % (ROWS - 8), number % (ROWS - 8) + 1 + number % 8)
            number += 1
            before_s = time.perf_counter()
            try:
                answer = await ask(self.infer(images[rows]), timeout=30)
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code()} {error.details()}")
                continue
            self.seconds.append(time.perf_counter() - before_s)
            self.judge(answer, logits[rows])

    def judge(self, answer: inference_pb2.ModelInferResponse, logits) -> None:
        """The version that an answer names must be the one that gave it."""
        version = int(answer.model_version)
        found = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
        expected = logits + np.array([0, 0, version], np.float32)
        if not np.array_equal(found, expected):
            self.failures.append(f"version {version} answered {found}, expected {expected}")
        self.versions.add(version)
        self.latest = version

    def answers(self, version: int) -> None:
        """Wait until a version answers."""
        end_s = time.monotonic() + WAIT_S
        while self.latest != version:
            assert time.monotonic() < end_s, f"version {version} does not answer"
            assert not self.failures
            time.sleep(0.0005)

    def show(self, what: str) -> None:
        ms = np.array(self.seconds) * 1000
        print(  # noqa: T201  for who runs it with -s
            f"{what}: {len(ms)} requests, p50 {np.percentile(ms, 50):.2f} ms, "
            f"p99 {np.percentile(ms, 99):.2f} ms, longest {ms.max():.2f} ms; "
            f"longest pause of the event loop {self.longest_pause_s * 1000:.1f} ms"
        )


@pytest.fixture
def hammer(loop, infer, tiny) -> Iterator[Callable[[str], Hammer]]:
    """Return a function that lets clients ask at an address; at the end none may have failed."""
    running: list[Hammer] = []

    def hammer(address: str) -> Hammer:
        one = Hammer(address, tiny, infer)
        one.asking = asyncio.run_coroutine_threadsafe(one.run(), loop)
        running.append(one)
        return one

    yield hammer
    for one in running:
        one.end()
        assert one.failures == []


@pytest.fixture
def publish(make_bundle, tiny):
    """Return a function that renames a version into place; its logits of `striped` name it."""

    def publish(root, version: int, *, good: bool = True) -> None:
        wrong = tiny.model(np.array([127, -127, version + 0.5], np.float32))
        staged = make_bundle(
            root / ".staging", version=version, striped=version, model=None if good else wrong
        )
        (root / "tiny").mkdir(exist_ok=True)
        staged.rename(root / "tiny" / str(version))

    return publish


def test_no_request_fails_and_every_answer_is_right_while_versions_are_swapped(
    tmp_path, publish, open_repository, listen, hammer
):
    root = tmp_path / "models"
    publish(root, 1)
    repository = open_repository(root)
    rpc = Rpc(repository)
    asking = hammer(listen(rpc))
    asking.answers(1)

    for version in range(2, SWAPS + 2):
        publish(root, version)
        repository.reconcile()
        asking.answers(version)

    asking.end()
    asking.show(f"{SWAPS} swaps in this process")
    assert asking.versions == set(range(1, SWAPS + 2))
    rpc.close()


def test_bad_candidates_among_good_ones_never_answer(
    tmp_path, publish, open_repository, listen, hammer
):
    root = tmp_path / "models"
    publish(root, 1)
    repository = open_repository(root)
    rpc = Rpc(repository)
    asking = hammer(listen(rpc))
    asking.answers(1)
    good = {1}

    for version in range(2, 42):
        publish(root, version, good=version % 2 == 0)
        repository.reconcile()
        good.add(version - version % 2)
        asking.answers(max(good))

    assert asking.versions == good
    assert {number for _, number in repository.refused()} == set(range(3, 42, 2))
    rpc.close()


def test_champion_that_is_moved_to_and_fro_answers_from_then_on(
    tmp_path, publish, open_repository, listen, hammer
):
    root = tmp_path / "models"
    for version in (1, 2, 3):
        publish(root, version)
    repository = open_repository(root)
    rpc = Rpc(repository)
    asking = hammer(listen(rpc))

    for flip in range(SWAPS):
        champion = 1 + flip % 3
        aliases.write(root / "tiny", {"champion": champion})
        repository.reconcile()
        asking.answers(champion)

    assert asking.versions == {1, 2, 3}
    rpc.close()


def test_changed_configuration_and_unloaded_neighbours_disturb_no_request(
    tmp_path, publish, make_generic_bundle, open_repository, listen, hammer
):
    root = tmp_path / "models"
    publish(root, 1)
    make_generic_bundle()
    repository = open_repository(root)
    rpc = Rpc(repository)
    asking = hammer(listen(rpc))
    asking.answers(1)

    for change in range(30):
        (root / "tiny" / "config.pbtxt").write_text(
            f"max_batch_size: {8 + change % 2} instance_group [{{ count: {1 + change % 3} }}]"
        )
        repository.unload("line")
        repository.reconcile()
        before = len(asking.seconds)
        while len(asking.seconds) == before:
            time.sleep(0.0005)

    assert repository.get("tiny", "").version.options.instances == 3
    rpc.close()


@pytest.mark.slow
def test_server_process_loses_no_request_while_it_checks_and_swaps_versions(
    tmp_path, publish, start_server, hammer
):
    root = tmp_path / "models"
    publish(root, 1)
    server = start_server(
        *("--repository", str(root), "--address", "127.0.0.1:0", "--instances", "1"),
        *("--max-batch-rows", "8"),
    )
    asking = hammer(server.address())
    asking.answers(1)
    bad = set()

    for version in range(2, CHECKED_SWAPS + 2):
        if version % 10 == 0:  # a bad one, and at the same time the next good one
            bad.add(CHECKED_SWAPS + version)
            publish(root, CHECKED_SWAPS + version, good=False)
        publish(root, version)
        asking.answers(version)

    asking.end()
    asking.show(f"{CHECKED_SWAPS} swaps in a process of its own, each checked in another")
    assert asking.versions == set(range(1, CHECKED_SWAPS + 2))
    server.popen.terminate()
    assert server.wait() == 0
    log = server.log.read_text()
    assert log.count("version refused") == len(bad)
    assert "Traceback" not in log
