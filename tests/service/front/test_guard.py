"""The parts of the guard; what it does to real clients of a front is tested in test_native.py."""

import socket

import pytest

from service import host
from service.front import guard
from service.front.guard import CALL_BYTES, LEAST_BYTES, MAX_PEERS, Guard

MIB = 1 << 20


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def port(listening):
    return listening.getsockname()[1]


@pytest.fixture
def connect(listening):
    """Return a function that opens a connection: (client, accepted, the peer's name)."""
    opened: list[socket.socket] = []

    def connect(sent=0):
        client = socket.create_connection(listening.getsockname())
        accepted, place = listening.accept()
        opened.extend((client, accepted))
        left = sent
        while left:
            client.sendall(bytes(min(left, 64 << 10)))
            read = 0
            while read < min(left, 64 << 10):
                read += len(accepted.recv(64 << 10))
            left -= read
        return client, accepted, f"ipv4:{place[0]}:{place[1]}"

    yield connect
    for one in opened:
        one.close()


def ended(client):
    client.settimeout(0)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def look(watching, port):
    watching._end_largest(port, resident=0)


def test_connection_that_holds_most_is_ended_and_the_others_are_not(connect, port):
    small, _, _ = connect(sent=2 * MIB)
    large, _, _ = connect(sent=4 * MIB)
    watching = Guard(limit_bytes=0)

    look(watching, port)
    assert (ended(large), ended(small)) == (True, False)
    look(watching, port)
    assert ended(small)


def test_what_was_handed_over_is_not_held(connect, port):
    fair, _, fair_peer = connect(sent=8 * MIB)
    hostile, _, hostile_peer = connect(sent=3 * MIB)
    watching = Guard(limit_bytes=0)
    for _ in range(8):
        watching.handed_over(fair_peer, MIB)
    watching.handed_over(hostile_peer, MIB)

    look(watching, port)

    assert (ended(hostile), ended(fair)) == (True, False)


@pytest.mark.parametrize(("sent", "is_ended"), [(LEAST_BYTES, False), (LEAST_BYTES + 1, True)])
def test_connection_that_holds_little_is_not_worth_ending(connect, port, sent, is_ended):
    client, _, _ = connect(sent=sent)

    look(Guard(limit_bytes=0), port)

    assert ended(client) is is_ended


def test_connections_to_other_ports_are_not_looked_at(connect, port):
    client, _, _ = connect(sent=2 * MIB)
    watching = Guard(limit_bytes=0)

    watching._end_largest(1, resident=0)

    assert not ended(client)


def test_looking_leaves_no_descriptor_open(connect, port):
    for _ in range(5):
        connect(sent=2 * MIB)
    before = len(list(guard.DESCRIPTORS.iterdir()))

    for _ in range(3):
        look(Guard(limit_bytes=0), port)
        Guard(limit_bytes=0)._forget(port)

    assert len(list(guard.DESCRIPTORS.iterdir())) == before


def test_peers_that_are_gone_are_forgotten_and_those_that_are_there_are_not(connect, port):
    _, _, peer = connect()
    watching = Guard(limit_bytes=0)
    for number in range(MAX_PEERS):
        watching.handed_over(f"ipv4:192.0.2.1:{number}", 1)
    watching.handed_over(peer, 1)

    watching._forget(port)

    assert dict(watching._handed) == {peer: 1 + CALL_BYTES}


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:127.0.0.1:80", ("127.0.0.1", 80)),
        ("ipv6:[::1]:80", ("::1", 80)),
        ("ipv6:%5B::1%5D:80", ("::1", 80)),
        ("ipv6:[::ffff:192.0.2.1]:80", ("192.0.2.1", 80)),
        ("unix:", ("", 0)),
        ("unix:/tmp/a", ("", 0)),
        ("", ("", 0)),
    ],
)
def test_peer_is_read_as_the_transport_writes_it(name, peer):
    assert guard._parsed(name) == peer


def test_limit_is_a_share_of_the_memory_there_is():
    limit, free = guard.limit_bytes(), host.available_bytes()

    assert limit is not None
    assert free is not None
    assert 0 < limit <= 0.6 * free


def test_guard_that_was_never_started_can_be_stopped():
    Guard(limit_bytes=0).stop()
