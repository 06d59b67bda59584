import os
import threading

import pytest

from service import host
from service.front.nearby import CALLS, Nearby

CPUS = host.cpus()
HERE = {min(CPUS, default=0)}
LONE = ["him"] * (CALLS + 1)  # the first does not follow one of his

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="on the only CPU a thread has nowhere to go")


def places(cpus, *peers, began=CPUS, runs=1):
    """Return where a thread of its own may be put after each of the calls that it took."""
    found = []

    def work():
        nearby = Nearby(cpus)
        os.sched_setaffinity(0, began)
        for peer in peers:
            nearby.took(peer)
            for _ in range(runs):
                nearby.runs()
            found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def test_thread_is_where_the_others_are_after_so_many_calls_of_a_lone_client():
    assert places(HERE, *LONE, "him", "him") == [CPUS] * CALLS + [HERE] * 3


@pytest.mark.parametrize("company", [None, "her"])
def test_thread_is_anywhere_again_with_the_first_call_that_is_not_his_alone(company):
    found = places(HERE, *LONE, company, *LONE)

    assert found[CALLS:] == [HERE, *[CPUS] * (CALLS + 1), HERE]


@pytest.mark.parametrize("company", [None, "her"])
def test_calls_that_had_company_in_between_are_not_those_of_a_lone_client(company):
    assert set(map(frozenset, places(HERE, *LONE[1:], company, *LONE[1:]))) == {frozenset(CPUS)}


def test_clients_that_take_turns_are_not_one():
    assert set(map(frozenset, places(HERE, *["him", "her"] * 2 * CALLS))) == {frozenset(CPUS)}


def test_thread_that_is_kept_by_others_work_does_it_anywhere():
    assert set(map(frozenset, places(HERE, *LONE * 2, runs=2))) == {frozenset(CPUS)}


def test_thread_that_may_not_move_stays_and_works_on():
    assert places({9999}, *LONE, None) == [CPUS] * (CALLS + 2)


def test_thread_goes_back_to_where_it_was_before_it_came_and_not_to_where_it_began():
    elsewhere = {max(CPUS)}

    assert places(HERE, *LONE, None, began=elsewhere)[-2:] == [HERE, elsewhere]
