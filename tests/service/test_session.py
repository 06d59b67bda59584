import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from protos import bundle_pb2
from service import session
from service.errors import ModelError
from service.session import Session
from service.tensors import DTYPE

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

    runtime = Session(tiny.model(), options, threads=1)._sessions[0].get_session_options()

    assert runtime.get_session_config_entry("session.x64quantprecision") == "1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("session.node_partition_config_file", "1"),  # onnxruntime would read it
        ("session.moe_expert_counter_state_file", "1"),  # and write this
        ("session.x64quantprecision", "/etc/hostname"),
        ("x" * 1025, "1"),
    ],
)
def test_a_manifest_that_sets_more_than_switches_of_the_arithmetic_is_refused(tiny, key, value):
    options = bundle_pb2.SessionOptions(graph_optimization="all", config={key: value})

    with pytest.raises(ModelError, match=r"expected numbers for session\.disable_quant_qdq, "):
        Session(tiny.model(), options, threads=1)


def test_what_onnxruntime_says_of_its_own_sources_is_not_repeated(tiny):
    model = onnx.load_model_from_string(tiny.model())
    del model.opset_import[:]

    with pytest.raises(ModelError) as caught:
        Session(model.SerializeToString(), ALL, threads=1)

    assert "/" not in str(caught.value)
    assert "\n" not in str(caught.value)


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
    model = one_node("Identity", datatype=TensorProto.STRING)

    with pytest.raises(ModelError, match=r"^x is tensor\(string\), expected one of"):
        Session(model, ALL, threads=1)


@pytest.mark.parametrize("name", session.WIRE.values())
def test_model_of_every_datatype_on_the_wire_answers_in_it(name):
    dtype = np.dtype(DTYPE[name])
    model = one_node("Identity", datatype=helper.np_dtype_to_tensor_dtype(dtype))
    loaded = Session(model, ALL, threads=1)

    answer = loaded.run(np.ones((2, 2), dtype))["y"]

    assert loaded.inputs == (session.Tensor("x", name, (-1, 2)),)
    assert (answer.dtype, answer.tolist()) == (dtype, [[1, 1], [1, 1]])


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


def test_warm_up_runs_every_rung_and_says_what_each_took(tiny):
    seconds = Session(tiny.model(), ALL, threads=1).warm_up(9, tiny.images(1)[0])

    assert list(seconds) == [9, 8, 4, 2, 1]
    assert all(took > 0 for took in seconds.values())


@pytest.fixture
def counting():
    """A model that answers every row with how many rows its call had."""
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "first"], ["rows"]),
            helper.make_node("Cast", ["rows"], ["count"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "count"], ["y"]),
        ],
        "counting",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [
            helper.make_tensor("first", TensorProto.INT64, [1], [0]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Session(model.SerializeToString(), ALL, threads=1)


@pytest.mark.parametrize(("rows", "calls"), [(64, [64]), (65, [64, 1]), (250, [64, 64, 64, 58])])
def test_no_call_of_onnxruntime_has_more_rows_than_its_arena_should_grow_to(counting, rows, calls):
    answers = counting.run(np.zeros((rows, 1), np.float32))["y"]

    assert answers[:, 0].tolist() == [float(call) for call in calls for _ in range(call)]


def test_rows_of_a_batch_of_many_calls_are_answered_in_their_order(tiny):
    images = tiny.images(1000)

    answers = Session(tiny.model(), ALL, threads=1).run(images)

    np.testing.assert_array_equal(answers["logits"], tiny.logits(images))
    assert answers["probabilities"].shape == (1000, 3)


def test_rungs_end_where_a_call_does(counting):
    assert max(counting.warm_up(100_000, np.zeros(1, np.float32))) == session.MAX_CALL_ROWS == 64


@pytest.fixture
def on_gpu(monkeypatch):
    """Have sessions treat this host's processor as they would a GPU."""
    monkeypatch.setattr(session, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(session, "_find_cuda", lambda: None)
    assert session.call_rows(session.CPU) == session.CUDA_ROWS[-1]


@pytest.mark.parametrize(
    ("rows", "calls"),
    [(1, [1]), (2, [4]), (16, [16]), (17, [64]), (256, [256]), (300, [256] * 256 + [64])],
)
def test_a_call_on_a_gpu_has_one_of_few_numbers_of_rows(on_gpu, counting, rows, calls):
    answers = counting.run(np.zeros((rows, 1), np.float32))["y"]

    assert answers.shape == (rows, 1)
    assert answers[:, 0].tolist()[: len(calls)] == calls[:rows]


def test_rows_that_are_filled_up_change_no_answer(on_gpu, tiny):
    loaded = Session(tiny.model(), ALL, threads=1)

    for rows in (1, 3, 16, 50, 255, 257, 700):
        images = tiny.images(rows)
        answers = loaded.run(images)
        np.testing.assert_array_equal(answers["logits"], tiny.logits(images))
        assert answers["probabilities"].shape == (rows, 3)
    assert max(loaded.warm_up(100_000, tiny.images(1)[0])) == 256


def test_provider_that_onnxruntime_left_out_without_a_word_is_refused():
    with pytest.raises(ModelError) as caught:
        session._check_started((session.CUDA, *session.CPU), session.CPU)

    assert "could not start CUDAExecutionProvider on this host: a device" in str(caught.value)
    session._check_started(session.CPU, session.CPU)


def test_what_fails_on_a_gpu_is_said_without_where_in_the_sources():
    where = (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:146 onnxruntime::CudaCall("
    )
    what = "CUDA failure 100: no CUDA-capable device is detected"
    error = RuntimeError(
        f"{where}int) [with bool THRW = true] {what} ; GPU=-1 ; hostname=h ; line=3"
    )

    assert session._reason(error) == what


def test_warm_up_reports_a_rung_that_fails():
    fixed = Session(one_node("Relu", shape=(4, 2)), ALL, threads=1)

    with pytest.raises(ModelError, match="cannot run the model"):
        fixed.warm_up(4, np.zeros(2, np.float32))


def test_model_runs_on_the_providers_it_was_given_and_on_no_other(tiny):
    assert Session(tiny.model(), ALL, threads=1).providers == ("CPUExecutionProvider",)
    assert "CPUExecutionProvider" in session.available_providers()


def test_provider_that_is_not_there_is_refused_rather_than_replaced(tiny):
    providers = ("ImaginaryExecutionProvider", "CPUExecutionProvider")

    with pytest.raises(ModelError) as caught:
        Session(tiny.model(), ALL, threads=1, providers=providers)

    assert str(caught.value) == (
        f"{session.RUNTIME} has no ImaginaryExecutionProvider, "
        f"only {', '.join(session.available_providers())}; "
        "install the extra gpu instead of service, or choose others with --providers"
    )


def test_onnxruntime_reports_to_nobody(tmp_path):
    """It leaves a file of its own in the temporary folder if it does."""
    kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    script = "import os, service.session; print(os.environ['ORT_DISABLE_TELEMETRY'])"

    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "1\n"
    assert list(tmp_path.iterdir()) == []
