"""Keep a thread beside those that hand it work, for as long as it is handed one call at a time.

To wake a thread on another processor, one that sleeps above all, costs a lone client more than the
two would save by running at once: neither has anything to do while the other works.
"""

import os
from collections.abc import Collection
from contextlib import suppress

CALLS = 16  # one after the other, from which on whoever asks is taken for a lone client


class Nearby:
    """One thread's; all of it is called by that thread."""

    def __init__(self, cpus: Collection[int]) -> None:
        """Store where the others are."""
        self._cpus = cpus
        self._alone = 0
        self._usual: set[int] | None = None  # where it may be put else; None: it is there

    def took(self, *, alone: bool) -> None:
        """Note that calls were taken; `alone` says that it is one, with no other in flight.

        Where the system does not let the thread move, it stays where it is.
        """
        if alone:
            self._alone += 1
            if self._alone == CALLS:
                self._join()
            return
        self._alone = 0
        if self._usual is not None:
            self._leave(self._usual)

    def _join(self) -> None:
        with suppress(OSError):
            usual = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cpus)
            self._usual = usual

    def _leave(self, usual: set[int]) -> None:
        self._usual = None
        with suppress(OSError):  # its processors were taken from the process meanwhile
            os.sched_setaffinity(0, usual)
