"""What was counted and timed, by version; readable while it is written, and by other processes.

Every figure is one float64 in a fixed row. With several worker processes the rows live in files
that all of them map, one folder a worker: a figure outlives the process that counted it, and any
process can add them up. Aligned eight bytes are read and written at once on the machines Python's
wheels are made for, so readers take no lock.
"""

import mmap
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    Row: TypeAlias = "array[float] | memoryview[float]"

MAX_BATCH_SIZES = 4096  # executions of more rows than this are counted, but not by their size
MANY = 8  # values from which on numpy is faster than a loop
SEPARATOR = "~"  # in no name
ITEM_BYTES = 8


class Figure(IntEnum):
    """Place of each figure in a version's row. Times are in seconds."""

    SUCCESS = 0  # requests answered
    SUCCESS_S = 1  # from their arrival until their answer
    FAIL_S = 2
    REJECTED = 3  # refused by the queue, or expired in it
    CANCELLED = 4
    BACKEND = 5  # the model failed
    OTHER = 6  # the request did not fit the model
    ROWS = 7  # answered
    EXECUTIONS = 8
    QUEUE_S = 9  # summed over requests, as the three below
    INPUT_S = 10
    INFER_S = 11
    OUTPUT_S = 12
    PENDING_REQUESTS = 13  # waiting now
    PENDING_ROWS = 14
    LAST_MS = 15  # when the last answer was given, milliseconds since 1970
    READY = 16
    REFUSED = 17  # times this version failed a check
    LOAD_S = 18
    MAX_LOGIT_DIFFERENCE = 19  # of the self-check
    MAX_LOGIT_ALLOWED = 20
    AGREEMENT = 21


FAILURES = {
    "REJECTED": Figure.REJECTED,
    "CANCELED": Figure.CANCELLED,
    "BACKEND": Figure.BACKEND,
    "OTHER": Figure.OTHER,
}
# An enum's member costs a look-up each time.
_SUCCESS, _SUCCESS_S, _SERVED, _EXECUTIONS = map(
    int, (Figure.SUCCESS, Figure.SUCCESS_S, Figure.ROWS, Figure.EXECUTIONS)
)
_QUEUE_S, _INPUT_S, _INFER_S, _OUTPUT_S, _LAST_MS = map(
    int, (Figure.QUEUE_S, Figure.INPUT_S, Figure.INFER_S, Figure.OUTPUT_S, Figure.LAST_MS)
)
# What is so now, and so no longer when its process has ended; everything else is kept.
LEVELS = (Figure.PENDING_REQUESTS, Figure.PENDING_ROWS, Figure.READY)
# Of these the largest of all workers stands for all; everything else is added up.
LARGEST = frozenset(figure for figure in Figure if figure >= Figure.LAST_MS) - {Figure.REFUSED}
# Upper ends of the histograms' buckets, in seconds and rows; one more bucket takes the rest.
SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10,
)  # fmt: skip
BATCH_ROWS = tuple(2**power for power in range(13))


class Histogram(IntEnum):
    """Which histograms there are, in the order of their buckets in the row."""

    REQUEST_S = 0
    QUEUE_S = 1
    INFER_S = 2  # by execution
    BATCH_ROWS = 3  # by execution


BUCKETS = {
    Histogram.REQUEST_S: SECONDS,
    Histogram.QUEUE_S: SECONDS,
    Histogram.INFER_S: SECONDS,
    Histogram.BATCH_ROWS: BATCH_ROWS,
}
# Where each histogram's buckets start, and where the figures by batch size do.
_STARTS = {
    histogram: len(Figure) + sum(len(BUCKETS[Histogram(i)]) + 2 for i in range(histogram))
    for histogram in Histogram
}
# The same with the buckets' upper ends and the place of their sum, for the hot path.
_REQUESTS, _WAITS, _CALLS, _SIZES = (
    (_STARTS[histogram], BUCKETS[histogram], _STARTS[histogram] + len(BUCKETS[histogram]) + 1)
    for histogram in Histogram
)
_BY_SIZE = len(Figure) + sum(len(ends) + 2 for ends in BUCKETS.values())
_SIZE_WIDTH = 4  # executions; seconds of input, infer, output


class Execution(NamedTuple):
    """One call of the model: seconds of joining its input, computing, cutting its output."""

    rows: int
    input_s: float
    infer_s: float
    output_s: float


class Statistics:
    """The row of one version in one process. Safe to use from several threads."""

    def __init__(self, values: "Row") -> None:
        self._values = values
        self._lock = threading.Lock()

    def add(self, figure: Figure, by: float = 1.0) -> None:
        """Add to one figure."""
        with self._lock:
            self._values[figure] += by

    def set(self, figure: Figure, value: float) -> None:
        """Set one figure, for those that are no counts."""
        with self._lock:
            self._values[figure] = value

    def show_pending(self, requests: int, rows: int) -> None:
        """Set how many wait now."""
        with self._lock:
            self._values[Figure.PENDING_REQUESTS] = requests
            self._values[Figure.PENDING_ROWS] = rows

    def values(self) -> "Row":
        """Return the row itself; it goes on changing."""
        return self._values

    def grow(self, longer: "Row") -> None:
        """Go on in a longer row, with what was counted in the shorter one."""
        with self._lock:
            for place, value in enumerate(self._values):
                longer[place] = value
            self._values = longer

    def executed(
        self, execution: Execution, waits_s: Sequence[float], requests_s: Sequence[float], ms: int
    ) -> None:
        """Count one execution and the requests that it answered.

        Args:
            execution: what was run.
            waits_s: how long each request was in the queue.
            requests_s: how long each took from its arrival to its answer.
            ms: now, in milliseconds since 1970.
        """
        requests = len(waits_s)
        rows, input_s, infer_s, output_s = execution
        with self._lock:
            values = self._values
            values[_SUCCESS] += requests
            values[_SUCCESS_S] += sum(requests_s)
            values[_SERVED] += rows
            values[_EXECUTIONS] += 1
            values[_QUEUE_S] += sum(waits_s)
            values[_INPUT_S] += input_s * requests
            values[_INFER_S] += infer_s * requests
            values[_OUTPUT_S] += output_s * requests
            values[_LAST_MS] = ms
            _observe_all(values, _WAITS, waits_s)
            _observe_all(values, _REQUESTS, requests_s)
            _observe_all(values, _CALLS, (infer_s,))
            _observe_all(values, _SIZES, (rows,))
            start = _BY_SIZE + (rows - 1) * _SIZE_WIDTH
            if start + _SIZE_WIDTH <= len(values):
                values[start] += 1
                values[start + 1] += input_s
                values[start + 2] += infer_s
                values[start + 3] += output_s

    def failed(self, reason: str, seconds: float) -> None:
        """Count a request that got no answer, for one of the reasons in `FAILURES`."""
        with self._lock:
            self._values[FAILURES[reason]] += 1
            self._values[Figure.FAIL_S] += seconds


def _observe_all(
    values: "Row", histogram: tuple[int, tuple[float, ...], int], observed: Sequence[float]
) -> None:
    """Count values in a histogram: where its buckets start, their upper ends, where its sum is."""
    start, ends, total = histogram
    if len(observed) < MANY:
        for value in observed:
            values[start + bisect_left(ends, value)] += 1
            values[total] += value
        return
    counts = np.bincount(np.searchsorted(ends, observed), minlength=len(ends) + 1).tolist()
    for place, count in enumerate(counts, start):
        if count:
            values[place] += count
    values[total] += sum(observed)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The figures of one version at one moment, added up over all workers."""

    name: str
    version: int
    values: tuple[float, ...]

    def __getitem__(self, figure: Figure) -> float:
        """Return one figure."""
        return self.values[figure]

    def histogram(self, histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative count up to each bucket's upper end, `+Inf` last, and the sum."""
        ends, start = BUCKETS[histogram], _STARTS[histogram]
        counts, total = [], 0.0
        for offset, end in enumerate([*map(str, ends), "+Inf"]):
            total += self.values[start + offset]
            counts.append((end, total))
        return counts, self.values[start + len(ends) + 1]

    def by_size(self) -> list[tuple[int, int, Execution]]:
        """Return batch size, executions and their summed times, for each size that was run."""
        sizes = []
        for start in range(_BY_SIZE, len(self.values) - _SIZE_WIDTH + 1, _SIZE_WIDTH):
            executions, *seconds = self.values[start : start + _SIZE_WIDTH]
            if executions:
                rows = (start - _BY_SIZE) // _SIZE_WIDTH + 1
                sizes.append((rows, int(executions), Execution(rows, *seconds)))
        return sizes


class Store:
    """Every version's statistics: in memory, or in files shared by several workers."""

    def __init__(self, folder: Path | None = None, worker: int = 0) -> None:
        """Store where the figures are; opens nothing.

        Args:
            folder: shared by all workers; None: in this process's memory.
            worker: number of this one; one that takes another's place goes on with its figures.
        """
        self._folder, self._worker = folder, worker
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], Statistics] = {}
        self._took_over = False

    def is_successors(self) -> bool:
        """Tell whether another worker had this one's place before; to be asked before `open`."""
        return self._folder is not None and (self._folder / str(self._worker)).is_dir()

    def open(self, name: str, version: int, max_batch_rows: int) -> Statistics:
        """Return a version's statistics, always the same; what was counted before is kept.

        Raises:
            OSError: its file cannot be written.
        """
        size = _BY_SIZE + _SIZE_WIDTH * min(max_batch_rows, MAX_BATCH_SIZES)
        key = (name, version)
        with self._lock:
            if not self._took_over:
                self._take_over()
            statistics = self._open.get(key)
            if statistics is None:
                statistics = self._open[key] = Statistics(self._row(key, size))
            elif len(statistics.values()) < size:
                statistics.grow(self._row(key, size))
            return statistics

    def drop(self, name: str, version: int) -> None:
        """Forget a version that is no longer there."""
        with self._lock:
            self._open.pop((name, version), None)
            if self._folder is not None:
                self._path((name, version)).unlink(missing_ok=True)

    def snapshots(self) -> list[Snapshot]:
        """Return the figures of every version, by name and number, added up over all workers."""
        rows: dict[tuple[str, int], list[Sequence[float]]] = {}
        if self._folder is None:
            with self._lock:
                rows = {key: [one.values()] for key, one in self._open.items()}
        else:
            for path in self._folder.glob(f"*/*{SEPARATOR}*"):
                name, _, number = path.name.rpartition(SEPARATOR)
                if not number.isdecimal():
                    continue
                values = array("d")
                try:
                    content = path.read_bytes()
                except FileNotFoundError:  # dropped since
                    continue
                values.frombytes(content[: len(content) // ITEM_BYTES * ITEM_BYTES])
                rows.setdefault((name, int(number)), []).append(values)
        return [Snapshot(*key, _merged(rows[key])) for key in sorted(rows)]

    def _path(self, key: tuple[str, int]) -> Path:
        assert self._folder is not None  # noqa: S101  for the type checker
        return self._folder / str(self._worker) / f"{key[0]}{SEPARATOR}{key[1]}"

    def _row(self, key: tuple[str, int], size: int) -> "Row":
        if self._folder is None:
            return array("d", bytes(size * ITEM_BYTES))
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            whole = file.tell() // ITEM_BYTES
            file.truncate(whole * ITEM_BYTES)  # less the half of a figure
            # Written rather than only made longer: a full disk is an error now, not SIGBUS later.
            file.write(bytes(max(0, size - whole) * ITEM_BYTES))
            file.flush()
            mapped = mmap.mmap(file.fileno(), max(size, whole) * ITEM_BYTES)
        return memoryview(mapped).cast("d")

    def _take_over(self) -> None:
        """Forget what was so while the worker ran that had this place before."""
        self._took_over = True
        if self._folder is None:
            return
        for path in (self._folder / str(self._worker)).glob(f"*{SEPARATOR}*"):
            with path.open("r+b") as file:
                for level in LEVELS:
                    file.seek(level * ITEM_BYTES)
                    file.write(bytes(ITEM_BYTES))


def _merged(rows: list[Sequence[float]]) -> tuple[float, ...]:
    shortest = (0.0,) * _BY_SIZE  # a file may be read just after it was made, before it was filled
    return tuple(
        max(values) if place in LARGEST else sum(values)
        for place, values in enumerate(zip_longest(shortest, *rows, fillvalue=0.0))
    )
