"""Join waiting requests into calls of one model, and hand every request its own rows.

Adds the clock and the threads to `service.batch_queue`. A request that finds an idle instance is
run at once; a batch is what has gathered while all of them were busy. Runs nothing whose caller
has left or whose time is over.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.batch_queue import BatchQueue, Ticket
from service.errors import (
    CancelledError,
    DeadlineError,
    ModelNotReadyError,
    OverloadedError,
    QueueTimeoutError,
    ServiceError,
)
from service.pace import Pace
from service.statistics import Execution, Figure, Statistics

log = logging.getLogger(__name__)
MIN_RETRY_S = 0.001
Answers: TypeAlias = dict[str, NDArray[np.generic]]
Run: TypeAlias = Callable[[NDArray[np.generic]], Answers]


@dataclass(frozen=True, slots=True)
class Timing:
    """How a request was answered; times in seconds."""

    rows: int
    batch_rows: int  # of the call of the model it was part of
    queue_s: float
    infer_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One request's rows, and who is told what became of them: one of the two, from any thread.

    The answers are each output's rows in the request's order, views of a larger array.
    """

    batch: NDArray[np.generic]
    answered: Callable[[Answers, Timing], None]
    failed: Callable[[Exception], None]


class Batcher:
    """The queue of one version of a model and the threads that run it."""

    def __init__(  # noqa: PLR0913  the parts it is put together from
        self,
        run: Run,
        queue: BatchQueue,
        pace: Pace,
        statistics: Statistics,
        *,
        name: str,
        max_batch_rows: int,
        instances: int,
    ) -> None:
        """Store the parts; `start` starts the threads.

        Args:
            run: the model: a batch to every output by name, as `Session.run`.
            queue: empty, and of nobody else.
            pace: what the model takes.
            statistics: where it is counted.
            name: of the model and version, for the threads and for refusals.
            max_batch_rows: most rows in one call, as the queue's.
            instances: calls at a time.
        """
        self._run = run
        self._queue = queue
        self._pace = pace
        self._statistics = statistics
        self._name = name
        self._max_batch_rows = max_batch_rows
        self._instances = instances
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._busy_rows: list[int] = []  # of the calls that run now
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start an instance's thread each."""
        for instance in range(self._instances):
            thread = threading.Thread(
                target=self._serve, name=f"{self._name}-{instance}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket with a `Job` wait for the model; returns at once.

        Raises:
            OverloadedError: there is no room to wait, or no hope to be answered in time.
            ModelNotReadyError: the batcher is closed: another version has taken its place.
        """
        expired: list[Ticket] = []
        try:
            with self._changed:
                if self._closed:
                    raise ModelNotReadyError(
                        f"Request for unknown model: {self._name} is not at ready state"
                    )
                self._admit(ticket, expired)
                self._changed.notify()
        except OverloadedError:
            self._statistics.failed("REJECTED", 0.0)
            raise
        finally:
            for late in expired:
                self._refuse_expired(late)

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request whose caller has left; one that runs already is let run."""
        with self._changed:
            if not self._queue.withdraw(ticket):
                return
            self._show_pending()
        self._fail([ticket], CancelledError("the caller cancelled the request"), "CANCELED")

    def close(self) -> None:
        """Take nothing new; what waits is still answered. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait until everything was answered after `close`; false if it was not in time."""
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def is_idle(self) -> bool:
        """Tell whether nothing waits or runs."""
        with self._changed:
            return not self._queue.requests and not self._busy_rows

    def _admit(self, ticket: Ticket, expired: list[Ticket]) -> None:
        """Put the ticket into the queue; what expired and made way for it joins a list."""
        try:
            self._put(ticket)
        except OverloadedError:
            removed = self._queue.remove_expired(time.monotonic())
            if not removed:
                raise
            expired += removed
            self._show_pending()
            self._put(ticket)

    def _put(self, ticket: Ticket) -> None:
        ready_s = self._ready_in_s(ticket)
        # What is admitted and then late was run for nobody.
        if ready_s and time.monotonic() + ready_s * self._pace.margin() > ticket.deadline_s:
            raise OverloadedError(
                f"Exceeds maximum queue size for its deadline: {self._queue.rows} rows are "
                f"waiting, an answer would take about {ready_s * 1000:.0f} ms",
                retry_after_s=max(MIN_RETRY_S, ready_s),
            )
        try:
            self._queue.put(ticket)
        except OverloadedError as error:
            error.retry_after_s = max(MIN_RETRY_S, ready_s / 2)
            raise
        self._show_pending()

    def _ready_in_s(self, ticket: Ticket) -> float:
        """Return when the ticket would be answered; 0 if it can be run now, whatever it takes."""
        if len(self._busy_rows) < self._instances and not self._queue.requests:
            return 0.0
        ahead = self._queue.rows_ahead(ticket.level)
        work_s = self._pace.work_s(ahead, self._max_batch_rows) + sum(
            self._pace.call_s(rows) for rows in self._busy_rows
        )
        return work_s / self._instances + self._pace.call_s(ticket.rows)

    def _show_pending(self) -> None:
        self._statistics.set(Figure.PENDING_REQUESTS, self._queue.requests)
        self._statistics.set(Figure.PENDING_ROWS, self._queue.rows)

    def _serve(self) -> None:
        """Run batches until the batcher is closed and its queue is empty."""
        while (taken := self._next()) is not None:
            batch, expired = taken
            for ticket in expired:
                self._refuse_expired(ticket)
            if not batch:
                continue
            try:
                self._answer(batch)
            finally:
                with self._changed:
                    self._busy_rows.remove(sum(ticket.rows for ticket in batch))

    def _next(self) -> tuple[list[Ticket], list[Ticket]] | None:
        """Wait for the next batch; None once there will be none."""
        with self._changed:
            while True:
                batch, expired = self._queue.take(time.monotonic(), at_once=self._closed)
                if batch or expired:
                    if batch:
                        self._busy_rows.append(sum(ticket.rows for ticket in batch))
                    self._show_pending()
                    return batch, expired
                if self._closed and not self._queue.requests:
                    return None
                due_in_s = self._queue.due_at_s() - time.monotonic()
                self._changed.wait(due_in_s if self._queue.requests else None)

    def _answer(self, tickets: Sequence[Ticket]) -> None:
        """Run one batch; where the model fails on it, every request alone, to spare the others."""
        started_s = time.monotonic()
        arrays = [ticket.content.batch for ticket in tickets]
        try:
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            joined_s = time.monotonic()
            answers = self._run(joined)
        except Exception as error:  # noqa: BLE001  whatever it is, every caller gets an answer
            if len(tickets) > 1:
                for ticket in tickets:
                    self._answer_alone(ticket)
            else:
                self._fail(tickets, error, "BACKEND")
            return
        run_s = time.monotonic()
        parts = _cut(answers, tickets)
        rows, cut_s = len(joined), time.monotonic()
        self._pace.observe(rows, run_s - joined_s)
        self._statistics.executed(
            Execution(rows, joined_s - started_s, run_s - joined_s, cut_s - run_s),
            [started_s - ticket.arrived_s for ticket in tickets],
            [cut_s - ticket.arrived_s for ticket in tickets],
            time.time_ns() // 1_000_000,
        )
        for ticket, part in zip(tickets, parts, strict=True):
            timing = Timing(ticket.rows, rows, started_s - ticket.arrived_s, run_s - joined_s)
            with _logged():
                ticket.content.answered(part, timing)

    def _answer_alone(self, ticket: Ticket) -> None:
        if ticket.expired(time.monotonic()):  # while its batch failed
            self._refuse_expired(ticket)
        else:
            self._answer([ticket])

    def _refuse_expired(self, ticket: Ticket) -> None:
        now_s = time.monotonic()
        error: ServiceError = QueueTimeoutError("Request timeout expired")
        if now_s >= ticket.deadline_s:
            error = DeadlineError(
                f"the deadline passed after {now_s - ticket.arrived_s:.3f} s in the queue"
            )
        self._fail([ticket], error, "REJECTED")

    def _fail(self, tickets: Sequence[Ticket], error: Exception, reason: str) -> None:
        for ticket in tickets:
            self._statistics.failed(reason, time.monotonic() - ticket.arrived_s)
            with _logged():
                ticket.content.failed(error)


def _cut(answers: Answers, tickets: Sequence[Ticket]) -> list[Answers]:
    parts, start = [], 0
    for ticket in tickets:
        stop = start + ticket.rows
        parts.append({name: array[start:stop] for name, array in answers.items()})
        start = stop
    return parts


@contextmanager
def _logged() -> Iterator[None]:
    """Keep what goes wrong while one answer is handed over from the others."""
    try:
        yield
    except Exception:
        log.exception("an answer could not be handed over")
