"""Layers as the exports compute them, held against scipy and numpy in float64.

TensorFlow is the reference of everywhere else. Here it is held to the definitions too: one model
has every layer of a kind as a branch of its own, and each branch's part of the logits is
compared.
"""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import signal

from pipeline import export, runtimes
from pipeline.export import onnx, saved_model, tflite
from pipeline.export.metadata import Metadata
from protos import bundle_pb2
from service import agreement
from service.session import Session

ROWS = 5
SCALE = np.float64(np.float32(1 / 255))
FORMATS = ("saved-model", "tflite", "onnx")
OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")


def padding(size, kernel, stride, mode):
    """Rows added before and after an axis: what is odd of SAME's padding comes after."""
    if mode == "valid":
        return 0, 0
    steps = -(-size // stride)
    missing = max((steps - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def padded(x, kernel, stride, mode, value=0.0):
    around = [padding(size, kernel, stride, mode) for size in x.shape[1:3]]
    return np.pad(x, [(0, 0), *around, (0, 0)], constant_values=value)


def correlated(planes, kernel, stride):
    """Correlate (rows, height, width) with one kernel (height, width), every stride-th place."""
    return np.stack([signal.correlate2d(one, kernel, "valid") for one in planes])[
        :, ::stride, ::stride
    ]


def convolution(x, weights, stride, mode):
    kernel, bias = weights
    x = padded(x, len(kernel), stride, mode)
    channels, filters = kernel.shape[2:]
    return np.stack(
        [
            sum(
                correlated(x[..., channel], kernel[..., channel, one], stride)
                for channel in range(channels)
            )
            + bias[one]
            for one in range(filters)
        ],
        axis=-1,
    )


def depthwise(x, weights, stride, mode):
    kernel, bias = weights
    x = padded(x, len(kernel), stride, mode)
    channels, multiplier = kernel.shape[2:]
    planes = [
        correlated(x[..., channel], kernel[..., channel, one], stride)
        for channel in range(channels)
        for one in range(multiplier)
    ]
    return np.stack(planes, axis=-1) + bias


def max_pooling(x, size, stride, mode):
    x = padded(x, size, stride, mode, -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return windows[:, ::stride, ::stride].max(axis=(-2, -1))


def average_pooling(x, size, stride, mode):
    """Average what is in a window of the image; padding is not counted."""
    ones, x = padded(np.ones_like(x), size, stride, mode), padded(x, size, stride, mode)
    window = np.ones((size, size))
    sums, counts = (
        np.stack([correlated(y[..., c], window, stride) for c in range(y.shape[-1])], axis=-1)
        for y in (x, ones)
    )
    return sums / counts


def dense(x, weights):
    return x.reshape(len(x), -1) @ weights[0] + weights[1]


class Branches:
    """A model under construction, and what numpy says that each of its branches gives."""

    def __init__(self, shape, seed):
        self.image = keras.Input(shape, dtype="uint8", name="image")
        self.scaled = layers.Rescaling(1 / 255)(self.image)
        self.random = np.random.default_rng(seed)
        self._parts = []
        self._expected = []
        self._names = []

    def weighted(self, layer, x):
        """Apply a layer with random weights; return its output and them, in float64."""
        y = layer(x)
        layer.set_weights([self.random.normal(size=one.shape) for one in layer.get_weights()])
        return y, [one.astype(np.float64) for one in layer.get_weights()]

    def add(self, name, output, expected):
        """Add a branch; `expected` is a function of the scaled image."""
        self._names.append(name)
        self._parts.append(layers.Flatten()(output) if len(output.shape) > 2 else output)
        self._expected.append(expected)

    def model(self):
        return keras.Model(self.image, layers.Concatenate(name="logits")(self._parts))

    def expected(self, images):
        x = images.astype(np.float64) * SCALE
        return {
            name: of(x).reshape(len(x), -1)
            for name, of in zip(self._names, self._expected, strict=True)
        }


WINDOWS = [(k, s, mode) for k in (1, 2, 3, 4, 5) for s in (1, 2) for mode in ("valid", "same")]


def convolutions(shape):
    """Every kernel, stride and padding straight on the image: the scale goes into the kernels."""
    branches = Branches(shape, 1)
    for window in WINDOWS:
        kernel, stride, mode = window
        for kind, layer, oracle in (
            ("conv", layers.Conv2D(3, kernel, stride, mode), convolution),
            ("depthwise", layers.DepthwiseConv2D(kernel, stride, mode, 2), depthwise),
        ):
            y, weights = branches.weighted(layer, branches.scaled)
            branches.add(
                f"{kind} {window}",
                y,
                functools.partial(oracle, weights=weights, stride=stride, mode=mode),
            )
    return branches


def poolings(shape):
    """Every window, stride and padding, on pixels below and above zero; and a dense layer."""
    branches = Branches(shape, 2)
    shifted = layers.Rescaling(2.0, offset=-1.0)(branches.scaled)
    for window in WINDOWS[4:]:
        size, stride, mode = window
        for kind, layer, oracle in (
            ("max", layers.MaxPooling2D(size, stride, mode), max_pooling),
            ("average", layers.AveragePooling2D(size, stride, mode), average_pooling),
        ):
            branches.add(
                f"{kind} {window}",
                layer(shifted),
                lambda x, oracle=oracle, window=window: oracle(2 * x - 1, *window),
            )
    branches.add(
        "global average",
        layers.GlobalAveragePooling2D()(shifted),
        lambda x: (2 * x - 1).mean(axis=(1, 2)),
    )
    y, matrix = branches.weighted(layers.Dense(7), layers.Flatten()(branches.scaled))
    branches.add("dense", y, functools.partial(dense, weights=matrix))
    return branches


def chains(shape):
    """Layers behind layers, as our passes look for them: blocks that are filled, dense layers
    whose rows are put in another order.
    """
    branches = Branches(shape, 3)
    for kind, pooling, pool in (
        ("max", layers.MaxPooling2D, max_pooling),
        ("average", layers.AveragePooling2D, average_pooling),
    ):
        for stride, mode in ((1, "same"), (2, "same"), (2, "valid")):
            conv = layers.Conv2D(10, 4, stride, mode, activation="relu")
            y, kernel = branches.weighted(conv, branches.scaled)
            y = layers.Flatten()(pooling(2, padding="same")(y))
            y, matrix = branches.weighted(layers.Dense(6), y)

            def expected(x, kernel=kernel, matrix=matrix, pool=pool, stride=stride, mode=mode):
                y = np.maximum(convolution(x, kernel, stride, mode), 0)
                return dense(pool(y, 2, 2, "same"), matrix)

            branches.add(f"conv 4 stride {stride} {mode}, {kind}, dense", y, expected)
    return branches


def answers(model, images, folder):
    """Export a model in every format and return each one's logits."""
    serve = export.serving_function(model)
    metadata = Metadata({})
    saved, lite, graph = folder / "saved_model", folder / "model.tflite", folder / "model.onnx"
    saved_model.write(model, serve, saved, metadata)
    tflite.write(saved, lite, metadata)
    onnx.write(serve, graph, metadata)
    loaded = tf.saved_model.load(str(saved))
    return {
        "saved-model": loaded.signatures["serving_default"](image=tf.constant(images))[
            "logits"
        ].numpy(),
        "tflite": runtimes.interpreted(lite, [images])[0]["logits"],
        "onnx": Session(graph.read_bytes(), OPTIONS, threads=2).run(images)["logits"],
    }


CASES = [
    pytest.param(family, shape, id=f"{family.__name__}-{'x'.join(map(str, shape))}")
    for family, shape in (
        (convolutions, (7, 10, 3)),
        (convolutions, (10, 7, 1)),
        (poolings, (7, 10, 3)),
        (poolings, (10, 7, 1)),
        (chains, (9, 12, 1)),
        (chains, (12, 9, 3)),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_every_export_computes_what_the_definition_says(family, shape, tmp_path):
    branches = family(shape)
    images = np.random.default_rng(4).integers(0, 256, (ROWS, *shape), np.uint8)
    images[0], images[1] = 0, 255
    expected = branches.expected(images)

    found = answers(branches.model(), images, tmp_path)

    borders = np.cumsum([part.shape[1] for part in expected.values()])[:-1]
    for name in FORMATS:
        parts = np.split(found[name], borders, axis=1)
        assert found[name].shape[1] == sum(part.shape[1] for part in expected.values())
        for (branch, wanted), part in zip(expected.items(), parts, strict=True):
            allowed = agreement.budget("float32", wanted).max_logit
            apart = np.abs(wanted - part).max()
            assert apart <= allowed, f"{name}: {branch} is {apart:.3g} off, allowed {allowed:.3g}"
    keras.backend.clear_session()


def test_same_padding_at_stride_two_is_more_behind_than_before():
    assert padding(10, 3, 2, "same") == (0, 1)
    assert padding(7, 4, 2, "same") == (1, 2)
    assert padding(7, 3, 2, "same") == (1, 1)
    assert padding(10, 2, 1, "same") == (0, 1)
    assert padding(7, 1, 2, "same") == (0, 0)
    assert padding(7, 5, 2, "valid") == (0, 0)


def test_oracle_tells_padding_before_from_padding_behind():
    x = np.arange(16.0).reshape(1, 4, 4, 1)
    kernel = [np.array([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]])[..., None, None], np.zeros(1)]

    y = convolution(x, kernel, 2, "same")[0, ..., 0]

    assert y.tolist() == [[10, 0], [0, 0]]  # the other corners look at zeros behind the image
