"""Sockets that are found by their descriptors, at both kinds of address."""

import os
import resource
import socket
from pathlib import Path

import pytest

from service.front import sockets
from service.front.sockets import end_connections, lengthen_backlogs, unsent

MORE = 1 << 24  # bytes than the system keeps between two ends
MANY = 100  # connections


@pytest.fixture(params=["internet", "unix"])
def place(request, tmp_path):
    """Who listens, and the address of it."""
    if request.param == "internet":
        with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
            yield listening, f"127.0.0.1:{listening.getsockname()[1]}"
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "socket"))
            listening.listen(1)
            yield listening, f"unix:{tmp_path / 'socket'}"


def descriptors():
    return sorted(int(path.name) for path in sockets.DESCRIPTORS.iterdir())


def test_connections_to_the_address_are_ended_and_who_listens_is_not(
    listening, address, connect, opened, ended
):
    clients = [connect(listening) for _ in range(3)]

    assert end_connections(address) == 3

    assert {one.fileno() for one in (listening, *opened)} <= {*descriptors()}
    assert all(map(ended, clients))
    assert not ended(connect(listening))


def test_connections_to_other_addresses_are_not_ended(listening, connect, ended):
    client = connect(listening)

    assert end_connections("127.0.0.1:1") == 0
    assert end_connections("unix:/tmp/none") == 0

    assert not ended(client)


def test_connections_of_a_socket_in_the_file_system_are_ended(tmp_path, connect, ended):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        client = connect(listening)

        assert end_connections(f"unix:{path}") == 1

        assert ended(client)


def test_connections_are_ended_where_no_descriptor_is_left(listening, address, connect, ended):
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


def test_connection_whose_client_has_no_room_is_told_until_it_has_read(place, connect, opened):
    listening, address = place
    client, idle = connect(listening), connect(listening)
    accepted = opened[1]
    accepted.setblocking(False)
    written = 0
    with pytest.raises(BlockingIOError):
        while True:
            written += accepted.send(bytes(MORE))

    left = unsent(address)
    assert left.pop(accepted.fileno()) > 0
    assert list(left.values()) == [0]
    assert unsent("127.0.0.1:1") == unsent("unix:/tmp/none") == {}

    while written:
        written -= len(client.recv(MORE))
    assert list(unsent(address).values()) == [0, 0]
    assert idle.fileno() >= 0


def test_more_connections_may_wait_to_be_accepted(place):
    listening, address = place
    lengthen_backlogs("127.0.0.1:1")  # of others: nothing happens
    lengthen_backlogs(address)
    allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
    if allowed < MANY:
        pytest.skip(f"this system lets only {allowed} wait")
    clients = [socket.socket(listening.family) for _ in range(MANY)]

    try:
        for client in clients:
            client.settimeout(0.5)  # after which internet's would try again
            client.connect(listening.getsockname())
    finally:
        for client in clients:
            client.close()
