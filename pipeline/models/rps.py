"""Rock, paper, scissors: a deep stack for large colour images of few classes."""

import keras
from keras import layers

KERNELS = (64, 64, 128, 128)


def rps(
    shape: tuple[int, ...] = (150, 150, 3), outputs: int = 3, *, dropout: float = 0.5
) -> keras.Model:
    """Four times kernels and a pool, dropout, dense 512."""
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    for place, kernels in enumerate(KERNELS, 1):
        x = layers.Conv2D(kernels, 3, activation="relu", name=f"conv{place}")(x)
        x = layers.MaxPooling2D(2, name=f"pool{place}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(512, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="rps")
