"""Five convolutions in three blocks and one hidden layer: the network of the preset `accurate`."""

import keras
from keras import layers

BLOCKS = ((32, 32), (64, 64), (128,))  # kernels of the convolutions before each pooling


def accurate(
    shape: tuple[int, ...] = (28, 28, 1), outputs: int = 10, dropout: float = 0.4
) -> keras.Model:
    """3 x 3 convolutions, 32 twice, 64 twice, 128, pooling after each, dense 256: our best.

    No batch normalisation: on a CPU it costs half of an epoch again, and brought nothing here.
    """
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    number = 0
    for block, widths in enumerate(BLOCKS, 1):
        for kernels in widths:
            number += 1
            x = layers.Conv2D(kernels, 3, padding="same", activation="relu", name=f"conv{number}")(
                x
            )
        x = layers.MaxPooling2D(2, name=f"pool{block}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(dropout, name="dropout1")(x)
    x = layers.Dense(256, activation="relu", name="dense")(x)
    x = layers.Dropout(dropout, name="dropout2")(x)
    return keras.Model(image, layers.Dense(outputs, name="logits")(x), name="accurate")
