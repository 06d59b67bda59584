"""What of the settings becomes a Keras optimizer, a schedule, a loss and what is watched."""

from typing import NamedTuple

import keras

from pipeline.config import TrainingConfig

RISING_SHARE = 0.3  # of a one-cycle run's steps, as fast.ai has it
FIRST_RATE = 1 / 25  # of the highest, as Smith and Topin (2018) and fast.ai begin a cycle
LAST_RATE = 1e-5  # of the highest


class Objective(NamedTuple):
    """What is made small, and what is watched meanwhile."""

    loss: keras.losses.Loss
    accuracy: keras.metrics.Metric | None  # None where there are no classes
    one_hot: int  # classes, if the loss takes targets as one-hot vectors; else 0


def objective(config: TrainingConfig, classes: int) -> Objective:
    """Return the loss of the settings.

    Args:
        config: its label smoothing needs one-hot targets.
        classes: how many; 0 for a model that does not classify, whose squared error is taken.
    """
    if not classes:
        return Objective(keras.losses.MeanSquaredError(), None, 0)
    if config.label_smoothing:
        return Objective(
            keras.losses.CategoricalCrossentropy(
                from_logits=True, label_smoothing=config.label_smoothing
            ),
            keras.metrics.CategoricalAccuracy(name="accuracy"),
            classes,
        )
    return Objective(
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        0,
    )


def optimizer(config: TrainingConfig, steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer of the settings.

    Args:
        config: which, and with what.
        steps: of the whole training.
    """
    options = {
        "learning_rate": schedule(config, steps),
        "weight_decay": config.weight_decay or None,
        "use_ema": bool(config.ema),
        "ema_momentum": config.ema or 0.99,  # Keras' default, of no effect without use_ema
    }
    if config.optimizer in {"sgd", "rmsprop"}:
        options["momentum"] = config.momentum
    kinds = {
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
        "sgd": keras.optimizers.SGD,
        "rmsprop": keras.optimizers.RMSprop,
    }
    if config.optimizer == "adamw":
        options["weight_decay"] = config.weight_decay
    return kinds[config.optimizer](**options)


def schedule(
    config: TrainingConfig, steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Return the learning rate as a function of the optimizer's own count of steps.

    That count is part of a checkpoint, so that the rate goes on where it stopped.
    """
    cycle = config.schedule == "one-cycle"
    share = config.warmup_share or (RISING_SHARE if cycle else 0.0)
    rising = round(steps * share)
    if config.schedule == "constant" and not rising:
        return config.learning_rate
    first = config.learning_rate * (FIRST_RATE if cycle else 0.0)
    falls = config.schedule != "constant"
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=first if rising else config.learning_rate,
        decay_steps=max(1, steps - rising),
        alpha=(LAST_RATE if cycle else 0.0) if falls else 1.0,
        warmup_target=config.learning_rate if rising else None,
        warmup_steps=rising,
    )
