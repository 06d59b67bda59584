"""Real Keras models, exported for real and spoilt in one place each."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from pipeline import __main__ as command
from pipeline import export
from pipeline.explain import first_divergence, worst
from pipeline.export import onnx as onnx_export
from pipeline.export import passes

pytestmark = pytest.mark.slow
SHAPE = (12, 12, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def conv(filters, name, **more):
    return layers.Conv2D(
        filters,
        3,
        padding="same",
        activation="relu",
        bias_initializer="random_normal",
        name=name,
        **more,
    )


def plain(x):
    x = conv(10, "conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = conv(12, "conv2", strides=2)(x)
    x = layers.Dropout(0.5, name="drop")(layers.Flatten(name="flatten")(x))
    return layers.Dense(16, activation="relu", bias_initializer="random_normal", name="dense")(x)


def residual(x):
    x = conv(8, "conv")(x)
    x = layers.Add(name="add")([x, conv(8, "conv2")(x)])
    return layers.GlobalAveragePooling2D(name="mean")(x)


def separable(x):
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", name="depthwise")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    return layers.Flatten(name="flatten")(layers.AveragePooling2D(2, name="pool")(x))


def network(body, seed=1):
    keras.utils.set_random_seed(seed)
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = body(layers.Rescaling(1 / 255, name="scale")(image))
    return keras.Model(image, layers.Dense(5, name="logits")(x))


def save(model, serve, folder):
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve)
    archive.write_out(str(folder), verbose=False)
    return folder


def training(model):
    @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE), tf.uint8, name="image")])
    def serve(image):
        logits = model(image, training=True)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    return serve


def write_onnx(serve, path):
    onnx.save(passes.improve(onnx_export.convert(serve)), path)
    return path


def write_tflite(saved, path, calibration=None):
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
    if calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ({"image": one[None]} for one in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path.write_bytes(converter.convert())
    return path


class Made:
    def __init__(self, folder, body):
        folder.mkdir()
        self.model = network(body)
        serve = export.serving_function(self.model)
        self.saved = save(self.model, serve, folder / "saved_model")
        self.onnx = write_onnx(serve, folder / "model.onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("plain") / "made", plain)


def constant(model, shape):
    return next(
        one
        for one in model.graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and tuple(one.dims) == shape
    )


def change(model, shape, edit):
    one = constant(model, shape)
    one.CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(edit(numpy_helper.to_array(one))), one.name)
    )


def first_kernel(model):
    return next(
        tuple(one.dims)
        for one in model.graph.initializer
        if len(one.dims) == 4 and one.dims[1] == 3
    )


def flip(bit, place):
    def edit(array):
        array = array.copy()
        array.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
        return array

    return edit


def second_kernel(model):
    return next(
        tuple(one.dims) for one in model.graph.initializer if tuple(one.dims)[:2] == (12, 10)
    )


def double_scale(model):
    change(model, first_kernel(model), lambda kernel: kernel * np.float32(2))


def miss_scale(model):
    change(model, first_kernel(model), lambda kernel: kernel * np.float32(255))


def drop_bias(model):
    change(model, (12,), np.zeros_like)


def drop_dense_bias(model):
    change(model, (16,), np.zeros_like)


def strengthen_dense(model):
    change(model, (108, 16), lambda kernel: kernel * np.float32(1.01))


def reverse_channels(model):
    change(model, first_kernel(model), lambda kernel: kernel[:, ::-1])


def swap_height_and_width(model):
    cast = next(node for node in model.graph.node if node.op_type == "Cast")
    swap = helper.make_node("Transpose", [cast.input[0]], ["swapped"], perm=[0, 2, 1, 3])
    cast.input[0] = "swapped"
    model.graph.node.insert(0, swap)


def move_padding(model):
    node = [node for node in model.graph.node if node.op_type == "Conv"][1]
    pads = next(one for one in node.attribute if one.name == "pads")
    pads.CopyFrom(helper.make_attribute("pads", [1, 1, 0, 0]))


def flip_sign(model):
    change(model, second_kernel(model), flip(31, 200))


def flip_exponent(model):
    change(model, (108, 16), flip(30, 200))


def other_weights(model):
    random = np.random.default_rng(5)
    for one in model.graph.initializer:
        if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1:
            value = numpy_helper.to_array(one)
            other = random.permutation(value.ravel()).reshape(value.shape)
            one.CopyFrom(numpy_helper.from_array(other, one.name))


@pytest.mark.parametrize(
    ("edit", "layer", "cause"),
    [
        (double_scale, "scale", "scale"),
        (miss_scale, "scale", "scale"),
        (drop_bias, "conv2", "offset"),
        (drop_dense_bias, "dense", "offset"),
        (strengthen_dense, "dense", "unknown"),
        (reverse_channels, "the input", "layout"),
        (swap_height_and_width, "the input", "layout"),
        (move_padding, "conv2", "padding"),
        (flip_sign, "conv2", "weights"),
        (flip_exponent, "dense", "weights"),
        (other_weights, "conv", "different model"),
    ],
)
def test_what_was_spoilt_in_an_onnx_file_is_named(made, tmp_path, edit, layer, cause):
    model = onnx.load(made.onnx)
    edit(model)
    path = tmp_path / "spoilt.onnx"
    onnx.save(model, path)

    found = first_divergence(made.saved, path, IMAGES)

    assert (found.diverges, found.layer, found.cause) == (True, layer, cause), found.text
    assert found.layer in found.text


def test_batch_normalisation_in_training_mode_is_named(made, tmp_path):
    model = network(plain)
    model.get_layer("drop").rate = 0
    path = write_onnx(training(model), tmp_path / "model.onnx")

    found = first_divergence(made.saved, path, IMAGES)

    assert (found.layer, found.cause) == ("norm", "training mode"), found.text
    assert "batch normalisation" in found.text


def test_a_dropout_left_on_is_named(made, tmp_path):
    model = network(plain)
    model.get_layer("norm").trainable = False  # it then normalises as it does when it serves
    saved = save(model, training(model), tmp_path / "saved_model")

    found = first_divergence(made.saved, saved, IMAGES)

    assert (found.layer, found.cause) == ("logits", "training mode"), found.text
    assert "dropout" in found.text  # its seeds are variables: such a graph is seen from outside


@pytest.mark.parametrize("body", [plain, residual, separable])
def test_nothing_is_named_in_a_right_export(tmp_path, body):
    made = Made(tmp_path / "made", body)
    lite = write_tflite(made.saved, tmp_path / "model.tflite")

    for path in (made.onnx, lite, made.saved):
        found = first_divergence(made.saved, path, IMAGES)
        assert not found.diverges, found.text
        assert "answers as the reference does" in found.text


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_an_int8_range_that_is_too_small_is_named_and_a_good_one_is_not(made, tmp_path):
    good = write_tflite(made.saved, tmp_path / "good.tflite", IMAGES)
    dark = write_tflite(made.saved, tmp_path / "dark.tflite", IMAGES // 8)

    assert not first_divergence(made.saved, good, IMAGES).diverges
    found = first_divergence(made.saved, dark, IMAGES)

    assert (found.diverges, found.cause) == (True, "range"), found.text


def test_the_command_says_one_sentence_draws_a_picture_and_ends_with_1(made, tmp_path):
    model = onnx.load(made.onnx)
    drop_bias(model)
    onnx.save(model, tmp_path / "spoilt.onnx")
    np.savez(tmp_path / "images.npz", images=IMAGES)
    words = ["explain", "--reference", str(made.saved), "--data", str(tmp_path / "images.npz")]
    words += ["--out", str(tmp_path)]

    bad = runner.invoke(command.app, [*words, "--candidate", str(tmp_path / "spoilt.onnx")])
    good = runner.invoke(command.app, [*words, "--candidate", str(made.onnx), "--json"])

    assert bad.exit_code == 1
    assert bad.stderr.startswith("error: spoilt.onnx diverges at conv2 (offset): ")
    assert (tmp_path / "spoilt.explained.png").read_bytes().startswith(b"\x89PNG")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["diverges"] is False


def test_what_failed_on_more_rows_than_these_is_said_where_these_show_nothing(made):
    asked = worst.Asked(made.saved, made.onnx, IMAGES, failure="over all rows it failed")

    found = worst.explain(asked)

    assert not found.diverges
    assert found.text.endswith("; but over all rows it failed")


@pytest.mark.parametrize(
    "words",
    [
        ("onnx-int8",),
        ("--bundle", "tiny/1"),
        ("onnx-int8", "--bundle", "tiny/1", "--data", "rows.npz"),
        ("onnx-int8", "--reference", "a", "--candidate", "b", "--data", "c"),
    ],
)
def test_options_that_do_not_go_together_are_status_2(words):
    refused = runner.invoke(command.app, ["explain", *words])

    assert refused.exit_code == 2
    assert "give VARIANT and --bundle; or --reference" in refused.stderr


def test_a_bundle_that_is_not_there_is_status_2():
    refused = runner.invoke(command.app, ["explain", "onnx-int8", "--bundle", "tiny/7"])

    assert refused.exit_code == 2
    assert "there is no bundle tiny/7" in refused.stderr
