"""Ends connections before what their clients make a front hold takes the memory of this host.

A front that hands over whole messages has no say in what it gathers of those that never end, and
nobody else can tell what it holds for whom. So when the process has grown to its limit, all of its
connections are ended: what was gathered is let go, clients that mean well connect again. If that
did not help, it is not the connections that hold it, and they may hold as much again.
"""

import logging
import os
import threading
from pathlib import Path

from service import host
from service.front.sockets import end_connections

log = logging.getLogger(__name__)
LOOK_S = 0.05  # a client on this host sends some 50 MiB meanwhile
SETTLE_S = 2.0  # from the end of the connections until what they held is given back
SHARE = 0.5  # of the memory there is when the front starts
STATM = Path("/proc/self/statm")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Guard:
    """Watches over the connections to one address of this process."""

    def __init__(self, limit_bytes: int, *, settle_s: float = SETTLE_S) -> None:
        """Store the limit; `start` starts the thread.

        Args:
            limit_bytes: of resident memory, from which on connections are ended.
            settle_s: seconds after which their memory counts as given back.
        """
        self._limit_bytes = limit_bytes
        self._settle_s = settle_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, address: str) -> None:
        """Watch from now on.

        Args:
            address: HOST:PORT or unix:PATH, as it is listened on.
        """
        # Open from now on: with no descriptor left, nothing more can be opened.
        statm = os.open(STATM, os.O_RDONLY)
        self._thread = threading.Thread(target=self._watch, args=(address, statm), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, address: str, statm: int) -> None:
        allowed = max(0, self._limit_bytes - _resident(statm))
        limit = self._limit_bytes
        while not self._stopping.wait(LOOK_S):
            resident = _resident(statm)
            if resident <= limit:
                continue
            ended = end_connections(address)
            log.warning(
                "ended %d connections: this process has %d MiB, and its limit is %d MiB",
                *(ended, resident >> 20, limit >> 20),
            )
            self._stopping.wait(self._settle_s)
            host.give_back_memory()
            limit = max(self._limit_bytes, _resident(statm) + allowed)
        os.close(statm)


def limit_bytes(processes: int) -> int | None:
    """Return what one of so many processes may have; None if the system does not tell."""
    known = [one for one in (host.memory_limit_bytes(), host.available_bytes()) if one]
    return int(min(known) * SHARE) // processes if known else None


def _resident(statm: int) -> int:
    return int(os.pread(statm, 128, 0).split()[1]) * PAGE_BYTES
