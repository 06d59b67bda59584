"""How long a model takes, from its warm-up on this host and from what it has taken since.

Figures only: no clock and no threads.
"""

from bisect import bisect_left
from collections.abc import Mapping

WEIGHT = 0.1  # of the last execution: ten of them outweigh what was before
# Times what is expected that one execution counts for at most. What held up a call of 0.1 ms for
# 30 ms adds as much to one of 10 ms; it does not take 300 times as long.
MOST = 4.0
TINY = 1e-9  # instead of nothing, to divide by
DEVIATIONS = 4.0  # what TCP allows for before it takes an answer for lost
UNKNOWN = 0.25  # the deviation until executions have shown it


class Pace:
    """Expected seconds of a model's calls by their rows."""

    def __init__(self, warmed: Mapping[int, float]) -> None:
        """Begin with what warm-up measured: seconds by batch rung, at least one."""
        self._rungs = sorted(warmed)
        self._seconds = [warmed[rung] for rung in self._rungs]
        self._factor = 1.0  # of now to warm-up: other work on the host, other calls beside it
        self._deviation = UNKNOWN  # of single calls from that, on average

    def call_s(self, rows: int) -> float:
        """Return what one call of that many rows is expected to take."""
        return self._warmed(rows) * self._factor

    def work_s(self, rows: int, max_rows: int) -> float:
        """Return what that many rows are expected to take in calls of at most `max_rows`."""
        calls, rest = divmod(rows, max_rows)
        return calls * self.call_s(max_rows) + (self.call_s(rest) if rest else 0.0)

    def margin(self) -> float:
        """Return how many times as long as expected calls may well take.

        Little more than 1 on a calm host. On some, the speed halves for seconds at a time.
        """
        return 1.0 + DEVIATIONS * self._deviation / max(self._factor, TINY)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a call that was made."""
        most = MOST * max(self._factor, 1.0)
        apart = min(seconds / max(self._warmed(rows), TINY), most) - self._factor
        self._factor += WEIGHT * apart
        self._deviation += WEIGHT * (abs(apart) - self._deviation)

    def _warmed(self, rows: int) -> float:
        """Interpolate between the rungs; beyond the last, in proportion."""
        place = bisect_left(self._rungs, rows)
        if place == len(self._rungs):
            return self._seconds[-1] * rows / self._rungs[-1]
        if not place:
            return self._seconds[0]
        low, high = self._rungs[place - 1], self._rungs[place]
        share = (rows - low) / (high - low)
        return self._seconds[place - 1] + share * (self._seconds[place] - self._seconds[place - 1])
