import logging
import math
import threading
from copy import deepcopy

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from protos import bundle_pb2, parity_pb2
from service import agreement
from service.errors import InvalidRequestError, PreconditionError
from service.live import BUCKETS, MIN_ROWS, READER, LiveStore, Tally, check, cleaned

KEY = ("tiny", 3)
WINDOW_S = 300.0
FLOAT32 = agreement.Budget("float32", 100.0)
INT8 = agreement.Budget("int8", 100.0)
PASSED, FAILED = parity_pb2.LIVE_VERDICT_PASSED, parity_pb2.LIVE_VERDICT_FAILED
NONE = parity_pb2.LIVE_VERDICT_UNSPECIFIED
MANIFEST = bundle_pb2.BundleManifest(
    kind=bundle_pb2.KIND_CLASSIFIER,
    labels=["a", "b"],
    input=bundle_pb2.TensorSpec(datatype="UINT8", shape=[-1, 2, 2, 1]),
)
GENERIC = bundle_pb2.BundleManifest(
    kind=bundle_pb2.KIND_GENERIC,
    input=bundle_pb2.TensorSpec(datatype="FP32", shape=[-1, 3]),
)


class Clock:
    """A clock that the test winds."""

    def __init__(self):
        self.now_s = 1e6

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return LiveStore(window_s=WINDOW_S, clock=clock)


def opened(store, budget=FLOAT32, expected=None, key=KEY, sampled=10**6):
    live = store.open(key, budget.message(), expected or bundle_pb2.TestDistribution())
    live.count(sampled=sampled)
    return live


def figures(rows=10, **fields):
    """Return figures of rows that all agree, but for what is given."""
    usual = {
        "agreed": rows,
        "predicted": [rows, 0],
        "pixel_mean": [rows, *[0] * (agreement.PIXEL_BINS - 1)],
        "sum_confidence": rows / 2,
    }
    return parity_pb2.ShadowFigures(rows=rows, **{**usual, **fields})


def test_version_has_no_live_parity_before_the_first_report(store):
    live = opened(store)

    assert live.message() is None
    assert (live.counts().sampled, live.counts().verdict) == (10**6, NONE)


def test_reports_are_added_up_since_the_version_was_loaded(store):
    live = opened(store)

    live.add(figures(10, max_logit=1e-5, sum_logit=5e-5))
    live.add(figures(20, max_logit=5e-6, sum_logit=6e-5, predicted=[5, 15]))

    found = live.message()
    assert (found.total.rows, found.total.agreed, list(found.total.predicted)) == (30, 30, [15, 15])
    assert found.total.max_logit == 1e-5
    assert found.total.sum_logit == pytest.approx(11e-5)
    assert found.window == found.total
    assert (found.window_s, found.budget) == (WINDOW_S, FLOAT32.message())
    assert found.reported.endswith("Z")


def test_window_forgets_what_was_reported_before_it_and_the_total_does_not(store, clock):
    live = opened(store)
    live.add(figures(10))
    clock.now_s += WINDOW_S / 2
    live.add(figures(20))

    clock.now_s += WINDOW_S / 2 - WINDOW_S / BUCKETS
    assert live.message().window.rows == 30
    clock.now_s += 3 * WINDOW_S / BUCKETS
    assert live.message().window.rows == 20
    clock.now_s += WINDOW_S
    found = live.message()

    assert (found.window.rows, found.total.rows, found.verdict) == (0, 30, NONE)


def test_memory_of_a_version_does_not_grow_with_its_reports(store, clock):
    live = opened(store)

    for _ in range(10 * BUCKETS):
        clock.now_s += WINDOW_S / BUCKETS
        live.add(figures(1))

    assert len(live._tally.buckets) <= BUCKETS + 1
    assert live.message().total.rows == 10 * BUCKETS


@pytest.mark.parametrize(
    ("budget", "fields", "failure"),
    [
        (FLOAT32, {"max_logit": FLOAT32.max_logit}, ""),
        (FLOAT32, {"max_logit": 0.00101}, "max |Δlogit| is 0.00101, over the float32 budget of"),
        (FLOAT32, {"max_logit": math.inf}, "a logit is not finite"),
        (FLOAT32, {"agreed": 9, "flips_explained": 1}, ""),
        (FLOAT32, {"agreed": 9, "flips_unexplained": 1}, "1 rows change their top-1 class"),
        (INT8, {"max_logit": 50.0}, ""),  # what few rows may: a maximum is no percentile
        (INT8, {"max_logit": math.inf}, "a logit is not finite"),
        (INT8, {"agreed": 9, "flips_unexplained": 1}, "1 rows change their top-1 class"),
        (INT8, {"agreed": 5, "flips_explained": 5}, ""),  # too few to tell
        (INT8, {"rows": 500, "agreed": 495, "flips_explained": 5}, ""),
        (INT8, {"rows": 500, "agreed": 494, "flips_explained": 6}, "agreement is 0.9880, expected"),
        (FLOAT32, {"rows": 500, "agreed": 400, "flips_explained": 100}, ""),
    ],
)
def test_verdict_is_that_of_the_variant_s_budget(store, budget, fields, failure):
    live = opened(store, budget)

    live.add(figures(**{"rows": 10, **fields}))

    found = live.message()
    assert found.verdict == (FAILED if failure else PASSED)
    assert (failure in found.failure) if failure else found.failure == ""


def test_failure_is_over_when_it_has_left_the_window(store, clock):
    live = opened(store)
    live.add(figures(max_logit=1.0))
    assert live.message().verdict == FAILED

    clock.now_s += WINDOW_S * (1 + 2 / BUCKETS)
    assert live.message().verdict == NONE
    live.add(figures())

    assert live.message().verdict == PASSED
    assert live.message().total.max_logit == 1.0


def test_verdict_is_logged_when_it_turns_and_not_at_every_report(store, clock, caplog):
    caplog.set_level(logging.INFO)
    live = opened(store)

    for _ in range(3):
        live.add(figures())
    assert not caplog.records
    for _ in range(3):
        live.add(figures(7, max_logit=0.5))
    (warning,) = caplog.records
    assert (warning.levelname, warning.model, warning.version) == ("WARNING", *KEY)
    assert warning.getMessage() == (
        "live parity is broken: tiny 3, max |Δlogit| is 0.5, over the float32 budget of 0.001; "
        "of 37 rows in the last 300 s"
    )
    clock.now_s += 2 * WINDOW_S
    for _ in range(3):
        live.add(figures())
    _, good = caplog.records
    assert (good.levelname, good.getMessage()) == (
        "INFO",
        "live parity holds again: tiny 3, max |Δlogit| 0 of 0.001 allowed; "
        "of 10 rows in the last 300 s",
    )


def test_drift_is_told_from_500_rows_on_where_the_test_set_is_known(store):
    bins = [500, 500, *[0] * (agreement.PIXEL_BINS - 2)]
    expected = bundle_pb2.TestDistribution(predicted=[500, 500], pixel_mean=bins)
    live = opened(store, expected=expected)
    live.add(figures(MIN_ROWS - 1, predicted=[250, 249], pixel_mean=[250, 249, *bins[2:]]))
    found = live.message()
    assert not found.HasField("predicted_psi")
    assert not found.HasField("pixel_mean_psi")

    live.add(figures(1, predicted=[0, 1], pixel_mean=[0, 1, *bins[2:]]))
    found = live.message()
    assert found.predicted_psi == pytest.approx(0, abs=1e-9)
    assert found.pixel_mean_psi == pytest.approx(0, abs=1e-9)

    live.add(figures(MIN_ROWS, predicted=[MIN_ROWS, 0]))
    found = live.message()
    assert found.predicted_psi == agreement.stability_index([500, 500], [750, 250])
    assert found.pixel_mean_psi == agreement.stability_index(bins, found.window.pixel_mean)
    assert found.predicted_psi > 0.2


@pytest.mark.parametrize(
    "expected",
    [
        bundle_pb2.TestDistribution(),
        bundle_pb2.TestDistribution(predicted=[1, 2, 3], pixel_mean=[1]),
        bundle_pb2.TestDistribution(predicted=[0, 0], pixel_mean=[0] * agreement.PIXEL_BINS),
    ],
)
def test_drift_is_not_told_of_a_manifest_without_a_distribution_of_its_classes(store, expected):
    live = opened(store, expected=expected)

    live.add(figures(MIN_ROWS))

    assert not live.message().HasField("predicted_psi")
    assert not live.message().HasField("pixel_mean_psi")


def test_no_more_rows_are_reported_than_shadows_were_handed(store):
    live = opened(store, sampled=15)
    live.add(figures(10))

    with pytest.raises(PreconditionError) as caught:
        live.add(figures(6))
    live.add(figures(5))

    assert str(caught.value) == (
        "6 rows are reported of 'tiny' version 3, of which 5 were handed to shadows since it was "
        "loaded and not yet reported; report each sampled row once"
    )
    assert live.message().total.rows == 15


def test_reports_that_come_together_are_not_more_than_was_handed_over(store):
    live = opened(store, sampled=100)
    refused = []

    def report():
        for _ in range(50):
            try:
                live.add(figures(1))
            except PreconditionError:
                refused.append(1)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (live.message().total.rows, len(refused)) == (100, 100)


def test_version_that_is_loaded_anew_begins_with_nothing(store):
    opened(store).add(figures())

    again = opened(store)
    assert again.message() is None
    store.drop(KEY)

    assert store.all() == []


def test_every_version_is_listed_by_name_and_number(store):
    opened(store, key=("b", 1), sampled=1)
    opened(store, key=("a", 10), sampled=2)
    opened(store, key=("a", 9), sampled=3)

    assert [(key, live.sampled) for key, live in store.all()] == [
        (("a", 9), 3),
        (("a", 10), 2),
        (("b", 1), 1),
    ]


# Several workers


@pytest.fixture
def workers(tmp_path, clock):
    """Return a function that opens the store of one worker, by its number."""
    return lambda number: LiveStore(tmp_path, number, window_s=WINDOW_S, clock=clock)


def test_what_one_worker_is_told_all_of_them_tell(workers):
    first, second, keeper = workers(0), workers(1), workers(READER)
    one, other = opened(first, sampled=10), opened(second, sampled=20)

    one.add(figures(25))  # of which another worker has handed over some
    other.add(figures(5, max_logit=1.0))

    for found in (one.message(), other.message(), keeper.all()[0][1], first.all()[0][1]):
        assert (found.total.rows, found.window.rows, found.sampled) == (30, 30, 30)
        assert found.verdict == FAILED
    with pytest.raises(PreconditionError):
        one.add(figures(1))
    assert [key for key, _ in keeper.all()] == [KEY]


def test_rows_that_another_worker_has_handed_over_may_be_reported_one_after_the_other(workers):
    reporting, _, sampling = (opened(workers(number), sampled=0) for number in range(3))
    sampling.count(sampled=2)

    for _ in range(2):
        reporting.add(figures(1))

    with pytest.raises(PreconditionError):
        reporting.add(figures(1))


def test_worker_that_takes_another_s_place_begins_with_nothing(workers):
    opened(workers(0)).add(figures(10))
    opened(workers(1)).add(figures(20))

    again = opened(workers(0))

    assert again.message().total.rows == 20


def test_worker_that_drops_a_version_takes_its_figures_along(workers):
    first, second = workers(0), workers(1)
    one, other = opened(first), opened(second)
    one.add(figures(10))
    other.add(figures(20))

    first.drop(KEY)
    one.count(sampled=1)  # by a call that is not over yet

    assert other.message().total.rows == 20


def test_files_that_are_no_figures_are_passed_over(workers, tmp_path):
    live = opened(workers(0))
    live.add(figures(10))
    for name in ("tiny~3.1", "tiny~3.2", "nonsense", "tiny~x.1", ".tiny~3.4"):
        (tmp_path / "live" / name).write_bytes(b"{}" if name.endswith("2") else b"\xff")

    assert live.message().total.rows == 10
    assert len(workers(READER).all()) == 1


def test_figures_of_a_worker_with_other_classes_are_not_added(workers):
    first, second = opened(workers(0)), opened(workers(1))
    first.add(figures(10))
    second.add(figures(20, predicted=[1, 2, 17]))

    assert first.message().total.rows == 10
    assert second.message().total.rows == 20


def test_files_are_written_whole_while_they_are_read(workers):
    writer, keeper = opened(workers(0)), workers(READER)
    over = threading.Event()

    def write():
        for _ in range(300):
            writer.add(figures(2, agreed=1, flips_explained=1))
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    while not over.is_set():
        for _, live in keeper.all():
            seen.append(live.total)
    thread.join()

    assert all(one.agreed == one.flips_explained == one.rows / 2 for one in seen)
    assert seen[-1].rows > 0


@given(rows=st.integers(1, 1000), inf=st.booleans(), places=st.lists(st.integers(-9, 9)))
def test_tally_is_read_as_it_was_written(rows, inf, places):
    one = figures(rows, max_logit=math.inf if inf else 0.5)
    tally = Tally(FLOAT32.message(), bundle_pb2.TestDistribution(predicted=[1]), one)
    tally.buckets = dict.fromkeys(places, one)
    tally.reported, tally.sampled, tally.dropped = "2026-01-01T00:00:00Z", rows, 3

    assert Tally.read(tally.written()) == tally


# What is believed


def real(rows=50, seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 10, (rows, 2)).astype(np.float32)
    served = reference + rng.normal(0, 1e-4, (rows, 2)).astype(np.float32)
    inputs = rng.integers(0, 256, (rows, 2, 2, 1), np.uint8)
    return reference, served, inputs


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("whose", [0, 1])
def test_what_agreement_counts_is_believed_and_can_be_added(store, bad, whose):
    pair = list(real())
    if bad is not None:
        pair[whose][3, 1] = bad
    reference, served, inputs = pair
    found = agreement.figures(reference, served, inputs, allowed=FLOAT32)
    live = opened(store)

    for _ in range(2):
        check(found, MANIFEST)
        live.add(cleaned(found))

    told = live.message()
    assert told.verdict == (PASSED if bad is None else FAILED)
    assert 0 <= told.total.sum_confidence <= told.total.rows
    assert not math.isnan(told.total.sum_logit)


def test_figures_of_a_generic_model_are_believed():
    outputs = np.ones((4, 3), np.float32)

    check(agreement.figures(outputs, outputs, outputs, allowed=FLOAT32, classes=False), GENERIC)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rows": 0, "agreed": 0}, "the report has no rows, expected at least one"),
        ({"agreed": 9}, "9 rows agreed and 0 + 0 flipped, expected 10 together"),
        ({"flips_explained": 1}, "10 rows agreed and 1 + 0 flipped, expected 10 together"),
        ({"agreed": 2**64 - 1, "flips_unexplained": 11}, "expected 10 together"),
        ({"predicted": [10]}, "predicted has 1 counts that add up to 10, expected 2 that add up"),
        ({"predicted": [10, 0, 0]}, "predicted has 3 counts"),
        ({"predicted": [10, 1]}, "predicted has 2 counts that add up to 11, expected 2"),
        ({"predicted": []}, "predicted has 0 counts that add up to 0, expected 2"),
        ({"pixel_mean": [10]}, "pixel_mean has 1 counts that add up to 10, expected 16"),
        ({"pixel_mean": []}, "pixel_mean has 0 counts"),
        ({"max_logit": math.nan}, "max_logit is nan, expected 0 or more, or infinity"),
        ({"max_logit": -1.0}, "max_logit is -1.0, expected 0 or more, or infinity"),
        ({"sum_logit": math.nan}, "sum_logit is nan, expected 0 to 0"),
        ({"sum_logit": math.inf, "max_logit": 1.0}, "sum_logit is inf, expected 0 to 10"),
        ({"sum_logit": 11.0, "max_logit": 1.0}, "sum_logit is 11.0, expected 0 to 10"),
        ({"sum_logit": -1.0}, "sum_logit is -1.0, expected 0 to 0"),
        ({"sum_confidence": 10.1}, "sum_confidence is 10.1, expected 0 to 10"),
        ({"sum_confidence": math.nan}, "sum_confidence is nan, expected 0 to 10"),
        ({"sum_confidence": -1.0}, "sum_confidence is -1.0, expected 0 to 10"),
    ],
)
def test_figures_that_contradict_themselves_are_refused(fields, reason):
    with pytest.raises(InvalidRequestError) as caught:
        check(figures(**{"rows": 10, **fields}), MANIFEST)

    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{"predicted": [10]}, {"pixel_mean": [10]}, {"agreed": 9, "flips_explained": 1}]
)
def test_classes_and_pixels_of_a_model_that_has_none_are_refused(fields):
    plain: dict[str, list[int]] = {"predicted": [], "pixel_mean": []}
    check(figures(10, **plain), GENERIC)

    with pytest.raises(InvalidRequestError):
        check(figures(10, **{**plain, **fields}), GENERIC)


numbers = st.floats() | st.sampled_from([0.0, 1.0, math.inf])
counts = st.integers(0, 2**64 - 1) | st.integers(0, 20)


@given(
    st.builds(
        parity_pb2.ShadowFigures,
        rows=counts,
        agreed=counts,
        flips_explained=counts,
        flips_unexplained=counts,
        max_logit=numbers,
        sum_logit=numbers,
        sum_confidence=numbers,
        predicted=st.lists(counts, max_size=3),
        pixel_mean=st.lists(counts, max_size=17),
    )
    | st.builds(
        figures,
        rows=st.integers(1, 10**6),
        max_logit=numbers,
        sum_logit=numbers,
        sum_confidence=numbers,
    )
)
def test_hostile_figures_are_refused_or_do_no_harm(found):
    live = opened(LiveStore())
    before = deepcopy(found)
    try:
        check(found, MANIFEST)
        live.add(cleaned(found))
    except (InvalidRequestError, PreconditionError) as error:
        assert str(error)
        assert live.message() is None
        return

    told = live.message()
    assert found == before or math.isnan(found.sum_confidence) or math.isnan(found.sum_logit)
    assert (
        told.total.rows
        == found.rows
        == told.total.agreed + told.total.flips_explained + (told.total.flips_unexplained)
    )
    assert not any(math.isnan(one) for one in (told.total.sum_logit, told.total.sum_confidence))
    json_format.MessageToJson(told)


def test_reader_of_a_folder_that_is_gone_finds_nothing(tmp_path):
    assert LiveStore(tmp_path / "none", READER).all() == []
    assert not list(tmp_path.iterdir())
