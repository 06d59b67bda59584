"""The textbook's largest network for small images: two convolutions, one pool."""

import keras
from keras import layers


def conv32_64(shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10) -> keras.Model:
    """32 kernels, 64 kernels, pool, dense 100."""
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.Conv2D(64, 3, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(100, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="conv32_64")
