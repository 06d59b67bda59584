"""Join waiting requests into calls of one model, and hand every request its own rows.

Adds the clock and the threads to `service.batch_queue`. A request that finds an idle instance is
run at once; a batch is what has gathered while all of them were busy. Runs nothing whose caller
has left or whose time is over.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

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
from service.statistics import Execution, Statistics

log = logging.getLogger(__name__)
MIN_RETRY_S = 0.001
Answers: TypeAlias = dict[str, NDArray[np.generic]]
Run: TypeAlias = Callable[[NDArray[np.generic]], Answers]
Sample: TypeAlias = Callable[[NDArray[np.generic], Answers], None]
Expect: TypeAlias = Callable[[float], object]


def ignore(_: float) -> None:
    """Do nothing about a call that is going to be made."""


class Batch:
    """One call of the model, and what it answered: the rows of all of its requests."""

    __slots__ = ("_raw", "answers", "infer_s", "layout", "rows", "started_s")

    def __init__(self, answers: Answers, *, rows: int, started_s: float, infer_s: float) -> None:
        """Store them.

        Args:
            answers: every output by its name, (rows, ...).
            rows: how many.
            started_s: when it left the queue, on the monotonic clock.
            infer_s: how long the model took, in seconds.
        """
        self.answers, self.rows = answers, rows
        self.started_s, self.infer_s = started_s, infer_s
        # What outputs have in common whose rows are written the same way.
        self.layout = tuple(
            [(name, array.dtype, array.shape[1:]) for name, array in answers.items()]
        )
        self._raw: dict[str, memoryview] = {}

    def raw(self, name: str) -> memoryview:
        """Return the bytes of an output, row-major; made once for all requests."""
        raw = self._raw.get(name)
        if raw is None:
            raw = self._raw[name] = memoryview(self.answers[name].tobytes())
        return raw


class Job(Protocol):
    """One request's rows, and who is told what became of them: one of the two, from any thread."""

    batch: NDArray[np.generic]

    def answered(self, batch: Batch, start: int) -> None:
        """Take note of the batch whose rows from `start` on are this request's."""

    def failed(self, error: Exception) -> None:
        """Take note of why there is no answer."""


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
        self._buffers: list[NDArray[np.generic]] = []  # that rows were joined in, to be used again
        self._threads: list[threading.Thread] = []
        # Shown the rows of every batch and their answers, once they are told; from several threads.
        # It copies what it keeps: the rows are overwritten by those of a later batch.
        self.sample: Sample | None = None

    def start(self) -> None:
        """Start an instance's thread each."""
        for instance in range(self._instances):
            thread = threading.Thread(
                target=self._serve, name=f"{self._name}-{instance}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def submit(self, ticket: Ticket, *, stay: bool = False) -> None:
        """Let a ticket with a `Job` wait for the model; returns at once.

        Args:
            ticket: the request.
            stay: wake no thread: whoever submits calls `work` or `wake` when all have come.

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
                if not stay:
                    self._wake_one()
        except OverloadedError:
            self._statistics.failed("REJECTED", 0.0)
            raise
        finally:
            for late in expired:
                self._refuse_expired(late)

    def run_at_once(
        self, tickets: Sequence[Ticket], longest_s: float, expect: Expect = ignore
    ) -> bool:
        """Run tickets that came together on this thread, if they would be the next batch.

        As `submit` and `work`, at less cost: nothing waits, and an instance is free for them.

        Args:
            tickets: of one shape; at least one.
            longest_s: seconds that the call may take.
            expect: told before each call of the model, on this thread, how many seconds it is
                expected to take.

        Returns:
            Whether they were; if not, none of them was.
        """
        rows = sum([ticket.rows for ticket in tickets])
        expected_s = self._pace.call_s(rows)
        if expected_s > longest_s:
            return False
        now_s = time.monotonic()
        for ticket in tickets:
            if ticket.deadline_s <= now_s or ticket.timeout_s <= now_s:
                return False
        with self._changed:
            if (
                self._closed
                or self._queue.requests
                or self._queue.waits_for_company
                or len(self._busy_rows) >= self._instances
                or not self._queue.is_a_batch(len(tickets), rows)
            ):
                return False
            self._busy_rows.append(rows)
        expect(expected_s)
        if self._run_taken(tickets, ()):
            self.work(longest_s, expect)  # what came meanwhile
        return True

    def wake(self) -> None:
        """Let a thread of this batcher's own run what waits."""
        with self._changed:
            self._wake_one()

    def work(self, longest_s: float, expect: Expect = ignore) -> None:
        """Run what waits on this thread, as long as an instance is free for it.

        Calls that are expected to take longer are left to the threads of this batcher's own, and so
        is what is not due yet; what comes while all instances are busy, to those that are busy.

        Args:
            longest_s: seconds that one call may take.
            expect: as of `run_at_once`.
        """
        while True:
            with self._changed:
                if not self._queue.requests or len(self._busy_rows) >= self._instances:
                    self._show_pending()
                    return
                rows = self._queue.next_rows()
                now_s, expected_s = time.monotonic(), self._pace.call_s(rows)
                if expected_s > longest_s or (now_s < self._queue.due_at_s() and not self._closed):
                    self._wake_one()
                    return
                batch, expired = self._take(now_s)
                if self._queue.requests:  # more than one batch: let others help
                    self._wake_one()
            expect(expected_s)
            self._run_taken(batch, expired)

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
        if ticket.deadline_s != math.inf:
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
            error.retry_after_s = max(MIN_RETRY_S, self._ready_in_s(ticket) / 2)
            raise

    def _ready_in_s(self, ticket: Ticket) -> float:
        """Return when the ticket would be answered; 0 if it can be run now, whatever it takes."""
        if len(self._busy_rows) < self._instances and not self._queue.requests:
            return 0.0
        ahead = self._queue.rows_ahead(ticket.level)
        work_s = self._pace.work_s(ahead, self._max_batch_rows) + sum(
            self._pace.call_s(rows) for rows in self._busy_rows
        )
        return work_s / self._instances + self._pace.call_s(ticket.rows)

    def _wake_one(self) -> None:
        """Have a thread of our own look at the queue, if an instance is free to run it."""
        self._show_pending()
        if len(self._busy_rows) < self._instances:
            self._changed.notify()

    def _show_pending(self) -> None:
        self._statistics.show_pending(self._queue.requests, self._queue.rows)

    def _serve(self) -> None:
        """Run batches until the batcher is closed and its queue is empty."""
        while (taken := self._next()) is not None:
            self._run_taken(*taken)
            del taken  # its messages need not stay until there is something to do again

    def _next(self) -> tuple[list[Ticket], list[Ticket]] | None:
        """Wait for the next batch; None once there will be none."""
        with self._changed:
            while True:
                free = len(self._busy_rows) < self._instances
                if free:
                    batch, expired = self._take(time.monotonic())
                    if batch or expired:
                        return batch, expired
                waits = self._queue.requests > 0
                if self._closed and not waits and not self._busy_rows:
                    return None
                due_in_s = self._queue.due_at_s() - time.monotonic()
                self._changed.wait(due_in_s if waits and free else None)

    def _take(self, now_s: float) -> tuple[list[Ticket], list[Ticket]]:
        """Take the batch that is due and an instance for it, while the lock is held."""
        batch, expired = self._queue.take(now_s, at_once=self._closed)
        if batch:
            self._busy_rows.append(sum([ticket.rows for ticket in batch]))
        if batch or expired:
            self._show_pending()
        return batch, expired

    def _run_taken(self, batch: Sequence[Ticket], expired: Sequence[Ticket]) -> bool:
        """Answer what was taken from the queue; tell whether more waits there."""
        for ticket in expired:
            self._refuse_expired(ticket)
        if not batch:
            return True
        try:
            self._answer(batch)
        finally:
            with self._changed:
                self._busy_rows.remove(sum([ticket.rows for ticket in batch]))
                waits = self._queue.requests > 0
                if self._closed:
                    self._changed.notify_all()
        return waits

    def _answer(self, tickets: Sequence[Ticket]) -> None:
        """Run one batch; where the model fails on it, every request alone, to spare the others."""
        started_s = time.monotonic()
        buffer: NDArray[np.generic] | None = None
        try:
            joined = tickets[0].content.batch
            if len(tickets) > 1:
                joined, buffer = self._joined([ticket.content.batch for ticket in tickets])
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
        batch = Batch(answers, rows=len(joined), started_s=started_s, infer_s=run_s - joined_s)
        self._pace.observe(batch.rows, batch.infer_s)
        cut_s = time.monotonic()
        # Before the answers are told: who asks for statistics next finds its own request in them.
        self._statistics.executed(
            Execution(batch.rows, joined_s - started_s, batch.infer_s, cut_s - run_s),
            [started_s - ticket.arrived_s for ticket in tickets],
            [cut_s - ticket.arrived_s for ticket in tickets],
            time.time_ns() // 1_000_000,
        )
        self._tell(tickets, batch)
        if self.sample is not None:
            self._show(joined, answers)
        if buffer is not None and not any(
            np.may_share_memory(buffer, array) for array in answers.values()
        ):
            self._buffers.append(buffer)

    def _tell(self, tickets: Sequence[Ticket], batch: Batch) -> None:
        start = 0
        for ticket in tickets:
            try:
                ticket.content.answered(batch, start)
            except Exception:
                log.exception("an answer could not be handed over")
            start += ticket.rows

    def _show(self, joined: NDArray[np.generic], answers: Answers) -> None:
        """Let rows be sampled; what fails at that is not tried at every batch."""
        sample = self.sample  # another thread may end it
        try:
            if sample is not None:
                sample(joined, answers)
        except Exception:
            if self.sample is not None:  # or another thread has said so
                self.sample = None
                log.exception("the rows of %s cannot be sampled; they are no longer", self._name)

    def _joined(
        self, arrays: list[NDArray[np.generic]]
    ) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """Return the rows of all in one array, and the buffer it is part of.

        A new array of this size would be the system's memory, page by page, at every call.
        """
        first = arrays[0]
        buffer = self._buffers.pop() if self._buffers else None
        if buffer is None or buffer.shape[1:] != first.shape[1:] or buffer.dtype != first.dtype:
            buffer = np.empty((self._max_batch_rows, *first.shape[1:]), first.dtype)
        rows = sum([len(array) for array in arrays])
        return np.concatenate(arrays, out=buffer[:rows]), buffer

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
            try:
                ticket.content.failed(error)
            except Exception:
                log.exception("a refusal could not be handed over")
