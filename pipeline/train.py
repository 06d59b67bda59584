"""Train a network, keep its state, and go on where an earlier run stopped, to the bit.

What a step computes follows from the settings and the variables of a checkpoint alone: the order
of the rows and their augmentation are keyed by (seed, epoch, step), the schedule by the
optimizer's own count, dropout by states that are kept with the weights. A run that was killed at
any moment and one that was not end with the same weights.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline import (
    augment,
    checkpoint,
    dataset,
    device,
    engines,
    feed,
    models,
    progress,
    recipe,
    splits,
    stopping,
)
from pipeline.config import TrainingConfig
from pipeline.errors import TrainingError
from pipeline.records import Dataset, Epoch, Trained
from service import bundle

log = logging.getLogger(__name__)
VALIDATION_BATCH_ROWS = 1000
# What changes neither a step nor the order of steps.
WITHOUT_EFFECT = {"fresh", "keep", "checkpoint_every_s", "tensorboard", "early_stopping"}
FULL = "float32"
NOT_FASTER = "nothing here is faster in 16 bits"
ROUNDED = (
    "products are rounded to 16 bits while training, which is faster here; validation and the "
    "exported model are float32"
)
CODE = (augment, engines, feed, recipe, splits)


def fit(
    data: Dataset,
    config: TrainingConfig,
    run: Path,
    share: Callable[[float], None] | None = None,
) -> Trained:
    """Train, or go on training, and keep the epoch with the lowest validation loss.

    Args:
        data: prepared rows.
        config: how.
        run: folder for the checkpoints of just these settings, as `run_folder` names it.
        share: told from time to time which share of the training is done.

    Raises:
        ConfigError: there is no such network, it does not fit the data, or this process is one of
            several workers.
        TrainingError: the loss is no longer a number, or `run` has checkpoints of other settings
            or of more epochs.
        InterruptedTrainingError: SIGTERM came; the state is saved.
    """
    computes_on = device.prepare()
    device.reproduce(xla=config.xla)
    folder = run / "checkpoints"
    if config.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    known = settings(data, config)
    found = checkpoint.latest(folder, known)
    training = _Training(data, config, folder, known)
    history = found.history if found else ()
    if len(history) > config.epochs:
        raise TrainingError(
            f"{folder} has {len(history)} epochs of this very run, {config.epochs} are asked for; "
            f"ask for {len(history)} or more, or train with --fresh"
        )
    if _is_over(history, config):
        log.info("all %d epochs of this very run are in %s: nothing to train", len(history), folder)
    else:
        if found:
            training.restore(found)
        log.info(
            "training %s on %s, epochs %d to %d, %d rows each",
            config.architecture, computes_on, len(history) + 1, config.epochs, data.train_rows,
        )  # fmt: skip
        history = training.run(share)
    return training.result(history, computes_on)


def run_folder(runs: Path, preset: str, data: Dataset, config: TrainingConfig) -> Path:
    """Name the folder of one set of settings: data, training, code and versions of the tools."""
    text = json.dumps(settings(data, config), sort_keys=True)
    return runs / f"{preset}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def settings(data: Dataset, config: TrainingConfig) -> dict[str, Any]:
    """Return all that the weights after a given step follow from, as JSON can hold it.

    The number of epochs is left out where no step depends on it, so that a longer run goes on
    where a shorter one ended.
    """
    training = {
        f"training.{name}": value
        for name, value in asdict(config).items()
        if name not in WITHOUT_EFFECT
    }
    if config.schedule == "constant" and not config.warmup_share:
        del training["training.epochs"]
    paths = [Path(__file__), *(Path(str(module.__file__)) for module in CODE)]
    code = {f"pipeline/{path.name}": path for path in paths} | models.files(config.architecture)
    return {
        "data": [data.sha256, data.train_rows, data.validation_share, data.split_seed],
        **training,
        **{f"code of {name}": bundle.file_sha256(path) for name, path in code.items()},
        "precision": (device.mixed_policy() if config.mixed_precision else None) or FULL,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


class _Training:
    """A model in training, with everything that a step reads or writes."""

    def __init__(
        self, data: Dataset, config: TrainingConfig, folder: Path, known: dict[str, Any]
    ) -> None:
        self._data = data
        self._config = config
        self._folder = folder
        self._known = known
        self._splits = dataset.load(data)
        keras.utils.set_random_seed(config.seed)
        objective = recipe.objective(config, len(data.labels))
        self._feed = feed.Feed(self._splits.train, config, objective.one_hot)
        mixed = device.mixed_policy() if config.mixed_precision else None
        if config.mixed_precision:
            log.info("training in %s: %s", mixed or FULL, ROUNDED if mixed else NOT_FASTER)
        spread = device.strategy()
        with spread.scope(), _precision(mixed or FULL):
            self._model = self._network()
            self._model.compile(
                optimizer=recipe.optimizer(config, config.epochs * self._feed.steps),
                loss=objective.loss,
                metrics=[objective.accuracy] if objective.accuracy else None,
                # Several replicas take one step at a time: with more, Keras fails.
                steps_per_execution=(
                    config.steps_per_execution if spread.num_replicas_in_sync == 1 else 1
                ),
                jit_compile=config.xla,
            )
            self._model.optimizer.build(self._model.trainable_variables)
        self._trackers = engines.trackers(self._model, objective)
        alone = spread.num_replicas_in_sync == 1  # else the devices share a batch already
        self._engine = engines.build(
            self._model, objective, config if alone else replace(config, shards=1)
        )
        # What is validated and saved: in float32, whatever is trained in.
        self._plain = self._float32() if mixed else self._model
        self._answer = tf.function(
            lambda inputs: self._plain(inputs, training=False), reduce_retracing=True
        )
        self._history: tuple[Epoch, ...] = ()
        self._step = 0
        self._began_s = self._saved_s = time.monotonic()
        self._measured: list[np.ndarray[Any, Any]] = []

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take a checkpoint's place.

        Raises:
            TrainingError: it has other variables than this model.
        """
        log.info("resuming from %s", found.arrays)
        arrays = checkpoint.read_arrays(found)
        variables = self._variables()
        if [one.shape for one in arrays] != [tuple(one.shape) for one in variables]:
            raise TrainingError(
                f"{found.arrays} has other variables than {self._config.architecture}; "
                "train with --fresh"
            )
        for variable, value in zip(variables, arrays, strict=True):
            variable.assign(value)
        self._history, self._step = found.history, found.step
        self._began_s -= found.seconds
        if found.step:  # else they are of the epoch before
            self._measured = arrays[len(arrays) - len(self._metrics()) :]

    def run(self, share: Callable[[float], None] | None) -> tuple[Epoch, ...]:
        """Train every epoch that is left; return the history of all."""
        config = self._config
        bar = progress.Bar(self._feed.steps, config.epochs, config.batch_rows, self._figures, share)
        with stopping.watched() as self._stopping, bar as self._bar:
            while not _is_over(self._history, config):
                self._epoch(len(self._history) + 1)
        return self._history

    def result(self, history: tuple[Epoch, ...], computes_on: str) -> Trained:
        """Return the record of the best epoch."""
        found = checkpoint.latest(self._folder, self._known)
        if found is None or found.model is None:
            raise TrainingError(f"{self._folder} lost its best epoch; train with --fresh")
        best = checkpoint.best(history)
        log.info(
            "epoch %d of %d has the lowest validation loss, %.4g: its weights are kept",
            best.number, len(history), best.validation_loss,
        )  # fmt: skip
        parameters, multiply_adds = models.count(self._model)
        return Trained(
            path=found.model,
            sha256=found.model_sha256,
            parameters=parameters,
            optimizer=self._config.optimizer,
            device=computes_on,
            history=history,
            best_epoch=best.number,
            multiply_adds=multiply_adds,
        )

    def _network(self) -> keras.Model:
        inputs = self._splits.train.inputs
        outputs = len(self._data.labels) or int(np.prod(self._splits.train.targets.shape[1:]))
        return models.build(
            self._config.architecture,
            inputs.shape[1:],
            outputs,
            dtype=str(inputs.dtype),
            **self._config.architecture_settings,
        )

    def _epoch(self, number: int) -> None:
        before = self._step
        self._engine.train(
            self._feed.epoch(number, skip=before),
            self._begin,
            lambda steps: self._after(number, before + steps),
        )
        figures = self._figures()
        with self._averaged():
            if self._plain is not self._model:
                self._plain.set_weights(self._model.get_weights())
            loss, accuracy = self._validate()
            done = Epoch(
                number=number,
                loss=figures["loss"],
                accuracy=figures.get("accuracy", 0.0),
                validation_loss=loss,
                validation_accuracy=accuracy,
                seconds=time.monotonic() - self._began_s,
            )
            _check(done)
            self._history, self._step = (*self._history, done), 0
            if checkpoint.best(self._history) is done:
                checkpoint.write_model(self._folder, number, self._save_model)
        self._save()
        self._tell(done)
        self._began_s = time.monotonic()
        if self._stopping.signal:
            self._stopping.leave()

    def _begin(self) -> None:
        """Give the metrics back what a resumed epoch had measured before it was stopped."""
        for metric, value in zip(self._metrics(), self._measured, strict=False):
            metric.assign(value)
        self._measured = []

    def _after(self, number: int, step: int) -> None:
        """Save between two steps, if it is time or somebody asks training to end."""
        self._step = step
        self._bar.move(number, step)
        if step == self._feed.steps:
            return  # the epoch's own end comes at once
        asked = bool(self._stopping.signal)
        if asked or time.monotonic() - self._saved_s >= self._config.checkpoint_every_s:
            self._save()
        if asked:
            self._stopping.leave()

    def _save(self) -> None:
        checkpoint.write(
            self._folder,
            self._known,
            checkpoint.Position(self._history, self._step, time.monotonic() - self._began_s),
            [variable.numpy() for variable in self._variables()],
            self._config.keep,
        )
        self._saved_s = time.monotonic()

    def _save_model(self, path: Path) -> None:
        self._plain.save(path)

    def _float32(self) -> keras.Model:
        with _precision(FULL):
            return self._network()

    def _variables(self) -> list[Any]:
        """Return all that a step reads and writes, states of dropout included."""
        model = self._model
        return [*model.variables, *model.optimizer.variables, *self._metrics()]

    def _metrics(self) -> list[Any]:
        return [variable for tracker in self._trackers for variable in tracker.variables]

    def _figures(self) -> dict[str, float]:
        return {tracker.name: float(tracker.result()) for tracker in self._trackers}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the moving averages (EMA) in the weights' place inside the block, if there are."""
        variables = self._model.trainable_variables
        weights = [variable.numpy() for variable in variables]
        self._model.optimizer.finalize_variable_values(variables)
        try:
            yield
        finally:
            for variable, value in zip(variables, weights, strict=True):
                variable.assign(value)

    def _validate(self) -> tuple[float, float]:
        """Return mean loss, without label smoothing, and accuracy on the validation rows."""
        split = self._splits.validation
        outputs = np.concatenate(
            [
                self._answer(tf.constant(split.inputs[start : start + VALIDATION_BATCH_ROWS]))
                for start in range(0, len(split.inputs), VALIDATION_BATCH_ROWS)
            ]
        ).astype(np.float32)
        if not self._data.classifies:
            return float(np.square(outputs - split.targets, dtype=np.float64).mean()), 0.0
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(split.targets, outputs)
        return float(loss), float((outputs.argmax(axis=1) == split.targets).mean())

    def _tell(self, done: Epoch) -> None:
        left = self._config.epochs - done.number
        if self._data.classifies:
            log.info(
                "epoch %d of %d: loss %.4f, accuracy %.2f %%; validation %.4f, %.2f %%; "
                "%.1f s, about %.0f s to go",
                done.number, self._config.epochs, done.loss, 100 * done.accuracy,
                done.validation_loss, 100 * done.validation_accuracy,
                done.seconds, done.seconds * left,
            )  # fmt: skip
        else:
            log.info(
                "epoch %d of %d: loss %.4g; validation %.4g; %.1f s, about %.0f s to go",
                done.number, self._config.epochs, done.loss, done.validation_loss,
                done.seconds, done.seconds * left,
            )  # fmt: skip
        if self._config.tensorboard:
            _write_summary(self._folder.parent / "tensorboard", done)


def _is_over(history: tuple[Epoch, ...], config: TrainingConfig) -> bool:
    if len(history) >= config.epochs:
        return True
    if not (config.early_stopping and history):
        return False
    return len(history) - checkpoint.best(history).number >= config.early_stopping


def _check(done: Epoch) -> None:
    if not np.isfinite(done.loss + done.validation_loss):
        raise TrainingError(
            f"the loss of epoch {done.number} is {done.loss}, on validation rows "
            f"{done.validation_loss}; lower the learning rate"
        )


@contextmanager
def _precision(policy: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _write_summary(folder: Path, done: Epoch) -> None:
    """Write the figures of an epoch as TensorBoard reads them, which need not be installed."""
    kind = tf.compat.v1.SummaryMetadata
    scalar = kind(plugin_data=kind.PluginData(plugin_name="scalars"))
    with tf.summary.create_file_writer(str(folder)).as_default(step=done.number):
        for name in ("loss", "accuracy", "validation_loss", "validation_accuracy", "seconds"):
            tf.summary.write(name, tf.constant(getattr(done, name), tf.float32), metadata=scalar)
