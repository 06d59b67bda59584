import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.batch_queue import BatchQueue, Ticket
from service.errors import OverloadedError

SHAPE = (2, 2, 1)
OTHER_SHAPE = (3, 3, 1)


def ticket(rows: int = 1, *, arrived_s: float = 0.0, shape=SHAPE, **fields) -> Ticket:
    return Ticket(rows=rows, shape=shape, arrived_s=arrived_s, **fields)


def make_queue(**options) -> BatchQueue:
    return BatchQueue(**{"max_batch_rows": 4, "max_queue_rows": 8, **options})


def put_all(queue: BatchQueue, *tickets: Ticket) -> None:
    for one in tickets:
        queue.put(one)


def taken(queue: BatchQueue, now_s: float = 1.0, **options) -> list[Ticket]:
    """Take a batch in which nothing had expired."""
    batch, expired = queue.take(now_s, **options)
    assert expired == []
    return batch


def test_lone_ticket_leaves_at_the_moment_it_arrives():
    queue = make_queue()
    lone = ticket(arrived_s=10.0)
    queue.put(lone)

    assert queue.due_at_s() == 10.0
    assert taken(queue, 10.0) == [lone]


def test_rows_are_counted_and_not_requests():
    queue = make_queue()
    two, one, more = ticket(2), ticket(1), ticket(2)
    put_all(queue, two, one, more)

    assert (queue.requests, queue.rows) == (3, 5)
    assert taken(queue) == [two, one]  # three requests would fit, five rows do not
    assert (queue.requests, queue.rows) == (1, 2)
    assert taken(queue) == [more]


@pytest.mark.parametrize(("last", "together"), [(1, 4), (2, 3)])
def test_batch_is_filled_to_its_last_row_and_not_beyond(last, together):
    queue = make_queue()
    tickets = [ticket(1), ticket(1), ticket(1), ticket(last)]
    put_all(queue, *tickets)

    assert taken(queue) == tickets[:together]


def test_ticket_of_a_whole_batch_is_not_divided():
    queue = make_queue()
    small, whole = ticket(1), ticket(4)
    put_all(queue, small, whole)

    assert taken(queue) == [small]
    assert taken(queue) == [whole]


def test_small_ticket_does_not_overtake_a_large_one_that_came_first():
    queue = make_queue()
    first, large, small = ticket(3), ticket(2), ticket(1)
    put_all(queue, first, large, small)

    assert taken(queue) == [first]
    assert taken(queue) == [large, small]


def test_rows_of_different_shapes_are_never_joined():
    queue = make_queue()
    tickets = [ticket(), ticket(), ticket(shape=OTHER_SHAPE), ticket()]
    put_all(queue, *tickets)

    assert [taken(queue), taken(queue), taken(queue)] == [tickets[:2], tickets[2:3], tickets[3:]]


def test_nothing_is_taken_from_an_empty_queue():
    queue = make_queue()

    assert queue.take(1.0) == ([], [])
    assert queue.take(1.0, at_once=True) == ([], [])
    assert queue.due_at_s() == math.inf


# Room ---------------------------------------------------------------------------------------------


def test_queue_is_full_at_its_last_row_and_not_before():
    queue = make_queue(max_queue_rows=8)
    put_all(queue, ticket(4), ticket(3))

    with pytest.raises(OverloadedError, match=r"^Exceeds maximum queue size: 7 rows are"):
        queue.put(ticket(2))
    queue.put(ticket(1))
    with pytest.raises(OverloadedError, match=r"^Exceeds maximum queue size: 8 rows are"):
        queue.put(ticket(1))


def test_queue_is_full_at_its_last_request_and_not_before():
    queue = make_queue(max_queue_requests=2)
    put_all(queue, ticket(), ticket())

    with pytest.raises(OverloadedError, match=r"^Exceeds maximum queue size"):
        queue.put(ticket())
    assert (queue.requests, queue.rows) == (2, 2)


def test_refused_ticket_does_not_wait():
    queue = make_queue(max_queue_rows=4)
    waiting, refused = ticket(4), ticket(1)
    queue.put(waiting)

    with pytest.raises(OverloadedError):
        queue.put(refused)

    assert not refused.waiting
    assert not queue.withdraw(refused)
    assert taken(queue) == [waiting]


def test_room_is_there_again_once_a_batch_was_taken():
    queue = make_queue(max_queue_rows=4)
    queue.put(ticket(4))
    taken(queue)

    queue.put(ticket(4))

    assert queue.rows == 4


# Delay --------------------------------------------------------------------------------------------


def test_partial_batch_leaves_when_its_oldest_ticket_has_waited_long_enough():
    queue = make_queue(max_delay_s=0.5)
    first, second = ticket(arrived_s=10.0), ticket(arrived_s=10.4)
    put_all(queue, first, second)

    assert queue.due_at_s() == 10.5
    assert taken(queue, 10.49) == []
    assert taken(queue, 10.5) == [first, second]


@pytest.mark.parametrize(("rows", "due_s"), [(3, 10.5), (4, 10.0), (5, 10.0)])
def test_full_batch_is_not_delayed(rows, due_s):
    queue = make_queue(max_delay_s=0.5)
    put_all(queue, *[ticket(arrived_s=10.0) for _ in range(rows)])

    assert queue.due_at_s() == due_s


def test_what_a_full_batch_leaves_behind_waits_from_its_own_arrival():
    queue = make_queue(max_delay_s=0.5)
    put_all(queue, ticket(3, arrived_s=10.0), ticket(2, arrived_s=10.2))
    taken(queue, 10.2)

    assert queue.due_at_s() == 10.7


def test_nothing_waits_for_company_when_it_is_taken_at_once():
    queue = make_queue(max_delay_s=0.5)
    lone = ticket(arrived_s=10.0)
    queue.put(lone)

    assert taken(queue, 10.0, at_once=True) == [lone]


# Time that is over --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["deadline_s", "timeout_s"])
def test_ticket_expires_at_its_limit_and_not_before(limit):
    one = ticket()
    setattr(one, limit, 5.0)

    assert not one.expired(4.999)
    assert one.expired(5.0)


def test_expired_ticket_is_never_in_a_batch():
    queue = make_queue()
    late, good, later = ticket(deadline_s=5.0), ticket(), ticket(timeout_s=5.0)
    put_all(queue, late, good, later)

    assert queue.take(5.0) == ([good], [late, later])
    assert (queue.requests, queue.rows) == (0, 0)


def test_expired_ticket_takes_no_room_in_a_batch():
    queue = make_queue()
    late, good = ticket(4, deadline_s=5.0), ticket(4)
    put_all(queue, late, good)

    assert queue.take(5.0) == ([good], [late])


def test_expired_ticket_of_another_shape_does_not_end_a_batch():
    queue = make_queue()
    first, late, last = ticket(), ticket(shape=OTHER_SHAPE, deadline_s=5.0), ticket()
    put_all(queue, first, late, last)

    assert queue.take(5.0) == ([first, last], [late])


def test_expired_tickets_make_room_when_they_are_removed():
    queue = make_queue(max_queue_rows=4, levels=2)
    early, late, good = ticket(2, deadline_s=5.0), ticket(1, deadline_s=6.0, level=2), ticket(1)
    put_all(queue, early, late, good)

    assert queue.remove_expired(4.9) == []
    assert queue.remove_expired(5.5) == [early]
    assert (queue.requests, queue.rows) == (2, 2)
    assert queue.remove_expired(6.0) == [late]
    assert taken(queue) == [good]


def test_ticket_that_comes_later_and_expires_sooner_is_found():
    queue = make_queue()
    patient, hurried = ticket(deadline_s=9.0), ticket(deadline_s=3.0)
    queue.put(patient)
    assert queue.remove_expired(2.0) == []
    queue.put(hurried)

    assert queue.remove_expired(3.0) == [hurried]


# Withdrawal ---------------------------------------------------------------------------------------


def test_withdrawn_ticket_is_gone_with_its_rows():
    queue = make_queue()
    first, second, third = ticket(1), ticket(2), ticket(1)
    put_all(queue, first, second, third)

    assert queue.withdraw(second)
    assert (queue.requests, queue.rows) == (2, 2)
    assert taken(queue) == [first, third]


def test_ticket_is_withdrawn_once_and_not_after_it_was_taken():
    queue = make_queue()
    first, second = ticket(4), ticket(4)
    put_all(queue, first, second)
    taken(queue)

    assert not queue.withdraw(first)
    assert queue.withdraw(second)
    assert not queue.withdraw(second)
    assert queue.rows == 0


def test_equal_tickets_are_not_mistaken_for_each_other():
    queue = make_queue()
    first, twin = ticket(), ticket()
    put_all(queue, first, twin)
    queue.withdraw(twin)

    (left,) = taken(queue)
    assert left is first


# Priority -----------------------------------------------------------------------------------------


def test_higher_priority_leaves_first_whenever_it_came():
    queue = make_queue(max_queue_rows=12, levels=3)
    low, middle, high = ticket(4, level=3), ticket(4, level=2), ticket(4, level=1)
    put_all(queue, low, middle, high)
    assert [queue.rows_ahead(level) for level in (1, 2, 3)] == [4, 8, 12]

    assert [taken(queue), taken(queue), taken(queue)] == [[high], [middle], [low]]


def test_batch_is_filled_up_from_lower_priorities():
    queue = make_queue(levels=2)
    low, high, high_too = ticket(1, level=2), ticket(2), ticket(1)
    put_all(queue, low, high, high_too)

    assert taken(queue) == [high, high_too, low]


def test_lower_priority_does_not_slip_past_a_higher_one_that_does_not_fit():
    queue = make_queue(levels=2)
    high, large, low = ticket(3), ticket(2), ticket(1, level=2)
    put_all(queue, high, large, low)

    assert taken(queue) == [high]
    assert taken(queue) == [large, low]


def test_lower_priorities_leave_a_higher_one_its_room():
    queue = make_queue(max_queue_rows=4, max_queue_requests=1, levels=2)
    queue.put(ticket(4, level=2))

    with pytest.raises(OverloadedError):
        queue.put(ticket(1, level=2))
    queue.put(ticket(4, level=1))
    with pytest.raises(OverloadedError):
        queue.put(ticket(1, level=1))


def test_higher_priorities_take_the_room_of_a_lower_one():
    queue = make_queue(max_queue_rows=4, levels=2)
    queue.put(ticket(4, level=1))

    with pytest.raises(OverloadedError):
        queue.put(ticket(1, level=2))


def test_delay_is_counted_from_the_oldest_of_all_priorities():
    queue = make_queue(max_delay_s=0.5, levels=2)
    put_all(queue, ticket(arrived_s=10.0, level=2), ticket(arrived_s=10.3, level=1))

    assert queue.due_at_s() == 10.5


# Whatever happens in whatever order ---------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a plain list of what waits in it."""

    MAX_BATCH_ROWS = 4
    MAX_QUEUE_ROWS = 9
    LEVELS = 3

    def __init__(self):
        super().__init__()
        self.queue = BatchQueue(
            max_batch_rows=self.MAX_BATCH_ROWS,
            max_queue_rows=self.MAX_QUEUE_ROWS,
            max_queue_requests=5,
            max_delay_s=2.0,
            levels=self.LEVELS,
        )
        self.now_s = 0.0
        self.waiting: list[Ticket] = []
        self.left: list[Ticket] = []

    def leave(self, tickets: list[Ticket]) -> None:
        for one in tickets:
            self.waiting.remove(one)  # fails for what was handed out twice
        self.left += tickets

    def in_order(self) -> list[Ticket]:
        return sorted(self.waiting, key=lambda one: one.level)  # stable: by arrival in a level

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule(
        rows=st.integers(1, MAX_BATCH_ROWS),
        shape=st.sampled_from([SHAPE, SHAPE, OTHER_SHAPE]),
        level=st.integers(1, LEVELS),
        deadline_s=st.sampled_from([math.inf, 1.0, 4.0]),
        timeout_s=st.sampled_from([math.inf, 1.5]),
    )
    def put(self, rows, shape, level, deadline_s, timeout_s):
        one = ticket(
            rows,
            arrived_s=self.now_s,
            shape=shape,
            level=level,
            deadline_s=self.now_s + deadline_s,
            timeout_s=self.now_s + timeout_s,
        )
        ahead = sum(other.rows for other in self.waiting if other.level <= level)
        beside = sum(other.level == level for other in self.waiting)
        fits = ahead + rows <= self.MAX_QUEUE_ROWS and beside < 5
        try:
            self.queue.put(one)
        except OverloadedError:
            assert not fits
        else:
            assert fits
            self.waiting.append(one)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data):
        one = data.draw(st.sampled_from(self.waiting))
        assert self.queue.withdraw(one)
        self.leave([one])

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def withdraw_what_has_left(self, data):
        assert not self.queue.withdraw(data.draw(st.sampled_from(self.left)))

    @rule()
    def remove_expired(self):
        expired = self.queue.remove_expired(self.now_s)

        assert set(map(id, expired)) == {id(o) for o in self.waiting if o.expired(self.now_s)}
        self.leave(expired)

    @rule(at_once=st.booleans())
    def take(self, at_once):
        due = bool(self.waiting) and (at_once or self.now_s >= self.queue.due_at_s())
        expected = self.in_order()
        batch, expired = self.queue.take(self.now_s, at_once=at_once)

        assert bool(batch or expired) == due
        assert all(one.expired(self.now_s) for one in expired)
        assert not any(one.expired(self.now_s) for one in batch)
        assert len({one.shape for one in batch}) <= 1
        assert sum(one.rows for one in batch) <= self.MAX_BATCH_ROWS
        gone = {id(one) for one in [*batch, *expired]}
        assert gone == {id(one) for one in expected[: len(gone)]}  # nothing was passed over
        assert batch == [one for one in expected if id(one) in gone and one not in expired]
        self.leave([*batch, *expired])
        if due and self.waiting:
            after = self.in_order()[0]
            room = self.MAX_BATCH_ROWS - sum(one.rows for one in batch)
            joins = not batch or after.shape == batch[0].shape
            assert not (joins and after.rows <= room), "there was room for one more"

    @invariant()
    def counts_are_of_what_waits(self):
        assert self.queue.requests == len(self.waiting)
        assert self.queue.rows == sum(one.rows for one in self.waiting)
        for level in range(1, self.LEVELS + 1):
            ahead = sum(one.rows for one in self.waiting if one.level <= level)
            assert self.queue.rows_ahead(level) == ahead
        assert all(one.waiting for one in self.waiting)
        assert not any(one.waiting for one in self.left)

    def teardown(self):
        while self.queue.requests:
            batch, expired = self.queue.take(self.now_s, at_once=True)
            self.leave([*batch, *expired])
        assert self.waiting == []


TestQueueInAnyOrder = QueueMachine.TestCase
TestQueueInAnyOrder.settings = settings(max_examples=100, stateful_step_count=40)


# Enough for one batch


@pytest.fixture
def frugal():
    """A queue that joins up to 4 rows, though a ticket may have 16."""
    return BatchQueue(max_batch_rows=16, max_queue_rows=64, enough_rows=4, max_delay_s=1.0)


def test_no_more_are_joined_than_is_of_use(frugal):
    tickets = [Ticket(rows, (1,), arrived_s=0.0) for rows in (1, 2, 1, 2)]
    for ticket in tickets:
        frugal.put(ticket)

    assert frugal.take(5.0)[0] == tickets[:3]
    assert frugal.take(5.0)[0] == tickets[3:]


def test_ticket_of_more_rows_than_are_joined_is_a_batch_of_its_own(frugal):
    large, small = Ticket(16, (1,), arrived_s=0.0), Ticket(1, (1,), arrived_s=0.0)
    frugal.put(large)
    frugal.put(small)

    assert frugal.next_rows() == 16
    assert frugal.take(5.0)[0] == [large]
    assert frugal.next_rows() == 1
    assert frugal.take(5.0)[0] == [small]
    assert frugal.next_rows() == 0


@pytest.mark.parametrize(("rows", "due_at_s"), [(3, 1.0), (4, 0.0)])
def test_batch_is_due_as_soon_as_there_are_enough(frugal, rows, due_at_s):
    frugal.put(Ticket(rows, (1,), arrived_s=0.0))

    assert frugal.due_at_s() == due_at_s


@pytest.mark.parametrize(
    ("rows", "are"), [([1], True), ([16], True), ([2, 2], True), ([2, 3], False), ([16, 1], False)]
)
def test_tickets_are_a_batch_if_they_would_be_handed_out_together(frugal, rows, are):
    tickets = [Ticket(one, (1,), arrived_s=0.0) for one in rows]

    assert frugal.is_a_batch(len(rows), sum(rows)) is are
    for ticket in tickets:
        frugal.put(ticket)
    assert (frugal.take(5.0)[0] == tickets) is are


def test_queue_joins_as_many_as_a_batch_may_have_unless_it_is_told_otherwise():
    queue = BatchQueue(max_batch_rows=4, max_queue_rows=64, enough_rows=100)
    for _ in range(5):
        queue.put(Ticket(1, (1,), arrived_s=0.0))

    assert len(queue.take(0.0)[0]) == 4
    assert not queue.waits_for_company
