import threading

import numpy as np
import pytest

from protos import inference_pb2
from service.errors import ModelNotFoundError
from service.statistics import FAILURES, Execution, Figure, Store
from service.statistics_rpc import statistics

Request = inference_pb2.ModelStatisticsRequest


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return Store(tmp_path if request.param == "files" else None)


def ready(store, name, version, max_batch_rows=8):
    counted = store.open(name, version, max_batch_rows)
    counted.set(Figure.READY, 1)
    return counted


def named(response):
    return [(one.name, one.version) for one in response.model_stats]


def test_executions_are_told_by_request_and_by_batch_size(store):
    counted = ready(store, "tiny", 3)
    # Three requests in one call of five rows, then one in a call of its own.
    counted.executed(Execution(5, 0.25, 0.5, 0.125), [0.001, 0.002, 0.003], [1.0, 2.0, 3.0], 17)
    counted.executed(Execution(1, 0.0, 0.25, 0.0), [0.0], [0.5], 18)

    (one,) = statistics(store, Request(name="tiny")).model_stats

    assert (one.name, one.version, one.last_inference) == ("tiny", "3", 18)
    assert (one.inference_count, one.execution_count) == (6, 2)
    told = {
        field.name: (value.count, value.ns) for field, value in one.inference_stats.ListFields()
    }
    assert told == {
        "success": (4, 6_500_000_000),
        "fail": (0, 0),
        "queue": (4, 6_000_000),
        "compute_input": (4, 750_000_000),
        "compute_infer": (4, 1_750_000_000),
        "compute_output": (4, 375_000_000),
    }
    sizes = {one.batch_size: one for one in one.batch_stats}
    assert set(sizes) == {1, 5}
    assert (sizes[5].compute_infer.count, sizes[5].compute_infer.ns) == (1, 500_000_000)
    assert (sizes[5].compute_input.ns, sizes[5].compute_output.ns) == (250_000_000, 125_000_000)
    assert (sizes[1].compute_infer.count, sizes[1].compute_infer.ns) == (1, 250_000_000)


def test_failures_of_every_reason_are_told_together(store):
    counted = ready(store, "tiny", 1)
    for reason in FAILURES:
        counted.failed(reason, 0.25)

    (one,) = statistics(store, Request()).model_stats

    assert (one.inference_stats.fail.count, one.inference_stats.fail.ns) == (4, 1_000_000_000)
    assert one.inference_stats.success.count == 0
    assert not one.batch_stats


def test_name_and_version_choose_and_without_them_all_are_told_in_order(store):
    for name, version in (("b", 10), ("b", 9), ("a", 1)):
        ready(store, name, version)

    assert named(statistics(store, Request())) == [("a", "1"), ("b", "9"), ("b", "10")]
    assert named(statistics(store, Request(name="b"))) == [("b", "9"), ("b", "10")]
    assert named(statistics(store, Request(name="b", version="9"))) == [("b", "9")]


def test_version_that_is_not_ready_has_none(store):
    ready(store, "tiny", 1)
    store.open("tiny", 2, 1).add(Figure.REFUSED)

    assert named(statistics(store, Request())) == [("tiny", "1")]
    with pytest.raises(ModelNotFoundError):
        statistics(store, Request(name="tiny", version="2"))


def test_unknown_model_or_version_is_refused_and_an_empty_server_answers_nothing(store):
    assert named(statistics(store, Request())) == []

    with pytest.raises(ModelNotFoundError) as caught:
        statistics(store, Request(name="none"))
    assert str(caught.value) == "Request for unknown model: 'none' is not found"
    with pytest.raises(ModelNotFoundError) as caught:
        statistics(store, Request(name="none", version="7"))
    assert str(caught.value) == "Request for unknown model: 'none' version 7 is not found"


def test_figures_of_several_workers_are_added_up(tmp_path):
    for worker, requests in ((0, 2), (1, 3)):
        counted = ready(Store(tmp_path, worker), "tiny", 1)
        counted.executed(
            Execution(requests, 0.0, 0.5, 0.0), [0.0] * requests, [1.0] * requests, 10 + worker
        )

    (one,) = statistics(Store(tmp_path, 0), Request(name="tiny")).model_stats

    assert (one.inference_count, one.execution_count, one.last_inference) == (5, 2, 11)
    assert one.inference_stats.success.count == 5


def test_server_counts_every_request_and_row_it_answers_and_every_one_it_refuses(ask, infer, tiny):
    for rows in (1, 2, 2, 8):
        ask("ModelInfer", infer(tiny.images(rows)))
    for _ in range(3):
        with pytest.raises(Exception, match="batch-size must be <= 8"):
            ask("ModelInfer", infer(tiny.images(9)))

    (one,) = ask("ModelStatistics", Request(name="tiny")).model_stats

    assert one.inference_count == 13
    assert one.inference_stats.success.count == 4
    assert one.inference_stats.fail.count == 3
    assert one.execution_count == sum(size.compute_infer.count for size in one.batch_stats) == 4
    assert {size.batch_size: size.compute_infer.count for size in one.batch_stats} == {
        1: 1,
        2: 2,
        8: 1,
    }
    assert one.inference_stats.compute_infer.ns > 0


def test_rows_that_were_answered_together_are_counted_once_each(ask, infer, tiny):
    images = [tiny.images(rows, seed=rows) for rows in (1, 2, 3)] * 20
    threads = [threading.Thread(target=ask, args=("ModelInfer", infer(each))) for each in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    (one,) = ask("ModelStatistics", Request()).model_stats

    assert one.inference_count == np.sum([len(each) for each in images])
    assert one.inference_stats.success.count == len(images)
    assert one.inference_count == sum(
        size.batch_size * size.compute_infer.count for size in one.batch_stats
    )
