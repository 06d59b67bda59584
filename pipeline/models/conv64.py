"""The textbook's networks of 64 kernels: one convolution or two, each with a pool behind it."""

import keras
from keras import layers


def conv64(
    shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10, dropout: float = 0.0
) -> keras.Model:
    """64 kernels, pool, dense 128; dropout before that if asked for."""
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Conv2D(64, 3, activation="relu", name="conv")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(128, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="conv64")


def conv64x2(shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10) -> keras.Model:
    """Twice 64 kernels and a pool, dense 128."""
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    for place in (1, 2):
        x = layers.Conv2D(64, 3, activation="relu", name=f"conv{place}")(x)
        x = layers.MaxPooling2D(2, name=f"pool{place}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(128, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="conv64x2")
