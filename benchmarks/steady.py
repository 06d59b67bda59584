"""Whether this machine's cores are all there: on a shared host they are not always.

Two cores of a virtual machine may be the two threads of one real core for seconds at a time. The
same call of the same model then takes up to three times the processor time, on both, whoever calls
it; one core alone shows nothing. So a load counts only if just before and just after it as many
callers as there are cores were about as fast as at their best, which knows nothing of who is asked.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service.host import cores
from service.session import Session

SLICE_S = 0.12
FIRST = 12  # looks, the best of which is what later ones are held against
SLOWER = 1.2  # times the best, from which on the cores count as taken
WAIT_S, MAX_WAIT_S = 0.3, 20.0
TRIES = 4  # of one load
Found = TypeVar("Found")


class Steady:
    """Repeats what was measured while cores were taken."""

    def __init__(self, model: Session, images: NDArray[np.uint8]) -> None:
        """Find out how fast the cores are at their best.

        Args:
            model: what is called.
            images: in one call.
        """
        self._model, self._images = model, images
        self.best_ms = min(self._look() for _ in range(FIRST))
        self.repeated = 0  # loads that were measured again
        self.unsteady = 0  # loads that count although no try of them was steady

    def measure(self, once: Callable[[], Found]) -> Found:
        """Return what a load was found to be while the cores were there, or else its last try."""
        found = self._tried(once)
        for _ in range(TRIES - 1):
            if self._is_there():
                return found
            self.repeated += 1
            found = self._tried(once)
        self.unsteady += not self._is_there()
        return found

    def _tried(self, once: Callable[[], Found]) -> Found:
        until_s = time.monotonic() + MAX_WAIT_S
        while not self._is_there() and time.monotonic() < until_s:
            time.sleep(WAIT_S)
        return once()

    def _is_there(self) -> bool:
        now_ms = self._look()
        self.best_ms = min(self.best_ms, now_ms)
        return now_ms <= SLOWER * self.best_ms

    def _look(self) -> float:
        """Return the processor time of a call, in milliseconds, of the slowest of the callers."""
        taken = [0.0] * cores()

        def call(place: int) -> None:
            calls, started_s, until_s = 0, time.thread_time(), time.monotonic() + SLICE_S
            while time.monotonic() < until_s:
                self._model.run(self._images)
                calls += 1
            taken[place] = (time.thread_time() - started_s) / calls * 1000

        callers = [threading.Thread(target=call, args=(place,)) for place in range(len(taken))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        return max(taken)
