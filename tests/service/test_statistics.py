import math
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import statistics
from service.statistics import (
    BUCKETS,
    FAILURES,
    LEVELS,
    Execution,
    Figure,
    Histogram,
    Snapshot,
    Statistics,
    Store,
)

COUNTS = [figure for figure in Figure if figure not in statistics.LARGEST | set(LEVELS)]


def executed(counted: Statistics, rows: int = 2, requests: int = 1, ms: int = 5) -> None:
    counted.executed(Execution(rows, 0.25, 0.5, 0.125), [0.001] * requests, [0.002] * requests, ms)


def only(store: Store) -> Snapshot:
    (snapshot,) = store.snapshots()
    return snapshot


def observed(snapshot: Snapshot, histogram: Histogram) -> dict[str, float]:
    """Return how many were observed up to each end, and no more than up to the one before."""
    counts, _ = snapshot.histogram(histogram)
    before = [0.0, *(count for _, count in counts)]
    return {
        end: count - less
        for (end, count), less in zip(counts, before, strict=False)
        if count != less
    }


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path) -> Store:
    return Store(tmp_path if request.param == "files" else None)


def test_execution_counts_its_requests_its_rows_and_their_times(store):
    executed(store.open("tiny", 1, 8), rows=5, requests=3, ms=42)

    snapshot = only(store)
    assert (snapshot.name, snapshot.version) == ("tiny", 1)
    counted = {
        Figure.SUCCESS: 3,
        Figure.SUCCESS_S: 0.006,
        Figure.ROWS: 5,
        Figure.EXECUTIONS: 1,
        Figure.QUEUE_S: 0.003,
        Figure.INPUT_S: 0.75,  # each request waits for the whole call
        Figure.INFER_S: 1.5,
        Figure.OUTPUT_S: 0.375,
        Figure.LAST_MS: 42,
    }
    for figure in Figure:
        assert snapshot[figure] == pytest.approx(counted.get(figure, 0)), figure


@pytest.mark.parametrize("reason", FAILURES)
def test_failure_is_counted_by_its_reason_with_its_time(store, reason):
    store.open("tiny", 1, 8).failed(reason, 0.5)

    snapshot = only(store)
    assert {other: snapshot[figure] for other, figure in FAILURES.items()} == {
        other: float(other == reason) for other in FAILURES
    }
    assert snapshot[Figure.FAIL_S] == 0.5
    assert snapshot[Figure.SUCCESS] == 0


@pytest.mark.parametrize("histogram", Histogram)
def test_value_at_an_end_is_below_it_and_one_beyond_is_in_the_next_bucket(histogram):
    ends = BUCKETS[histogram]
    for place, end in enumerate(ends):
        store = Store()
        counted, beyond = store.open("tiny", 1, 8), math.nextafter(end, math.inf)
        for value in (end, beyond):
            if histogram is Histogram.REQUEST_S:
                counted.executed(Execution(1, 0, 0, 0), [], [value], 0)
            elif histogram is Histogram.QUEUE_S:
                counted.executed(Execution(1, 0, 0, 0), [value], [], 0)
            elif histogram is Histogram.INFER_S:
                counted.executed(Execution(1, 0, value, 0), [], [], 0)
            else:
                counted.executed(Execution(math.ceil(value), 0, 0, 0), [], [], 0)
        after = str(ends[place + 1]) if place + 1 < len(ends) else "+Inf"
        assert observed(only(store), histogram) == {str(end): 1, after: 1}


@pytest.mark.parametrize("histogram", Histogram)
def test_histogram_is_cumulative_ends_with_all_and_sums_what_it_saw(store, histogram):
    counted = store.open("tiny", 1, 8)
    for rows in (1, 3, 3, 10_000):
        executed(counted, rows=rows)

    counts, total = only(store).histogram(histogram)
    assert [end for end, _ in counts] == [*map(str, BUCKETS[histogram]), "+Inf"]
    assert [count for _, count in counts] == sorted(count for _, count in counts)
    assert counts[-1] == ("+Inf", 4)
    each = {
        Histogram.REQUEST_S: 0.008,
        Histogram.QUEUE_S: 0.004,
        Histogram.INFER_S: 2.0,
        Histogram.BATCH_ROWS: 10_007,
    }
    assert total == pytest.approx(each[histogram])


def test_executions_are_told_by_their_rows_up_to_the_largest_batch(store):
    counted = store.open("tiny", 1, 8)
    for rows in (1, 8, 8, 9):  # 9: beyond what the row has room for
        executed(counted, rows=rows)

    assert only(store).by_size() == [
        (1, 1, Execution(1, 0.25, 0.5, 0.125)),
        (8, 2, Execution(8, 0.5, 1.0, 0.25)),
    ]
    assert only(store)[Figure.EXECUTIONS] == 4


def test_huge_batches_take_no_more_room_than_the_largest_that_is_told_apart(store):
    counted = store.open("tiny", 1, 1 << 20)
    executed(counted, rows=statistics.MAX_BATCH_SIZES)
    executed(counted, rows=statistics.MAX_BATCH_SIZES + 1)

    assert [(rows, count) for rows, count, _ in only(store).by_size()] == [(4096, 1)]
    assert only(store)[Figure.ROWS] == 2 * 4096 + 1


def test_version_that_is_opened_again_for_larger_batches_counts_on(store):
    before = store.open("tiny", 1, 2)
    executed(before, rows=2)
    before.set(Figure.PENDING_REQUESTS, 7)
    before.set(Figure.READY, 1)

    after = store.open("tiny", 1, 8)
    executed(after, rows=8)
    executed(before, rows=3)  # as calls that began before

    snapshot = only(store)
    assert [rows for rows, _, _ in snapshot.by_size()] == [2, 3, 8]
    assert snapshot[Figure.EXECUTIONS] == 3
    assert (snapshot[Figure.PENDING_REQUESTS], snapshot[Figure.READY]) == (7, 1)
    assert store.open("tiny", 1, 4) is after


@pytest.fixture
def _eager_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
def test_adds_from_many_threads_are_all_counted(store):
    counted = store.open("tiny", 1, 8)
    start = threading.Barrier(9)

    def work():
        start.wait()
        for _ in range(500):
            counted.add(Figure.REFUSED)
            counted.failed("OTHER", 0.5)
            executed(counted)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    for rows in range(9, 200):  # as a reload with larger batches does meanwhile
        assert store.open("tiny", 1, rows) is counted
    for thread in threads:
        thread.join()

    snapshot = only(store)
    assert snapshot[Figure.REFUSED] == snapshot[Figure.OTHER] == 4000
    assert snapshot[Figure.SUCCESS] == snapshot.by_size()[0][1] == 4000
    assert snapshot[Figure.FAIL_S] == 2000


def test_dropped_version_is_gone_and_begins_anew_when_it_comes_back(store):
    executed(store.open("tiny", 1, 8))
    store.open("tiny", 2, 8)

    store.drop("tiny", 1)
    store.drop("tiny", 3)  # was never there

    assert [snapshot.version for snapshot in store.snapshots()] == [2]
    store.open("tiny", 1, 8)
    assert store.snapshots()[0][Figure.SUCCESS] == 0


def test_versions_are_told_apart_and_come_by_name_and_number(store):
    for name, version in (("b", 1), ("a.b-c_d", 10), ("a.b-c_d", 9)):
        store.open(name, version, 8).add(Figure.SUCCESS, version)

    found = [(one.name, one.version, one[Figure.SUCCESS]) for one in store.snapshots()]
    assert found == [("a.b-c_d", 9, 9), ("a.b-c_d", 10, 10), ("b", 1, 1)]


def test_counts_of_two_workers_are_added_up_and_the_larger_of_other_figures_is_taken(tmp_path):
    stores = [Store(tmp_path, worker) for worker in range(2)]
    for store, value, rows in zip(stores, (1, 10), (2, 8), strict=True):
        counted = store.open("tiny", 1, rows)
        for figure in Figure:
            counted.set(figure, value)
        executed(counted, rows=rows, ms=value)

    merged = Store(tmp_path, worker=2).snapshots()
    assert stores[0].snapshots() == stores[1].snapshots() == merged
    for figure in statistics.LARGEST:
        assert merged[0][figure] == 10, figure
    assert merged[0][Figure.REFUSED] == merged[0][Figure.PENDING_ROWS] == 11
    assert merged[0][Figure.SUCCESS] == 13
    assert [(rows, count) for rows, count, _ in merged[0].by_size()] == [(2, 1), (8, 1)]


COUNT = """
import sys
from pathlib import Path
from service.statistics import Execution, Store

rows = int(sys.argv[2])
counted = Store(Path(sys.argv[1]), rows).open("tiny", 1, 8)
counted.executed(Execution(rows, 0.25, 0.5, 0.125), [0.001], [0.002], 5)
"""


def test_what_another_process_counted_is_seen_and_outlives_it(tmp_path):
    for rows in ("1", "2"):
        subprocess.run([sys.executable, "-c", COUNT, tmp_path, rows], check=True, timeout=60)

    assert [(rows, count) for rows, count, _ in only(Store(tmp_path)).by_size()] == [(1, 1), (2, 1)]


def test_worker_knows_whether_another_had_its_place(tmp_path):
    first = Store(tmp_path, 1)
    assert not first.is_successors()
    first.open("tiny", 1, 8)

    assert Store(tmp_path, 1).is_successors()
    assert not Store(tmp_path, 0).is_successors()
    assert not Store().is_successors()


def test_worker_that_takes_anothers_place_keeps_its_counts_and_not_its_levels(tmp_path):
    other = Store(tmp_path, 1).open("tiny", 1, 8)
    for version in (1, 2):
        dead = Store(tmp_path, 0).open("tiny", version, 8)
        for figure in Figure:
            dead.set(figure, 5)
    other.set(Figure.PENDING_ROWS, 3)

    store = Store(tmp_path, 0)
    assert store.snapshots()[1][Figure.READY] == 5  # nothing is opened by looking
    executed(store.open("tiny", 1, 16), rows=16)

    first, second = store.snapshots()
    assert first[Figure.PENDING_ROWS] == 3  # of the worker beside it
    assert [first[figure] for figure in (Figure.PENDING_REQUESTS, Figure.READY)] == [0, 0]
    assert [second[level] for level in LEVELS] == [0, 0, 0]  # though nobody opens it again
    assert all(second[figure] == 5 for figure in COUNTS)
    assert first[Figure.SUCCESS] == 6


@pytest.mark.parametrize("size_bytes", [0, 3, 8 * len(Figure) + 5, 8 * 100 + 1])
def test_file_that_is_half_written_is_read_as_far_as_it_goes_and_counted_on_in(
    tmp_path, size_bytes
):
    Store(tmp_path).open("tiny", 1, 8).add(Figure.SUCCESS)
    file = tmp_path / "0" / "tiny~1"
    file.write_bytes(file.read_bytes()[:size_bytes])
    counted = float(size_bytes > 8)

    for reader in (Store(tmp_path), Store(tmp_path, 1)):
        snapshot = only(reader)
        assert snapshot[Figure.SUCCESS] == counted
        assert snapshot.by_size() == []
        assert snapshot.histogram(Histogram.BATCH_ROWS)[0][-1] == ("+Inf", 0)
    store = Store(tmp_path)
    executed(store.open("tiny", 1, 8), rows=8)
    assert only(store)[Figure.SUCCESS] == counted + 1
    assert [rows for rows, _, _ in only(store).by_size()] == [8]


def test_file_that_is_none_of_ours_is_passed_over(tmp_path):
    Store(tmp_path).open("tiny", 1, 8)
    for name in ("tiny~", "tiny~1.part", "notes"):
        (tmp_path / "0" / name).write_bytes(b"12345678")

    assert [(one.name, one.version) for one in Store(tmp_path).snapshots()] == [("tiny", 1)]


def test_figures_of_workers_that_have_not_begun_are_none(tmp_path):
    assert Store(tmp_path / "not-there").snapshots() == []
    assert Store().snapshots() == []


@given(
    st.lists(
        st.sampled_from([0.0, *BUCKETS[Histogram.QUEUE_S], 11.0]) | st.floats(0, 20),
        min_size=1,
        max_size=60,
    )
)
def test_many_values_at_once_fall_where_each_of_them_would(values):
    together, apart = Store(), Store()

    together.open("m", 1, 64).executed(Execution(1, 0, 0, 0), values, values, 0)
    counted = apart.open("m", 1, 64)
    for value in values:
        counted.executed(Execution(1, 0, 0, 0), [value], [value], 0)

    (one,), (other,) = together.snapshots(), apart.snapshots()
    for histogram in (Histogram.QUEUE_S, Histogram.REQUEST_S):
        (counts, total), (expected, sum_expected) = (
            one.histogram(histogram),
            other.histogram(histogram),
        )
        assert counts == expected
        assert total == pytest.approx(sum_expected)
