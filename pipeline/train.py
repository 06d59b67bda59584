"""Train with Keras' own loop, a checkpoint every epoch, and go on where an earlier run stopped.

What an epoch computes depends on the settings and its number alone: the order of the images and
every layer's random state are set from (seed, epoch) when it begins. A run that was killed and
one that was not end with the same weights.
"""

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pipeline import checkpoint, dataset, device, models
from pipeline.config import TrainingConfig
from pipeline.errors import TrainingError
from pipeline.records import Dataset, Epoch, Trained

log = logging.getLogger(__name__)
VALIDATION_BATCH_ROWS = 1000


def fit(data: Dataset, config: TrainingConfig, run: Path) -> Trained:
    """Train, or go on training, and keep the epoch with the lowest validation loss.

    Args:
        data: prepared images.
        config: how.
        run: folder for the checkpoints of just these settings, as `run_folder` names it.

    Raises:
        ConfigError: there is no such architecture.
        TrainingError: the loss is no longer a number.
    """
    computes_on = device.prepare()
    folder = run / "checkpoints"
    if config.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    keras.utils.set_random_seed(config.seed)
    state = checkpoint.latest(folder)
    history = state.history if state else ()
    done = len(history)
    if state and done >= config.epochs:
        log.info("all %d epochs of this very run are in %s: nothing to train", done, folder)
        model = keras.models.load_model(state.path)
    else:
        model = _resumed(state) if state else _fresh(data, config)
        log.info(
            "training %s on %s, epochs %d to %d, %d images each",
            config.architecture, computes_on, done + 1, config.epochs, data.train_rows,
        )  # fmt: skip
        history = _fit(model, data, config, folder, history)
    best = checkpoint.best(history)
    chosen = checkpoint.of_epoch(folder, best.number)
    if chosen is None:
        raise TrainingError(f"{folder} lost epoch {best.number}, its best; train with --fresh")
    return Trained(
        path=chosen.path,
        sha256=chosen.sha256,
        parameters=model.count_params(),
        optimizer=model.optimizer.name,
        device=computes_on,
        history=history,
        best_epoch=best.number,
    )


def run_folder(runs: Path, preset: str, data: Dataset, config: TrainingConfig) -> Path:
    """Name the folder of one set of settings: data, training, code and versions of the tools.

    The number of epochs is left out, so that a longer run goes on where a shorter one ended.
    """
    settings = asdict(config)
    del settings["fresh"], settings["epochs"]
    here = Path(__file__).parent
    code = [here / "train.py", here / "dataset.py", *sorted((here / "models").glob("*.py"))]
    facts: dict[str, Any] = {
        "data": [data.sha256, data.train_rows, data.validation_share, data.split_seed],
        "training": settings,
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
        "tools": [tf.__version__, keras.__version__],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return runs / f"{preset}-{digest[:12]}"


def _fresh(data: Dataset, config: TrainingConfig) -> keras.Model:
    shape = dataset.load(data).train.inputs.shape[1:]
    model = models.build(config.architecture, shape, len(data.labels))
    model.compile(
        optimizer=keras.optimizers.Adam(config.learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def _resumed(state: checkpoint.State) -> keras.Model:
    log.info("resuming from %s", state.path)
    return keras.models.load_model(state.path)


def _fit(
    model: keras.Model,
    data: Dataset,
    config: TrainingConfig,
    folder: Path,
    history: tuple[Epoch, ...],
) -> tuple[Epoch, ...]:
    splits = dataset.load(data)
    done = len(history)
    steps = -(-len(splits.train.inputs) // config.batch_rows)
    keeper = _Keeper(folder, history, config.epochs)
    with _progress() as progress:
        model.fit(
            _batches(splits.train, config, done),
            epochs=config.epochs,
            initial_epoch=done,
            steps_per_epoch=steps,
            validation_data=(splits.validation.inputs, splits.validation.targets),
            validation_batch_size=VALIDATION_BATCH_ROWS,
            shuffle=False,
            verbose=0,
            callbacks=[_RandomState(config.seed), _Bar(progress, steps, config.epochs), keeper],
        )
    return keeper.history


def _batches(split: dataset.Split, config: TrainingConfig, done: int) -> tf.data.Dataset:
    """Return the batches of every epoch still to come, in an order set by (seed, epoch)."""
    images, labels = tf.constant(split.inputs), tf.constant(split.targets)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split.inputs)), seed=[config.seed, number]
        )
        return tf.data.Dataset.from_tensor_slices(order).batch(config.batch_rows)

    return (
        tf.data.Dataset.range(done, config.epochs, output_type=tf.int32)
        .flat_map(epoch)
        .map(lambda rows: (tf.gather(images, rows), tf.gather(labels, rows)))
        .prefetch(tf.data.AUTOTUNE)
    )


class _RandomState(keras.callbacks.Callback):
    """Set each random layer's state from (seed, epoch, place): it is not in a checkpoint."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        for place, generator in enumerate(_seed_generators(self.model)):
            state = np.random.SeedSequence((self._seed, epoch, place)).generate_state(2)
            generator.state.assign(state)


def _seed_generators(model: keras.Model) -> Iterator[keras.random.SeedGenerator]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _seed_generators(layer)
        elif getattr(layer, "seed_generator", None) is not None:
            yield layer.seed_generator


class _Keeper(keras.callbacks.Callback):
    """Write a checkpoint and a line of log at the end of every epoch."""

    def __init__(self, folder: Path, history: tuple[Epoch, ...], epochs: int) -> None:
        super().__init__()
        self._folder = folder
        self._epochs = epochs
        self._started_s = 0.0
        self.history = history

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._started_s = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        figures = logs or {}
        if not np.isfinite(figures["loss"]):
            raise TrainingError(
                f"the loss of epoch {epoch + 1} is {figures['loss']}; lower the learning rate"
            )
        done = Epoch(
            number=epoch + 1,
            loss=figures["loss"],
            accuracy=figures["accuracy"],
            validation_loss=figures["val_loss"],
            validation_accuracy=figures["val_accuracy"],
            seconds=time.monotonic() - self._started_s,
        )
        self.history = (*self.history, done)
        checkpoint.save(self._folder, self.model, self.history)
        log.info(
            "epoch %d of %d: loss %.4f, accuracy %.2f %%; validation %.4f, %.2f %%; "
            "%.1f s, about %.0f s to go",
            done.number, self._epochs, done.loss, 100 * done.accuracy,
            done.validation_loss, 100 * done.validation_accuracy,
            done.seconds, done.seconds * (self._epochs - done.number),
        )  # fmt: skip


class _Bar(keras.callbacks.Callback):
    """Move a bar on the terminal; there is none where the output is not a terminal."""

    def __init__(self, progress: Progress, steps: int, epochs: int) -> None:
        super().__init__()
        self._progress = progress
        self._epochs = epochs
        self._task = progress.add_task("", total=steps, loss="")

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._progress.reset(self._task, description=f"epoch {epoch + 1} of {self._epochs}")

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        loss = f", loss {(logs or {})['loss']:.4f}"
        self._progress.update(self._task, completed=batch + 1, loss=loss)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
