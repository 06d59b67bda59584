"""What an epoch costs: our engines beside plain `model.fit` on numpy arrays, on one network.

    python benchmarks/training.py quick accurate

Plain fit has batches of 128, Keras' usual way: `model.fit(images, labels, batch_size=128)`. All
train the same network on the same rows, in turn, round after round, in one process; the first
epoch of each, which traces, is not counted. Beside the seconds stands the arithmetic rate: three
times the network's multiply-adds a row (forward, and back to weights and inputs), two operations
each, against what the same cores do in one large product of matrices.

Prints medians and ratios; writes them, with the machine and the versions, to
benchmarks/results/training.json.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import measured
from pipeline import config, dataset, device, engines, models, recipe
from pipeline.config import TrainingConfig
from pipeline.feed import Feed

PLAIN_ROWS = 128
SIDE = 2048  # of the matrices
Epoch = Callable[[int], None]


def main(
    presets: Annotated[list[str], typer.Argument(help="Whose networks and settings.")],
    times: Annotated[int, typer.Option("--rounds", min=3, help="Epochs of each.")] = 5,
    xla: Annotated[bool, typer.Option("--xla", help="Try XLA as well.")] = False,
) -> None:
    """Measure, print and write."""
    peak = matrix_rate()
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"an epoch, medians of {times}; a product of matrices runs at {peak:.0f} GFLOP/s",
    )
    for name in ("preset", "way", "s", "least", "most", "plain fit /", "GFLOP/s"):
        table.add_column(name, justify="left" if name in {"preset", "way"} else "right")
    found: dict[str, object] = {"rounds": times, "matrix_gflops": peak}
    for preset in presets:
        seconds, operations = epochs(preset, times, xla=xla)
        plain = statistics.median(seconds["plain fit"])
        for way, took in seconds.items():
            median = statistics.median(took)
            table.add_row(
                preset, way, f"{median:.2f}", f"{min(took):.2f}", f"{max(took):.2f}",
                f"{plain / median:.2f}", f"{operations / median / 1e9:.0f}",
            )  # fmt: skip
        found[preset] = {"seconds": seconds, "gflop_an_epoch": operations / 1e9}
    Console().print(table)
    measured.write("training", found)


def epochs(preset: str, times: int, *, xla: bool) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of every epoch of every way, and the operations of one."""
    chosen = config.build(preset)
    data = dataset.prepare(chosen.data)
    train = dataset.load(data).train
    device.prepare()
    engine_settings: dict[str, dict[str, Any]] = {
        "fit": {"engine": "fit"},
        "tape": {"engine": "tape"},
    }
    if chosen.training.mixed_precision and device.mixed_policy():
        engine_settings["fit, float32"] = {"engine": "fit", "mixed_precision": False}
    if xla:
        engine_settings["fit, XLA"] = {"engine": "fit", "xla": True}
    ways: dict[str, Epoch] = {"plain fit": plain(train, chosen.training)}
    for name, changes in engine_settings.items():
        ways[name] = ours(train, replace(chosen.training, **changes))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in track(range(1, times + 2), description=preset, transient=True):
        for name, epoch in ways.items():
            started_s = time.monotonic()
            epoch(number)
            seconds[name].append(time.monotonic() - started_s)
    _, multiply_adds = models.count(network(train, chosen.training))
    return {name: took[1:] for name, took in seconds.items()}, 6.0 * multiply_adds * len(
        train.inputs
    )


def network(train: dataset.Split, settings: TrainingConfig) -> keras.Model:
    """Return the network of the settings with fresh weights."""
    keras.utils.set_random_seed(settings.seed)
    return models.build(settings.architecture, train.inputs.shape[1:], 10)


def plain(train: dataset.Split, settings: TrainingConfig) -> Epoch:
    """Return an epoch as a tutorial has it: arrays, batches of 128, Adam."""
    model = network(train, settings)
    model.compile(
        keras.optimizers.Adam(settings.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return lambda _: model.fit(train.inputs, train.targets, batch_size=PLAIN_ROWS, verbose=0)


def ours(train: dataset.Split, settings: TrainingConfig) -> Epoch:
    """Return an epoch as `train` makes it, without checkpoint and validation."""
    objective = recipe.objective(settings, 10)
    feed = Feed(train, settings, objective.one_hot)
    policy = device.mixed_policy() if settings.mixed_precision else None
    keras.config.set_dtype_policy(policy or "float32")
    model = network(train, settings)
    keras.config.set_dtype_policy("float32")
    model.compile(
        recipe.optimizer(settings, feed.steps * settings.epochs),
        objective.loss,
        metrics=[objective.accuracy],
        steps_per_execution=settings.steps_per_execution,
        jit_compile=settings.xla,
    )
    model.optimizer.build(model.trainable_variables)
    engine = engines.build(model, objective, settings)
    return lambda number: engine.train(feed.epoch(number), lambda: None, lambda _: None)


def matrix_rate() -> float:
    """Return GFLOP/s of float32 in one large product, the best of five."""
    one = tf.constant(np.random.default_rng(0).random((SIDE, SIDE), np.float32))
    product = tf.function(lambda: tf.linalg.matmul(one, one))
    product()
    rates = []
    for _ in range(5):
        started_s = time.monotonic()
        product().numpy()
        rates.append(2.0 * SIDE**3 / (time.monotonic() - started_s) / 1e9)
    return max(rates)


if __name__ == "__main__":
    typer.run(main)
