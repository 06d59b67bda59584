import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tensorflow as tf
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from pipeline import check, questions
from pipeline.__main__ import app
from pipeline.errors import CheckError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tf.lite.Interpreter.*", "ignore:.*constrained.*:UserWarning"
)


class Linear(tf.Module):
    """The tiny model on TensorFlow."""

    def __init__(self, weights, bias):
        super().__init__()
        self.weights, self.bias = tf.Variable(weights), tf.Variable(bias)

    @tf.function(input_signature=[tf.TensorSpec((None, 2, 2, 1), tf.uint8, name="image")])
    def serve(self, image):
        logits = tf.reshape(tf.cast(image, tf.float32), (-1, 4)) @ self.weights + self.bias
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}


@pytest.fixture(scope="module")
def linear(request):
    tiny = request.getfixturevalue("tiny")
    bias = tiny.logits(np.zeros((1, 2, 2, 1), np.uint8))[0]
    return Linear(tiny.logits(np.eye(4, dtype=np.uint8).reshape(4, 2, 2, 1)) - bias, bias)


@pytest.fixture(scope="module")
def saved(linear, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "saved_model"
    tf.saved_model.save(linear, str(path), signatures={"serving_default": linear.serve})
    return path


@pytest.fixture
def candidate(tiny, tmp_path):
    """Return a function that writes the tiny model as ONNX, with a bias added."""

    def write(*bias, model=None):
        path = tmp_path / "model.onnx"
        moved = tiny.logits(np.zeros((1, 2, 2, 1), np.uint8))[0] + np.array(bias or 0, np.float32)
        path.write_bytes(model or tiny.model(moved))
        return path

    return write


@pytest.fixture
def images(tiny, tmp_path):
    path = tmp_path / "images.npz"
    rows = tiny.images(40)
    np.savez(path, images=rows, labels=tiny.logits(rows).argmax(axis=1))
    return path


def hold(reference, candidate, data, **options):
    return check.pair(reference, candidate, questions.read(data), **options)


def refusal(*arguments, **options):
    with pytest.raises(CheckError) as caught:
        hold(*arguments, **options)
    return str(caught.value)


def test_a_pair_that_answers_alike_passes(saved, candidate, images):
    found = hold(saved, candidate(), images)

    assert found.failure == ""
    (report,) = found.reports
    assert report.accuracy.rows == 40
    assert report.accuracy.value == 1.0
    assert found.worst == {}


def test_a_pair_that_does_not_fails_with_its_worst_rows(saved, candidate, images):
    found = hold(saved, candidate(0, 0, 200), images)

    assert found.failure.startswith("parity does not hold, model.onnx: max |Δlogit| is 200, over")
    assert len(found.worst["model.onnx"]) == 3


def test_a_wider_class_has_a_wider_budget(saved, candidate, images):
    path = candidate(0, 0, 0.05)

    assert hold(saved, path, images).failure
    assert not hold(saved, path, images, precision="float16").failure


def test_a_tflite_file_is_run_by_its_own_runtime(linear, saved, images, tmp_path):
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
    path = tmp_path / "model.tflite"
    path.write_bytes(converter.convert())

    assert not hold(saved, path, images).failure


def test_channels_first_are_recognised_and_said(tmp_path):
    def write(name, permuted):
        shape: list[str | int | None] = ["batch", *((3, 4, 5) if permuted else (4, 5, 3))]
        nodes = [helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT)]
        if not permuted:
            nodes.append(helper.make_node("Transpose", ["cast"], ["first"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Flatten", ["cast" if permuted else "first"], ["flat"]))
        nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["logits"]))
        weights = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)
        graph = helper.make_graph(
            nodes, "m",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
            [numpy_helper.from_array(weights, "weights")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    data = tmp_path / "rows.npy"
    np.save(data, np.random.default_rng(2).integers(0, 256, (9, 4, 5, 3), np.uint8))

    found = hold(write("last.onnx", permuted=False), write("first.onnx", permuted=True), data)

    assert not found.failure
    assert "channels first" in found.notes[0]


def test_outputs_that_are_no_logits_are_judged_by_their_differences(saved, candidate, images):
    found = hold(saved, candidate(), images, output="probabilities")

    assert not found.failure
    assert "probabilities and probabilities are no logits" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.onnx", b"", "cannot be loaded"),
        ("model.onnx", b"\x08\x07", "cannot be loaded"),
        ("model.tflite", b"TFL3", "cannot be loaded: TFLite's runtime says: "),
        ("model.pt", b"", "is a .pt file, expected .onnx or .tflite"),
    ],
)
def test_what_is_no_model_is_refused(saved, images, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)

    assert said in refusal(saved, tmp_path / name, images)


def test_a_truncated_model_is_refused(saved, candidate, images):
    path = candidate()
    path.write_bytes(path.read_bytes()[:-40])

    assert "cannot be loaded" in refusal(saved, path, images)


def test_files_that_are_not_there_are_named(saved, images, tmp_path):
    assert "none.onnx is not there" in refusal(saved, tmp_path / "none.onnx", images)
    assert "cannot be loaded as a SavedModel" in refusal(tmp_path, tmp_path / "a.onnx", images)


def test_missing_signatures_and_outputs_name_those_there_are(saved, candidate, images):
    path = candidate()

    assert "choose one with --signature" in refusal(saved, path, images, signature="other")
    assert "no output 'other': " in refusal(saved, path, images, output="other")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros(3), "b": np.zeros(3)}, "expected one called images"),
        ({"images": np.zeros((0, 2, 2, 1), np.uint8)}, "there are no rows"),
        ({"images": np.zeros((4, 3, 2, 1), np.uint8)}, "has rows of shape [3, 2, 1]"),
        ({"images": np.full((4, 2, 2, 1), 0.5)}, "have values that are none"),
        ({"images": np.full((4, 2, 2, 1), np.nan)}, "have values that are none"),
        ({"images": np.zeros((4, 2, 2, 1), np.uint8), "labels": np.zeros(3, int)}, "expected 4"),
    ],
)
def test_rows_that_do_not_fit_are_refused(saved, candidate, tmp_path, arrays, said):
    data = tmp_path / "rows.npz"
    np.savez(data, **arrays)

    assert said in refusal(saved, candidate(), data)


HUGE = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 28), }".ljust(117) + b"\n"
)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", HUGE])
def test_hostile_data_are_refused(saved, candidate, tmp_path, content):
    (tmp_path / "rows.npz").write_bytes(content)

    assert "cannot be read as .npy or .npz" in refusal(saved, candidate(), tmp_path / "rows.npz")


def signed(path, name):
    """List a file of a bundle again, as whoever changed it would."""
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / name).read_bytes()
    entry = next(file for file in manifest["files"] if file["path"] == name)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    entry["sizeBytes"] = len(content)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_bundle_passes_alone_and_against_its_original(make_bundle, saved):
    path = make_bundle()

    for against in (None, saved):
        found = check.whole_bundle(path, against)
        assert found.failure == ""
        assert found.reports[-1].variant == "model.onnx"


def test_another_model_in_a_bundle_is_found_though_it_is_signed(make_bundle, tiny):
    path = make_bundle()
    (path / "model.onnx").write_bytes(tiny.model(np.array([1, 2, 300], np.float32)))
    signed(path, "model.onnx")

    assert "model.onnx: max |Δlogit| is " in check.whole_bundle(path).failure


def test_a_golden_set_of_another_model_is_found_against_the_original(make_bundle, saved):
    found = check.whole_bundle(make_bundle(striped=200), saved)

    assert "is not the model that answered it" in found.failure


def test_a_changed_file_of_a_bundle_is_refused_by_its_digest(make_bundle):
    path = make_bundle()
    with (path / "golden.npz").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(CheckError, match=r"golden\.npz"):
        check.whole_bundle(path)


def test_a_file_that_names_its_classes_otherwise_fails(make_bundle, tiny):
    model = onnx.load_from_string(tiny.model())
    model.metadata_props.add(key="labels", value='["light", "dark", "striped"]')

    found = check.whole_bundle(make_bundle(model=model.SerializeToString()))

    assert "the file has the labels" in found.failure


def reversed_probabilities(tiny):
    """The tiny model with its logits untouched and its probabilities the other way round."""
    model = onnx.load_from_string(tiny.model())
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "reverse"))
    model.graph.node.insert(
        len(model.graph.node) - 1, helper.make_node("Gather", ["logits", "reverse"], ["r"], axis=1)
    )
    softmax.input[0] = "r"
    return model.SerializeToString()


def test_probabilities_that_are_not_those_of_the_logits_are_found(
    make_bundle, saved, candidate, images, tiny
):
    model = reversed_probabilities(tiny)

    for failure in (
        check.whole_bundle(make_bundle(model=model)).failure,
        hold(saved, candidate(model=model), images).failure,
    ):
        assert "from the softmax of the logits, allowed are 0.001" in failure


def run(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)])


def test_the_command_ends_with_0_and_a_table_or_1_and_a_sentence(make_bundle, tiny):
    path = make_bundle()
    right = run("--bundle", path)
    (path / "model.onnx").write_bytes(tiny.model(np.array([1, 2, 300], np.float32)))
    signed(path, "model.onnx")
    wrong = run("--bundle", path)

    assert right.exit_code == 0, right.output
    assert "passed" in right.stdout
    assert wrong.exit_code == 1
    assert "model.onnx is furthest off on the rows" in wrong.stdout
    assert "parity does not hold, " in wrong.stderr


def test_the_command_gives_its_reports_as_json(saved, candidate, images):
    words = ("--reference", saved, "--candidate", candidate(), "--data", images, "--json")

    found = json.loads(run(*words).stdout)

    assert found["failure"] == ""
    assert found["reports"][0]["passed"] is True


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--reference", "a"),
        ("--bundle", "a", "--reference", "a", "--candidate", "b", "--data", "c"),
        ("--against", "a", "--reference", "a", "--candidate", "b", "--data", "c"),
        ("--bundle", "a", "--data", "c"),
    ],
)
def test_options_that_do_not_go_together_are_refused_as_usage(words):
    result = run(*words)

    assert result.exit_code == 2
    assert "give --bundle" in result.stderr


def test_a_bundle_that_is_not_there_is_usage_and_not_a_verdict(tmp_path):
    result = run("--bundle", str(tmp_path / "none"))

    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no bundle" in result.stderr


def test_a_bundle_is_found_by_its_name_in_the_models_folder(make_bundle):
    models = make_bundle().parents[1]

    assert run("--bundle", "tiny/1", "--models", models).exit_code == 0


def test_how_far_it_is_is_told_in_files_of_a_bundle_and_in_rows_of_a_pair(
    make_bundle, saved, candidate, images
):
    of_bundle: list[tuple[int, int]] = []
    of_pair: list[tuple[int, int]] = []
    found = check.whole_bundle(make_bundle(), show=lambda *said: of_bundle.append(said))
    hold(saved, candidate(), images, show=lambda *said: of_pair.append(said))

    files = len(found.reports)
    assert of_bundle == [(done, files) for done in range(files + 1)]
    assert of_pair == [(0, 80), (40, 80), (80, 80)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--precision": "float8"}, "expected one of float32, float16, int8"),
        ({"--candidate": "none.onnx"}, "none.onnx is not there"),
        ({"--data": "none.npz"}, "none.npz cannot be read"),
        ({"--output": "other"}, "no output 'other'"),
        ({"--signature": "other"}, "choose one with --signature"),
    ],
)
def test_what_cannot_be_asked_for_is_usage_and_not_a_verdict(
    saved, candidate, images, changed, said
):
    words = {"--reference": saved, "--candidate": candidate(), "--data": images} | changed

    result = run(*(word for pair in words.items() for word in pair))

    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("wrong", [99, -1])
def test_labels_of_classes_that_there_are_not_are_refused(saved, candidate, tmp_path, tiny, wrong):
    np.savez(tmp_path / "rows.npz", images=tiny.images(5), labels=np.full(5, wrong))

    assert "the models have 3 classes" in refusal(saved, candidate(), tmp_path / "rows.npz")


def test_labels_may_stand_in_a_file_of_their_own(saved, candidate, images, tiny, tmp_path):
    for name, arrays in (("a.npz", {"labels": np.zeros(40, int)}), ("b.npz", {"x": np.zeros(40)})):
        np.savez(tmp_path / name, **arrays)
    asked = questions.read(images, labels=tmp_path / "a.npz")

    assert check.pair(saved, candidate(), asked).reports[0].accuracy.value < 1
    with pytest.raises(CheckError, match="expected one called labels"):
        check.pair(saved, candidate(), questions.read(images, labels=tmp_path / "b.npz"))


@pytest.mark.slow
def test_integers_of_tflite_are_compared_as_what_they_stand_for(saved, images, tmp_path, tiny):
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[np.newaxis]] for row in tiny.images(100))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_output_type = tf.int8
    path = tmp_path / "model.tflite"
    path.write_bytes(converter.convert())

    report = hold(saved, path, images, precision="int8").reports[0]

    assert report.logits.p999 <= report.budget.max_logit


@pytest.fixture
def project(tmp_path, make_bundle, saved, candidate, images):
    """A user's own tests, with a bundle and a pair of files."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copytree(make_bundle().parents[1], folder / "models")
    (folder / "test_models.py").write_text(
        f"""
def test_the_bundle_holds(parity_bundle):
    assert parity_bundle.reports["model.onnx"].passed
    parity_bundle.assert_parity()
    parity_bundle.assert_parity("model.onnx")

def test_the_pair_holds(parity_check):
    parity_check({str(saved)!r}, {str(candidate())!r}, {str(images)!r}).assert_parity()
"""
    )
    return folder


def pytest_of(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_fixtures_hold_a_bundle_and_a_pair_in_a_users_own_tests(project, tiny):
    done = pytest_of(project, "--parity-bundle", "models/tiny/1")
    assert done.returncode == 0, done.stdout

    path = project / "models/tiny/1"
    (path / "model.onnx").write_bytes(tiny.model(np.array([1, 2, 300], np.float32)))
    signed(path, "model.onnx")
    done = pytest_of(project, "-k", "bundle", "-o", "parity_bundle=models/tiny/1")
    assert done.returncode == 1

    (project / "test_models.py").write_text(
        "def test_it_holds(parity_bundle):\n    parity_bundle.assert_parity()\n"
    )
    done = pytest_of(project, "-o", "parity_bundle=models/tiny/1")
    assert "parity does not hold, onnx-float32: max |Δlogit| is " in done.stdout


@pytest.mark.slow
def test_a_run_that_asks_for_no_fixture_pays_nothing(project):
    (project / "test_models.py").write_text(
        "import sys\n\ndef test_nothing():\n"
        "    assert not {'tensorflow', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
    )

    assert pytest_of(project).returncode == 0
    assert pytest_of(project, "-p", "no:train-export").returncode == 0


@pytest.mark.slow
def test_a_fixture_without_a_bundle_says_how_to_name_one(project):
    done = pytest_of(project, "-k", "bundle")

    assert "name a bundle with --parity-bundle" in done.stdout
