"""Answers that the native front was given and holds, until clients that read slowly have room.

It does not tell when one has left, and its `close` waits a tenth of a second for all of them.
"""

import asyncio
import itertools
import math
import time
from typing import TYPE_CHECKING

from service.front import sockets

if TYPE_CHECKING:
    from pygrpc_native import NativeGrpcFront

LOOK_S = 0.01  # between two looks
STUCK_S = 5.0  # an answer that has not left by then, and none beside it, counts as given up
OK = 0  # gRPC's code, as the front counts its calls by


class Unread:
    """Counts a front's answers; it has to count its calls itself as well (`metrics=True`)."""

    def __init__(self) -> None:
        """Start with none.

        `next` of `given` notes an answer, of `late` one whose client had left. Each is one call of
        C, since any thread may answer.
        """
        self.given, self.late = itertools.count(), itertools.count()
        self._looks = 0  # which took one of each

    async def leave(self, front: "NativeGrpcFront", address: str, until_s: float) -> None:
        """Wait until all that was answered has left, or until a time of the monotonic clock.

        Args:
            front: no further inference is answered by it.
            address: HOST:PORT or unix:PATH that it listens on.
            until_s: seconds.
        """
        least, moved_s = math.inf, time.monotonic()
        while (most := self._most(front)) and time.monotonic() < min(until_s, moved_s + STUCK_S):
            if most < least:
                least, moved_s = most, time.monotonic()
            await asyncio.sleep(LOOK_S)
        # What was seen empty once has sent them, though refusals may follow without end.
        waiting = sockets.unsent(address)
        while waiting and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
            waiting &= sockets.unsent(address)

    def _most(self, front: "NativeGrpcFront") -> int:
        """Return how many answers there are at most that clients have no room for.

        Those whose clients left while they were sent are not told apart, so they count for as long
        as calls are in flight, which may have been answered, be refused, or never arrive whole.
        """
        given, late = next(self.given) - self._looks, next(self.late) - self._looks
        self._looks += 1
        counts = front.metrics()
        assert counts is not None  # noqa: S101  it was told to count
        methods = counts["methods"].values()
        sent = sum(one["status"][OK]["count"] for one in methods if OK in one["status"])
        ended = sum(status["count"] for one in methods for status in one["status"].values())
        begun = sum(one["started"] for one in methods)
        return int(min(given - late - sent, begun - ended))
