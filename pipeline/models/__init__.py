"""Networks by name, one file an architecture.

Each is a function from an image's shape and the number of classes to a Keras model with one uint8
input `image` and one float32 output `logits`. Scaling is inside the model, so that no client can
get it wrong.
"""

from collections.abc import Callable

import keras

from pipeline.errors import ConfigError
from pipeline.models.conv10 import conv10_dropout

ARCHITECTURES: dict[str, Callable[[tuple[int, int, int], int], keras.Model]] = {
    "conv10-dropout": conv10_dropout,
}


def build(architecture: str, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Build a network with fresh weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        shape: (height, width, channels) of one image.
        classes: how many logits.

    Raises:
        ConfigError: there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture](shape, classes)
