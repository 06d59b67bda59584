import json

import numpy as np
import pytest

from pipeline import cost, dataset, parity
from pipeline.cost import Cost
from pipeline.errors import ParityError
from pipeline.records import Variant
from protos import bundle_pb2

OPTIONS = parity.session_options()


def test_what_is_measured_reaches_the_report_as_percentiles():
    report = bundle_pb2.ParityReport()

    Cost(0.25, 50_000, {1: [0.001] * 98 + [0.005] * 2, 8: [0.002]}).add_to(report)

    assert (report.load_seconds, report.peak_rss_kib) == (0.25, 50_000)
    assert [one.rows for one in report.latencies] == [1, 8]
    assert report.latencies[0].p50_seconds == 0.001
    assert report.latencies[0].p99_seconds == pytest.approx(0.005)


def test_a_cost_is_read_as_it_was_written():
    written = Cost(0.25, 50_000, {1: [0.001], 64: [0.1, 0.2]})

    assert Cost.parse(written.json()) == written


@pytest.fixture
def tiny_variant(tiny, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny.model())
    return Variant("onnx-float32", "onnx", "float32", path)


def test_a_process_of_its_own_loads_the_file_and_calls_it_with_every_batch(tiny, tiny_variant):
    found = cost.measure(tiny_variant, tiny.images(5), OPTIONS)

    assert list(found.seconds) == [1, 8, 64]
    assert all(len(calls) >= cost.MIN_CALLS for calls in found.seconds.values())
    assert 0 < found.load_seconds < 60
    assert found.peak_rss_kib > 10_000


def test_memory_is_the_processs_own_and_not_what_its_parent_had(tiny, tiny_variant):
    ballast = np.ones(150 << 20, np.uint8)  # getrusage would begin with it

    found = cost.measure(tiny_variant, tiny.images(5), OPTIONS)

    assert found.peak_rss_kib < ballast.nbytes >> 10


def test_a_file_that_cannot_be_loaded_is_refused_in_a_sentence(tiny, tiny_variant):
    tiny_variant.path.write_bytes(b"no model")

    with pytest.raises(ParityError, match=r"^model\.onnx cannot be measured: .*cannot load"):
        cost.measure(tiny_variant, tiny.images(1), OPTIONS)


@pytest.mark.parametrize("name", ["saved-model", "tflite-int8"])
def test_every_runtime_is_measured_alone(exports, data, name):
    variant = exports.named(name)

    found = cost.measure(variant, dataset.load(data).test.inputs, OPTIONS)

    assert json.loads(found.json())["peak_rss_kib"] == found.peak_rss_kib
    assert min(map(len, found.seconds.values())) >= cost.MIN_CALLS
