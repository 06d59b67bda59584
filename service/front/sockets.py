"""The sockets of this process at one address, for where a library keeps them to itself.

They are found by their descriptors, and nothing is opened for it: there may be none left.
"""

import fcntl
import os
import resource
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from service.front.address import UNIX

MAX_DESCRIPTORS = 1 << 16  # looked through where the system does not list them
DESCRIPTORS = Path("/proc/self/fd")
SIOCOUTQNSD = 0x894B  # of linux/sockios.h: bytes that were written and did not go out yet
BACKLOG = 4096  # connections that may wait to be accepted; the system may allow fewer


def end_connections(address: str) -> int:
    """End all connections to an address of this process; return how many there were.

    Args:
        address: HOST:PORT or unix:PATH, as it is listened on.
    """
    ended = 0
    for connection in _connections(address):
        with suppress(OSError):  # it is closed by now
            connection.shutdown(socket.SHUT_RDWR)
            ended += 1
    return ended


def unsent(address: str) -> dict[int, int]:
    """Return of each connection to an address, by descriptor, the bytes that did not go out yet.

    Of a socket in the file system: that were not read yet.
    """
    return {one.fileno(): _unsent_bytes(one) for one in _connections(address)}


def lengthen_backlogs(address: str) -> None:
    """Let as many connections to an address wait to be accepted as gRPC's own servers do."""
    for one in _at(address):
        with suppress(OSError):  # it is none of those that listen
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                one.listen(BACKLOG)


def _connections(address: str) -> Iterator[socket.socket]:
    for one in _at(address):
        try:
            one.getpeername()
        except OSError:  # it listens, or is closed
            continue
        yield one


def _at(address: str) -> Iterator[socket.socket]:
    """Yield each socket whose own end is at an address, until the next one is asked for."""
    is_ours = _test(address)
    for number in _descriptors():
        try:
            # Not a copy: there may be no descriptor left for one.
            one = socket.socket(fileno=number)
        except OSError:  # no socket, or closed since
            continue
        try:
            if is_ours(one):
                yield one
        finally:
            one.detach()


def _descriptors() -> Iterator[int]:
    try:
        yield from [int(name) for name in os.listdir(DESCRIPTORS)]  # noqa: PTH208  whole, at once
    except OSError:
        yield from range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MAX_DESCRIPTORS))


def _test(address: str) -> Callable[[socket.socket], bool]:
    """Return what tells whether a socket is at an address."""
    if address.startswith(UNIX):
        path = address.removeprefix(UNIX).removeprefix("//")
        return lambda one: one.family is socket.AF_UNIX and _name(one) == path
    port = int(address.rpartition(":")[2])
    internet = (socket.AF_INET, socket.AF_INET6)
    return lambda one: one.family in internet and _name(one)[1:2] == (port,)


def _name(one: socket.socket) -> "tuple[str | int, ...] | str":
    try:
        name: tuple[str | int, ...] | str = one.getsockname()
    except OSError:  # closed since
        return ()
    return name


def _unsent_bytes(one: socket.socket) -> int:
    asked = termios.TIOCOUTQ if one.family is socket.AF_UNIX else SIOCOUTQNSD
    with suppress(OSError):  # closed since, or not told by this system
        (found,) = struct.unpack("i", fcntl.ioctl(one.fileno(), asked, bytes(4)))
        return int(found)
    return 0
