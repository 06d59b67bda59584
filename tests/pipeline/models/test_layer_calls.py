import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from pipeline import models
from pipeline.models import layer_calls


def multiply_adds(layer, shape):
    given = keras.Input(shape)
    return models.count(keras.Model(given, layer(given)))[1]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (layers.Conv2D(8, 3), (10, 9, 4), 8 * 7 * 8 * (9 * 4)),
        (layers.Conv2D(8, 3, 2, padding="same"), (9, 9, 4), 5 * 5 * 8 * (9 * 4)),
        (layers.Conv2D(8, 3, groups=2), (10, 10, 4), 8 * 8 * 8 * (9 * 2)),
        (layers.Conv1D(8, 3), (10, 4), 8 * 8 * (3 * 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (10, 10, 4), 8 * 8 * 8 * 9),
        (layers.SeparableConv2D(8, 3), (10, 10, 4), 8 * 8 * (9 * 4 + 4 * 8)),
        (layers.Conv2DTranspose(8, 3, 2), (5, 5, 4), 5 * 5 * 4 * (9 * 8)),
        (layers.Dense(6), (10,), 60),
        (layers.Dense(6), (7, 10), 7 * 60),
        (layers.MaxPooling2D(2), (10, 10, 4), 0),
    ],
)
def test_multiply_adds_are_those_worked_out_by_hand(layer, shape, expected):
    assert multiply_adds(layer, shape) == expected


def test_calls_come_in_order_with_their_shapes_and_leave_the_model_as_it_was():
    model = models.build("dense", (4, 4, 1), 3, hidden=[5])
    rows = np.full((2, 4, 4, 1), 7, np.uint8)

    answer, calls = layer_calls.trace(model, "uint8", rows=2)

    np.testing.assert_allclose(answer(tf.constant(rows)), model(rows), rtol=1e-6)
    assert [(one.layer.name, one.given, one.made) for one in calls] == [
        ("scale", (2, 4, 4, 1), (2, 4, 4, 1)),
        ("flatten", (2, 4, 4, 1), (2, 16)),
        ("dense", (2, 16), (2, 5)),
        ("logits", (2, 5), (2, 3)),
    ]
    assert not any("call" in vars(layer) for layer in model.layers)


def test_layers_inside_models_and_layers_are_found_once():
    model = models.build("tests.pipeline.models.odd_nets:subclassed", (8, 8, 1), 3)

    names = [layer.name for layer in layer_calls.inside(model)]

    assert names.count("conv") == 1
    assert {"block", "last", "conv"} < set(names)
