"""The textbook network: one convolution with ten kernels, then a dense layer."""

import keras
from keras import layers


def conv10_dropout(shape: tuple[int, int, int], classes: int) -> keras.Model:
    """3 x 3 convolution with 10 kernels, 2 x 2 max pooling, dropout 0.5, dense 100.

    197,210 parameters and 0.27 million multiply-adds for 28 x 28 x 1 and ten classes.
    """
    image = keras.Input(shape, dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Conv2D(10, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    x = layers.Dense(100, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="conv10_dropout")
