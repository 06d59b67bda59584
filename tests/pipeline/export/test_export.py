import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf

from pipeline import dataset, export
from pipeline.errors import ExportError
from pipeline.export import onnx as onnx_export
from pipeline.export import tflite
from pipeline.export.metadata import Metadata
from protos import bundle_pb2
from service.session import Session, Tensor

OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")


@pytest.fixture(scope="module")
def graph(exports):
    return onnx.load(exports.onnx)


@pytest.fixture(scope="module")
def signature(exports):
    return tf.saved_model.load(str(exports.saved_model)).signatures["serving_default"]


@pytest.fixture(scope="module")
def lite(exports, tmp_path_factory):
    """The TFLite file's own description, read in another process as its runtime must be."""
    code = (
        "import json, sys\n"
        "from ai_edge_litert.interpreter import Interpreter\n"
        "i = Interpreter(sys.argv[1])\n"
        "d = i.get_input_details()[0]\n"
        "print(json.dumps([i.get_signature_list(), d['shape_signature'].tolist(),"
        " d['dtype'].__name__]))\n"
    )
    command = [sys.executable, "-c", code, str(exports.tflite)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


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
    session = Session(exports.onnx.read_bytes(), OPTIONS, threads=1)

    assert session.inputs == (Tensor("image", "UINT8", (-1, 28, 28, 1)),)
    assert {output.datatype for output in session.outputs} == {"FP32"}


def test_saved_model_takes_pixels_by_the_same_names(signature):
    spec = signature.structured_input_signature[1]["image"]

    assert (spec.dtype, spec.shape.as_list()) == (tf.uint8, [None, 28, 28, 1])
    assert sorted(signature.structured_outputs) == ["logits", "probabilities"]


def test_tflite_takes_pixels_by_the_same_names_in_any_batch(lite):
    signatures, shape, dtype = lite

    assert signatures["serving_default"]["inputs"] == ["image"]
    assert sorted(signatures["serving_default"]["outputs"]) == ["logits", "probabilities"]
    assert (shape, dtype) == ([-1, 28, 28, 1], "uint8")


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_a_row_is_answered_alike_in_every_batch(signature, data, rows):
    images = dataset.load(data).test.images[:33]

    alone = signature(image=tf.constant(images[:1]))["logits"].numpy()
    among = signature(image=tf.constant(images[:rows]))["logits"].numpy()

    np.testing.assert_allclose(among[:1], alone, atol=1e-5)


def test_probabilities_are_the_softmax_of_the_logits(signature, data):
    answers = signature(image=tf.constant(dataset.load(data).test.images[:50]))

    expected = tf.nn.softmax(answers["logits"]).numpy()

    np.testing.assert_allclose(answers["probabilities"].numpy(), expected, atol=1e-6)


def test_dropout_is_off(signature, data):
    images = tf.constant(dataset.load(data).test.images[:50])

    first, again = (signature(image=images)["logits"].numpy() for _ in range(2))

    np.testing.assert_array_equal(first, again)


@pytest.fixture
def texts(exports, graph):
    """The metadata of each format, read from the files alone."""
    with zipfile.ZipFile(exports.tflite) as archive:
        lite = json.loads(archive.read("metadata.json"))
    saved = json.loads((exports.saved_model / "assets.extra" / "metadata.json").read_bytes())
    return lite, saved, {entry.key: entry.value for entry in graph.metadata_props}


def test_all_formats_say_the_same_about_themselves(texts):
    lite, saved, graph = texts

    assert lite == saved == graph


def test_metadata_names_labels_data_parent_run_versions_and_licence(texts, data, trained):
    about = texts[0]

    assert json.loads(about["labels"]) == list(data.labels)
    assert about["dataset.sha256"] == data.sha256
    assert about["dataset.license"] == "MIT"
    assert about["parent.sha256"] == trained.sha256
    assert about["run"] == "run-1"
    assert about["version.tensorflow"] == tf.__version__


def test_the_server_reads_the_same_metadata(exports, texts):
    session = Session(exports.onnx.read_bytes(), OPTIONS, threads=1)

    assert dict(session.metadata) == texts[0]


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


def test_an_output_by_another_name_is_refused(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="image")])
    def serve(image):
        return {"scores": image * 2}

    with pytest.raises(ExportError, match=r"\['image'\] and outputs \['scores'\], expected image"):
        onnx_export.write(serve, tmp_path / "odd.onnx", Metadata({}))
    assert not (tmp_path / "odd.onnx").exists()


def test_exporting_again_leaves_nothing_of_the_time_before(trained, data, tmp_path):
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "stale.onnx").write_bytes(b"old")

    export.convert(trained, data, folder, "run-2")

    assert sorted(path.name for path in folder.iterdir()) == [
        "model.float32.onnx",
        "model.float32.tflite",
        "saved_model",
    ]
    keras.backend.clear_session()
