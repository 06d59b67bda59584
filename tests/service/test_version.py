import hashlib
import io
import json
import math
import re
from datetime import datetime

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from onnx import TensorProto, helper

from protos import bundle_pb2
from service import bundle, host, version
from service.errors import BundleError, ModelError, ServiceError
from service.session import RUNTIME


@pytest.fixture
def load(options):
    """Return a function that loads and checks one bundle."""
    return lambda path, **changes: version.load(path, options(**changes))


@pytest.fixture
def refusal(load):
    """Return a function that has a bundle refused, and returns the reason."""

    def refusal(path):
        with pytest.raises(BundleError) as caught:
            load(path)
        assert str(path.parents[1]) not in str(caught.value)
        return str(caught.value)

    return refusal


def resign(path, file, content):
    """Replace a file of a bundle and list it again."""
    (path / file).write_bytes(content)
    manifest = bundle_pb2.BundleManifest()
    json_format.Parse((path / "manifest.json").read_text(), manifest)
    entry = next(entry for entry in manifest.files if entry.path == file)
    entry.sha256, entry.size_bytes = hashlib.sha256(content).hexdigest(), len(content)
    (path / "manifest.json").write_text(json_format.MessageToJson(manifest))


def change_golden(path, **changes):
    with np.load(path / "golden.npz") as arrays:
        changed = {**arrays, **changes}
    file = io.BytesIO()
    np.savez(file, **changed)
    resign(path, "golden.npz", file.getvalue())


def test_version_that_passed_carries_its_manifest_session_and_self_check(make_bundle, load, tiny):
    loaded = load(make_bundle(version=3), threads=2, max_batch_rows=5)

    check = loaded.self_check
    assert (loaded.manifest.name, loaded.manifest.version) == ("tiny", 3)
    assert loaded.options.max_batch_rows == 5
    assert check.report.passed
    assert (check.report.variant, check.report.runtime) == ("self-check", RUNTIME)
    assert check.report.path == "model.onnx"
    assert check.report.size_bytes == len(tiny.model())
    assert check.report.accuracy.rows == 12
    assert check.report.hostile.rows == 5
    assert check.threads == 2
    assert list(check.providers) == ["CPUExecutionProvider"]
    assert check.seconds > 0
    assert check.cpu == host.processor().name != ""
    assert tuple(check.cpu_flags) == host.processor().kernel_flags
    assert check.session.graph_optimization == "all"
    assert datetime.fromisoformat(check.checked).utcoffset() is not None
    images = tiny.images(5)
    np.testing.assert_array_equal(loaded.session.run(images)["logits"], tiny.logits(images))


def test_every_rung_was_run_and_timed(make_bundle, load):
    warmed = load(make_bundle(), max_batch_rows=5).warmed

    assert sorted(warmed) == [1, 2, 4, 5]
    assert all(seconds > 0 for seconds in warmed.values())


def test_golden_set_is_answered_in_batches_no_larger_than_are_served(make_bundle, load):
    assert load(make_bundle(), max_batch_rows=1).self_check.report.accuracy.rows == 12


def test_generic_model_is_judged_by_its_differences_alone(make_generic_bundle, load):
    loaded = load(make_generic_bundle())

    report = loaded.self_check.report
    assert report.passed
    assert (report.logits.max, report.agreement, report.hostile.rows) == (0, 1, 1)
    assert not report.classes
    assert bundle.checked_output(loaded.manifest) == "y"


def test_inner_size_that_varies_is_warmed_with_that_of_the_golden_set(make_generic_bundle, load):
    session = load(make_generic_bundle()).session

    for length in (1, 3, 1000):
        x = np.full((2, length), 5, np.float32)
        np.testing.assert_array_equal(session.run(x)["y"], np.full((2, length), 9))


def test_generic_model_that_is_off_is_refused(make_generic_bundle, refusal):
    path = make_generic_bundle()
    with np.load(path / "golden.npz") as arrays:
        change_golden(path, outputs=arrays["outputs"] + np.float32(0.5))

    assert re.fullmatch(
        r"line/1 fails its self-check on this host: "
        r"max \|Δlogit\| is 0\.5, over the float32 budget of [0-9.e-]+",
        refusal(path),
    )


def test_generic_model_that_is_off_on_hostile_inputs_is_refused(make_generic_bundle, refusal):
    path = make_generic_bundle()
    change_golden(path, hostile_outputs=np.zeros((1, 3), np.float32))

    assert "max |Δlogit| on hostile inputs is" in refusal(path)


def test_classifier_needs_logits_where_a_generic_model_does_not(make_generic_bundle, refusal):
    def edit(manifest):
        manifest.kind = bundle_pb2.KIND_CLASSIFIER

    path = make_generic_bundle(edit=edit)
    with np.load(path / "golden.npz") as arrays:
        change_golden(
            path,
            images=arrays["inputs"],
            logits=arrays["outputs"],
            labels=np.zeros(8, np.int64),
            hostile_images=arrays["hostile_inputs"],
            hostile_logits=arrays["hostile_outputs"],
        )

    assert refusal(path) == "line/1 has no output 'logits' to be checked by"


def test_provider_that_is_not_there_is_refused_with_what_is_there(make_bundle, load):
    with pytest.raises(ModelError) as caught:
        load(make_bundle(), providers=("ImaginaryExecutionProvider", "CPUExecutionProvider"))

    assert re.fullmatch(
        r"onnxruntime [0-9.]+ has no ImaginaryExecutionProvider, "
        r"only ([A-Za-z]+ExecutionProvider(, )?)+; "
        "install the extra gpu instead of service, or choose others with --providers",
        str(caught.value),
    )


def test_model_that_does_not_agree_with_its_golden_set_is_refused(make_bundle, refusal, tiny):
    path = make_bundle(model=tiny.model(np.array([127, -127, 0.1], np.float32)))

    assert re.fullmatch(
        r"tiny/1 fails its self-check on this host: "
        r"max \|Δlogit\| is 0\.1, over the float32 budget of [0-9.e-]+",
        refusal(path),
    )


def test_model_that_does_not_agree_on_hostile_inputs_is_refused(make_bundle, refusal):
    path = make_bundle()
    change_golden(path, hostile_logits=np.zeros((5, 3), np.float32))

    assert "max |Δlogit| on hostile inputs is" in refusal(path)


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300])
def test_golden_set_that_is_not_finite_is_refused_without_a_warning(make_bundle, refusal, value):
    for version_number, name, rows in ((1, "hostile_logits", 5), (2, "logits", 12)):
        path = make_bundle(version=version_number)
        change_golden(path, **{name: np.full((rows, 3), value)})

        assert refusal(path).startswith(f"tiny/{version_number} fails its self-check on this host:")


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((0, 2, 2, 1), np.uint8)},
        {"images": np.zeros((), np.uint8)},
        {"images": np.zeros((12, 2, 2, 1), np.float32)},
        {"images": np.zeros((12, 2, 3, 1), np.uint8)},
        {"images": np.zeros((12, 4), np.uint8)},
        {"hostile_images": np.zeros((0, 2, 2, 1), np.uint8)},
        {"hostile_images": np.zeros((5, 2, 2, 1), np.int8)},
        {"labels": np.zeros(3, np.int64)},
        {"labels": np.zeros((12, 1), np.int64)},
        {"labels": np.zeros((), np.int64)},
        {"labels": np.array(["x"] * 12)},
        {"logits": np.zeros((12, 2), np.float32)},
        {"logits": np.zeros((), np.float32)},
        {"logits": np.zeros((12, 3), np.complex64)},
        {"hostile_logits": np.zeros((4, 3), np.float32)},
        {"hostile_logits": np.zeros((1, 3), np.float32)},
        {"hostile_logits": np.array([["x"] * 3] * 5)},
        {"hostile_logits": np.zeros((5, 3), np.complex64)},
    ],
    ids=str,
)
def test_golden_set_of_the_wrong_shape_or_datatype_is_refused(make_bundle, refusal, changes):
    path = make_bundle()
    change_golden(path, **changes)

    assert "golden set" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": np.zeros((8, 3), np.float64)},
        {"inputs": np.zeros((8, 0), np.float32)},
        {"inputs": np.zeros((8, 3, 1), np.float32)},
        {"outputs": np.zeros((8, 2), np.float32)},
        {"outputs": np.array([["x"] * 3] * 8)},
    ],
    ids=str,
)
def test_generic_golden_set_of_the_wrong_shape_or_datatype_is_refused(
    make_generic_bundle, refusal, changes
):
    path = make_generic_bundle()
    change_golden(path, **changes)

    assert "golden set" in refusal(path)


@pytest.mark.parametrize("name", ["images", "labels", "logits", "hostile_images", "hostile_logits"])
def test_golden_set_without_one_of_its_arrays_is_refused(make_bundle, refusal, name):
    path = make_bundle()
    with np.load(path / "golden.npz") as arrays:
        kept = {key: arrays[key] for key in arrays if key != name}
    file = io.BytesIO()
    np.savez(file, **kept)
    resign(path, "golden.npz", file.getvalue())

    assert refusal(path).startswith("tiny/1/golden.npz is not a golden set: ")


def test_golden_set_with_pickled_objects_is_refused_and_nothing_is_unpickled(make_bundle, refusal):
    path = make_bundle()
    change_golden(path, images=np.array([print], dtype=object))

    assert refusal(path).startswith("tiny/1/golden.npz is not a golden set: ")


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: setattr(manifest, "served_variant", "onnx-int8"),
        lambda manifest: setattr(manifest.parity[0].budget, "precision", "int4"),
        lambda manifest: manifest.ClearField("parity"),
    ],
)
def test_bundle_without_a_report_of_its_served_variant_is_refused(make_bundle, refusal, edit):
    assert re.fullmatch(
        "tiny/1 has no usable parity report of its served variant 'onnx-[a-z0-9]+'; "
        "publish it again",
        refusal(make_bundle(edit=edit)),
    )


@pytest.mark.parametrize("scale", [math.inf, math.nan, 0.0, -1.0])
def test_budget_that_could_not_fail_is_refused(make_bundle, refusal, scale, tiny):
    wrong = tiny.model(np.array([127, -127, 100], np.float32))

    path = make_bundle(
        model=wrong, edit=lambda manifest: setattr(manifest.parity[0].budget, "scale", scale)
    )

    assert refusal(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: setattr(manifest.input, "name", "pixels"),
        lambda manifest: setattr(manifest.input, "datatype", "FP32"),
        lambda manifest: manifest.input.shape.append(1),
        lambda manifest: manifest.ClearField("input"),
        lambda manifest: setattr(manifest.outputs[0], "name", "scores"),
        lambda manifest: manifest.outputs.pop(),
        lambda manifest: manifest.ClearField("outputs"),
    ],
)
@pytest.mark.parametrize("kind", [bundle_pb2.KIND_CLASSIFIER, bundle_pb2.KIND_GENERIC])
def test_model_whose_tensors_are_not_the_manifests_is_refused(make_bundle, refusal, edit, kind):
    def other(manifest):
        edit(manifest)
        manifest.kind = kind

    path = make_bundle(edit=other)
    if kind == bundle_pb2.KIND_GENERIC:
        with np.load(path / "golden.npz") as arrays:
            names = {"images": "inputs", "logits": "outputs"}
            named = {new: arrays[old] for old, new in names.items()}
            hostile = {f"hostile_{new}": arrays[f"hostile_{old}"] for old, new in names.items()}
        change_golden(path, **named, **hostile)

    assert refusal(path).startswith("tiny/1/model.onnx has the tensors [(")


def identity(shape, name="logits"):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], [name])],
        "identity",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def with_shape(shape, name="logits"):
    def edit(manifest):
        del manifest.outputs[:]
        wire = [size if isinstance(size, int) else -1 for size in shape]
        manifest.input.CopyFrom(bundle_pb2.TensorSpec(name="image", datatype="FP32", shape=wire))
        manifest.outputs.add(name=name, datatype="FP32", shape=wire)

    return edit


@pytest.mark.parametrize("shape", [[4, 3], [], ["batch", 0]])
def test_model_that_does_not_begin_with_an_open_batch_is_refused(make_bundle, refusal, shape):
    assert refusal(make_bundle(model=identity(shape), edit=with_shape(shape))) == (
        f"tiny/1 takes the shape {[-1 if size == 'batch' else size for size in shape]}, "
        "expected -1 for the batch first, and no size of 0"
    )


def test_model_without_logits_is_refused(make_bundle, refusal):
    shape = ["batch", 3]
    path = make_bundle(model=identity(shape, "answer"), edit=with_shape(shape, "answer"))

    assert refusal(path) == "tiny/1 has no output 'logits' to be checked by"


def test_model_that_only_takes_small_batches_is_refused_where_larger_ones_are_served(
    make_bundle, load
):
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["image"], ["shape"], start=0, end=1),
            helper.make_node("Sub", ["limit", "shape"], ["left"]),
            helper.make_node("Expand", ["zero", "left"], ["fails_below_zero"]),
            helper.make_node("ReduceSum", ["fails_below_zero"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["image", "nothing"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            onnx.numpy_helper.from_array(np.array([4]), "limit"),
            onnx.numpy_helper.from_array(np.array([0], np.float32), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = make_bundle(model=model.SerializeToString(), edit=with_shape(["batch", 3]))
    images = np.random.default_rng(0).uniform(-9, 9, (12, 3)).astype(np.float32)
    change_golden(
        path,
        images=images,
        logits=images,
        labels=images.argmax(axis=1),
        hostile_images=images[:5],
        hostile_logits=images[:5],
    )

    assert load(path, max_batch_rows=4).self_check.report.passed
    with pytest.raises(ModelError, match="cannot run the model"):
        load(path, max_batch_rows=5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "model.onnx").unlink(),
        lambda path: (path / "golden.npz").write_bytes(b"cut"),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: resign(path, "model.onnx", b"not a model"),
        lambda path: resign(path, "model.onnx", b""),
        lambda path: resign(path, "golden.npz", b"not a golden set"),
    ],
)
def test_bundle_that_is_damaged_is_refused(make_bundle, load, spoil):
    path = make_bundle()
    spoil(path)

    with pytest.raises(ServiceError, match=r"^(tiny/1|onnxruntime)"):
        load(path)


def described(model, **texts):
    """Return the model with texts in its own metadata."""
    loaded = onnx.load_from_string(model)
    for key, text in texts.items():
        loaded.metadata_props.add(key=key.replace("_", "."), value=text)
    return loaded.SerializeToString()


def test_a_model_that_says_what_its_manifest_says_is_loaded(make_bundle, load, tiny):
    model = described(tiny.model(), labels=json.dumps(tiny.labels), parent_sha256="abc")

    def edit(manifest):
        manifest.provenance.parent_sha256 = "abc"

    assert load(make_bundle(model=model, edit=edit)).self_check.report.passed


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ('["light", "dark", "striped"]', r"\['light', 'dark', 'striped'\]"),
        ("[", r"\["),
        ("3", "3"),
    ],
)
def test_a_model_that_names_its_classes_otherwise_is_refused(
    make_bundle, load, tiny, labels, found
):
    path = make_bundle(model=described(tiny.model(), labels=labels))

    with pytest.raises(BundleError, match=f"has the labels {found}, its manifest"):
        load(path)


def test_probabilities_that_are_not_those_of_the_logits_are_refused(make_bundle, load, tiny):
    model = onnx.load_from_string(tiny.model())
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.node.insert(
        len(model.graph.node) - 1, helper.make_node("Neg", ["logits"], ["negative"])
    )
    softmax.input[0] = "negative"
    path = make_bundle(model=model.SerializeToString())

    with pytest.raises(BundleError, match="from the softmax of the logits, allowed are"):
        load(path)


def test_a_model_of_another_original_is_refused(make_bundle, load, tiny):
    def edit(manifest):
        manifest.provenance.parent_sha256 = "abc"

    path = make_bundle(model=described(tiny.model(), parent_sha256="def"), edit=edit)

    with pytest.raises(BundleError, match="comes from the original def, its manifest is of abc"):
        load(path)
