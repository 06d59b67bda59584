from dataclasses import replace

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf

from pipeline import config, dataset, export
from pipeline.config import ExportConfig
from pipeline.errors import ExportError
from pipeline.export import onnx as onnx_export
from pipeline.export.metadata import Metadata
from protos import bundle_pb2
from service.session import Session, Tensor

OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")


@pytest.fixture(scope="module")
def graph(exports):
    return onnx.load(exports.named("onnx-float32").path)


@pytest.fixture(scope="module")
def signature(exports):
    return tf.saved_model.load(str(exports.named("saved-model").path)).signatures["serving_default"]


def test_onnx_has_stable_names_and_one_name_for_the_batch(graph):
    names = [value.name for value in (*graph.graph.input, *graph.graph.output)]
    axes = {
        value.type.tensor_type.shape.dim[0].dim_param
        for value in (*graph.graph.input, *graph.graph.output)
    }

    assert sorted(names) == ["image", "logits", "probabilities"]
    assert axes == {"batch"}
    assert b"unk__" not in graph.SerializeToString()


def test_onnx_is_of_the_opset_and_valid(graph):
    onnx.checker.check_model(graph, full_check=True)

    assert {o.domain: o.version for o in graph.opset_import}[""] == 17


def test_onnx_scales_transposes_and_computes_shapes_no_more(graph):
    operators = " ".join(node.op_type for node in graph.graph.node)

    assert operators == "Cast Reshape Conv Relu MaxPool Slice Flatten Gemm Relu Gemm Softmax"
    assert not graph.graph.value_info


def test_onnx_takes_pixels_and_gives_floats(exports):
    session = Session(exports.named("onnx-float32").path.read_bytes(), OPTIONS, threads=1)

    assert session.inputs == (Tensor("image", "UINT8", (-1, 28, 28, 1)),)
    assert {output.datatype for output in session.outputs} == {"FP32"}


def test_saved_model_takes_pixels_by_the_same_names(signature):
    spec = signature.structured_input_signature[1]["image"]

    assert (spec.dtype, spec.shape.as_list()) == (tf.uint8, [None, 28, 28, 1])
    assert sorted(signature.structured_outputs) == ["logits", "probabilities"]


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_a_row_is_answered_alike_in_every_batch(signature, data, rows):
    images = dataset.load(data).test.inputs[:33]

    alone = signature(image=tf.constant(images[:1]))["logits"].numpy()
    among = signature(image=tf.constant(images[:rows]))["logits"].numpy()

    np.testing.assert_allclose(among[:1], alone, atol=1e-5)


def test_probabilities_are_the_softmax_of_the_logits(signature, data):
    answers = signature(image=tf.constant(dataset.load(data).test.inputs[:50]))

    expected = tf.nn.softmax(answers["logits"]).numpy()

    np.testing.assert_allclose(answers["probabilities"].numpy(), expected, atol=1e-6)


def test_dropout_is_off(signature, data):
    images = tf.constant(dataset.load(data).test.inputs[:50])

    first, again = (signature(image=images)["logits"].numpy() for _ in range(2))

    np.testing.assert_array_equal(first, again)


def test_the_server_reads_the_same_metadata(exports):
    variant = exports.named("onnx-float32")
    session = Session(variant.path.read_bytes(), OPTIONS, threads=1)

    assert dict(session.metadata) == Metadata.read(variant).texts


def test_an_output_by_another_name_is_refused(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="image")])
    def serve(image):
        return {"scores": image * 2}

    with pytest.raises(ExportError, match=r"inputs and outputs .*'scores'.*, expected .*'logits'"):
        onnx_export.write(serve, tmp_path / "odd.onnx", Metadata({}))
    assert not (tmp_path / "odd.onnx").exists()


def test_exporting_again_leaves_nothing_of_the_time_before(trained, data, tmp_path, exports):
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "stale.onnx").write_bytes(b"old")

    export.convert(trained, data, folder, "run-2")

    planned = {variant.path.name for variant in exports.variants}
    assert {path.name for path in folder.iterdir()} == planned | {"calibration.json"}
    keras.backend.clear_session()


def test_three_variants_are_required_and_every_name_is_its_formats(exports):
    required = [variant.name for variant in exports.variants if variant.required]

    assert required == ["saved-model", "tflite-float32", "onnx-float32"]
    assert list(export.WRITERS) == [variant.name for variant in exports.variants]
    for variant in exports.variants:
        assert variant.name.startswith(variant.format.replace("_", "-"))
        assert variant.failure == ""


def fail(source, path, texts):
    path.write_bytes(b"half a file")
    raise ExportError("no such operator")


@pytest.fixture
def quickly(monkeypatch):
    """Return a function that converts to three variants only, the named one of which fails."""

    def quickly(trained, data, folder, failing, *more, **options):
        whole = export.plan(folder)
        kept = ("saved-model", "onnx-float32", failing, *more)
        monkeypatch.setattr(export, "plan", lambda _: [v for v in whole if v.name in kept])
        monkeypatch.setitem(export.WRITERS, failing, fail)
        return export.convert(trained, data, folder, "run-1", **options)

    return quickly


def test_an_optional_variant_that_cannot_be_written_is_left_out_with_its_reason(
    quickly, trained, data, tmp_path
):
    variant = quickly(trained, data, tmp_path / "exports", "tflite-int8").named("tflite-int8")

    assert variant.failure == "no such operator"
    assert not variant.path.exists()


def test_a_required_variant_that_cannot_be_written_is_left_to_parity_to_refuse(
    quickly, trained, data, tmp_path
):
    variant = quickly(trained, data, tmp_path / "exports", "tflite-float32").named("tflite-float32")

    assert (variant.required, variant.failure) == (True, "no such operator")


def test_what_others_are_made_from_fails_the_run_at_once(quickly, trained, data, tmp_path):
    with pytest.raises(ExportError, match="no such operator"):
        quickly(trained, data, tmp_path / "exports", "onnx-float32")


def test_what_the_settings_require_or_serve_is_required(quickly, trained, data, tmp_path):
    chosen = ExportConfig(serve="onnx-int8", required=("tflite-int8",))

    found = quickly(trained, data, tmp_path / "exports", "tflite-int8", "onnx-int8", config=chosen)

    assert found.named("tflite-int8").required
    assert found.named("onnx-int8").required


def test_settings_name_the_variants_that_there_are():
    served = ["best", *(one for one in export.names() if one.startswith("onnx-"))]
    for name in served:
        tables = {"export": {"serve": name, "required": export.names()}}
        assert config.build("quick", tables).export.required == export.names()


def test_pixels_of_a_model_that_takes_floats_are_cast_inside():
    image = keras.Input((4, 4, 1), dtype="float32", name="pixels")
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image)))
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)

    answers = export.serving_function(model)(tf.constant(images))

    np.testing.assert_allclose(
        answers["logits"], model(images.astype(np.float32)), rtol=1e-6, atol=1e-6
    )


def test_an_original_that_changed_since_it_was_trained_is_refused(trained, data, tmp_path):
    with pytest.raises(ExportError, match=r"has sha256 .*, expected 000000000000… of the model"):
        export.convert(replace(trained, sha256="0" * 64), data, tmp_path / "exports", "run-1")
