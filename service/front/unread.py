"""Answers that the native front was given and holds, until clients that read slowly have room.

It does not tell when one has left, and its `close` drops what it holds.
"""

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

from service.front import sockets

if TYPE_CHECKING:
    from pygrpc_native import NativeGrpcFront

LOOK_S = 0.01  # between two looks of a front that stops
STUCK_S = 5.0  # without a move, after which what is left counts as given up by its clients
QUIET_LOOKS = 5  # at which nothing is unsent, in a row: the front may be about to write more
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
        """Wait until all that was answered has left, or none of it will, or until a time.

        Args:
            front: no further inference is answered by it.
            address: HOST:PORT or unix:PATH that it listens on.
            until_s: of the monotonic clock.
        """
        before, moved_s = 0, time.monotonic()
        while time.monotonic() < min(until_s, moved_s + STUCK_S):
            most, sent = self._counts(front)
            if most <= 0:
                break
            if sent > before:
                before, moved_s = sent, time.monotonic()
            await asyncio.sleep(LOOK_S)
        await _flush(address, until_s)

    def _counts(self, front: "NativeGrpcFront") -> tuple[int, int]:
        """Return how many answers there are at most that clients have no room for, and had.

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
        return min(given - late - sent, begun - ended), sent


async def _flush(address: str, until_s: float) -> None:
    """Wait until every connection has sent what the front holds for it, though more may follow."""
    looks = dict.fromkeys(await asyncio.to_thread(sockets.unsent, address), QUIET_LOOKS)
    before: dict[int, int] = {}
    moved_s = time.monotonic()
    while looks and time.monotonic() < min(until_s, moved_s + STUCK_S):
        await asyncio.sleep(LOOK_S)
        unsent = await asyncio.to_thread(sockets.unsent, address)
        for one in list(looks):
            left = unsent.get(one, 0)
            if left < before.get(one, 0):
                moved_s = time.monotonic()
            looks[one] = QUIET_LOOKS if left else looks[one] - 1
            if not looks[one]:
                del looks[one]
        before = unsent
