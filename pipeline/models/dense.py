"""The simplest classifier of images: dense layers alone."""

from collections.abc import Sequence

import keras
from keras import layers

from pipeline.errors import ConfigError


def dense(
    shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10, *, hidden: Sequence[int] = (128,)
) -> keras.Model:
    """Dense 128, or other layers.

    Args:
        shape: of one image.
        outputs: how many classes.
        hidden: units of each layer before the last, such as [512, 256].

    Raises:
        ConfigError: `hidden` is not a list of whole numbers from 1.
    """
    if not isinstance(hidden, list | tuple) or not all(
        isinstance(units, int) and units >= 1 for units in hidden
    ):
        raise ConfigError(
            f"hidden of dense is {hidden!r}, expected units a layer, such as [512, 256]"
        )
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Flatten(name="flatten")(x)
    for place, units in enumerate(hidden, 1):
        name = "dense" if len(hidden) == 1 else f"dense{place}"
        x = layers.Dense(units, activation="relu", name=name)(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="dense_layers")
