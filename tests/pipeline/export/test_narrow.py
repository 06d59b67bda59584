import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline import dataset
from pipeline.errors import ExportError
from pipeline.export import narrow
from pipeline.export.metadata import Metadata
from protos import bundle_pb2
from service.session import Session, Tensor


@pytest.fixture(scope="module")
def int8(exports):
    return onnx.load(exports.named("onnx-int8").path)


def constants(model):
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


@pytest.mark.parametrize("name", ["onnx-float16", "onnx-int8"])
def test_pixels_go_in_and_floats_come_out_by_the_same_names(exports, name):
    options = bundle_pb2.SessionOptions(graph_optimization="all")
    session = Session(exports.named(name).path.read_bytes(), options, threads=1)

    assert session.inputs == (Tensor("image", "UINT8", (-1, 28, 28, 1)),)
    assert {(one.name, one.datatype) for one in session.outputs} == {
        ("logits", "FP32"),
        ("probabilities", "FP32"),
    }


def test_every_weight_of_float16_is_one(exports):
    model = onnx.load(exports.named("onnx-float16").path)

    kinds = {array.dtype for array in constants(model).values() if array.dtype.kind == "f"}

    assert kinds == {np.dtype(np.float16)}


def test_weights_have_seven_bits_and_a_scale_for_each_channel(int8):
    weights = {name: one for name, one in constants(int8).items() if one.dtype == np.int8}
    large = {name: one for name, one in weights.items() if one.ndim > 1}
    scales = {
        node.input[0]: constants(int8)[node.input[1]]
        for node in int8.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in large
    }

    assert len(large) == 2  # the convolution and the hidden layer
    for name, one in large.items():
        assert np.abs(one.astype(int)).max() <= 64
        assert scales[name].size in one.shape
        assert scales[name].size > 1


def test_the_layer_that_makes_the_logits_stays_float32(int8):
    last = next(node for node in int8.graph.node if "logits" in node.output)

    assert constants(int8)[last.input[1]].dtype == np.float32


def test_sums_do_not_saturate_whatever_the_session_is_told(exports, data):
    content = exports.named("onnx-int8").path.read_bytes()
    images = dataset.load(data).test.inputs[:64]
    answers = [
        Session(
            content,
            bundle_pb2.SessionOptions(
                graph_optimization=level, config={"session.x64quantprecision": precise}
            ),
            threads=1,
        )
        .run(images)["logits"]
        .astype(np.float32)
        for level, precise in (("all", "0"), ("all", "1"), ("disable", "0"))
    ]

    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
    # A value between two steps may be rounded to either: a step of a hidden unit, not saturation.
    np.testing.assert_allclose(answers[0], answers[2], atol=0.2)


def test_a_file_that_is_no_graph_is_refused_in_a_sentence(tmp_path):
    source = tmp_path / "odd.onnx"
    source.write_bytes(b"not a graph")

    with pytest.raises(ExportError, match="onnxruntime cannot write float16: "):
        narrow.write_float16(source, tmp_path / "half.onnx", Metadata({}))
    assert not (tmp_path / "half.onnx").exists()


def test_images_of_another_shape_cannot_calibrate(exports, tmp_path):
    images = np.zeros((2, 5, 5, 1), np.uint8)

    with pytest.raises(ExportError, match="onnxruntime cannot quantise to int8: "):
        narrow.write_int8(
            exports.named("onnx-float32").path, tmp_path / "int8.onnx", Metadata({}), images
        )
    assert not (tmp_path / "int8.onnx").exists()
