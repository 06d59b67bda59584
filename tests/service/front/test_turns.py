import threading
import time

import pytest

from service.front import turns
from service.front.turns import ALONE_S, Turn, Turns

WAIT_S = 30
LONG_S, SHORT_S = 2 * ALONE_S, ALONE_S / 2


@pytest.fixture
def shared():
    return Turns()


@pytest.fixture
def start():
    """Run functions in threads, which are waited for."""
    threads = []

    def started(target):
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        threads.append(thread)
        return thread

    yield started
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def waiting(shared, start):
    """Start a thread that waits for its turn; return an event that says when it has it."""
    has = threading.Event()

    def wait():
        with Turn(shared):
            has.set()

    start(wait)
    return has


def test_short_work_keeps_the_turn(shared, start, monkeypatch):
    monkeypatch.setattr(turns, "LONGEST_S", WAIT_S)
    own = Turn(shared)
    with own:
        other = waiting(shared, start)
        for _ in range(100):
            own.works()
            own.expect(SHORT_S)
            own.take()
        assert not other.is_set()

    assert other.wait(WAIT_S)


def test_another_has_its_turn_during_long_work(shared, start):
    own = Turn(shared)
    with own:
        own.works()
        own.expect(LONG_S)

        assert waiting(shared, start).wait(WAIT_S)
        own.take()


def test_another_has_its_turn_when_short_work_follows_short_work_for_long(
    shared, start, monkeypatch
):
    monkeypatch.setattr(turns, "LONGEST_S", 0.05)
    own = Turn(shared)
    with own:
        other = waiting(shared, start)
        own.works()
        until_s = time.monotonic() + WAIT_S
        while not other.is_set() and time.monotonic() < until_s:
            own.expect(SHORT_S)

        assert other.is_set()
        own.take()


def test_long_work_in_a_row_gives_the_turn_away_once(shared):
    own, other = Turn(shared), Turn(shared)
    with own:
        own.expect(LONG_S)
        with other:
            own.expect(LONG_S)  # not its own any more

            assert not shared.lock.acquire(blocking=False)


def test_only_one_of_many_has_a_turn_at_a_time(shared, start):
    inside, most = 0, 0
    done = threading.Barrier(9)

    def work():
        nonlocal inside, most
        own = Turn(shared)
        with own:
            for number in range(200):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1
                own.works()
                own.expect(LONG_S if number % 3 else SHORT_S)
                own.take()
        done.wait(WAIT_S)

    for _ in range(8):
        start(work)
    done.wait(WAIT_S)

    assert most == 1


def test_work_that_does_not_end_is_not_waited_for_though_it_was_to_be_short(
    shared, start, monkeypatch
):
    monkeypatch.setattr(turns, "STUCK_S", 0.05)
    stuck = Turn(shared)
    stuck.take()
    stuck.works()
    stuck.expect(SHORT_S)

    assert waiting(shared, start).wait(WAIT_S)
    stuck.take()  # it has come back, and waits as the others do
    assert shared.owner is stuck


def test_thread_that_came_back_too_late_does_not_hide_that_another_is_stuck(shared):
    first, second = Turn(shared), Turn(shared)
    first.take()
    first.works()
    shared.pass_on(first)
    second.take()
    second.works()

    assert not shared.keep(first)
    assert shared.works_since_s < time.monotonic()


def test_thread_that_waits_for_calls_keeps_its_turn_however_long(shared, start, monkeypatch):
    monkeypatch.setattr(turns, "STUCK_S", 0.02)
    own = Turn(shared)
    with own:
        other = waiting(shared, start)

        assert not other.wait(0.3)
        assert shared.owner is own


def test_turn_ends_with_an_error(shared, start):
    with pytest.raises(ZeroDivisionError), Turn(shared):
        raise ZeroDivisionError

    assert waiting(shared, start).wait(WAIT_S)
