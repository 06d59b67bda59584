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
        version: str,
        onnxruntime: str,
    ) -> None:
        """Store where the figures come from.

        Args:
            snapshots: the figures of every version, as `Store.snapshots`.
            pids: the server's processes now, on this host.
            version: of this server.
            onnxruntime: its version.
        """
        self._snapshots, self._pids = snapshots, pids
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
        yield from self._processes()

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
