"""What the passes save: the graph that is exported against the one that tf2onnx wrote.

    python benchmarks/graph.py

Networks with random weights, each in both forms, asked in turn, round after round, in one process
and by one thread, through onnxruntime as the server sets it up. Counted is the processor time of
that thread, which other programs on the machine disturb less than the clock on the wall.

Then how many rows a call should have: two threads ask one session at once, as the server does on
two cores, and the clock on the wall counts. Beside it stands the memory that the calls left taken.

Prints the medians, and the largest difference of any logit over random images; writes them, with
the machine and the versions, to benchmarks/results/graph.json.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import keras
import numpy as np
import onnxruntime
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import measured
from benchmarks.networks import NETWORKS, SHAPE
from pipeline.export import onnx, passes, serving_function

BATCHES = (1, 8, 32, 128)
IMAGES = 2_048  # for the largest difference
SLICE_S = 0.1  # processor time of one form, network and batch in a round
CALL_ROWS = (8, 16, 32, 64, 128, 256)
CALL_ROUNDS = 5
CALL_SLICE_S = 0.15  # on the wall, of one network and number of rows in a round
THREADS = 2  # that call at once

Case = tuple[str, int]  # a network and the rows of a call
Forms = tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]


def main(
    rounds: Annotated[int, typer.Option(min=7, help="Rounds; medians are of these.")] = 15,
) -> None:
    """Measure, print and write."""
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)
    models = {name: _models(make()) for name, make in NETWORKS.items()}
    sessions = {
        name: (_session(plain), _session(passed)) for name, (plain, passed) in models.items()
    }
    differences = {name: _difference(*forms, images) for name, forms in sessions.items()}
    seconds = _forms(sessions, images, rounds)
    calls, memory_mib = _calls({name: passed for name, (_, passed) in models.items()}, images)
    _report(seconds, differences, calls, memory_mib)


def _models(model: keras.Model) -> tuple[bytes, bytes]:
    """Return a network as tf2onnx wrote it, and as it is exported."""
    plain = onnx.convert(serving_function(model))
    return plain.SerializeToString(), passes.improve(plain).SerializeToString()


def _session(model: bytes) -> onnxruntime.InferenceSession:
    """Load a model as service.session does, which would cut large batches into several calls."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.intra_op_num_threads = 1
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _difference(
    plain: onnxruntime.InferenceSession,
    passed: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
) -> float:
    """Return the largest difference of any logit."""
    differences = []
    for batch in np.split(images, IMAGES // BATCHES[-1]):
        (before,), (after,) = (form.run(["logits"], {"image": batch}) for form in (plain, passed))
        differences.append(np.abs(before.astype(np.float64) - after).max())
    return float(max(differences))


def _forms(
    sessions: dict[str, Forms], images: NDArray[np.uint8], rounds: int
) -> dict[Case, list[tuple[float, float]]]:
    """Return the processor time of one image in both forms, for each round."""
    cases = [(name, rows) for name in sessions for rows in BATCHES]
    seconds: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in track(range(rounds + 1), "forms", console=Console(stderr=True)):
        for name, rows in cases:
            plain, passed = (_processor_s(form, images[:rows]) for form in sessions[name])
            seconds[name, rows].append((plain, passed))
    return {case: pairs[1:] for case, pairs in seconds.items()}  # one warms up


def _processor_s(form: onnxruntime.InferenceSession, batch: NDArray[np.uint8]) -> float:
    """Return the processor time of one image."""
    outputs = [output.name for output in form.get_outputs()]  # named, as service.session does
    form.run(outputs, {"image": batch})
    calls = 0
    started_s = time.thread_time()
    while (passed_s := time.thread_time() - started_s) < SLICE_S:
        form.run(outputs, {"image": batch})
        calls += 1
    return passed_s / calls / len(batch)


def _calls(
    models: dict[str, bytes], images: NDArray[np.uint8]
) -> tuple[dict[Case, list[float]], dict[Case, float]]:
    """Return the time of one image for each round, and the memory that each session took.

    Each case has a session of its own, and all stay: none gets what another gave back.
    """
    seconds: dict[Case, list[float]] = {}
    memory_mib: dict[Case, float] = {}
    sessions: dict[Case, onnxruntime.InferenceSession] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        for name, model in models.items():
            for rows in CALL_ROWS:
                sessions[name, rows] = _session(model)
                before_mib = _resident_mib()
                _wall_s(threads, sessions[name, rows], images[:rows])
                memory_mib[name, rows] = _resident_mib() - before_mib
                seconds[name, rows] = []
        for _ in track(range(CALL_ROUNDS), "calls", console=Console(stderr=True)):
            for (name, rows), session in sessions.items():
                seconds[name, rows].append(_wall_s(threads, session, images[:rows]))
    return seconds, memory_mib


def _wall_s(
    threads: ThreadPoolExecutor, session: onnxruntime.InferenceSession, batch: NDArray[np.uint8]
) -> float:
    """Return the time of one image while all threads call at once."""
    together = Barrier(THREADS)

    def rows_a_second() -> float:
        together.wait()
        calls = 0
        started_s = time.perf_counter()
        while (passed_s := time.perf_counter() - started_s) < CALL_SLICE_S:
            session.run(None, {"image": batch})
            calls += 1
        return calls * len(batch) / passed_s

    running = [threads.submit(rows_a_second) for _ in range(THREADS)]
    return 1 / sum(each.result() for each in running)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * measured.PAGE_MIB


def _report(
    seconds: dict[Case, list[tuple[float, float]]],
    differences: dict[str, float],
    calls: dict[Case, list[float]],
    memory_mib: dict[Case, float],
) -> None:
    figures = _report_forms(seconds)
    found = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(f"largest difference of a logit over {IMAGES:,} images: {found}")
    measured.write(
        "graph",
        {
            "images": IMAGES,
            "max_logit_difference": differences,
            "microseconds_an_image": figures,
            "calls": {
                "threads": THREADS,
                "microseconds_an_image": _report_calls(calls, memory_mib),
            },
        },
    )


def _report_forms(seconds: dict[Case, list[tuple[float, float]]]) -> list[dict[str, object]]:
    table = Table(box=box.SIMPLE_HEAD, title="microseconds an image, median (min-max)")
    for column in ("network", "batch", "tf2onnx", "exported", "times faster"):
        table.add_column(column, justify="left" if column == "network" else "right")
    figures: list[dict[str, object]] = []
    for (name, rows), pairs in seconds.items():
        plain, passed = ([round(1e6 * pair[form], 2) for pair in pairs] for form in (0, 1))
        ratios = [round(before / after, 3) for before, after in pairs]
        cells = [_spread(each) for each in (plain, passed, ratios)]
        table.add_row(name, str(rows), *cells, end_section=rows == BATCHES[-1])
        case = {"network": name, "batch": rows, "tf2onnx": plain, "exported": passed}
        figures.append({**case, "times_faster": statistics.median(ratios)})
    Console().print(table)
    return figures


def _report_calls(
    calls: dict[Case, list[float]], memory_mib: dict[Case, float]
) -> list[dict[str, object]]:
    title = f"microseconds an image and MiB taken, {THREADS} threads, by the rows of a call"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("network")
    for rows in CALL_ROWS:
        table.add_column(str(rows), justify="right")
    for network in dict.fromkeys(name for name, _ in calls):
        cases = [(network, rows) for rows in CALL_ROWS]
        cells = (f"{1e6 * statistics.median(calls[case]):.3g} µs" for case in cases)
        table.add_row(network, *cells)
        table.add_row("", *(f"{memory_mib[case]:.1f} MiB" for case in cases), end_section=True)
    Console().print(table)
    return [
        {
            "network": name,
            "rows": rows,
            "exported": [round(1e6 * each, 2) for each in figures],
            "memory_mib": round(memory_mib[name, rows], 1),
        }
        for (name, rows), figures in calls.items()
    ]


def _spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):.3g} ({min(figures):.3g}-{max(figures):.3g})"


if __name__ == "__main__":
    typer.run(main)
