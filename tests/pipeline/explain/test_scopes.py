"""The layers that explain names are the ones that Keras knows, in graphs of real exports."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from pipeline import export, models
from pipeline.explain import first_divergence
from pipeline.explain.scopes import places
from pipeline.explain.tensors import Reference
from pipeline.export import onnx, saved_model
from pipeline.export.metadata import Metadata
from pipeline.models import contract

SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
ABOUT = Metadata({})


class Pieces(keras.Model):
    """A user's model, which has no input of its own and calls what is no layer."""

    def __init__(self):
        super().__init__(name="pieces")
        self.conv = layers.Conv2D(2, 3, name="conv")
        self.flatten = layers.Flatten(name="flatten")
        self.block = keras.Sequential([layers.Dense(6, name="conv")], name="block")
        self.head = layers.Dense(3, name="logits")

    def call(self, image):
        return self.head(tf.nn.relu(self.block(self.flatten(self.conv(image)))))


class Compiled(layers.Layer):
    """Its call is a function of TensorFlow, which freezing puts in place of the call."""

    @tf.function
    def call(self, x):
        return tf.square(x)


def ours(architecture):
    return models.build(architecture, SHAPE, 3)


def functional(*inside, name=None):
    x = image = keras.Input(SHAPE, dtype="uint8", name="image")
    for layer in (layers.Rescaling(1 / 255, name="scale"), *inside):
        x = layer(x)
    x = layers.Dense(3, name="logits")(layers.Flatten(name="flatten")(x))
    return keras.Model(image, x, name=name)


def sequential():
    return keras.Sequential(
        [
            keras.Input(SHAPE, dtype="uint8", name="image"),
            layers.Rescaling(1 / 255, name="scale"),
            layers.Flatten(name="flatten"),
            layers.Dense(4, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="logits"),
        ]
    )


def nested(name=None):
    deep = keras.Sequential([layers.Conv2D(2, 3, name="conv")], name="deep")
    body = keras.Sequential([layers.Conv2D(2, 3, name="conv"), deep], name="sequential")
    return functional(layers.Conv2D(2, 3, name="conv"), body, name=name)


def called_twice(name=None):
    conv = layers.Conv2D(1, 3, padding="same", activation="relu", name="conv")
    return functional(conv, layers.BatchNormalization(name="norm"), conv, name=name)


def numbered():
    return functional(
        *(layers.Conv2D(1, 1, name=name) for name in ("a", "a_1", "a_3", "a_2")), name="a_4"
    )


def attending():
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    return functional(
        layers.Reshape((8, 8), name="reshape"),
        lambda x: attention(x, x),
        layers.LayerNormalization(name="norm"),
        name="attending",
    )


def wrapped():
    return contract.make("pieces", Pieces, SHAPE, "uint8")


def of_one_layer():
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = keras.ops.reshape(keras.ops.cast(image, "float32"), (-1, 64))
    return keras.Model(image, layers.Dense(3, name="logits")(x), name="of_one")


def all_of(*inside):
    return ["Cast", "scale", *inside, "logits"]


NESTED = all_of("conv", "sequential/conv", "sequential/deep/conv", "flatten")
ATTENTION = [f"attention/{part}" for part in ("query", "key", "value", "attention_output")]
CASES = {
    "small": (
        partial(ours, "small"),
        all_of("conv1", "pool1", "conv2", "pool2", "flatten", "dense"),
    ),
    "accurate": (
        partial(ours, "accurate"),
        all_of(
            *("conv1", "conv2", "pool1", "conv3", "conv4", "pool2", "conv5", "pool3"),
            *("flatten", "dense"),
        ),
    ),
    "conv10-dropout": (
        partial(ours, "conv10-dropout"), all_of("conv", "pool", "flatten", "dense")
    ),
    "conv32-64": (
        partial(ours, "conv32-64"), all_of("conv1", "conv2", "pool", "flatten", "dense")
    ),
    "without a name": (called_twice, all_of("conv", "norm", "flatten")),
    "with a name": (partial(called_twice, "mine"), all_of("conv", "norm", "flatten")),
    "sequential": (sequential, all_of("flatten", "first", "norm")),
    "nested": (partial(nested, "mine"), NESTED),
    "nested without a name": (nested, NESTED),
    "subclassed": (wrapped, ["Cast", "conv", "flatten", "block/conv", "Relu", "logits"]),
    "layers with numbers": (numbered, all_of("a", "a_1", "a_3", "a_2", "flatten")),
    "layers of layers": (
        attending, all_of("reshape", *ATTENTION, "attention", "norm", "flatten")
    ),
    "a compiled layer": (
        lambda: functional(Compiled(name="compiled"), name="mine"), all_of("compiled", "flatten")
    ),
    "one layer": (of_one_layer, ["Cast", "Reshape", "logits"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_every_tensor_is_of_a_layer_that_keras_knows_by_that_name(make, expected, tmp_path):
    model = make()
    saved_model.write(model, export.serving_function(model), tmp_path / "saved", ABOUT)

    found = Reference(tmp_path / "saved").walk(IMAGES)

    assert set(expected) == {tensor.layer for tensor in found.tensors}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (partial(ours, "small"), "conv2"),
        (partial(ours, "conv10-dropout"), "conv"),
        (partial(nested, "mine"), "sequential/deep/conv"),
        (nested, "sequential/deep/conv"),
        (wrapped, "block/conv"),
        (partial(called_twice, "mine"), "conv"),
    ],
)
def test_the_layer_whose_weights_are_damaged_is_named(make, layer, tmp_path):
    keras.utils.set_random_seed(2)
    model = make()
    serve = export.serving_function(model)
    saved_model.write(model, serve, tmp_path / "saved", ABOUT)
    damaged = model.get_layer("pieces") if make is wrapped else model
    for name in layer.split("/"):
        damaged = damaged.get_layer(name)
    kernel, bias = damaged.get_weights()
    kernel[..., 0] = kernel[::-1, ..., 0]
    damaged.set_weights([kernel, bias])
    onnx.write(serve, tmp_path / "model.onnx", ABOUT)

    found = first_divergence(tmp_path / "saved", tmp_path / "model.onnx", IMAGES)

    assert found.layer == layer, found.text
    assert f"diverges at {layer} (" in found.text


def test_a_scope_inside_a_layer_that_is_opened_twice_is_no_layer():
    named = places(["m_1/norm_1/moments/mean", "m_1/norm_1/moments_1/mean", "m_1/out_1/MatMul"])

    assert [place.layer for place in named.values()] == ["norm", "norm", "out"]


def test_what_is_in_no_layer_keeps_its_own_name_without_the_model_and_its_functions():
    named = places(
        ["StatefulPartitionedCall/m_1/Cast", "StatefulPartitionedCall/m_1/a_1/Relu", "split/MatMul"]
    )

    assert [place.layer for place in named.values()] == ["Cast", "a", "split/MatMul"]
