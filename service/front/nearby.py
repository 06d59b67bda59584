"""Keep a thread beside those that hand it work, for as long as that is a lone client's.

To wake a thread on another processor, one that sleeps above all, costs a lone client more than the
two would save by running at once: neither has anything to do while the other works.
"""

import os
from collections.abc import Collection
from contextlib import suppress

CALLS = 16  # of one client, one after the other, from which on he is taken for the only one


class Nearby:
    """One thread's; all of it is called by that thread.

    Where the system does not let the thread move, it stays where it is. Threads that it starts
    while it is beside the others begin there as well (see `host.let_go`).
    """

    def __init__(self, cpus: Collection[int]) -> None:
        """Store where the others are."""
        self._cpus = cpus
        self._peer: str | None = None
        self._alone = self._runs = 0
        self._usual: set[int] | None = None  # where it may be put else; None: it is there

    def took(self, peer: str | None) -> None:
        """Note whose call was taken; None: it was not one alone, or others are in flight."""
        self._runs = 0
        if peer is None or peer != self._peer:
            self._peer, self._alone = peer, 0
            self._leave()
        else:
            self._alone += 1
            if self._alone == CALLS:
                self._join()

    def runs(self) -> None:
        """Note that the model is about to be run; again for one call taken, it is for others."""
        self._runs += 1
        if self._runs > 1:
            self.took(None)

    def _join(self) -> None:
        with suppress(OSError):
            usual = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cpus)
            self._usual = usual

    def _leave(self) -> None:
        if self._usual is not None:
            with suppress(OSError):  # its processors were taken from the process meanwhile
                os.sched_setaffinity(0, self._usual)
            self._usual = None
