"""An event loop that tells when it has nothing else to do.

gRPC's asyncio server hands over one call a round of its loop, and whatever is done about it in that
round keeps the next from coming. So what costs less for many calls at once waits until the loop is
about to sleep: by then all that had come have been handed over.
"""

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

LATEST_S = 0.002  # after which a callback no longer waits for the loop to have time
# Times that a loop with nothing to do looks again, some 3 us each: gRPC's own thread needs about
# that long to hand over the next call, and one that comes then need not wait for the callback.
LOOKS = 8
Callback: TypeAlias = Callable[[], None]
Events: TypeAlias = list[tuple[selectors.SelectorKey, int]]


class Loop(asyncio.SelectorEventLoop):
    """asyncio's event loop, with `when_idle`."""

    def __init__(self) -> None:
        self._looking = _Selector(self.call_soon)
        super().__init__(self._looking)

    def when_idle(self, callback: Callback, *, patient: bool) -> None:
        """Call back once, before this loop sleeps next.

        Args:
            callback: called by the loop, as by `call_soon`; after `LATEST_S` seconds at the latest,
                unless a callback of others takes longer.
            patient: whether more that it is for is likely to come within microseconds.
        """
        self._looking.wait(callback, LOOKS if patient else 1)

    def withdraw(self, callback: Callback) -> None:
        """Do not call back any more, if it was to be."""
        self._looking.withdraw(callback)


class _Selector(selectors.DefaultSelector):
    """Waits for sockets, and knows thereby that its loop has nothing to do."""

    def __init__(self, call_soon: Callable[[Callback], object]) -> None:
        super().__init__()
        self._call_soon = call_soon
        self._waiting: list[Callback] = []
        self._looks = 1
        self._due_s = 0.0  # when the first of them no longer waits

    def wait(self, callback: Callback, looks: int) -> None:
        """Keep a callback until there is nothing to do but wait."""
        if not self._waiting:
            self._looks, self._due_s = looks, time.monotonic() + LATEST_S
        self._looks = max(self._looks, looks)
        self._waiting.append(callback)

    def withdraw(self, callback: Callback) -> None:
        """Forget a callback."""
        if callback in self._waiting:
            self._waiting.remove(callback)

    def select(self, timeout: float | None = None) -> Events:
        """Return the sockets that can be used; with 0 the loop has something else to do."""
        if not self._waiting:
            return super().select(timeout)
        found = super().select(0)
        looks = 1
        while not found and timeout != 0 and looks < self._looks:
            found = super().select(0)
            looks += 1
        if (not found and timeout != 0) or time.monotonic() >= self._due_s:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                self._call_soon(callback)  # the loop calls it in this round
        return found


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end on such a loop, as `asyncio.run` does."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


def running_loop() -> Loop:
    """Return the loop that runs.

    Raises:
        RuntimeError: it is another kind of loop.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, Loop):
        raise RuntimeError("fronts need an event loop of service.front.idle")  # noqa: TRY004
    return loop
