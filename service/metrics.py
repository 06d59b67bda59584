"""What Prometheus is told, under Triton's names where it has one.

The figures are `service.statistics`'s, merged over all workers; nothing is counted here, and
`service.front.http` answers who asks.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from protos.parity_pb2 import LIVE_VERDICT_PASSED, LiveParity
from service import host
from service.live import Key
from service.statistics import BUCKETS, FAILURES, Figure, Histogram, Snapshot

LABELS = ("model", "version")
US = 1e6  # microseconds in a second
COUNTERS = {
    "nv_inference_request_success": (Figure.SUCCESS, 1, "Requests answered"),
    "nv_inference_count": (Figure.ROWS, 1, "Rows answered"),
    "nv_inference_exec_count": (Figure.EXECUTIONS, 1, "Calls of the model"),
    "nv_inference_request_duration_us": (Figure.SUCCESS_S, US, "From arrival to answer, summed"),
    "nv_inference_queue_duration_us": (Figure.QUEUE_S, US, "In the queue, summed over requests"),
    "nv_inference_compute_input_duration_us": (Figure.INPUT_S, US, "Joining a batch, so summed"),
    "nv_inference_compute_infer_duration_us": (Figure.INFER_S, US, "The model's call, so summed"),
    "nv_inference_compute_output_duration_us": (Figure.OUTPUT_S, US, "Cutting answers, so summed"),
    "serve_export_versions_refused": (Figure.REFUSED, 1, "Times a version failed its checks"),
}
GAUGES = {
    "nv_inference_pending_request_count": (Figure.PENDING_REQUESTS, "Requests in the queue"),
    "nv_model_load_duration_secs": (Figure.LOAD_S, "Seconds that loading and checking took"),
    "serve_export_queue_rows": (Figure.PENDING_ROWS, "Rows in the queue"),
    "serve_export_version_ready": (Figure.READY, "1 while the version answers, 0 otherwise"),
}
PARITY = {  # with the original, as the self-check measured it; of versions that came so far
    "serve_export_parity_max_logit_difference": (Figure.MAX_LOGIT_DIFFERENCE, "Largest |Δlogit|"),
    "serve_export_parity_max_logit_allowed": (Figure.MAX_LOGIT_ALLOWED, "What it may be at most"),
    "serve_export_parity_agreement": (
        Figure.AGREEMENT,
        "Share of images of the same class, 0 to 1",
    ),
}
HISTOGRAMS = {
    "nv_inference_request_duration_histogram_us": (
        Histogram.REQUEST_S, US, "From arrival to answer, by request",
    ),
    "nv_inference_queue_duration_histogram_us": (Histogram.QUEUE_S, US, "In the queue, by request"),
    "nv_inference_compute_infer_duration_histogram_us": (
        Histogram.INFER_S, US, "The model's call, by call",
    ),
    "serve_export_batch_rows": (Histogram.BATCH_ROWS, 1, "Rows in one call of the model"),
}  # fmt: skip
CPU = "process_cpu_seconds"
PROCESS: dict[str, tuple[Callable[[Iterable[float]], float], str]] = {
    "process_start_time_seconds": (min, "When the oldest process began, since 1970"),
    "process_resident_memory_bytes": (sum, "Of all processes; what they share counts in each"),
    "process_virtual_memory_bytes": (sum, "Address space of all processes"),
    "process_open_fds": (sum, "File descriptors open in all processes"),
    "process_max_fds": (sum, "File descriptors that all processes may open"),
}


class Metrics(Collector):
    """Everything there is to tell, made anew each time it is asked for."""

    def __init__(
        self,
        snapshots: Callable[[], list[Snapshot]],
        pids: Callable[[], Iterable[int]],
        *,
        live: Callable[[], list[tuple[Key, LiveParity]]] = list,
        version: str,
        onnxruntime: str,
    ) -> None:
        """Store where the figures come from.

        Args:
            snapshots: the figures of every version, as `Store.snapshots`.
            pids: the server's processes now, on this host.
            live: what shadows have found of every version, as `LiveStore.all`.
            version: of this server.
            onnxruntime: its version.
        """
        self._snapshots, self._pids, self._live = snapshots, pids, live
        self._info = {"version": version, "onnxruntime": onnxruntime}
        self._lock = threading.Lock()
        self._cpu_s: dict[int, float] = {}  # by process
        self._ended_cpu_s = 0.0  # of those that are no more
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format 0.0.4. Safe to call from several threads."""
        with self._lock:
            text = generate_latest(self._registry)
        # The library appends `_total` to counters' names, and Triton's have none. What is `untyped`
        # it leaves alone; no line but a type's can end so.
        return text.replace(b" untyped\n", b" counter\n")

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as the library's registry asks for them."""
        info = GaugeMetricFamily("serve_export_info", "What serves", labels=[*self._info])
        info.add_metric([*self._info.values()], 1)
        yield info
        snapshots = self._snapshots()
        yield _failures(snapshots)
        for name, (figure, unit, text) in COUNTERS.items():
            counter = UnknownMetricFamily(name, text, labels=LABELS)
            for one in snapshots:
                counter.add_metric(_labels(one), one[figure] * unit)
            yield counter
        checked = [one for one in snapshots if one[Figure.MAX_LOGIT_ALLOWED]]
        for gauges, shown in ((GAUGES, snapshots), (PARITY, checked)):
            for name, (figure, text) in gauges.items():
                gauge = GaugeMetricFamily(name, text, labels=LABELS)
                for one in shown:
                    gauge.add_metric(_labels(one), one[figure])
                yield gauge
        for name, (histogram, unit, text) in HISTOGRAMS.items():
            yield _histogram(
                HistogramMetricFamily(name, text, labels=LABELS), histogram, unit, snapshots
            )
        yield from _live_metrics(self._live())
        yield from self._processes()
        yield from _memory_limit()

    def _processes(self) -> Iterator[Metric]:
        """Add up what the library tells of each process."""
        cpu_s: dict[int, float] = {}
        values: dict[str, list[float]] = {}
        for pid in self._pids():
            for one in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                if one.name == CPU:
                    cpu_s[pid] = one.samples[0].value
                else:
                    values.setdefault(one.name, []).append(one.samples[0].value)
        for pid, before_s in self._cpu_s.items():
            if cpu_s.get(pid, 0.0) < before_s:  # it has ended; another may have its number
                self._ended_cpu_s += before_s
        self._cpu_s = cpu_s
        total_s = self._ended_cpu_s + sum(cpu_s.values())
        yield CounterMetricFamily(CPU, "Of all processes, with those that have ended", total_s)
        for name, (merge, text) in PROCESS.items():
            if name in values:
                yield GaugeMetricFamily(name, text, merge(values[name]))


def _memory_limit() -> Iterator[Metric]:
    """Yield what all processes may take together, if this host tells."""
    limits = [one for one in (host.memory_limit_bytes(), host.memory_bytes()) if one is not None]
    if limits:
        text = "What the cgroups allow, or what the machine has, if that is less"
        yield GaugeMetricFamily("serve_export_memory_limit_bytes", text, min(limits))


def _live_metrics(found: Iterable[tuple[Key, LiveParity]]) -> Iterator[Metric]:
    """Yield counters of every version, and gauges of those with reports in the window."""
    known = [([name, str(number)], live) for (name, number), live in found]
    for name, (count, text) in LIVE_COUNTERS.items():
        counter = UnknownMetricFamily(name, text, labels=LABELS)
        for labels, live in known:
            counter.add_metric(labels, count(live))
        yield counter
    for name, (level, text) in LIVE_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=LABELS)
        for labels, live in known:
            value = level(live) if live.window.rows else None
            if value is not None:
                gauge.add_metric(labels, value)
        yield gauge


LIVE_COUNTERS: dict[str, tuple[Callable[[LiveParity], float], str]] = {
    "serve_export_sampled_rows": (lambda live: live.sampled, "Rows handed to shadows"),
    "serve_export_sampled_rows_dropped": (
        lambda live: live.dropped, "Sampled rows that a shadow was too slow for",
    ),
    "serve_export_live_rows": (lambda live: live.total.rows, "Rows that shadows have reported"),
    "serve_export_live_flips_explained": (
        lambda live: live.total.flips_explained,
        "Reported rows of another class, with a margin within twice the budget",
    ),
    "serve_export_live_flips_unexplained": (
        lambda live: live.total.flips_unexplained,
        "Reported rows of another class, with a wider margin",
    ),
}  # fmt: skip
# Of the rows reported within the window; none while there are none.
LIVE_GAUGES: dict[str, tuple[Callable[[LiveParity], float | None], str]] = {
    "serve_export_live_window_rows": (
        lambda live: live.window.rows, "Rows that shadows have reported within the window",
    ),
    "serve_export_live_passed": (
        lambda live: float(live.verdict == LIVE_VERDICT_PASSED),
        "1 while live parity holds, 0 while it is broken",
    ),
    "serve_export_live_max_logit_difference": (
        lambda live: live.window.max_logit, "Largest |Δlogit| of the window",
    ),
    "serve_export_live_max_logit_allowed": (
        lambda live: live.budget.max_logit, "What it may be at most",
    ),
    "serve_export_live_agreement": (
        lambda live: live.window.agreed / live.window.rows,
        "Share of the window's rows of the same class, 0 to 1",
    ),
    "serve_export_live_confidence": (
        lambda live: (
            live.window.sum_confidence / live.window.rows if live.window.predicted else None
        ),
        "Mean of the highest probability in the window, 0 to 1",
    ),
    "serve_export_live_predicted_psi": (
        lambda live: live.predicted_psi if live.HasField("predicted_psi") else None,
        "Population stability index of the predicted classes",
    ),
    "serve_export_live_pixel_mean_psi": (
        lambda live: live.pixel_mean_psi if live.HasField("pixel_mean_psi") else None,
        "Population stability index of the images' mean pixels",
    ),
}  # fmt: skip


def _labels(one: Snapshot) -> list[str]:
    return [one.name, str(one.version)]


def _failures(snapshots: Iterable[Snapshot]) -> Metric:
    text = "Requests without an answer, by reason"
    failures = UnknownMetricFamily("nv_inference_request_failure", text, labels=[*LABELS, "reason"])
    for one in snapshots:
        for reason, figure in FAILURES.items():
            failures.add_metric([*_labels(one), reason], one[figure])
    return failures


def _histogram(
    family: HistogramMetricFamily,
    histogram: Histogram,
    unit: float,
    snapshots: Iterable[Snapshot],
) -> Metric:
    ends = [*(str(float(round(end * unit))) for end in BUCKETS[histogram]), "+Inf"]
    for one in snapshots:
        counts, total = one.histogram(histogram)
        buckets = [(end, count) for end, (_, count) in zip(ends, counts, strict=True)]
        family.add_metric(_labels(one), buckets, total * unit)
    return family
