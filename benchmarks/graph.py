"""What the passes save: the graph that is exported against the one that tf2onnx wrote.

    python benchmarks/graph.py

Four networks with random weights, each in both forms, asked in turn, round after round, in one
process and by one thread, through the session that serves: it cuts a batch of 128 into calls.
Counted is the processor time of that thread, which other programs on the machine disturb less than
the clock on the wall. Prints the medians, and the largest difference of any logit over random
images; writes them, with the machine and the versions, to benchmarks/results/graph.json.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import typer
from keras import layers
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import measured
from pipeline.export import onnx, passes, serving_function
from pipeline.models import build
from protos import bundle_pb2
from service.session import Session

BATCHES = (1, 8, 32, 128)
IMAGES = 2_048  # for the largest difference
SLICE_S = 0.1  # processor time of one form, network and batch in a round
OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")
SHAPE = (28, 28, 1)
CLASSES = 10


def conv10() -> keras.Model:
    """Return the network that the pipeline trains by default."""
    return build("conv10-dropout", SHAPE, CLASSES)


def dense() -> keras.Model:
    """Return two dense layers."""
    image, scaled = _scaled()
    hidden = layers.Dense(128, activation="relu")(layers.Flatten()(scaled))
    return keras.Model(image, layers.Dense(CLASSES)(hidden))


def conv32_64() -> keras.Model:
    """Return two convolutions without padding, each pooled, and two dense layers."""
    image, x = _scaled()
    for filters in (32, 64):
        x = layers.Conv2D(filters, 3, activation="relu")(x)
        x = layers.MaxPooling2D(2)(x)
    hidden = layers.Dense(100, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(CLASSES)(hidden))


def residual() -> keras.Model:
    """Return a small residual network: normalised convolutions, one of two strides, two sums."""
    image, x = _scaled()
    x = layers.ReLU()(_normalised(x, 16, 3))
    for filters, strides in ((16, 1), (32, 2)):
        inner = layers.ReLU()(_normalised(x, filters, 3, strides))
        inner = _normalised(inner, filters, 3)
        beside = x if strides == 1 else _normalised(x, filters, 1, strides)
        x = layers.ReLU()(layers.Add()([beside, inner]))
    return keras.Model(image, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "conv10": conv10,
    "dense": dense,
    "conv32-64": conv32_64,
    "residual": residual,
}


def main(
    rounds: Annotated[int, typer.Option(min=7, help="Rounds; medians are of these.")] = 15,
) -> None:
    """Measure, print and write."""
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)
    sessions = {name: _sessions(make()) for name, make in NETWORKS.items()}
    differences = {name: _difference(*forms, images) for name, forms in sessions.items()}
    cases = [(name, rows) for name in NETWORKS for rows in BATCHES]
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for name, rows in cases:
            plain, passed = (_seconds(form, images[:rows]) for form in sessions[name])
            seconds[name, rows].append((plain, passed))
    _report({case: rounds[1:] for case, rounds in seconds.items()}, differences)  # one warms up


def _scaled() -> tuple[keras.KerasTensor, keras.KerasTensor]:
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    return image, layers.Rescaling(1 / 255)(image)


def _normalised(
    x: keras.KerasTensor, filters: int, size: int, strides: int = 1
) -> keras.KerasTensor:
    conv = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)
    return layers.BatchNormalization()(conv(x))


def _sessions(model: keras.Model) -> tuple[Session, Session]:
    """Return a network as tf2onnx wrote it, and as it is exported."""
    plain = onnx.convert(serving_function(model))
    plain_bytes, passed_bytes = (
        form.SerializeToString() for form in (plain, passes.improve(plain))
    )
    return Session(plain_bytes, OPTIONS, threads=1), Session(passed_bytes, OPTIONS, threads=1)


def _difference(plain: Session, passed: Session, images: NDArray[np.uint8]) -> float:
    """Return the largest difference of any logit."""
    before, after = (form.run(images)["logits"].astype(np.float64) for form in (plain, passed))
    return float(np.abs(before - after).max())


def _seconds(form: Session, batch: NDArray[np.uint8]) -> float:
    """Return the processor time of one image."""
    form.run(batch)
    calls = 0
    started_s = time.thread_time()
    while (passed_s := time.thread_time() - started_s) < SLICE_S:
        form.run(batch)
        calls += 1
    return passed_s / calls / len(batch)


def _report(
    seconds: dict[tuple[str, int], list[tuple[float, float]]], differences: dict[str, float]
) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="microseconds an image, median (min-max)")
    for column in ("network", "batch", "tf2onnx", "exported", "times faster"):
        table.add_column(column, justify="left" if column == "network" else "right")
    figures = []
    for (name, rows), pairs in seconds.items():
        plain, passed = ([round(1e6 * pair[form], 2) for pair in pairs] for form in (0, 1))
        ratios = [round(before / after, 3) for before, after in pairs]
        cells = [_spread(each) for each in (plain, passed, ratios)]
        table.add_row(name, str(rows), *cells, end_section=rows == BATCHES[-1])
        case = {"network": name, "batch": rows, "tf2onnx": plain, "exported": passed}
        figures.append({**case, "times_faster": statistics.median(ratios)})
    Console().print(table)
    found = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(f"largest difference of a logit over {IMAGES:,} images: {found}")
    measured.write(
        "graph",
        {"images": IMAGES, "max_logit_difference": differences, "microseconds_an_image": figures},
    )


def _spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):.3g} ({min(figures):.3g}-{max(figures):.3g})"


if __name__ == "__main__":
    typer.run(main)
