import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import export, parity, report
from pipeline.errors import ExportError
from pipeline.export import saved_model, tflite
from pipeline.export.metadata import Metadata
from pipeline.records import Variant
from protos import bundle_pb2

NAMES = [f"tflite-{kind}" for kind in ("float32", "float16", "dynamic-range", "int8", "int16x8")]
DESCRIBE = """
import json, sys
from ai_edge_litert.interpreter import Interpreter
told = []
for path in sys.argv[1:]:
    reader = Interpreter(path)
    inputs, outputs = reader.get_input_details(), reader.get_output_details()
    kept = {}
    for tensor in reader.get_tensor_details():
        kind = tensor["dtype"].__name__
        kept[kind] = max(kept.get(kind, 0), int(tensor["shape"].prod()))
    told.append([
        reader.get_signature_list(), inputs[0]["shape_signature"].tolist(),
        inputs[0]["dtype"].__name__, [one["dtype"].__name__ for one in outputs], kept,
    ])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def described(exports):
    """Every file's own description, read in another process as its runtime must be."""
    paths = [str(exports.named(name).path) for name in NAMES]
    command = [sys.executable, "-c", DESCRIBE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(NAMES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_go_in_and_floats_come_out_by_the_same_names_in_any_batch(described, name):
    signatures, shape, dtype, outputs, _ = described[name]

    assert signatures["serving_default"]["inputs"] == ["image"]
    assert sorted(signatures["serving_default"]["outputs"]) == ["logits", "probabilities"]
    assert (shape, dtype) == ([-1, 28, 28, 1], "uint8")
    assert outputs == ["float32", "float32"]


def test_the_large_weights_are_kept_as_the_name_says(described):
    largest = {name: kept for name, (*_, kept) in described.items()}
    weights = largest["tflite-float32"]["float32"]

    assert largest["tflite-float16"]["float16"] == weights
    for name in ("tflite-dynamic-range", "tflite-int8", "tflite-int16x8"):
        assert largest[name]["int8"] == weights
    assert "int16" in largest["tflite-int16x8"]
    assert largest["tflite-int8"]["float32"] < weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A SavedModel whose weights are too few for dynamic range to quantise, in both forms."""
    folder = tmp_path_factory.mktemp("small")
    model = keras.Sequential(
        [
            keras.layers.Input((4, 4, 1), name="image"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="logits"),
        ]
    )
    saved_model.write(model, export.serving_function(model), folder / "saved_model", Metadata({}))
    tflite.write(folder / "saved_model", folder / "float32.tflite", Metadata({}))
    tflite.write_dynamic_range(folder / "saved_model", folder / "dynamic.tflite", Metadata({}))
    return folder


def test_dynamic_range_of_few_weights_is_labelled_as_float32_again(small):
    images = parity.hostile_images((4, 4, 1))
    variants = [
        Variant("tflite-float32", "tflite", "float32", small / "float32.tflite"),
        Variant("tflite-dynamic-range", "tflite", "int8", small / "dynamic.tflite"),
    ]
    loaded = tf.saved_model.load(str(small / "saved_model"))
    logits = loaded.signatures["serving_default"](image=tf.constant(images))["logits"].numpy()
    labels = logits.argmax(axis=1).astype(np.uint8)
    asked = parity.Questions(images, labels, ("a", "b", "c"), images, logits, logits)
    manifest = bundle_pb2.BundleManifest()

    manifest.parity.extend(parity.measure(variant, asked)[0] for variant in variants)

    assert [one.failure for one in manifest.parity] == ["", ""]
    assert "tflite-dynamic-range is tflite-float32 again: it quantised nothing" in report.remarks(
        manifest
    )


def test_planes_are_averaged_in_two_steps_where_tflite_is_made_and_in_one_after(tmp_path):
    image = keras.Input((28, 28, 1), dtype="uint8", name="image")
    pool = keras.layers.GlobalAveragePooling2D(keepdims=True)
    inner = keras.Sequential([keras.layers.Rescaling(1 / 255), pool, keras.layers.Flatten()])
    model = keras.Model(image, inner(image))
    images = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 1), np.uint8)
    traced = {}

    for name in ("two", "one"):
        with tflite.in_two_steps(tflite.averages(model) if name == "two" else []):
            serve = export.serving_function(model).get_concrete_function()
        kinds = [operation.type for operation in serve.graph.get_operations()]
        traced[name] = kinds.count("Mean"), serve(tf.constant(images))["logits"].numpy()

    assert tflite.averages(model) == [pool]
    assert (traced["two"][0], traced["one"][0]) == (2, 1)
    np.testing.assert_allclose(traced["two"][1], traced["one"][1], rtol=1e-6)


def test_an_operator_that_tflite_does_not_have_is_refused_in_a_sentence(tmp_path):
    class Odd(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="image")])
        def serve(self, image):
            return {"logits": tf.raw_ops.Igamma(a=image, x=image)}

    odd = Odd()
    tf.saved_model.save(odd, str(tmp_path / "odd"), signatures={"serving_default": odd.serve})

    with pytest.raises(ExportError, match="TFLite cannot hold this model"):
        tflite.write(tmp_path / "odd", tmp_path / "odd.tflite", Metadata({}))
    assert not (tmp_path / "odd.tflite").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_the_converters_idle_line_is_left_out_and_all_else_is_passed_on(capfd, fails):
    def write():
        with tflite.without_noise():
            os.write(2, b"before\nfully_quantize: 0, inference_type: 6, input: FLOAT32\nafter\n")
            if fails:
                raise ExportError("it failed")

    if fails:
        with pytest.raises(ExportError):
            write()
    else:
        write()

    os.write(2, b"later\n")
    assert capfd.readouterr().err.split("\n") == ["before", "after", "later", ""]
