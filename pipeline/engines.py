"""Two ways to train on the batches of one epoch: Keras' `fit`, and a loop of our own.

Both take the same batches, call the same functions in between, and leave the same weights in the
model, bit for bit. Neither knows what an epoch is for: no validation, no checkpoints.
"""

from collections.abc import Callable
from typing import Protocol

import keras
import tensorflow as tf

from pipeline.config import TrainingConfig
from pipeline.recipe import Objective

After = Callable[[int], None]  # called with the steps that were done in this call of `train`


class Engine(Protocol):
    """Trains a compiled model in place."""

    def train(self, batches: tf.data.Dataset, before: Callable[[], None], after: After) -> None:
        """Train on every batch.

        Args:
            batches: of known number.
            before: called once the metrics are reset.
            after: called between steps, at least every `steps_per_execution`; may raise to stop.
        """


class Fit:
    """Keras' own loop."""

    def __init__(self, model: keras.Model, objective: Objective) -> None:
        self._model = model
        self._trackers = trackers(model, objective)

    def train(self, batches: tf.data.Dataset, before: Callable[[], None], after: After) -> None:
        """See `Engine`."""
        steps = int(batches.cardinality())  # Keras counts whole executions, the last one too

        def begin() -> None:
            _reset(self._trackers)  # Keras does not know the accuracy before the first step
            before()

        follower = _Follower(begin, lambda step: after(min(step, steps)))
        self._model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=[follower])


class _Follower(keras.callbacks.Callback):
    """Call back, and keep `fit` from putting averages (EMA) in the weights' place at its end."""

    def __init__(self, before: Callable[[], None], after: After) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._weights: list[object] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._before()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._after(batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self.model.optimizer.use_ema:
            self._weights = [one.numpy() for one in self.model.trainable_variables]

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        for variable, value in zip(self.model.trainable_variables, self._weights, strict=False):
            variable.assign(value)


class Tape:
    """`tf.GradientTape` and an optimizer, compiled."""

    def __init__(self, model: keras.Model, objective: Objective, config: TrainingConfig) -> None:
        self._model = model
        self._objective = objective
        self._trackers = trackers(model, objective)
        self._chunk = config.steps_per_execution
        self._step = tf.function(self._one, reduce_retracing=True, jit_compile=config.xla)
        self._steps = tf.function(self._several, reduce_retracing=True)

    def train(self, batches: tf.data.Dataset, before: Callable[[], None], after: After) -> None:
        """See `Engine`."""
        _reset(self._trackers)
        before()
        rest = iter(batches)
        steps = int(batches.cardinality())
        for done in range(0, steps, self._chunk):
            count = min(self._chunk, steps - done)
            self._steps(rest, tf.constant(count))
            after(done + count)

    def _several(self, batches: tf.data.Iterator, count: tf.Tensor) -> None:
        for _ in tf.range(count):
            inputs, targets = batches.get_next()
            self._step(inputs, targets)

    def _one(self, inputs: tf.Tensor, targets: tf.Tensor) -> None:
        model = self._model
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.add_n([self._objective.loss(targets, outputs), *model.losses])
            scaled = model.optimizer.scale_loss(loss)
        variables = model.trainable_variables
        model.optimizer.apply_gradients(
            zip(tape.gradient(scaled, variables), variables, strict=True)
        )
        self._trackers[0].update_state(loss, sample_weight=tf.shape(inputs)[0])
        if self._objective.accuracy is not None:
            self._objective.accuracy.update_state(targets, outputs)


def trackers(model: keras.Model, objective: Objective) -> list[keras.metrics.Metric]:
    """Return what a compiled model keeps of an epoch: its mean loss and, of classes, accuracy."""
    return [model.metrics[0], *([objective.accuracy] if objective.accuracy else [])]


def _reset(metrics: list[keras.metrics.Metric]) -> None:
    for metric in metrics:
        metric.reset_state()


def build(model: keras.Model, objective: Objective, config: TrainingConfig) -> Engine:
    """Return the engine of the settings for a compiled model."""
    return Tape(model, objective, config) if config.engine == "tape" else Fit(model, objective)
