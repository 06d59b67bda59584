"""Choose which waiting requests make up the next call of the model.

Bookkeeping only: no clock, no threads, no tensors. The caller passes the time in, so every rule
here is tested without sleeping. `service.batcher` adds the clock and runs the model.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from service.errors import OverloadedError


@dataclass(slots=True, eq=False)
class Ticket:
    """A request waiting for the model. Times are seconds on the queue's clock."""

    rows: int
    shape: tuple[int, ...]  # of one row; only equal ones are joined
    arrived_s: float
    deadline_s: float = math.inf  # the caller's: after it nobody listens
    timeout_s: float = math.inf  # the queue policy's
    level: int = 1  # of priority, 1 first
    waiting: bool = field(default=False, init=False)
    content: Any = None  # the queue does not look at it

    def expired(self, now_s: float) -> bool:
        """Tell whether it is too late to run this request."""
        return now_s >= self.deadline_s or now_s >= self.timeout_s


class BatchQueue:
    """Tickets by priority and arrival, handed out in batches of at most `max_batch_rows` rows.

    Tickets are joined up to `enough_rows`, from which on a larger batch is of no use; a single one
    may have more. Rows are counted, never requests, and no request is divided. A batch holds rows
    of one shape. Nothing waits for company unless `max_delay_s` says so. What has a lower priority
    takes no room from what has a higher one: as in Triton, each level has its own
    `max_queue_requests`; `max_queue_rows` are those of a ticket's own level and the higher ones.
    """

    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        max_queue_requests: float = math.inf,
        max_delay_s: float = 0.0,
        levels: int = 1,
        enough_rows: int | None = None,
    ) -> None:
        self._enough_rows = min(enough_rows or max_batch_rows, max_batch_rows)
        self._max_queue_rows = max_queue_rows
        self._max_queue_requests = max_queue_requests
        self._max_delay_s = max_delay_s
        self.waits_for_company = max_delay_s > 0  # although nothing runs
        self._levels: tuple[deque[Ticket], ...] = tuple(deque() for _ in range(levels))
        self._rows = [0] * levels
        self._expires_s = math.inf  # no ticket that waits expires before
        self.requests = 0  # waiting

    def is_a_batch(self, requests: int, rows: int) -> bool:
        """Tell whether requests of one shape that come together would be handed out together."""
        return requests == 1 or rows <= self._enough_rows

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return sum(self._rows)

    def next_rows(self) -> int:
        """Return about how many rows the next batch has; 0 while nothing waits."""
        heads = [level[0].rows for level in self._levels if level]
        return max(heads[0], min(self.rows, self._enough_rows)) if heads else 0

    def rows_ahead(self, level: int) -> int:
        """Return how many of them a new ticket of this level waits for."""
        return sum(self._rows[:level])

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait its turn; it has at most `max_batch_rows` rows and a level there is.

        Raises:
            OverloadedError: there is no room left to wait. When to try again is for the caller to
                say, who knows how long a row takes.
        """
        level = self._levels[ticket.level - 1]
        ahead = self.rows_ahead(ticket.level)
        if ahead + ticket.rows > self._max_queue_rows or len(level) >= self._max_queue_requests:
            raise OverloadedError(
                f"Exceeds maximum queue size: {ahead} rows are already waiting; try again later",
                retry_after_s=0.0,
            )
        ticket.waiting = True
        level.append(ticket)
        self._rows[ticket.level - 1] += ticket.rows
        self._expires_s = min(self._expires_s, ticket.deadline_s, ticket.timeout_s)
        self.requests += 1

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a ticket out again; false if it has left already."""
        if not ticket.waiting:
            return False
        self._levels[ticket.level - 1].remove(ticket)
        self._leave(ticket)
        return True

    def remove_expired(self, now_s: float) -> list[Ticket]:
        """Remove and return every ticket whose time is over."""
        if now_s < self._expires_s:  # a full queue asks at every request it refuses
            return []
        waiting = [ticket for level in self._levels for ticket in level]
        expired = [ticket for ticket in waiting if ticket.expired(now_s)]
        for ticket in expired:
            self.withdraw(ticket)
        self._expires_s = min(
            (min(one.deadline_s, one.timeout_s) for one in waiting if one.waiting),
            default=math.inf,
        )
        return expired

    def due_at_s(self) -> float:
        """Return when the next batch is due; infinity while nothing waits."""
        heads = [level[0].arrived_s for level in self._levels if level]
        if not heads:
            return math.inf
        return min(heads) + (0.0 if self.rows >= self._enough_rows else self._max_delay_s)

    def take(self, now_s: float, *, at_once: bool = False) -> tuple[list[Ticket], list[Ticket]]:
        """Remove and return the batch due at `now_s`, and the tickets found expired before it.

        With `at_once` nothing waits for company any more.
        """
        batch: list[Ticket] = []
        expired: list[Ticket] = []
        if not at_once and now_s < self.due_at_s():
            return batch, expired
        room = self._enough_rows
        for level in self._levels:
            while level:
                ticket = level[0]
                if ticket.expired(now_s):
                    expired.append(ticket)
                elif batch and (ticket.rows > room or ticket.shape != batch[0].shape):
                    return batch, expired
                else:
                    room -= ticket.rows
                    batch.append(ticket)
                level.popleft()
                self._leave(ticket)
        return batch, expired

    def _leave(self, ticket: Ticket) -> None:
        ticket.waiting = False
        self._rows[ticket.level - 1] -= ticket.rows
        self.requests -= 1
