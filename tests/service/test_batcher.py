import math
import queue as queues
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from protos import bundle_pb2
from service.batch_queue import BatchQueue, Ticket
from service.batcher import Answers, Batch, Batcher
from service.errors import (
    CancelledError,
    DeadlineError,
    ModelError,
    ModelNotReadyError,
    OverloadedError,
    QueueTimeoutError,
)
from service.pace import Pace
from service.session import Session
from service.statistics import Figure, Histogram, Store

WAIT_S = 30.0
LONG_S = 1000.0  # of an estimate: no pause of the test's own reaches it
PAST = 0.0  # on the monotonic clock
NO_TIME = Pace({1: 0.0})
MARGIN = NO_TIME.margin()  # of an estimate that nothing was learnt for yet


def double(batch: NDArray[np.generic]) -> Answers:
    return {"doubled": np.asarray(batch) * 2}


@dataclass(eq=False)
class HeldCall:
    """A call of the model that runs until a test lets it go."""

    batch: NDArray[np.generic]
    rows: list[int]
    over: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        if not self.over.is_set():
            self.error = error
            self.over.set()


class HeldModel:
    """A model whose calls begin when they do, and end when a test says so."""

    def __init__(self) -> None:
        self._calls: queues.SimpleQueue[HeldCall] = queues.SimpleQueue()
        self.made: list[HeldCall] = []
        self.opened = False

    def __call__(self, batch: NDArray[np.generic]) -> Answers:
        call = HeldCall(batch, batch.ravel().tolist())
        self.made.append(call)
        if self.opened:
            call.end()
        self._calls.put(call)
        assert call.over.wait(WAIT_S)
        if call.error is not None:
            raise call.error
        return double(batch)

    def next_call(self) -> HeldCall:
        """Wait until the next call has begun."""
        return self._calls.get(timeout=WAIT_S)

    def open(self) -> None:
        """Let every call end that runs, and those to come."""
        self.opened = True
        for call in self.made:
            call.end()

    def rows(self) -> list[list[int]]:
        """Return the rows of every call so far, each by its number."""
        return [call.rows for call in self.made]


class Request:
    """A request of rows by their numbers, or of a batch, and what became of it."""

    def __init__(self, *rows: int, batch=None, shape=(1,), fails: bool = False, **fields) -> None:
        self.outcome: Future[Batch] = Future()
        if batch is None:
            batch = np.array(rows, np.int64).reshape(-1, *shape)
        self.batch = batch
        self.start = 0
        self._fails = fails
        self.ticket = Ticket(
            rows=len(batch),
            shape=batch.shape[1:],
            **{"arrived_s": time.monotonic(), **fields},
            content=self,
        )

    def answered(self, batch: Batch, start: int) -> None:
        self.start = start
        self.outcome.set_result(batch)
        if self._fails:
            raise RuntimeError("nobody is there")

    def failed(self, error: Exception) -> None:
        self.outcome.set_exception(error)
        if self._fails:
            raise RuntimeError("nobody is there")

    def answers(self, name: str) -> NDArray[np.generic]:
        batch = self.outcome.result(WAIT_S)
        return batch.answers[name][self.start : self.start + len(self.batch)]

    def result(self) -> list[int]:
        return self.answers("doubled").ravel().tolist()

    def part_of(self) -> Batch:
        return self.outcome.result(WAIT_S)

    def error(self) -> BaseException | None:
        return self.outcome.exception(WAIT_S)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make_batcher(store):
    """Return a function that starts a batcher; every one of them has to end by itself."""
    made = []

    def make_batcher(
        run: Callable[[NDArray[np.generic]], Answers],
        *,
        instances: int = 1,
        pace: Pace = NO_TIME,
        max_batch_rows: int = 8,
        **options,
    ) -> Batcher:
        batcher = Batcher(
            run,
            BatchQueue(
                **{
                    "max_batch_rows": max_batch_rows,
                    "max_queue_rows": max_batch_rows * 4,
                    **options,
                }
            ),
            pace,
            store.open("tiny", 1, max_batch_rows),
            name="'tiny' version 1",
            max_batch_rows=max_batch_rows,
            instances=instances,
        )
        batcher.start()
        made.append(batcher)
        return batcher

    yield make_batcher
    for batcher in made:
        batcher.close()
        assert batcher.join(WAIT_S)


@pytest.fixture
def model(make_batcher):
    """A held model, let go before its batcher is joined."""
    held = HeldModel()
    yield held
    held.open()


def submit(batcher: Batcher, *requests: Request) -> None:
    for request in requests:
        batcher.submit(request.ticket)


def busy(batcher: Batcher, model: HeldModel, *rows: int) -> tuple[Request, HeldCall]:
    """Keep an instance busy with a request of its own."""
    request = Request(*(rows or (0,)))
    submit(batcher, request)
    return request, model.next_call()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


# What makes a call --------------------------------------------------------------------------------


def test_lone_request_runs_at_once(make_batcher, model):
    batcher = make_batcher(model)

    lone, call = busy(batcher, model, 1, 2)

    assert call.batch.tolist() == [[1], [2]]
    call.end()
    assert lone.result() == [2, 4]
    assert lone.part_of().rows == 2


def test_lone_request_is_not_copied(make_batcher, model):
    batcher = make_batcher(model)

    lone, call = busy(batcher, model, 1, 2)

    assert call.batch is lone.ticket.content.batch


def test_what_gathers_while_the_model_is_busy_becomes_one_call(make_batcher, model):
    batcher = make_batcher(model)
    first, call = busy(batcher, model)
    gathered = [Request(1, 2, 3), Request(4), Request(5, 6)]
    submit(batcher, *gathered)

    call.end()
    model.open()

    assert [request.result() for request in gathered] == [[2, 4, 6], [8], [10, 12]]
    assert first.result() == [0]
    assert model.rows() == [[0], [1, 2, 3, 4, 5, 6]]
    assert {request.part_of().rows for request in gathered} == {6}
    assert len({id(request.part_of()) for request in gathered}) == 1


def test_call_has_no_more_rows_than_the_model_takes(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=4)
    busy(batcher, model)
    gathered = [Request(*range(rows)) for rows in (3, 1, 1, 4, 2)]
    submit(batcher, *gathered)

    model.open()

    for request in gathered:
        request.result()
    assert [len(rows) for rows in model.rows()] == [1, 4, 1, 4, 2]


def test_rows_of_different_shapes_run_apart(make_batcher, model):
    batcher = make_batcher(model)
    busy(batcher, model)
    flat, square = Request(1, 2, shape=(1,)), Request(3, 4, 5, 6, shape=(2, 2))
    submit(batcher, flat, square)

    model.open()

    assert (flat.result(), square.result()) == ([2, 4], [6, 8, 10, 12])
    assert [call.batch.shape for call in model.made] == [(1, 1), (2, 1), (1, 2, 2)]


def test_as_many_calls_run_at_a_time_as_there_are_instances(make_batcher, model):
    batcher = make_batcher(model, instances=2)

    busy(batcher, model, 1)
    busy(batcher, model, 2)
    waiting = Request(3)
    submit(batcher, waiting)

    assert model.rows() == [[1], [2]]
    assert not waiting.outcome.done()
    model.made[1].end()  # either of them takes it
    model.next_call().end()
    assert waiting.result() == [6]


def test_idle_instance_takes_what_a_full_batch_left_behind(make_batcher, model):
    batcher = make_batcher(model, instances=2, max_batch_rows=4, max_delay_s=0.05)
    submit(batcher, Request(1, 2, 3), Request(4, 5))  # the second has to wait, or it would join

    calls = [model.next_call(), model.next_call()]

    assert [call.rows for call in calls] == [[1, 2, 3], [4, 5]]


def test_higher_priority_runs_first(make_batcher, model):
    batcher = make_batcher(model, levels=2, max_batch_rows=2)
    busy(batcher, model)
    low, high = Request(1, 2, level=2), Request(3, 4, level=1)
    submit(batcher, low, high)

    model.open()

    assert (low.result(), high.result()) == ([2, 4], [6, 8])
    assert model.rows() == [[0], [3, 4], [1, 2]]


def test_delay_waits_for_company(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=4, max_delay_s=LONG_S)
    first, second = Request(1, 2), Request(3, 4)

    submit(batcher, first)
    assert not batcher.is_idle()
    assert model.made == []
    submit(batcher, second)
    model.open()

    assert (first.result(), second.result()) == ([2, 4], [6, 8])
    assert model.rows() == [[1, 2, 3, 4]]


def test_delay_ends_without_company(make_batcher):
    batcher = make_batcher(double, max_delay_s=0.01)
    lone = Request(1)

    submit(batcher, lone)

    assert lone.result() == [2]
    assert lone.part_of().started_s - lone.ticket.arrived_s >= 0.01


# What never runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"deadline_s": PAST}, DeadlineError),
        ({"timeout_s": PAST}, QueueTimeoutError),
        ({"deadline_s": PAST, "timeout_s": PAST}, DeadlineError),
    ],
)
@pytest.mark.parametrize("when", ["idle", "busy"])
def test_expired_request_never_runs(make_batcher, model, when, fields, error):
    batcher = make_batcher(model)
    if when == "busy":
        busy(batcher, model)
    late, good = Request(1, **fields), Request(2)
    submit(batcher, late, good)

    model.open()

    assert isinstance(late.error(), error)
    assert good.result() == [4]
    assert 1 not in np.concatenate(model.rows())


def test_queue_timeout_is_told_in_tritons_words(make_batcher):
    batcher = make_batcher(double)
    late = Request(1, timeout_s=PAST)

    submit(batcher, late)

    assert str(late.error()) == "Request timeout expired"


def test_cancelled_request_never_runs(make_batcher, model):
    batcher = make_batcher(model)
    busy(batcher, model)
    cancelled, good = Request(1), Request(2)
    submit(batcher, cancelled, good)

    batcher.cancel(cancelled.ticket)
    model.open()

    assert isinstance(cancelled.error(), CancelledError)
    assert good.result() == [4]
    assert model.rows() == [[0], [2]]


def test_cancellation_of_a_request_that_runs_comes_too_late(make_batcher, model):
    batcher = make_batcher(model)
    running, call = busy(batcher, model, 1)

    batcher.cancel(running.ticket)
    call.end()
    assert running.result() == [2]
    batcher.cancel(running.ticket)


def test_request_that_expires_while_its_batch_fails_is_not_run_again(make_batcher, model):
    batcher = make_batcher(model)
    _, first = busy(batcher, model)
    late, good = Request(1), Request(2)
    submit(batcher, late, good)
    first.end()
    together = model.next_call()

    late.ticket.deadline_s = PAST  # as if the call had taken that long
    together.end(ModelError("no"))
    model.open()

    assert isinstance(late.error(), DeadlineError)
    assert good.result() == [4]
    assert model.rows() == [[0], [1, 2], [2]]


# What is not admitted -----------------------------------------------------------------------------


def test_request_is_refused_where_there_is_no_room_to_wait(make_batcher, model, store):
    batcher = make_batcher(model, max_batch_rows=2, max_queue_rows=3, pace=Pace({1: 2.0}))
    busy(batcher, model)
    waiting, refused = Request(1, 2), Request(3, 4)
    submit(batcher, waiting)

    with pytest.raises(OverloadedError, match="Exceeds maximum queue size: 2 rows") as overloaded:
        submit(batcher, refused)
    submit(batcher, Request(5))  # there is room for this one
    model.open()

    assert overloaded.value.retry_after_s > 0
    assert waiting.result() == [2, 4]
    assert not refused.outcome.done()  # it is told by the exception alone
    assert figures(store)[Figure.REJECTED] == 1


def test_the_more_work_waits_the_later_a_refused_request_may_come_again(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=2, max_queue_rows=6, pace=Pace({1: 2.0, 2: 4.0}))
    busy(batcher, model)
    advice = []

    for _ in range(3):
        with pytest.raises(OverloadedError) as overloaded:
            submit(batcher, Request(1, deadline_s=time.monotonic()))
        advice.append(overloaded.value.retry_after_s)
        submit(batcher, Request(1, 2))

    assert advice == sorted(set(advice))


def test_refusal_advises_some_wait_even_of_a_model_that_takes_no_time(make_batcher, model):
    batcher = make_batcher(model, max_queue_rows=1)
    busy(batcher, model)
    submit(batcher, Request(1))

    with pytest.raises(OverloadedError) as overloaded:
        submit(batcher, Request(2))

    assert overloaded.value.retry_after_s > 0


def test_request_takes_the_room_of_those_that_have_expired(make_batcher, model):
    batcher = make_batcher(model, max_queue_rows=2)
    busy(batcher, model)
    late, too_late = Request(1, deadline_s=PAST), Request(2, timeout_s=PAST)
    submit(batcher, late, too_late)
    good = Request(3, 4)

    submit(batcher, good)

    # They are told now, and not when the model has time again.
    assert isinstance(late.error(), DeadlineError)
    assert isinstance(too_late.error(), QueueTimeoutError)
    model.open()
    assert good.result() == [6, 8]


def test_expired_requests_are_told_even_where_their_room_is_not_enough(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=4, max_queue_rows=4)
    busy(batcher, model)
    late, good = Request(1, deadline_s=PAST), Request(2, 3, 4)
    submit(batcher, late, good)

    with pytest.raises(OverloadedError):
        submit(batcher, Request(5, 6))

    assert isinstance(late.error(), DeadlineError)
    model.open()
    assert good.result() == [4, 6, 8]


def test_request_that_cannot_be_answered_before_its_deadline_is_refused_at_once(
    make_batcher, model, store
):
    batcher = make_batcher(model, pace=Pace({1: LONG_S, 2: 1.5 * LONG_S}))
    busy(batcher, model)
    # One row runs, and this one after it.
    ready_s = MARGIN * 2 * LONG_S
    hopeless = Request(1, deadline_s=time.monotonic() + 0.9 * ready_s)
    hopeful = Request(2, deadline_s=time.monotonic() + 1.1 * ready_s)

    with pytest.raises(OverloadedError, match="Exceeds maximum queue size for its deadline") as no:
        submit(batcher, hopeless)
    submit(batcher, hopeful)
    model.open()

    assert no.value.retry_after_s > LONG_S
    assert hopeful.result() == [4]
    assert figures(store)[Figure.REJECTED] == 1


def test_the_rows_that_wait_count_for_what_can_be_answered_in_time(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=2, pace=Pace({1: LONG_S, 2: LONG_S}))
    busy(batcher, model)
    deadline_s = time.monotonic() + MARGIN * 2.5 * LONG_S
    submit(batcher, Request(1, 2, deadline_s=deadline_s))

    with pytest.raises(OverloadedError):
        submit(batcher, Request(3, 4, deadline_s=deadline_s))
    submit(batcher, Request(3, 4, deadline_s=deadline_s + MARGIN * LONG_S))


def test_only_what_goes_first_counts_for_a_request_of_high_priority(make_batcher, model):
    batcher = make_batcher(model, max_batch_rows=2, pace=Pace({1: LONG_S, 2: LONG_S}), levels=2)
    busy(batcher, model)
    submit(batcher, Request(1, 2, level=2), Request(3, 4, level=2))
    deadline_s = time.monotonic() + MARGIN * 2.5 * LONG_S

    with pytest.raises(OverloadedError):
        submit(batcher, Request(5, deadline_s=deadline_s, level=2))
    submit(batcher, Request(6, deadline_s=deadline_s, level=1))


def test_more_instances_are_expected_to_be_ready_sooner(make_batcher, model):
    deadline_s = time.monotonic() + MARGIN * 3.5 * LONG_S
    pace = Pace({1: LONG_S})
    batcher = make_batcher(model, instances=2, max_batch_rows=1, pace=pace)
    busy(batcher, model)
    busy(batcher, model)
    submit(batcher, Request(1), Request(2))

    submit(batcher, Request(3, deadline_s=deadline_s))

    alone = make_batcher(model, instances=1, max_batch_rows=1, pace=pace)
    busy(alone, model)
    submit(alone, Request(1), Request(2))
    with pytest.raises(OverloadedError):
        submit(alone, Request(3, deadline_s=deadline_s))


@pytest.mark.parametrize("instances", [1, 2])
def test_idle_instance_admits_whatever_the_estimate_says(make_batcher, model, instances):
    batcher = make_batcher(model, instances=instances, pace=Pace({1: LONG_S}))
    requests = [
        Request(number, deadline_s=time.monotonic() + WAIT_S) for number in range(instances)
    ]

    for request in requests:
        submit(batcher, request)
        model.next_call().end()

    assert [request.result() for request in requests] == [[2 * i] for i in range(instances)]


def test_estimate_follows_what_the_model_really_takes(make_batcher, model):
    pace = Pace({1: LONG_S})
    batcher = make_batcher(model, pace=pace)

    for _ in range(100):
        request, call = busy(batcher, model)
        call.end()
        request.result()
        until(batcher.is_idle)

    assert pace.call_s(1) < LONG_S / 100


# The model fails ----------------------------------------------------------------------------------


def test_failing_batch_is_run_request_by_request_so_that_only_the_offender_fails(
    make_batcher, model, store
):
    def picky(batch):
        model(batch)
        if 13 in batch:
            raise ModelError("13 is not divisible")
        return double(batch)

    batcher = make_batcher(picky)
    busy(batcher, model)
    good, bad, good_too = Request(1, 2), Request(12, 13), Request(3)
    submit(batcher, good, bad, good_too)

    model.open()

    assert (good.result(), good_too.result()) == ([2, 4], [6])
    assert isinstance(bad.error(), ModelError)
    assert model.rows() == [[0], [1, 2, 12, 13, 3], [1, 2], [12, 13], [3]]
    assert (figures(store)[Figure.SUCCESS], figures(store)[Figure.BACKEND]) == (3, 1)


def test_error_that_nobody_foresaw_is_told_to_the_caller_alone(make_batcher):
    def broken(batch):
        raise ZeroDivisionError("inside")

    batcher = make_batcher(broken)
    requests = [Request(1), Request(2)]
    submit(batcher, *requests)

    assert [type(request.error()) for request in requests] == [ZeroDivisionError] * 2
    until(batcher.is_idle)


def test_callback_that_fails_neither_stops_the_thread_nor_harms_the_others(
    make_batcher, model, caplog
):
    batcher = make_batcher(model)
    busy(batcher, model)
    good, later = Request(3), Request(4)
    submit(batcher, Request(1, fails=True), good)
    submit(batcher, Request(2, fails=True, deadline_s=PAST))

    model.open()
    assert good.result() == [6]
    submit(batcher, later)

    assert later.result() == [8]
    logged = [record for record in caplog.records if "handed over" in record.message]
    assert len(logged) == 2


# The end ------------------------------------------------------------------------------------------


def test_what_waits_when_it_is_closed_is_answered(make_batcher, model):
    batcher = make_batcher(model, max_delay_s=LONG_S, max_batch_rows=2)
    submit(batcher, Request(0, 0))
    call = model.next_call()
    waiting = Request(1)
    submit(batcher, waiting)

    batcher.close()
    assert not batcher.join(0.0)
    call.end()
    model.open()

    assert waiting.result() == [2]  # though its delay is not over
    assert batcher.join(WAIT_S)
    assert batcher.is_idle()


def test_closed_batcher_refuses_so_that_the_next_version_may_be_asked(make_batcher):
    batcher = make_batcher(double)
    batcher.close()

    with pytest.raises(ModelNotReadyError, match="'tiny' version 1 is not at ready state"):
        submit(batcher, Request(1))


def test_batcher_with_nothing_to_do_ends_when_it_is_closed(make_batcher):
    batcher = make_batcher(double, instances=3)

    batcher.close()

    assert batcher.join(WAIT_S)


def test_batcher_is_idle_while_nothing_waits_or_runs(make_batcher, model):
    batcher = make_batcher(model)
    assert batcher.is_idle()

    busy(batcher, model)
    assert not batcher.is_idle()
    model.open()

    until(batcher.is_idle)


# Figures ------------------------------------------------------------------------------------------


def figures(store):
    (snapshot,) = store.snapshots()
    return snapshot


def test_statistics_add_up(make_batcher, model, store):
    batcher = make_batcher(model, max_batch_rows=4, max_queue_rows=8)
    busy(batcher, model)
    answered = [Request(1, 2, 3), Request(4), Request(5, 6)]
    cancelled, late = Request(7), Request(8, deadline_s=PAST)
    submit(batcher, *answered, cancelled, late)
    assert figures(store)[Figure.PENDING_REQUESTS] == 5
    assert figures(store)[Figure.PENDING_ROWS] == 8
    batcher.cancel(cancelled.ticket)
    assert figures(store)[Figure.PENDING_ROWS] == 7
    submit(batcher, cancelled_too := Request(10))
    with pytest.raises(OverloadedError):
        submit(batcher, Request(11, 12, 13))  # though what has expired makes way
    batcher.cancel(cancelled_too.ticket)
    assert isinstance(late.error(), DeadlineError)

    model.open()
    for request in answered:
        request.result()
    until(batcher.is_idle)

    counted = figures(store)
    assert counted[Figure.SUCCESS] == 4
    assert counted[Figure.ROWS] == 7
    assert counted[Figure.EXECUTIONS] == 3
    assert counted[Figure.CANCELLED] == 2
    assert counted[Figure.REJECTED] == 2  # one expired, one refused
    assert counted[Figure.BACKEND] == counted[Figure.OTHER] == 0
    assert counted[Figure.PENDING_REQUESTS] == counted[Figure.PENDING_ROWS] == 0
    assert [(rows, calls) for rows, calls, _ in counted.by_size()] == [(1, 1), (2, 1), (4, 1)]
    for histogram, observations in (
        (Histogram.REQUEST_S, 4),
        (Histogram.QUEUE_S, 4),
        (Histogram.INFER_S, 3),
        (Histogram.BATCH_ROWS, 3),
    ):
        counts, _ = counted.histogram(histogram)
        assert counts[-1] == ("+Inf", observations)
    parts = sum(
        counted[figure]
        for figure in (Figure.QUEUE_S, Figure.INPUT_S, Figure.INFER_S, Figure.OUTPUT_S)
    )
    assert counted[Figure.SUCCESS_S] == pytest.approx(parts)


# With a real model, and all at once ---------------------------------------------------------------


def some_of(images, rng: random.Random):
    rows = rng.randint(1, 16)
    start = rng.randrange(len(images) - rows)
    return images[start : start + rows]


def outcome_of(batcher: Batcher, batch, tiny, rng: random.Random) -> str:
    """Ask about a batch, sometimes too late or not for long; check what is answered."""
    request = Request(batch=batch, deadline_s=PAST if rng.random() < 0.1 else math.inf)
    try:
        submit(batcher, request)
    except OverloadedError:
        return "refused"
    if rng.random() < 0.2:
        batcher.cancel(request.ticket)
    error = request.error()
    if error is not None:
        return type(error).__name__
    np.testing.assert_array_equal(request.answers("logits"), tiny.logits(batch))
    return "answered"


def test_every_request_gets_one_outcome_and_its_own_rows_under_concurrency(
    make_batcher, tiny, store
):
    session = Session(tiny.model(), bundle_pb2.SessionOptions(graph_optimization="all"), threads=1)
    batcher = make_batcher(session.run, instances=2, max_batch_rows=16, max_queue_rows=64)
    images = tiny.images(4096, seed=5)
    outcomes = []

    def client(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [outcome_of(batcher, some_of(images, rng), tiny, rng) for _ in range(400)]

    with ThreadPoolExecutor(12) as clients:
        for seen in clients.map(client, range(12)):
            outcomes += seen
    until(batcher.is_idle)
    counted = figures(store)
    assert set(outcomes) <= {"answered", "refused", "CancelledError", "DeadlineError"}
    assert counted[Figure.SUCCESS] == outcomes.count("answered") > 0
    assert counted[Figure.CANCELLED] == outcomes.count("CancelledError") > 0
    assert counted[Figure.REJECTED] == sum(map(outcomes.count, ("refused", "DeadlineError"))) > 0


# On the thread of whoever brings the requests


class Here:
    """A model that notes the thread of every call."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.rows: list[int] = []

    def __call__(self, batch):
        self.threads.append(threading.get_ident())
        self.rows.append(len(batch))
        return double(batch)

    def was_here(self) -> list[bool]:
        return [thread == threading.get_ident() for thread in self.threads]


def stay(batcher: Batcher, *requests: Request) -> None:
    for request in requests:
        batcher.submit(request.ticket, stay=True)


def test_requests_that_stay_are_run_on_the_thread_that_works(make_batcher):
    model = Here()
    batcher = make_batcher(model)
    requests = [Request(number) for number in range(5)]
    stay(batcher, *requests)

    batcher.work(LONG_S)

    assert [request.result() for request in requests] == [[2 * number] for number in range(5)]
    assert (model.was_here(), model.rows) == ([True], [5])


def test_call_that_is_expected_to_take_long_is_left_to_the_batchers_own_thread(make_batcher):
    model = Here()
    batcher = make_batcher(model, pace=Pace({1: 1.0, 8: 8.0}))
    short, long = Request(1), Request(2, 3)
    stay(batcher, short)
    batcher.work(1.5)
    stay(batcher, long)
    batcher.work(1.5)

    assert (short.result(), long.result()) == ([2], [4, 6])
    assert model.was_here() == [True, False]


def test_what_is_not_due_yet_is_left_to_wait(make_batcher):
    model = Here()
    batcher = make_batcher(model, max_delay_s=2)
    request = Request(1)
    stay(batcher, request)

    batcher.work(LONG_S)

    assert request.result() == [2]
    assert model.was_here() == [False]


def test_nothing_more_is_run_at_a_time_than_there_are_instances(make_batcher, model):
    batcher = make_batcher(model)
    first, call = busy(batcher, model)
    second = Request(1)
    stay(batcher, second)

    batcher.work(LONG_S)  # returns at once: who is busy takes what waits

    assert len(model.made) == 1
    call.end()
    model.open()
    assert (first.result(), second.result()) == ([0], [2])


def test_more_than_one_batch_is_shared_with_the_other_instance(make_batcher):
    begun = threading.Barrier(2)

    def both(batch):
        begun.wait(WAIT_S)  # until two calls run at once
        return double(batch)

    batcher = make_batcher(both, instances=2, max_batch_rows=4)
    requests = [Request(*range(4)), Request(*range(4, 8))]
    stay(batcher, *requests)

    batcher.work(LONG_S)

    assert [request.result() for request in requests] == [[0, 2, 4, 6], [8, 10, 12, 14]]


def test_waking_runs_what_stays_on_the_batchers_own_thread(make_batcher):
    model = Here()
    batcher = make_batcher(model)
    request = Request(1)
    stay(batcher, request)

    batcher.wake()

    assert request.result() == [2]
    assert model.was_here() == [False]


def at_once(batcher: Batcher, *requests: Request, longest_s: float = LONG_S) -> bool:
    return batcher.run_at_once([request.ticket for request in requests], longest_s)


def test_requests_that_find_nothing_before_them_run_at_once_and_are_counted(make_batcher, store):
    model = Here()
    batcher = make_batcher(model)
    requests = [Request(number) for number in range(8)]

    assert at_once(batcher, *requests)

    assert [request.result() for request in requests] == [[2 * number] for number in range(8)]
    assert (model.was_here(), model.rows) == ([True], [8])
    assert batcher.is_idle()
    figures = store.snapshots()[0]
    assert [figures[one] for one in (Figure.SUCCESS, Figure.ROWS, Figure.EXECUTIONS)] == [8, 8, 1]


@pytest.mark.parametrize(
    ("options", "requests", "longest_s"),
    [
        ({"max_delay_s": 1.0}, [Request(1)], LONG_S),
        ({"enough_rows": 2}, [Request(1, 2), Request(3)], LONG_S),
        ({"pace": Pace({1: 2.0})}, [Request(1)], 1.0),
        ({}, [Request(1), Request(2, deadline_s=PAST)], LONG_S),
        ({}, [Request(1, timeout_s=PAST)], LONG_S),
    ],
    ids=["wait for company", "are too many", "take long", "are late", "have waited too long"],
)
def test_requests_that_would_not_be_the_next_batch_do_not_run_at_once(
    make_batcher, options, requests, longest_s
):
    model = Here()
    batcher = make_batcher(model, **options)

    assert not at_once(batcher, *requests, longest_s=longest_s)

    assert model.rows == []
    assert batcher.is_idle()


def test_nothing_runs_at_once_before_what_waits_or_beside_what_runs_or_after_the_end(
    make_batcher, model
):
    batcher = make_batcher(model)
    first, call = busy(batcher, model)
    assert not at_once(batcher, Request(1))
    call.end()
    first.result()
    until(batcher.is_idle)
    stay(batcher, Request(2))

    assert not at_once(batcher, Request(3))
    model.open()
    batcher.work(LONG_S)
    batcher.close()
    assert not at_once(batcher, Request(4))


def test_whoever_runs_is_told_before_each_call_what_it_is_expected_to_take(make_batcher):
    late = Request(9, 2)
    happened: list[object] = []

    def run(batch):
        happened.append(len(batch))
        if len(batch) == 1:
            stay(batcher, late)
        return double(batch)

    batcher = make_batcher(run, pace=Pace({1: 2.0, 2: 4.0}))

    assert batcher.run_at_once([Request(1).ticket], LONG_S, happened.append)

    late.result()
    assert [type(one) for one in happened] == [float, int, float, int]
    assert happened[0] == 2.0
    assert happened[1::2] == [1, 2]


def test_what_comes_while_a_batch_runs_at_once_is_run_next(make_batcher):
    late = Request(9)

    def run(batch):
        if not late.ticket.waiting and not late.outcome.done():
            batcher.submit(late.ticket, stay=True)
        return double(batch)

    batcher = make_batcher(run)

    assert at_once(batcher, Request(1))

    assert late.result() == [18]


def test_batch_that_fails_at_once_is_run_one_by_one_and_frees_its_instance(make_batcher):
    def run(batch):
        if 7 in batch:
            raise ModelError("seven")
        return double(batch)

    batcher = make_batcher(run)
    good, bad = Request(1), Request(7)

    assert at_once(batcher, good, bad)

    assert good.result() == [2]
    assert isinstance(bad.error(), ModelError)
    assert batcher.is_idle()


# Who is shown what was answered


def test_rows_are_shown_with_their_answers_before_others_take_their_place(make_batcher):
    begun, go = threading.Event(), threading.Event()
    shown: list[tuple[list[int], list[int]]] = []

    def run(batch):
        return {"doubled": 2 * batch.astype(np.int64)}

    def sample(inputs, answers):
        begun.set()
        assert go.wait(WAIT_S)
        shown.append((inputs.ravel().tolist(), answers["doubled"].ravel().tolist()))

    batcher = make_batcher(run, instances=2)
    batcher.sample = sample
    pairs = [[Request(i), Request(i + 1)] for i in range(0, 40, 2)]
    first = pairs[0]
    for request in first:
        batcher.submit(request.ticket, stay=True)
    thread = threading.Thread(target=batcher.work, args=(math.inf,))
    thread.start()
    assert begun.wait(WAIT_S)
    assert [request.result() for request in first] == [[0], [2]]  # answered before they are shown
    batcher.sample = None
    for pair in pairs[1:]:  # which would be joined in the same memory
        for request in pair:
            batcher.submit(request.ticket, stay=True)
        batcher.work(math.inf)
    go.set()
    thread.join()

    assert shown == [([0, 1], [0, 2])]


def test_failure_of_who_is_shown_rows_fails_no_answer_and_is_not_repeated(make_batcher, caplog):
    def sample(inputs, answers):
        raise MemoryError

    batcher = make_batcher(lambda batch: {"doubled": 2 * batch})
    batcher.sample = sample
    for _ in range(3):
        request = Request(4)
        submit(batcher, request)
        assert request.result() == [8]

    until(lambda: caplog.records)
    assert [record.message for record in caplog.records] == [
        "the rows of 'tiny' version 1 cannot be sampled; they are no longer"
    ]
