"""More than the server can carry: what is admitted is answered, the rest told when to retry."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2, inference_pb2_grpc
from service import version
from service.front.grpcio import MAX_SETTLED, _Mailbox
from service.rpc import Rpc
from service.statistics import Figure

WAIT_S = 60.0
PUSHBACK = "grpc-retry-pushback-ms"
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


class HeldSession:
    """A model whose calls end when a test says so."""

    def __init__(self, session) -> None:
        self._session = session
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.ran: list[int] = []  # rows of each call
        self.statistics: Any = None

    def run(self, batch):
        self.ran.append(len(batch))
        self.begun.set()
        assert self.may_end.wait(WAIT_S)
        return self._session.run(batch)


@pytest.fixture
def start_held(make_bundle, open_repository, listen):
    """Return a function that serves the tiny model, held; returns a stub and the session."""
    channels, rpcs = [], []
    sessions: list[Any] = []

    def start_held(row_s: float = 0.001, **options):
        def load(path, options):
            loaded = version.load(path, options)
            sessions.append(HeldSession(loaded.session))
            return replace(loaded, session=sessions[-1], warmed={1: row_s, 8: 8 * row_s})

        repository = open_repository(make_bundle().parents[1], load=load, **options)
        sessions[-1].statistics = repository.versions()[0].statistics
        rpcs.append(Rpc(repository))
        channels.append(grpc.insecure_channel(listen(rpcs[-1])))
        return inference_pb2_grpc.GRPCInferenceServiceStub(channels[-1]), sessions[-1]

    yield start_held
    for session in sessions:
        session.may_end.set()
    for channel in channels:
        channel.close()
    for rpc in rpcs:
        rpc.close()


@pytest.fixture
def busy(infer, tiny):
    """Return a function that keeps the one instance of a held model busy."""

    def busy(stub, session):
        running = stub.ModelInfer.future(infer(tiny.images(1)), timeout=WAIT_S)
        assert session.begun.wait(WAIT_S)
        return running

    return busy


def refused(call: grpc.Call) -> int:
    """Return how many milliseconds a refused call is told to wait."""
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert "Exceeds maximum queue size" in call.details()
    return int(dict(call.trailing_metadata())[PUSHBACK])


def wait_for_pending(session, requests: int) -> None:
    """Wait until so many requests wait for a held model."""
    end_s = time.monotonic() + WAIT_S
    while session.statistics.values()[Figure.PENDING_REQUESTS] != requests:
        assert time.monotonic() < end_s
        time.sleep(0.001)


def wait_for_refusals(stub, requests: int) -> None:
    """Wait until the server has refused so many."""
    asked = inference_pb2.ModelStatisticsRequest(name="tiny")
    end_s = time.monotonic() + WAIT_S
    while stub.ModelStatistics(asked).model_stats[0].inference_stats.fail.count < requests:
        assert time.monotonic() < end_s


def test_refusals_say_when_to_come_again_and_everything_admitted_is_answered(
    start_held, busy, infer, tiny
):
    stub, session = start_held(max_batch_rows=4, max_queue_rows=8)
    images = tiny.images(64, seed=3)
    running = busy(stub, session)
    asked = [
        (one, stub.ModelInfer.future(infer(one), timeout=WAIT_S))
        for one in np.split(images, len(images))
    ]

    wait_for_refusals(stub, 56)
    session.may_end.set()

    assert running.code() is grpc.StatusCode.OK
    answered = [(one, call) for one, call in asked if call.code() is grpc.StatusCode.OK]
    assert len(answered) == 8
    for one, call in answered:
        assert call.result().raw_output_contents[1] == tiny.logits(one).tobytes()
    turned_away = [call for _, call in asked if call.code() is not grpc.StatusCode.OK]
    assert all(refused(call) >= 1 for call in turned_away)


def test_requests_are_taken_again_once_the_load_has_fallen(start_held, busy, infer, tiny):
    stub, session = start_held(max_batch_rows=1, max_queue_rows=1)
    running = busy(stub, session)
    waiting = stub.ModelInfer.future(infer(tiny.images(1)), timeout=WAIT_S)
    over = [stub.ModelInfer.future(infer(tiny.images(1)), timeout=WAIT_S) for _ in range(3)]
    wait_for_refusals(stub, 3)
    session.may_end.set()
    codes = [call.code().name for call in (running, waiting, *over)]

    assert sorted(codes) == ["OK"] * 2 + ["UNAVAILABLE"] * 3
    again = stub.ModelInfer(infer(tiny.images(1)), timeout=WAIT_S)
    assert again.raw_output_contents[1] == tiny.logits(tiny.images(1)).tobytes()


def test_request_that_cannot_be_answered_in_time_is_refused_long_before_its_deadline(
    start_held, busy, infer, tiny
):
    stub, session = start_held(row_s=1000.0)
    busy(stub, session)

    hopeless = stub.ModelInfer.future(infer(tiny.images(1)), timeout=WAIT_S)
    patient = stub.ModelInfer.future(infer(tiny.images(1)), timeout=100_000)

    assert refused(hopeless) > 1_000_000
    assert "for its deadline" in hopeless.details()
    session.may_end.set()
    assert patient.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_request_whose_caller_has_left_is_never_run(start_held, busy, infer, tiny, how):
    stub, session = start_held()
    busy(stub, session)
    left = stub.ModelInfer.future(
        infer(tiny.images(3)), timeout=4.0 if how == "expired" else WAIT_S
    )
    wait_for_pending(session, 1)

    if how == "cancelled":
        left.cancel()
    wait_for_pending(session, 0)
    session.may_end.set()

    expected = grpc.StatusCode.CANCELLED if how == "cancelled" else DEADLINE_EXCEEDED
    assert left.code() is expected
    stub.ModelInfer(infer(tiny.images(2)), timeout=WAIT_S)
    assert session.ran == [1, 2]


def test_stream_tells_its_refusals_and_goes_on(start_held, busy, infer, tiny):
    stub, session = start_held(max_batch_rows=1, max_queue_rows=1)
    busy(stub, session)
    requests = [infer(tiny.images(1, seed=seed), id=str(seed)) for seed in range(4)]
    stream = stub.ModelStreamInfer(iter(requests), timeout=WAIT_S)
    with ThreadPoolExecutor(1) as reader:
        answers = reader.submit(list, stream)
        wait_for_refusals(stub, 3)
        session.may_end.set()

        messages = [answer.error_message for answer in answers.result(WAIT_S)]

    assert messages[0] == ""
    assert all("Exceeds maximum queue size" in message for message in messages[1:])
    assert len(messages) == 4


def test_answers_of_a_whole_batch_let_others_have_their_turn():
    async def settled() -> list[int]:
        mailbox = _Mailbox(asyncio.get_running_loop())
        futures = [mailbox.loop.create_future() for _ in range(2 * MAX_SETTLED + 1)]
        with ThreadPoolExecutor(1) as instance:
            for future in futures:
                instance.submit(mailbox.put, future, b"")
        counts: list[int] = []
        while not counts or counts[-1] < len(futures):
            await asyncio.sleep(0)
            counts.append(sum(one.done() for one in futures))
        return sorted(set(counts) - {0})

    assert asyncio.run(settled()) == [MAX_SETTLED, 2 * MAX_SETTLED, 2 * MAX_SETTLED + 1]
