"""Connections of a process to itself."""

import socket

import pytest


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


@pytest.fixture
def ended():
    """Return a function that tells whether the other end of a connection was closed."""

    def ended(client, within_s=0):
        client.settimeout(within_s)
        try:
            return client.recv(1) == b""
        except (BlockingIOError, TimeoutError):
            return False

    return ended
