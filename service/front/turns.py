"""Threads that take turns at taking calls, so that one that has little to do keeps to itself.

For short work two threads cost more than they bring: each runs Python only while the other does
not, frees what the other has made, and finds nothing of the model in its core's cache. For long
work they are what uses a second core.
"""

import math
import threading
import time

# Expected seconds of work from which on another thread has its turn meanwhile: some times what it
# costs to wake it.
ALONE_S = 0.0005
LONGEST_S = 0.002  # of work in all before a turn ends, though each part of it was short
STUCK_S = 1.0  # from which on work that was expected to be short is no longer waited for
LOOKS = 4  # a STUCK_S whether it is


class Turns:
    """Whose turn it is; what the threads share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by the one whose turn it is, whoever releases it
        self.owner: Turn | None = None
        self.works_since_s = math.inf  # infinity while it waits for calls
        self._passing = threading.Lock()

    def keep(self, owner: "Turn") -> bool:
        """Let an owner wait for calls; tell whether it is the owner still."""
        with self._passing:
            if self.owner is not owner:
                return False
            self.works_since_s = math.inf
            return True

    def pass_on(self, owner: "Turn | None", works_before_s: float = math.inf) -> None:
        """End a turn, if it is still `owner`'s and it works since before that time."""
        with self._passing:
            if owner is not None and self.owner is owner and self.works_since_s <= works_before_s:
                self.owner, self.works_since_s = None, math.inf
                self.lock.release()


class Turn:
    """One thread's; a context in which it has its turn at first, and has none afterwards."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def take(self) -> None:
        """Wait for it, unless this thread has it still."""
        turns = self._turns
        if not turns.keep(self):
            while not turns.lock.acquire(timeout=STUCK_S / LOOKS):
                turns.pass_on(turns.owner, time.monotonic() - STUCK_S)
            turns.owner = self

    def works(self) -> None:
        """Say that this thread has taken calls, and answers them now."""
        if self._turns.owner is self:
            self._turns.works_since_s = time.monotonic()

    def expect(self, seconds: float) -> None:
        """Let another thread have its turn, if this one is about to have worked for long."""
        turns = self._turns
        worked_s = time.monotonic() - turns.works_since_s
        if seconds > ALONE_S or worked_s + seconds > LONGEST_S:
            turns.pass_on(self)

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self._turns.pass_on(self)
