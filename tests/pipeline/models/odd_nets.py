"""Networks as users write them, found as tests.pipeline.models.odd_nets:NAME.

Those above `SOUND` can be trained, exported and served; the others are refused, each for one
reason.
"""

import sys

import keras
import numpy as np
from keras import layers

from pipeline import models


def strided(shape, outputs):
    """Strides of two with padding, so that odd sizes are padded on one side only."""
    image, x = _scaled(shape)
    for place in (1, 2):
        x = layers.Conv2D(8, 3, 2, padding="same", activation="relu", name=f"conv{place}")(x)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def averaged(shape, outputs):
    image, x = _scaled(shape)
    x = layers.AveragePooling2D(3, 2, padding="same")(layers.Conv2D(8, 3)(x))
    return keras.Model(image, layers.Dense(outputs)(layers.GlobalAveragePooling2D()(x)))


def residual(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    inner = layers.ReLU()(layers.BatchNormalization()(x))
    inner = layers.Conv2D(8, 3, padding="same", use_bias=False)(inner)
    x = layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(inner)]))
    return keras.Model(image, layers.Dense(outputs)(layers.GlobalAveragePooling2D()(x)))


def colour(shape, outputs, width=8):
    """Float pixels, channels mixed first; for images of 150 x 150 and more."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.Conv2D(width, 1, activation="relu"),
            layers.SeparableConv2D(width, 3, 4, activation="relu"),
            layers.MaxPooling2D(4),
            layers.Flatten(),
            layers.Dense(outputs),
        ]
    )


def thin(shape, outputs):
    """Kernels of one column, for images one pixel wide."""
    image, x = _scaled(shape)
    x = layers.MaxPooling2D((2, 1))(layers.Conv2D(8, (5, 1), activation="relu")(x))
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def even(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Conv2D(8, 4, padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(2, 2, padding="same", activation="relu")(x)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def lazy(shape, outputs):
    """A Sequential model that says nothing of its input."""
    return keras.Sequential([layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(outputs)])


def any_size(shape, outputs):
    image = keras.Input((None, None, shape[2]), dtype="uint8")
    x = layers.Conv2D(8, 3, activation="relu")(layers.Rescaling(1 / 255)(image))
    return keras.Model(image, layers.Dense(outputs)(layers.GlobalMaxPooling2D()(x)))


@keras.saving.register_keras_serializable("odd_nets")
class Block(layers.Layer):
    """A layer that holds others, one of which it calls as often as it is told."""

    def __init__(self, filters, size=3, times=1, **options):
        super().__init__(**options)
        self.filters, self.size, self.times = filters, size, times
        self.conv = layers.Conv2D(filters, size, activation="relu", name="conv")

    def build(self, shape):
        self.conv.build(shape)

    def call(self, x):
        for _ in range(self.times):
            x = self.conv(x)
        return x

    def get_config(self):
        own = {"filters": self.filters, "size": self.size, "times": self.times}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("odd_nets")
class Subclassed(keras.Model):
    def __init__(self, outputs, times=1, size=3, **options):
        super().__init__(**options)
        self.outputs_wanted, self.times, self.size = outputs, times, size
        self.scale = layers.Rescaling(1 / 255)
        self.block = Block(1, size, times, name="block")
        self.last = layers.Dense(outputs, name="last")
        self.flatten = layers.Flatten()

    def call(self, x):
        return self.last(self.flatten(self.block(self.scale(x))))

    def get_config(self):
        own = {"outputs": self.outputs_wanted, "times": self.times, "size": self.size}
        return {**super().get_config(), **own}


def subclassed(shape, outputs, **settings):
    return Subclassed(outputs, **settings)


def nested(shape, outputs):
    """A model in a model, one layer of which is called twice."""
    image, x = _scaled(shape)
    inner = keras.Sequential([keras.Input(shape), layers.Conv2D(1, 3, padding="same")])
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(inner(inner(x)))))


SOUND = {
    "strided": (28, 28, 1),
    "averaged": (28, 28, 1),
    "residual": (28, 28, 1),
    "colour": (150, 150, 3),
    "thin": (28, 1, 1),
    "even": (27, 27, 1),
    "lazy": (28, 28, 1),
    "any_size": (28, 28, 3),
    "subclassed": (28, 28, 1),
    "nested": (9, 9, 1),
}


def listed(shape, outputs):
    """One tensor in a list is one tensor to Keras."""
    image, x = _scaled(shape)
    return keras.Model([image], [layers.Dense(outputs)(layers.Flatten()(x))])


def numbers(shape, outputs):
    """Two dense layers for numbers, with names of their own."""
    given = keras.Input(shape, name="measured")
    hidden = layers.Dense(8, activation="tanh")(given)
    return keras.Model(given, layers.Dense(outputs, name="estimate")(hidden))


def eaten(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Conv2D(4, 5, 2, name="first")(x)
    x = layers.Conv2D(4, 5, 2, name="second")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def eaten_lazily(shape, outputs):
    return keras.Sequential(
        [
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, dilation_rate=4, name="wide"),
            layers.Flatten(),
            layers.Dense(outputs),
        ]
    )


def sliced(shape, outputs):
    """Keras makes nothing of this without a word."""
    image, x = _scaled(shape)
    x = layers.Conv2D(4, 3, name="conv")(x[:, 9:])
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def sliced_flat(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten(name="flat")(x[:, 9:])))


@keras.saving.register_keras_serializable("odd_nets")
class Cut(layers.Layer):
    """Leaves nothing of images of up to nine lines."""

    def call(self, x):
        return x[:, 9:]


def cut(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Flatten()(Cut(name="cut")(x))
    return keras.Model(image, layers.Dense(outputs)(x))


@keras.saving.register_keras_serializable("odd_nets")
class Trusted(layers.Layer):
    """Says what shape it makes, so that Keras does not look inside."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pool = layers.MaxPooling2D(4, 1, name="hidden")

    def call(self, x):
        return keras.ops.mean(self.pool(x), axis=(1, 2))

    def compute_output_shape(self, shape):
        return shape[0], shape[3]


def trusted(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model(image, layers.Dense(outputs)(Trusted()(x)))


def raising(shape, outputs):
    raise KeyError("no such colour")


def leaving(shape, outputs):
    sys.exit(0)


def interrupted(shape, outputs):
    raise KeyboardInterrupt


def input_in_a_dict(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model({"image": image}, layers.Dense(outputs)(layers.Flatten()(x)))


def open_input_in_a_dict(shape, outputs):
    image = keras.Input((None, None, shape[2]), name="image")
    x = layers.GlobalMaxPooling2D()(image)
    return keras.Model({"image": image}, layers.Dense(outputs)(x))


def output_in_a_dict(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model(image, {"y": layers.Dense(outputs)(layers.Flatten()(x))})


@keras.saving.register_keras_serializable("odd_nets")
class Telling(Subclassed):
    def call(self, x):
        return {"a": super().call(x)}


def subclassed_to_a_dict(shape, outputs):
    return Telling(outputs)


def of_whole_numbers(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Dense(outputs)(layers.Flatten()(x))
    return keras.Model(image, keras.ops.cast(x, "int32"))


def halves(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model(image, layers.Dense(outputs, dtype="float16")(layers.Flatten()(x)))


def of_four_rows(shape, outputs):
    image = keras.Input(batch_shape=(4, *shape))
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(image)))


def of_four_open_rows(shape, outputs):
    image = keras.Input(batch_shape=(4, None, None, shape[2]))
    return keras.Model(image, layers.Dense(outputs)(layers.GlobalMaxPooling2D()(image)))


def text(shape, outputs):
    return "a model"


def two_inputs(shape, outputs):
    one, other = keras.Input(shape), keras.Input(shape)
    x = layers.Flatten()(layers.Add()([one, other]))
    return keras.Model([one, other], layers.Dense(outputs)(x))


def two_outputs(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Flatten()(x)
    return keras.Model(image, [layers.Dense(outputs)(x), layers.Dense(outputs)(x)])


def too_wide(shape, outputs):
    return models.build("dense", shape, outputs + 1)


def unflattened(shape, outputs):
    image, x = _scaled(shape)
    return keras.Model(image, layers.Dense(outputs)(x))


def of_another_shape(shape, outputs):
    return models.build("dense", (8, 8, 1), outputs)


def of_doubles(shape, outputs):
    image = keras.Input(shape, dtype="float64")
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(image)))


def softmax(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Dense(outputs, activation="softmax", name="classes")(layers.Flatten()(x))
    return keras.Model(image, x)


def softmax_inside(shape, outputs):
    image, x = _scaled(shape)
    inner = keras.Sequential([layers.Flatten(), layers.Dense(outputs), layers.Softmax(name="end")])
    return keras.Model(image, inner(x))


def with_lambda(shape, outputs):
    image, x = _scaled(shape)
    x = layers.Lambda(lambda x: x * 2, output_shape=shape, name="doubled")(x)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def augmenting(shape, outputs):
    image, x = _scaled(shape)
    inner = keras.Sequential([keras.Input(shape), layers.RandomFlip(name="flip"), layers.Flatten()])
    return keras.Model(image, layers.Dense(outputs)(inner(x)))


class Forgetful(layers.Layer):
    """Says nothing of its factor when it is saved, and Keras cannot guess an array."""

    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return x * self.factor


def forgetful(shape, outputs):
    image, x = _scaled(shape)
    x = Forgetful(np.float32(2), name="forgetful")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(outputs)(x))


def needing(shape, outputs, width):
    return models.build("dense", shape, outputs, hidden=[width])


def alone(shape):
    return models.build("dense", shape, 10)


NOT_CALLABLE = 3


def _scaled(shape):
    image = keras.Input(shape, dtype="uint8", name="image")
    return image, layers.Rescaling(1 / 255)(image)
