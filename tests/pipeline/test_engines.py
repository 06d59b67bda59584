import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import device, engines, recipe
from pipeline.config import Augmentation, TrainingConfig
from pipeline.dataset import Split
from pipeline.feed import Feed

ROWS, CLASSES = 70, 3
RANDOM = np.random.default_rng(3)
SPLIT = Split(
    inputs=RANDOM.integers(0, 256, (ROWS, 8, 8, 1)).astype(np.uint8),
    targets=RANDOM.integers(0, CLASSES, ROWS),
)


def network():
    """Dropout, averages of a batch, a penalty on weights: all that has a state or a loss."""
    image = keras.Input((8, 8, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, kernel_regularizer="l2")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.4)(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Dense(CLASSES)(x))


def train(config):
    """Return the weights after every step, and the figures of every epoch."""
    device.reproduce(xla=config.xla)
    keras.utils.set_random_seed(5)
    objective = recipe.objective(config, CLASSES)
    feed = Feed(SPLIT, config, objective.one_hot)
    model = network()
    model.compile(
        recipe.optimizer(config, 2 * feed.steps),
        objective.loss,
        metrics=[objective.accuracy],
        steps_per_execution=config.steps_per_execution,
        jit_compile=config.xla,
    )
    model.optimizer.build(model.trainable_variables)
    engine = engines.build(model, objective, config)
    steps, weights, figures = [], [], []

    def after(step):
        steps.append(step)
        weights.append([one.numpy() for one in model.variables])

    for epoch in (1, 2):
        engine.train(feed.epoch(epoch), lambda: None, after)
        weights.append([one.numpy() for one in model.variables])
        figures.append([float(one.result()) for one in engines.trackers(model, objective)])
    return steps, weights, figures


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "learning_rate": 0.01},
        {"optimizer": "adam", "ema": 0.9, "schedule": "cosine", "label_smoothing": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.01, "steps_per_execution": 3},
        {"optimizer": "rmsprop", "momentum": 0.5, "augmentation": Augmentation(flip=True)},
        {"optimizer": "adam", "shards": 3, "steps_per_execution": 2},
    ],
)
def test_both_engines_give_the_same_weights_after_every_step(settings):
    fit, tape = (
        train(TrainingConfig(engine=engine, batch_rows=16, **settings))
        for engine in ("fit", "tape")
    )

    assert fit[0] == tape[0]
    assert fit[2] == tape[2]
    for expected, found in zip(fit[1], tape[1], strict=True):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("engine", ["fit", "tape"])
def test_steps_are_told_at_least_once_an_execution_and_at_the_end(engine):
    steps, _, _ = train(TrainingConfig(engine=engine, batch_rows=16, steps_per_execution=2))

    assert steps == [2, 4, 5] * 2


@pytest.mark.parametrize("engine", ["fit", "tape"])
def test_averages_do_not_take_the_weights_place_between_epochs(engine):
    with_averages, without = (
        train(TrainingConfig(engine=engine, batch_rows=16, ema=ema)) for ema in (0.9, 0.0)
    )

    for one, other in zip(with_averages[1][-1], without[1][-1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shards", [2, 3, 40])
def test_a_batch_in_pieces_is_the_same_step_up_to_rounding(shards):
    config = TrainingConfig(optimizer="sgd", learning_rate=0.1, batch_rows=16)
    inputs, targets = tf.constant(SPLIT.inputs[:7]), tf.constant(SPLIT.targets[:7])
    found = []
    for pieces in (1, shards):  # more than there are rows, too
        keras.utils.set_random_seed(5)
        image = keras.Input((8, 8, 1), dtype="uint8")
        x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
        model = keras.Model(image, keras.layers.Dense(CLASSES, kernel_regularizer="l2")(x))
        objective = recipe.objective(config, CLASSES)
        model.compile(recipe.optimizer(config, 10), objective.loss, metrics=[objective.accuracy])
        step = engines.Step(model, objective, pieces, model.compute_metrics)
        tf.function(step)(inputs, targets)
        found.append([variable.numpy() for variable in model.trainable_variables])

    for whole, parts in zip(*found, strict=True):
        if shards <= len(inputs):
            np.testing.assert_allclose(parts, whole, atol=1e-6)
        assert np.isfinite(parts).all()


@pytest.mark.slow
def test_a_step_that_xla_compiles_comes_to_the_same_up_to_rounding():
    plain, compiled = (
        train(TrainingConfig(engine="tape", optimizer="sgd", batch_rows=16, xla=xla))
        for xla in (False, True)
    )

    for one, other in zip(plain[1][0], compiled[1][0], strict=True):
        np.testing.assert_allclose(other, one, atol=1e-3)
