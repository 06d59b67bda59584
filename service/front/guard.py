"""Ends connections before what their clients make a front hold takes the memory of this host.

A front that hands over whole messages has no say in what it gathers of those that never end. What a
connection holds is what the kernel has received on it less what the front has handed over. Looks
at the process's memory often and at its connections only when that is too much.
"""

import ipaddress
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from service import host

log = logging.getLogger(__name__)
LOOK_S = 0.05  # a client on this host sends some 50 MiB meanwhile
SHARE = 0.5  # of the memory there is when the front starts
LEAST_BYTES = 1 << 20  # a connection that holds less is not worth ending
MAX_PEERS = 10_000  # counted, before those are forgotten that have no connection any more
CALL_BYTES = 200  # of a call besides its message, generously: frames and headers
DESCRIPTORS = Path("/proc/self/fd")
# Of <linux/tcp.h>'s struct tcp_info: tcpi_state, and tcpi_bytes_received, since Linux 4.1.
TCP_INFO = struct.Struct("B127xQ")
ESTABLISHED = 1  # a connection that was ended is not
Peer: TypeAlias = tuple[str, int]


class Guard:
    """Watches over the connections of one TCP port of this process."""

    def __init__(self, limit_bytes: int) -> None:
        """Store the limit; `start` starts the thread.

        Args:
            limit_bytes: of resident memory, from which on connections are ended.
        """
        self._limit_bytes = limit_bytes
        self._handed: dict[str, int] = {}  # bytes, by the transport's name of the peer
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, port: int) -> None:
        """Watch from now on."""
        self._thread = threading.Thread(target=self._watch, args=(port,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def handed_over(self, peer: str, size_bytes: int) -> None:
        """Take note of a call that the front has given away."""
        self._handed[peer] = self._handed.get(peer, 0) + size_bytes + CALL_BYTES

    def _watch(self, port: int) -> None:
        while not self._stopping.wait(LOOK_S):
            if len(self._handed) > MAX_PEERS:
                self._forget(port)
            resident = host.resident_bytes()
            if resident > self._limit_bytes:
                self._end_largest(port, resident)

    def _forget(self, port: int) -> None:
        """Forget the peers that are gone."""
        there = set()
        for connection, peer in _connections(port):
            there.add(peer)
            connection.close()
        for name in [name for name in self._handed.copy() if _parsed(name) not in there]:
            del self._handed[name]

    def _end_largest(self, port: int, resident: int) -> None:
        """End the connection that holds most; if that is not enough, the next look ends another."""
        found = [(one, peer, _received_bytes(one)) for one, peer in _connections(port)]
        # Now, and not before: what came meanwhile would seem to be held.
        handed = {_parsed(name): size for name, size in self._handed.copy().items()}
        held = [received - handed.get(peer, 0) for _, peer, received in found]
        most = max(held, default=0)
        largest = found[held.index(most)][0] if most > LEAST_BYTES else None
        for connection, _, _ in found:
            if connection is not largest:
                connection.close()
        if largest is None:
            return
        with largest, suppress(OSError):
            place, number = largest.getpeername()[:2]
            log.warning(
                "ended the connection of %s:%d, which held %d MiB of messages without an end: "
                "this process has %d MiB, and %d MiB are its limit",
                *(place, number, most >> 20, resident >> 20, self._limit_bytes >> 20),
            )
            largest.shutdown(socket.SHUT_RDWR)


def limit_bytes() -> int | None:
    """Return what a process may hold: a share of the memory there is; None if nobody tells."""
    known = [one for one in (host.memory_limit_bytes(), host.available_bytes()) if one]
    return int(min(known) * SHARE) if known else None


def _connections(port: int) -> Iterator[tuple[socket.socket, Peer]]:
    """Give a copy of each connection to a port of this process; who takes it closes it."""
    for path in DESCRIPTORS.iterdir():
        try:
            copy = os.dup(int(path.name))
        except OSError:  # closed since it was listed
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        peer = _peer(connection, port)
        if peer is None:
            connection.close()
        else:
            yield connection, peer


def _peer(connection: socket.socket, port: int) -> Peer | None:
    """Return who is at the other end; None if it is no connection to this port."""
    if connection.family not in {socket.AF_INET, socket.AF_INET6}:
        return None
    try:
        own, other = connection.getsockname(), connection.getpeername()
    except OSError:  # it listens, or is closed
        return None
    return (_plain(other[0]), other[1]) if own[1] == port else None


def _received_bytes(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    state, received = TCP_INFO.unpack(info)
    return int(received) if state == ESTABLISHED else 0


def _parsed(peer: str) -> Peer:
    """Return the address and port of a peer as gRPC writes it: ipv4:ADDRESS:PORT, ipv6:[…]:PORT."""
    place, _, number = peer.partition(":")[2].rpartition(":")
    place = place.replace("%5B", "[").replace("%5D", "]").strip("[]")
    return _plain(place), int(number) if number.isdecimal() else 0


def _plain(place: str) -> str:
    """Return an address as it is without IPv6 around it."""
    with suppress(ValueError):
        address = ipaddress.ip_address(place)
        return str(getattr(address, "ipv4_mapped", None) or address)
    return place
