"""The parts of the guard; what it does to real clients of a front is tested in test_native.py."""

import os
import resource
import socket
import time

import pytest

from service import host
from service.front import guard
from service.front.guard import Guard, end_connections, limit_bytes

MIB = 1 << 20
WAIT_S = 30


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def address(listening):
    return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def opened():
    """Both ends of every connection that a test opens."""
    opened: list[socket.socket] = []
    yield opened
    for one in opened:
        one.close()


@pytest.fixture
def connect(opened):
    """Return a function that opens a connection to a listening socket: its client's end."""

    def connect(listening):
        client = socket.socket(listening.family)
        client.connect(listening.getsockname())
        accepted, _ = listening.accept()
        opened.extend((client, accepted))
        return client

    return connect


def ended(client, within_s=0):
    client.settimeout(within_s)
    try:
        return client.recv(1) == b""
    except (BlockingIOError, TimeoutError):
        return False


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def descriptors():
    return sorted(int(path.name) for path in guard.DESCRIPTORS.iterdir())


def test_connections_to_the_address_are_ended_and_who_listens_is_not(
    listening, address, connect, opened
):
    clients = [connect(listening) for _ in range(3)]

    assert end_connections(address) == 3

    assert {one.fileno() for one in (listening, *opened)} <= {*descriptors()}
    assert all(map(ended, clients))
    assert not ended(connect(listening))


def test_connections_to_other_addresses_are_not_ended(listening, connect):
    client = connect(listening)

    assert end_connections("127.0.0.1:1") == 0
    assert end_connections("unix:/tmp/none") == 0

    assert not ended(client)


def test_connections_of_a_socket_in_the_file_system_are_ended(tmp_path, connect):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        client = connect(listening)

        assert end_connections(f"unix:{path}") == 1

        assert ended(client)


def test_connections_are_ended_where_no_descriptor_is_left(listening, address, connect):
    client = connect(listening)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors()[-1], before[1]))
    taken = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert end_connections(address) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for one in taken:
            os.close(one)
    assert ended(client)


def test_connections_are_ended_once_the_process_has_grown_to_its_limit(
    listening, address, connect, caplog
):
    client = connect(listening)
    watching = Guard(_own() + 64 * MIB, settle_s=0.1)
    watching.start(address)
    try:
        time.sleep(0.2)  # which gives it time to do the wrong thing
        assert not ended(client)
        held = [b"x" * (128 * MIB)]
        until(lambda: ended(client))
        until(lambda: "ended 1 connections: this process has " in caplog.text)

        time.sleep(0.4)  # what is held now is nobody's message
        other = connect(listening)
        time.sleep(0.3)
        assert not ended(other)

        def ended_by_more():
            held.append(b"x" * (128 * MIB))
            return ended(other, within_s=5)

        until(ended_by_more)  # the first may come before the new limit is set
    finally:
        watching.stop()


def _own():
    statm = os.open(guard.STATM, os.O_RDONLY)
    try:
        return guard._resident(statm)
    finally:
        os.close(statm)


def test_limit_is_a_share_of_the_memory_there_is_for_all_processes_together():
    limit, free = limit_bytes(1), host.available_bytes()

    assert limit is not None
    assert free is not None
    assert 0 < limit <= 0.6 * free
    assert 0 < (limit_bytes(4) or 0) < limit / 3


def test_guard_that_was_never_started_can_be_stopped():
    Guard(limit_bytes=0).stop()
