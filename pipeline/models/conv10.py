"""The textbook network: one convolution with ten kernels, then a dense layer."""

import keras
from keras import layers


def conv10(shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10) -> keras.Model:
    """10 kernels, pool, dense 100."""
    image, x = _convolved(shape)
    return _answered(image, x, outputs, "conv10")


def conv10_dropout(
    shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10, *, dropout: float = 0.5
) -> keras.Model:
    """10 kernels, pool, dropout, dense 100."""
    image, x = _convolved(shape)
    x = layers.Dropout(dropout, name="dropout")(x)
    return _answered(image, x, outputs, "conv10_dropout")


def _convolved(shape: tuple[int, ...]) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Conv2D(10, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    return image, layers.Flatten(name="flatten")(x)


def _answered(
    image: keras.KerasTensor, x: keras.KerasTensor, outputs: int, name: str
) -> keras.Model:
    x = layers.Dense(100, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name=name)
