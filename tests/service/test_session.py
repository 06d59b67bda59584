import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from protos import bundle_pb2
from service import session
from service.errors import ModelError
from service.session import Session

ALL = bundle_pb2.SessionOptions(graph_optimization="all")


def one_node(op, *, datatype=TensorProto.FLOAT, shape=("batch", 2), out_shape=None, **attributes):
    """A model of one node from x to y."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", datatype, shape)],
        [helper.make_tensor_value_info("y", datatype, out_shape or shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def test_model_answers_as_worked_out_by_hand_under_every_optimization(tiny):
    images = tiny.images(5)

    for level in session.OPTIMIZATION:
        options = bundle_pb2.SessionOptions(graph_optimization=level)
        answers = Session(tiny.model(), options, threads=1).run(images)
        np.testing.assert_array_equal(answers["logits"], tiny.logits(images))
        assert list(answers) == ["probabilities", "logits"]


def test_tensors_are_named_with_a_batch_of_minus_one(tiny):
    loaded = Session(tiny.model(), ALL, threads=1)

    assert loaded.inputs == (session.Tensor("image", "UINT8", (-1, 2, 2, 1)),)
    assert loaded.outputs == (
        session.Tensor("probabilities", "FP32", (-1, 3)),
        session.Tensor("logits", "FP32", (-1, 3)),
    )


def test_metadata_of_the_model_is_kept(tiny):
    model = onnx.load_model_from_string(tiny.model())
    model.metadata_props.add(key="run", value="7")

    assert Session(model.SerializeToString(), ALL, threads=1).metadata == {"run": "7"}


def test_session_config_reaches_onnxruntime(tiny):
    options = bundle_pb2.SessionOptions(graph_optimization="all")
    options.config["session.x64quantprecision"] = "1"
    Session(tiny.model(), options, threads=1)

    options.config["x" * 1025] = "a key that is too long"
    with pytest.raises(ModelError, match="cannot load the model: Config key is empty or longer"):
        Session(tiny.model(), options, threads=1)


def test_unknown_optimization_is_refused(tiny):
    with pytest.raises(ModelError) as caught:
        Session(tiny.model(), bundle_pb2.SessionOptions(), threads=1)

    assert str(caught.value) == (
        "graph_optimization is '', expected one of ['all', 'basic', 'disable', 'extended']"
    )


@pytest.mark.parametrize("model", [b"", b"not a model", b"\x08"])
def test_bytes_that_are_not_a_model_are_refused(model):
    with pytest.raises(ModelError, match=r"^onnxruntime [0-9.]+ cannot load the model: "):
        Session(model, ALL, threads=1)


def test_model_of_a_datatype_that_is_not_served_is_refused():
    model = one_node("Identity", datatype=TensorProto.FLOAT16)

    with pytest.raises(ModelError, match=r"^x is tensor\(float16\), expected one of"):
        Session(model, ALL, threads=1)


def test_model_of_flipped_bytes_is_loaded_or_refused_and_prints_nothing(tiny, capsys):
    rng = random.Random(0)
    refused = 0

    for _ in range(400):
        model = bytearray(tiny.model())
        model[rng.randrange(len(model))] = rng.randrange(256)
        try:
            Session(bytes(model), ALL, threads=1)
        except ModelError:
            refused += 1
    assert refused > 100
    assert capsys.readouterr().out == ""


def test_batch_that_the_model_cannot_take_is_an_error_of_the_model(tiny):
    loaded = Session(tiny.model(), ALL, threads=1)

    with pytest.raises(ModelError, match=r"^onnxruntime [0-9.]+ cannot run the model: "):
        loaded.run(np.zeros((1, 2, 2, 1), np.float32))


def test_model_that_answers_another_number_of_rows_is_an_error():
    model = one_node("Transpose", shape=("batch", 2), out_shape=(2, "batch"), perm=[1, 0])
    loaded = Session(model, ALL, threads=1)

    assert len(loaded.run(np.zeros((2, 2), np.float32))["y"]) == 2
    with pytest.raises(ModelError, match=r"^y has 2 rows, expected 3$"):
        loaded.run(np.zeros((3, 2), np.float32))


def test_every_thread_gets_the_answers_to_its_own_batch(tiny):
    loaded = Session(tiny.model(), ALL, threads=1)
    batches = [tiny.images(1 + seed % 7, seed) for seed in range(500)]

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(loaded.run, batches))

    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(answer["logits"], tiny.logits(batch))


@pytest.mark.parametrize(
    ("max_rows", "rungs"),
    [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1]), (9, [9, 8, 4, 2, 1])],
)
def test_rungs_are_the_largest_batch_and_the_powers_of_two_below_it(max_rows, rungs):
    assert session.rungs(max_rows) == rungs


def test_warm_up_runs_every_rung_and_reports_one_that_fails(tiny):
    Session(tiny.model(), ALL, threads=1).warm_up(9)

    fixed = Session(one_node("Relu", shape=(4, 2)), ALL, threads=1)
    with pytest.raises(ModelError, match="cannot run the model"):
        fixed.warm_up(4)


def test_process_has_at_least_one_core_and_no_more_than_the_machine():
    assert 1 <= session.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", 1 << 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("nonsense\n", 1 << 16),
        ("1 0.5\n", 1 << 16),
    ],
)
def test_quota_of_a_cgroup_is_rounded_up_to_whole_cores(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)

    assert session._quota(tmp_path / "cpu.max") == cores


def test_absent_quota_is_no_limit(tmp_path):
    assert session._quota(tmp_path / "cpu.max") == 1 << 16
