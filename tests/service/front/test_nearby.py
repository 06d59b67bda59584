import os
import threading

import pytest

from service.front.nearby import CALLS, Nearby

CPUS = os.sched_getaffinity(0)
HERE = {min(CPUS)}

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="on the only CPU a thread has nowhere to go")


def places(cpus, *alone, began=CPUS):
    """Return where a thread of its own may be put after each of the calls that it took."""
    found = []

    def work():
        nearby = Nearby(cpus)
        os.sched_setaffinity(0, began)
        for one in alone:
            nearby.took(alone=one)
            found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def test_thread_is_where_the_others_are_after_so_many_calls_of_a_lone_client():
    found = places(HERE, *[True] * (CALLS + 2))

    assert found == [CPUS] * (CALLS - 1) + [HERE] * 3


def test_thread_is_anywhere_again_with_the_first_call_that_has_company():
    alone = [True] * CALLS

    assert places(HERE, *alone, False, *alone)[CALLS - 1 :] == [HERE, *[CPUS] * CALLS, HERE]


def test_calls_that_had_company_in_between_are_not_those_of_a_lone_client():
    most = [True] * (CALLS - 1)

    assert places(HERE, *most, False, *most, False) == [CPUS] * 2 * CALLS


def test_thread_that_may_not_move_stays_and_works_on():
    assert places({9999}, *[True] * CALLS, False) == [CPUS] * (CALLS + 1)


def test_thread_goes_back_to_where_it_was_before_it_came_and_not_to_where_it_began():
    elsewhere = {max(CPUS)}

    assert places(HERE, *[True] * CALLS, False, began=elsewhere)[-2:] == [HERE, elsewhere]
