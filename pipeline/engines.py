"""Two ways to train on the batches of one epoch: Keras' `fit`, and a loop of our own.

Both take the same batches, call the same functions in between, and leave the same weights in the
model, bit for bit. Neither knows what an epoch is for: no validation, no checkpoints.
"""

import itertools
from collections.abc import Callable
from typing import Protocol

import keras
import tensorflow as tf

from pipeline.config import TrainingConfig
from pipeline.recipe import Objective

Count = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], object]  # inputs, targets, outputs
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
    """Keras' own loop, and its own step where a batch is computed in one piece."""

    def __init__(self, model: keras.Model, objective: Objective, shards: int = 1) -> None:
        self._model = model
        self._trackers = trackers(model, objective)
        if shards > 1:
            # Keras makes its own wrapper of the accuracy when it first counts.
            step = Step(model, objective, shards, model.compute_metrics)

            def train_step(batch: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
                step(*batch)
                return {one.name: one.result() for one in self._trackers}

            model.train_step = train_step

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
        self._trackers = trackers(model, objective)
        self._chunk = config.steps_per_execution
        step = Step(model, objective, config.shards, _counting(objective))
        self._step = tf.function(step, reduce_retracing=True, jit_compile=config.xla)
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


class Step:
    """One step of an optimizer, on a batch in one piece or in several.

    Pieces have no order between them, so that TensorFlow computes them at the same time, a core
    each, without waiting for all cores after every operator. Their gradients are averaged by rows:
    the same step up to rounding, but for layers that look at a whole batch (BatchNormalization) and
    then see a piece of it.
    """

    def __init__(self, model: keras.Model, objective: Objective, shards: int, count: Count) -> None:
        self._model = model
        self._loss = objective.loss
        self._mean = trackers(model, objective)[0]
        self._shards = shards
        self._count = count

    def __call__(self, inputs: tf.Tensor, targets: tf.Tensor) -> None:
        """Change the weights, and count loss and accuracy."""
        if self._shards == 1:
            gradients = self._piece(inputs, targets)
        else:
            gradients = self._averaged(inputs, targets)
        variables = self._model.trainable_variables
        self._model.optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def _averaged(self, inputs: tf.Tensor, targets: tf.Tensor) -> list[tf.Tensor]:
        rows = tf.shape(inputs)[0]
        borders = [rows * place // self._shards for place in range(self._shards + 1)]
        found, weights = [], []
        for start, end in itertools.pairwise(borders):
            # With fewer rows than pieces one comes twice, rather than a mean of nothing.
            stop = tf.maximum(end, start + 1)
            found.append(self._piece(inputs[start:stop], targets[start:stop]))
            weights.append(tf.cast(stop - start, tf.float32))
        shares = [weight / tf.add_n(weights) for weight in weights]
        return [
            tf.add_n([share * one for share, one in zip(shares, of_variable, strict=True)])
            for of_variable in zip(*found, strict=True)
        ]

    def _piece(self, inputs: tf.Tensor, targets: tf.Tensor) -> list[tf.Tensor]:
        """Return the gradients of some rows, scaled as the optimizer wants them."""
        model = self._model
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.add_n([self._loss(targets, outputs), *model.losses])
            scaled = model.optimizer.scale_loss(loss)
        self._mean.update_state(loss, sample_weight=tf.shape(inputs)[0])
        self._count(inputs, targets, outputs)
        gradients: list[tf.Tensor] = tape.gradient(scaled, model.trainable_variables)
        return gradients


def trackers(model: keras.Model, objective: Objective) -> list[keras.metrics.Metric]:
    """Return what a compiled model keeps of an epoch: its mean loss and, of classes, accuracy."""
    return [model.metrics[0], *([objective.accuracy] if objective.accuracy else [])]


def _counting(objective: Objective) -> Count:
    def count(_: tf.Tensor, targets: tf.Tensor, outputs: tf.Tensor) -> None:
        if objective.accuracy is not None:
            objective.accuracy.update_state(targets, outputs)

    return count


def _reset(metrics: list[keras.metrics.Metric]) -> None:
    for metric in metrics:
        metric.reset_state()


def build(model: keras.Model, objective: Objective, config: TrainingConfig) -> Engine:
    """Return the engine of the settings for a compiled model."""
    if config.engine == "tape":
        return Tape(model, objective, config)
    return Fit(model, objective, config.shards)
