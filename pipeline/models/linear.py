"""A straight line: no classes, numbers in and numbers out."""

import keras
from keras import layers


def linear(shape: tuple[int, ...] = (1,), outputs: int = 1) -> keras.Model:
    """A straight line: dense without activation."""
    x = keras.Input(shape, dtype="float32", name="x")
    return keras.Model(x, layers.Dense(outputs, name="y")(x), name="linear")
