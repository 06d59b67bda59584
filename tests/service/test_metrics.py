import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from protos import bundle_pb2, parity_pb2
from service import agreement, host
from service.live import LiveStore
from service.metrics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    LIVE_COUNTERS,
    LIVE_GAUGES,
    PARITY,
    Metrics,
)
from service.statistics import FAILURES, Execution, Figure, Store

TINY = {"model": "tiny", "version": "3"}
# Triton's own, of a model on a CPU, without its cache and without those of the whole machine.
TRITON = {
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_inference_pending_request_count": "gauge",
    "nv_model_load_duration_secs": "gauge",
}


def metrics(store: Store, pids=lambda: [os.getpid()]) -> Metrics:
    return Metrics(store.snapshots, pids, version="1.2.3", onnxruntime="1.32.0")


LINE = re.compile(r"(?P<name>[a-z_]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


def samples(told: Metrics) -> list[tuple[str, dict[str, str], float]]:
    """Return name, labels and value of each line, as Prometheus reads them.

    The library's own parser would give counters the `_total` that theirs do not have.
    """
    found = []
    for line in told.text().decode().splitlines():
        if not line.startswith("#"):
            parts = LINE.fullmatch(line)
            assert parts is not None, line
            labels = dict(re.findall(r'([a-z]+)="([^"]*)"', parts["labels"] or ""))
            found.append((parts["name"], labels, float(parts["value"])))
    return found


def value(told: Metrics, name: str, **labels: str) -> float:
    """Return the one sample of that name with exactly these labels."""
    (found,) = (one[2] for one in samples(told) if one[:2] == (name, labels))
    return found


@pytest.fixture
def store() -> Store:
    store = Store()
    counted = store.open("tiny", 3, 8)
    counted.executed(Execution(5, 0.25, 0.5, 0.125), [0.0001, 0.3], [0.25, 20.0], 42)
    counted.failed("REJECTED", 0.5)
    counted.set(Figure.PENDING_REQUESTS, 2)
    counted.set(Figure.PENDING_ROWS, 9)
    counted.set(Figure.LOAD_S, 1.5)
    counted.set(Figure.READY, 1)
    counted.set(Figure.MAX_LOGIT_DIFFERENCE, 3.8e-06)
    counted.set(Figure.MAX_LOGIT_ALLOWED, 0.0001)
    counted.set(Figure.AGREEMENT, 0.995)
    return store


def test_tritons_metrics_have_tritons_names_types_and_labels(store):
    text = metrics(store).text().decode()

    for name, kind in TRITON.items():
        assert f"# TYPE {name} {kind}\n" in text
        labels = '{model="tiny",version="3"} '
        if name == "nv_inference_request_failure":
            labels = '{model="tiny",reason="REJECTED",version="3"} '
        assert f"\n{name}{labels}" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nv_inference_request_success", 2),
        ("nv_inference_count", 5),
        ("nv_inference_exec_count", 1),
        ("nv_inference_request_duration_us", 20_250_000),
        ("nv_inference_queue_duration_us", 300_100),
        ("nv_inference_compute_input_duration_us", 500_000),
        ("nv_inference_compute_infer_duration_us", 1_000_000),
        ("nv_inference_compute_output_duration_us", 250_000),
        ("nv_inference_pending_request_count", 2),
        ("nv_model_load_duration_secs", 1.5),
        ("serve_export_queue_rows", 9),
        ("serve_export_version_ready", 1),
        ("serve_export_versions_refused", 0),
        ("serve_export_parity_max_logit_difference", 3.8e-06),
        ("serve_export_parity_max_logit_allowed", 0.0001),
        ("serve_export_parity_agreement", 0.995),
    ],
)
def test_figure_is_told_in_its_unit(store, name, expected):
    assert value(metrics(store), name, **TINY) == pytest.approx(expected)


def test_failures_are_told_by_reason_before_there_are_any(store):
    told = metrics(store)

    for reason in FAILURES:
        failures = value(told, "nv_inference_request_failure", reason=reason, **TINY)
        assert failures == float(reason == "REJECTED")


@pytest.mark.parametrize(
    ("name", "buckets", "total"),
    [
        (
            "nv_inference_request_duration_histogram_us",
            {"100000.0": 0, "250000.0": 1, "10000000.0": 1, "+Inf": 2},
            20_250_000,
        ),
        (
            "nv_inference_queue_duration_histogram_us",
            {"100.0": 1, "250000.0": 1, "500000.0": 2, "+Inf": 2},
            300_100,
        ),
        (
            "nv_inference_compute_infer_duration_histogram_us",
            {"250000.0": 0, "500000.0": 1, "+Inf": 1},
            500_000,
        ),
        ("serve_export_batch_rows", {"4.0": 0, "8.0": 1, "4096.0": 1, "+Inf": 1}, 5),
    ],
)
def test_histogram_is_a_true_one(store, name, buckets, total):
    told = metrics(store)

    assert f"# TYPE {name} histogram\n".encode() in told.text()
    for end, count in buckets.items():
        assert value(told, f"{name}_bucket", le=end, **TINY) == count
    assert value(told, f"{name}_count", **TINY) == buckets["+Inf"]
    assert value(told, f"{name}_sum", **TINY) == pytest.approx(total)


def test_ends_of_buckets_are_whole_microseconds_and_all_there(store):
    name = "nv_inference_queue_duration_histogram_us_bucket"
    ends = [labels["le"] for found, labels, _ in samples(metrics(store)) if found == name]

    assert len(ends) == 16
    assert all(end == "+Inf" or float(end).is_integer() for end in ends)


def test_parity_of_a_version_that_was_not_checked_is_not_told():
    store = Store()
    store.open("tiny", 3, 8).add(Figure.REFUSED)
    told = metrics(store)

    assert not {*PARITY} & {name for name, _, _ in samples(told)}
    assert value(told, "serve_export_versions_refused", **TINY) == 1
    assert value(told, "serve_export_version_ready", **TINY) == 0


def test_figures_of_all_workers_are_one(tmp_path):
    stores = [Store(tmp_path, worker) for worker in range(3)]
    for store in stores:
        counted = store.open("tiny", 3, 8)
        counted.executed(Execution(4, 0, 0.5, 0), [0.1], [0.2], 1)
        counted.show_pending(2, 7)

    told = metrics(stores[0])
    assert value(told, "nv_inference_count", **TINY) == 12
    assert value(told, "nv_inference_pending_request_count", **TINY) == 6
    assert value(told, "serve_export_queue_rows", **TINY) == 21
    assert value(told, "nv_inference_compute_infer_duration_histogram_us_count", **TINY) == 3


def test_versions_are_told_with_what_serves(store):
    assert value(metrics(store), "serve_export_info", version="1.2.3", onnxruntime="1.32.0") == 1


def test_every_metric_is_named_once_with_a_text_and_nothing_else_is_registered(store):
    text = metrics(store).text().decode()

    named = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(named) == len(set(named))
    assert {*COUNTERS, *GAUGES, *PARITY, *HISTOGRAMS} <= set(named)
    assert " untyped" not in text
    assert not any(line.split()[3:] == [] for line in text.splitlines() if line.startswith("# H"))
    assert "nv_inference_count" not in {one.name for one in REGISTRY.collect()}


def test_text_is_read_by_the_library_whole(store):
    told = metrics(store)
    read = {one.name: one for one in text_string_to_metric_families(told.text().decode())}

    assert sum(len(one.samples) for one in read.values()) == len(samples(told))
    assert {name: read[name].type for name in TRITON} == TRITON
    assert read["nv_inference_count"].samples[0].labels == TINY


# It has used some CPU time, and ends when its input does.
BUSY = "import sys; sum(range(3_000_000)); print('busy', flush=True); sys.stdin.read()"


def is_waiting(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for child in started:
        assert child.stdout.readline() == "busy\n"
    end_s = time.monotonic() + 30
    while not all(is_waiting(child.pid) for child in started):  # and uses no more CPU time
        assert time.monotonic() < end_s
        time.sleep(0.01)
    yield started
    for child in started:
        child.communicate(timeout=30)


def process(told: Metrics) -> dict[str, float]:
    return {name: value for name, _, value in samples(told) if name.startswith("process_")}


def test_processes_are_added_up_under_the_standard_names(children):
    pids = [child.pid for child in children]
    each = [process(metrics(Store(), lambda pid=pid: [pid])) for pid in pids]
    together = process(metrics(Store(), lambda: pids))

    assert {*together} == {
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_start_time_seconds",
        "process_open_fds",
        "process_max_fds",
    }
    starts = [one["process_start_time_seconds"] for one in each]
    assert together["process_start_time_seconds"] == min(starts)
    for name in {*together} - {"process_start_time_seconds"}:
        assert together[name] == pytest.approx(sum(one[name] for one in each)), name
    assert together["process_cpu_seconds_total"] > 0


@pytest.mark.parametrize(
    ("limit", "machine", "expected"), [(1 << 30, 8 << 30, 1 << 30), (None, 8 << 30, 8 << 30)]
)
def test_memory_limit_is_the_lowest_there_is(monkeypatch, limit, machine, expected):
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: limit)
    monkeypatch.setattr(host, "memory_bytes", lambda: machine)

    assert value(metrics(Store()), "serve_export_memory_limit_bytes") == expected


def test_host_that_does_not_tell_its_memory_has_no_limit(monkeypatch):
    for name in ("memory_limit_bytes", "memory_bytes"):
        monkeypatch.setattr(host, name, lambda: None)

    assert b"serve_export_memory_limit_bytes" not in metrics(Store()).text()


def test_cpu_time_of_a_process_that_has_ended_is_kept(children):
    pids = [child.pid for child in children]
    told = metrics(Store(), lambda: pids)
    before = process(told)
    children[0].communicate(timeout=30)

    for left in (pids, pids[1:], pids[1:]):  # it is looked for once more, then never again
        pids = left
        after = process(told)
        assert after["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"]
        assert after["process_cpu_seconds_total"] < 2 * before["process_cpu_seconds_total"]
        assert after["process_open_fds"] < before["process_open_fds"]
    pids = []
    assert {*process(told)} == {"process_cpu_seconds_total"}


# Live parity


def live_metrics(store):
    return Metrics(Store().snapshots, list, live=store.all, version="1", onnxruntime="1")


def opened(store, **expected):
    budget = agreement.Budget("float32", 100.0).message()
    return store.open(("tiny", 3), budget, bundle_pb2.TestDistribution(**expected))


def live_values(store):
    return {
        name: found
        for name, labels, found in samples(live_metrics(store))
        if name.startswith(("serve_export_live", "serve_export_sampled")) and labels == TINY
    }


def test_live_parity_is_told_of_the_total_and_of_the_window():
    store = LiveStore()
    live = opened(store, predicted=[300, 300], pixel_mean=[600, *[0] * 15])
    live.count(sampled=1000, dropped=7)
    live.add(
        parity_pb2.ShadowFigures(
            rows=600,
            agreed=595,
            flips_explained=3,
            flips_unexplained=2,
            max_logit=0.25,
            sum_confidence=540,
            predicted=[300, 300],
            pixel_mean=[600, *[0] * 15],
        )
    )

    assert live_values(store) == {
        "serve_export_sampled_rows": 1000,
        "serve_export_sampled_rows_dropped": 7,
        "serve_export_live_rows": 600,
        "serve_export_live_flips_explained": 3,
        "serve_export_live_flips_unexplained": 2,
        "serve_export_live_window_rows": 600,
        "serve_export_live_passed": 0,
        "serve_export_live_max_logit_difference": 0.25,
        "serve_export_live_max_logit_allowed": pytest.approx(1e-3),
        "serve_export_live_agreement": pytest.approx(595 / 600),
        "serve_export_live_confidence": pytest.approx(0.9),
        "serve_export_live_predicted_psi": 0,
        "serve_export_live_pixel_mean_psi": 0,
    }


def test_nothing_is_told_of_a_window_without_reports():
    store = LiveStore()
    opened(store).count(sampled=5)

    assert live_values(store) == {
        **dict.fromkeys(LIVE_COUNTERS, 0),
        "serve_export_sampled_rows": 5,
    }
    assert not set(LIVE_GAUGES) & set(live_values(store))


def test_generic_model_has_neither_confidence_nor_drift():
    store = LiveStore()
    live = opened(store)
    live.count(sampled=600)
    live.add(parity_pb2.ShadowFigures(rows=600, agreed=600))

    assert live_values(store)["serve_export_live_passed"] == 1
    missing = set(LIVE_GAUGES) - set(live_values(store))
    assert missing == {
        f"serve_export_live_{one}"
        for one in (
            "confidence",
            "predicted_psi",
            "pixel_mean_psi",
        )
    }


def test_live_metrics_have_types_and_texts():
    text = live_metrics(LiveStore()).text().decode()

    for names, kind in ((LIVE_COUNTERS, "counter"), (LIVE_GAUGES, "gauge")):
        for name in names:
            assert f"# TYPE {name} {kind}\n" in text
            assert f"# HELP {name} " in text
