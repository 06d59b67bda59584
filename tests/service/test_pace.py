import pytest

from service.pace import DEVIATIONS, UNKNOWN, WEIGHT, Pace

WARMED = {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.040}


@pytest.fixture
def pace() -> Pace:
    return Pace(WARMED)


@pytest.mark.parametrize(("rows", "seconds"), WARMED.items())
def test_call_of_a_rung_takes_what_its_warm_up_took(pace, rows, seconds):
    assert pace.call_s(rows) == pytest.approx(seconds)


@pytest.mark.parametrize(("rows", "seconds"), [(3, 0.014), (5, 0.022), (6, 0.028), (7, 0.034)])
def test_call_between_two_rungs_takes_its_share_between_them(pace, rows, seconds):
    assert pace.call_s(rows) == pytest.approx(seconds)


@pytest.mark.parametrize(("rows", "seconds"), [(9, 0.045), (16, 0.080)])
def test_call_beyond_the_last_rung_takes_as_much_more_as_it_has_rows(pace, rows, seconds):
    assert pace.call_s(rows) == pytest.approx(seconds)


def test_call_below_the_first_rung_takes_as_long_as_it():
    assert Pace({4: 0.016, 8: 0.040}).call_s(1) == pytest.approx(0.016)


def test_rungs_may_come_in_any_order():
    assert Pace({8: 0.040, 1: 0.010}).call_s(8) == pytest.approx(0.040)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [(0, 0.0), (1, 0.010), (4, 0.016), (5, 0.016 + 0.010), (8, 2 * 0.016), (11, 2 * 0.016 + 0.014)],
)
def test_work_is_its_whole_calls_and_one_of_what_is_left(pace, rows, seconds):
    assert pace.work_s(rows, 4) == pytest.approx(seconds)


def test_model_that_takes_longer_than_in_its_warm_up_is_expected_to_go_on_so(pace):
    for _ in range(100):
        pace.observe(2, 0.036)

    assert pace.call_s(2) == pytest.approx(0.036, rel=0.01)
    assert pace.call_s(8) == pytest.approx(0.120, rel=0.01)  # whatever the rows
    assert pace.work_s(8, 8) == pytest.approx(0.120, rel=0.01)


def test_model_that_is_fast_again_is_soon_expected_to_be():
    pace = Pace(WARMED)
    pace.observe(1, 1.0)

    for _ in range(100):
        pace.observe(1, 0.010)

    assert pace.call_s(1) == pytest.approx(0.010, rel=0.05)


def test_one_call_counts_for_its_weight_and_no_more(pace):
    pace.observe(1, 0.020)

    assert pace.call_s(1) == pytest.approx(0.010 * (1 + WEIGHT))


@pytest.mark.parametrize("stall_s", [0.1, 10.0])
def test_one_call_that_was_held_up_does_not_make_all_others_seem_as_slow(stall_s):
    pace = Pace({1: 0.0001, 64: 0.0025, 256: 0.010})
    for _ in range(100):
        pace.observe(256, 0.010)

    pace.observe(1, stall_s)

    assert pace.call_s(256) < 0.014
    assert pace.call_s(256) * pace.margin() < 0.040


def test_host_that_has_become_very_slow_is_learnt_of_in_a_few_calls(pace):
    for _ in range(40):
        pace.observe(1, 1.0)

    assert pace.call_s(1) == pytest.approx(1.0, rel=0.1)


def test_margin_is_wide_until_the_model_was_seen_to_run(pace):
    assert pace.margin() == 1 + DEVIATIONS * UNKNOWN == 2


def test_margin_vanishes_for_a_model_that_always_takes_the_same(pace):
    for rows in [1, 2, 4, 8, 3] * 40:
        pace.observe(rows, 1.5 * Pace(WARMED).call_s(rows))

    assert pace.margin() == pytest.approx(1.0, abs=0.01)


def test_margin_covers_what_the_model_takes_at_its_slowest(pace):
    slow = 0.020
    for seconds in [0.010, slow] * 100:
        pace.observe(1, seconds)

    assert pace.call_s(1) * pace.margin() > slow
    assert pace.margin() < 3


def test_call_that_took_no_time_by_the_clock_harms_nothing():
    pace = Pace({1: 0.0, 2: 0.0})

    pace.observe(1, 0.0)

    assert pace.call_s(1) == 0.0
    assert pace.work_s(7, 2) == 0.0
    assert pace.margin() >= 1
