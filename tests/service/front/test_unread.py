"""A native front that is stopped while its clients have not read what it answered."""

import asyncio
import time
from contextlib import contextmanager
from typing import Any

import pytest

from service.access import Access
from service.front import unread
from service.front.grpcio import Transport
from service.front.native import NativeFront
from tests.service.front.fake import Fake
from tests.service.front.hostile import GO_AWAY, RESET, WAIT_S, Hostile

DATA = 0
ANSWER = bytes(1000)
LARGE = bytes(64 << 20)  # more than the system keeps between two ends
PART, PARTS = bytes(300 << 10), 200  # of as much; the front takes each whole, room or not
MUCH = (1 << 31) - 1  # the most room there can be
HEAD = 5  # bytes of gRPC before each message


@pytest.fixture
def serve(loop):
    """Return a function that serves a Fake, and gives the front and its address."""
    fronts = []

    def serve(fake):
        transport = Transport(address="127.0.0.1:0", max_message_bytes=128 << 20)
        front = NativeFront(fake, transport, access=Access((), ()), io_threads=2)
        fronts.append(front)
        return front, asyncio.run_coroutine_threadsafe(front.start(), loop).result(WAIT_S)

    yield serve
    for front in fronts:
        asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(WAIT_S)


@pytest.fixture
def stop(loop):
    return lambda front, grace_s=WAIT_S: asyncio.run_coroutine_threadsafe(front.stop(grace_s), loop)


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def counted(front):
    """Return how many calls were begun, and how many of them the front counts as sent."""
    methods = front._front.metrics()["methods"].values()
    sent = [one["status"][0]["count"] for one in methods if 0 in one["status"]]
    return sum(one["started"] for one in methods), sum(sent)


def ask(client, stream):
    client.begin(stream)
    client.give(stream, bytes(HEAD), end=True)


def answering(content) -> Any:
    return Fake(lambda call: call.answer(content))


@contextmanager
def client_that_does_not_read(address, calls=1):
    """Ask as often, with room for all answers, and read none of them."""
    with Hostile(address, window=MUCH, reads=False) as client:
        client.make_room(0, MUCH - 65_535)
        for number in range(calls):
            client.begin(2 * number + 1)
            client.send(DATA, 2 * number + 1, bytes(HEAD), 1)
        yield client


def received(client):
    return sum(len(payload) for kind, _, payload in client.frames if kind == DATA)


def test_answers_wait_for_a_client_that_has_no_room_when_the_server_is_stopped(serve, stop):
    fake = answering(ANSWER)
    front, address = serve(fake)
    with Hostile(address, window=0) as client:
        for stream in (1, 3, 5):
            ask(client, stream)
        until(lambda: len(fake.calls) == 3)
        stopping = stop(front)
        time.sleep(0.5)  # which gives it time to do the wrong thing
        assert not client.closed
        assert not stopping.done()

        for stream in (1, 3, 5):
            client.make_room(stream, 1 << 16)

        client.wait(lambda: client.closed)
        assert received(client) == 3 * (HEAD + len(ANSWER))
        assert any(kind == GO_AWAY for kind, _, _ in client.frames)
        stopping.result(WAIT_S)


def test_answer_waits_for_a_client_that_does_not_read_when_the_server_is_stopped(serve, stop):
    fake = answering(LARGE)
    front, address = serve(fake)
    with client_that_does_not_read(address) as client:
        until(lambda: fake.calls)
        stopping = stop(front)
        time.sleep(0.5)  # which gives it time to do the wrong thing
        assert not stopping.done()

        client.reads()

        client.wait(lambda: client.closed)
        assert received(client) == HEAD + len(LARGE)
        stopping.result(WAIT_S)


def test_answers_that_the_front_has_taken_wait_for_a_client_that_does_not_read(serve, stop):
    front, address = serve(answering(PART))
    with client_that_does_not_read(address, PARTS) as client:
        until(lambda: counted(front) == (PARTS, PARTS))
        stopping = stop(front)
        time.sleep(0.5)  # which gives it time to do the wrong thing
        assert not stopping.done()

        client.reads()

        client.wait(lambda: client.closed)
        assert received(client) == PARTS * (HEAD + len(PART))
        stopping.result(WAIT_S)


def test_clients_that_read_are_waited_for_no_longer_than_it_takes(serve, stop):
    front, address = serve(answering(ANSWER))
    with Hostile(address) as client, Hostile(address) as half:
        half.begin(1)  # whose message never comes
        for number in range(20):
            ask(client, 2 * number + 1)
        client.wait(lambda: received(client) == 20 * (HEAD + len(ANSWER)))
        until(lambda: counted(front) == (21, 20))
        started_s = time.monotonic()

        stop(front).result(WAIT_S)

        assert time.monotonic() - started_s < unread.STUCK_S
        client.wait(lambda: client.closed)


def test_client_that_never_reads_what_the_front_has_taken_is_given_up(serve, stop, monkeypatch):
    monkeypatch.setattr(unread, "STUCK_S", 0.3)
    front, address = serve(answering(PART))
    with client_that_does_not_read(address, PARTS):
        until(lambda: counted(front) == (PARTS, PARTS))
        started_s = time.monotonic()

        stop(front).result(WAIT_S)

        assert time.monotonic() - started_s < WAIT_S / 2


def test_client_that_never_has_room_is_given_up(serve, stop, monkeypatch):
    monkeypatch.setattr(unread, "STUCK_S", 1.0)
    fake = answering(ANSWER)
    front, address = serve(fake)
    with Hostile(address, window=0) as client:
        ask(client, 1)
        until(lambda: fake.calls)
        started_s = time.monotonic()

        stop(front).result(WAIT_S)

        assert time.monotonic() - started_s >= 1
        assert received(client) == 0


def test_stop_ends_when_it_must_though_a_client_does_not_read(serve, stop):
    fake = answering(LARGE)
    front, address = serve(fake)
    with client_that_does_not_read(address):
        until(lambda: fake.calls)
        started_s = time.monotonic()

        stop(front, 0.3).result(WAIT_S)

        assert time.monotonic() - started_s < unread.STUCK_S


def test_clients_that_left_before_they_were_answered_are_not_waited_for(serve, stop, monkeypatch):
    monkeypatch.setattr(unread, "STUCK_S", WAIT_S)
    fake: Any = Fake(lambda call: None)
    front, address = serve(fake)
    with Hostile(address) as left, Hostile(address) as half:
        ask(left, 1)
        until(lambda: fake.calls)
        left.send(RESET, 1, bytes(4))
        until(lambda: fake.calls[0].over)
        fake.calls[0]._send(ANSWER)  # as by a thread that had not noticed
        half.begin(1)
        until(lambda: counted(front) == (2, 0))
        started_s = time.monotonic()

        stop(front).result(2 * WAIT_S)

        assert time.monotonic() - started_s < WAIT_S
