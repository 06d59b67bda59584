"""Measure what a variant costs: the start, a call and memory, in a process of its own.

    python -m pipeline.cost FORMAT MODEL ROWS.npy THREADS SESSION  # prints a Cost as JSON

A process apart so that nothing else is counted, and that each runtime is alone. Says nothing about
the answers: `pipeline.parity` does.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ParityError
from pipeline.records import Variant
from protos import bundle_pb2
from service.host import cores

BATCHES = (1, 8, 64)  # rows in a call
CALLS_S = 0.3  # of calls of each batch, after the first two
MIN_CALLS, MAX_CALLS = 3, 1000
STATUS = Path("/proc/self/status")
Rows = NDArray[np.generic]
Answer = Callable[[Rows], object]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one variant costs on this machine, with a thread for each of its cores."""

    load_seconds: float  # from the file to the first answer, one row
    peak_rss_kib: int
    seconds: dict[int, list[float]]  # of each call, by its rows

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read it as `json` wrote it."""
        found = json.loads(text)
        calls = {int(rows): seconds for rows, seconds in found["seconds"].items()}
        return cls(found["load_seconds"], found["peak_rss_kib"], calls)

    def json(self) -> str:
        """Return it as one line."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    def add_to(self, report: bundle_pb2.ParityReport) -> None:
        """Add it to a variant's report."""
        report.load_seconds, report.peak_rss_kib = self.load_seconds, self.peak_rss_kib
        for rows, seconds in self.seconds.items():
            p50, p99 = np.percentile(seconds, (50, 99))
            report.latencies.add(rows=rows, p50_seconds=p50, p99_seconds=p99)


def measure(variant: Variant, rows: Rows, options: bundle_pb2.SessionOptions) -> Cost:
    """Start a process that loads the variant and calls it, for about a second.

    Args:
        variant: there is a file of it.
        rows: (rows, ...), as it takes them; the largest batch of `BATCHES` at most is used.
        options: for onnxruntime.

    Raises:
        ParityError: the process ends without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "rows.npy")
        wanted = max(BATCHES)
        np.save(given, np.concatenate([rows[:wanted]] * -(-wanted // len(rows[:wanted])))[:wanted])
        session = options.SerializeToString().hex()
        words = (variant.format, variant.path, given, cores(), session)
        done = subprocess.run(  # noqa: S603  our own module
            [sys.executable, "-m", "pipeline.cost", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ParityError(f"{variant.path.name} cannot be measured: {last}")
    return Cost.parse(done.stdout.strip().splitlines()[-1])


def _measured(load: Callable[[], Answer], rows: Rows) -> Cost:
    started_s = time.perf_counter()
    answer = load()
    answer(rows[:1])
    load_seconds = time.perf_counter() - started_s
    seconds = {size: _calls(answer, rows[:size]) for size in BATCHES}
    return Cost(load_seconds, _peak_rss_kib(), seconds)


def _calls(answer: Answer, batch: Rows) -> list[float]:
    """Return the seconds of each call; the first ones take memory and are not counted."""
    for _ in range(2):
        answer(batch)
    seconds: list[float] = []
    until_s = time.perf_counter() + CALLS_S
    while len(seconds) < MAX_CALLS and (len(seconds) < MIN_CALLS or time.perf_counter() < until_s):
        started_s = time.perf_counter()
        answer(batch)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def _peak_rss_kib() -> int:
    """Return this process' own peak.

    From /proc where there is one: what `getrusage` says begins with the parent's.
    """
    if STATUS.exists():
        line = next(one for one in STATUS.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _tflite(path: Path, threads: int, _: bundle_pb2.SessionOptions) -> Callable[[], Answer]:
    from pipeline.litert import Lite  # noqa: PLC0415  each process imports its runtime alone

    return lambda: Lite(path, threads).run


def _onnx(path: Path, threads: int, options: bundle_pb2.SessionOptions) -> Callable[[], Answer]:
    from service.session import Session  # noqa: PLC0415

    return lambda: Session(path.read_bytes(), options, threads=threads).run


def _saved_model(path: Path, _: int, __: bundle_pb2.SessionOptions) -> Callable[[], Answer]:
    import tensorflow as tf  # noqa: PLC0415

    from pipeline import device  # noqa: PLC0415

    device.prepare()

    def load() -> Answer:
        loaded = tf.saved_model.load(str(path))
        (name,) = loaded.signatures["serving_default"].structured_input_signature[1]

        def answer(rows: Rows) -> dict[str, Any]:
            serve = loaded.signatures["serving_default"]  # `loaded` owns the variables
            found = serve(**{name: tf.constant(rows)})
            return {output: value.numpy() for output, value in found.items()}

        return answer

    return load


RUNTIMES = {"tflite": _tflite, "onnx": _onnx, "saved_model": _saved_model}

if __name__ == "__main__":
    kind, model, given, number, session = sys.argv[1:]
    options = bundle_pb2.SessionOptions.FromString(bytes.fromhex(session))
    load = RUNTIMES[kind](Path(model), int(number), options)
    print(_measured(load, np.load(given, allow_pickle=False)).json())  # noqa: T201  for the parent
