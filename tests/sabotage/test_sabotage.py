"""What goes wrong between a trained model and its clients is caught, by the stage that can see it.

Each test breaks a real model in one way and says in its name which stage catches it.
"""

import io
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from google.protobuf import json_format
from keras import layers
from onnx import helper, numpy_helper

from pipeline import evaluate, explain, export, models, parity, publish
from pipeline.config import Config, GateConfig, PublishConfig
from pipeline.cost import Cost
from pipeline.errors import EvaluationError, ExportError, ParityError
from pipeline.export import metadata
from pipeline.records import Epoch, Trained, Variant
from protos import parity_pb2
from service import agreement, bundle, model_config, version
from service.errors import BundleError, ModelError
from service.live import LiveStore
from service.session import CPU
from service.settings import Settings
from service.trial import Trials

ROWS = 512
EXPLAINED_ROWS = 32
FLUSHED = {"session.set_denormal_as_zero": "1"}


@dataclass(frozen=True)
class Subject:
    """A model that was trained and exported, and what it answers."""

    model: keras.Model
    saved_model: Variant
    onnx: Variant
    asked: parity.Questions


def fitted(model, images, labels, callbacks=(), **optimizer):
    """Train for one pass over the images."""
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3, **optimizer),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=64, verbose=0, callbacks=list(callbacks))
    return model


def conv10(splits, seed, labels):
    """Train the default network: one convolution, dropout, dense layers."""
    keras.utils.set_random_seed(seed)
    model = models.build("conv10-dropout", (28, 28, 1), 10)
    return fitted(model, splits.train.inputs, labels)


def subject(lab, model, test, folder):
    asked = lab.questions(model, *test)
    return Subject(model, lab.saved_model(model, folder), lab.onnx(model, folder), asked)


@pytest.fixture(scope="session")
def plain(lab, splits, tmp_path_factory):
    model = conv10(splits, 1, splits.train.targets)
    test = splits.test.inputs[:ROWS], splits.test.targets[:ROWS]
    return subject(lab, model, test, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def other(lab, splits, tmp_path_factory):
    """The same network, trained from another seed, as ONNX too."""
    model = conv10(splits, 99, splits.train.targets)
    return model, lab.onnx(model, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def deep(lab, crop, tmp_path_factory):
    """Colour, strides of two, batch normalisation and dropout."""
    keras.utils.set_random_seed(3)
    image = keras.Input((28, 28, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(12, 3, strides=2, padding="same", use_bias=False, name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8, name="norm")(x))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="second")(x)
    x = layers.Dropout(0.4)(x)
    x = layers.Dense(32, activation="relu", name="hidden")(layers.Flatten()(x))
    model = keras.Model(image, layers.Dense(10, name="logits")(x))
    fitted(model, *crop((28, 28, 3), 4096, 4))
    return subject(lab, model, crop((28, 28, 3), ROWS, 5), tmp_path_factory.mktemp("deep"))


def explained(whole, variant):
    """Return what `train-export explain` says of a variant, on a few rows."""
    return explain.first_divergence(
        whole.saved_model.path,
        variant.path,
        whole.asked.inputs[:EXPLAINED_ROWS],
        config=dict(variant.session),
    )


# A graph that was changed.


def weights(model):
    """Return the constants of a graph that have more than one element, by their names."""
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    return {
        name: array for name, array in arrays.items() if array.dtype.kind == "f" and array.size > 1
    }


def change(model, name, value):
    constant = next(one for one in model.graph.initializer if one.name == name)
    constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def first(model, operator):
    return next(node for node in model.graph.node if node.op_type == operator)


def broken(path, breaking):
    model = onnx.load(path)
    breaking(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def scaled(factor):
    def scale(model):
        name = first(model, "Conv").input[1]  # the scale is part of the first kernel
        change(model, name, weights(model)[name] * np.float32(factor))

    return scale


def channels_swapped(model):
    name = first(model, "Conv").input[1]
    change(model, name, weights(model)[name][:, ::-1])


def height_and_width_swapped(model):
    reader = next(node for node in model.graph.node if "image" in node.input)
    reader.input[0] = "turned"
    turned = helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 2, 1, 3])
    model.graph.node.insert(0, turned)


def bit_flipped(bit):
    def flip(model):
        """Flip a bit of the largest weight of the first dense layer."""
        name = first(model, "Gemm").input[1]
        value = weights(model)[name].copy()
        value.view(np.uint32).reshape(-1)[np.abs(value).argmax()] ^= np.uint32(1 << bit)
        change(model, name, value)

    return flip


def bias_dropped(model):
    name = first(model, "Gemm").input[2]
    change(model, name, np.zeros_like(weights(model)[name]))


def padded_before(model):
    """Add what SAME adds behind at stride two, but before."""
    pads = next(one for one in first(model, "Conv").attribute if one.name == "pads")
    assert list(pads.ints) == [0, 0, 1, 1]
    pads.ints[:] = [1, 1, 0, 0]


# By what was done: to which model, how, the causes that explain it, and a layer if it is inside.
CHANGES = {
    "scale doubled": ("plain", scaled(2), {"scale"}, ""),
    "scale missing": ("plain", scaled(255), {"scale"}, ""),
    "scale missing in colour": ("deep", scaled(255), {"scale"}, ""),
    "BGR for RGB": ("deep", channels_swapped, {"layout"}, ""),
    "height for width": ("plain", height_and_width_swapped, {"layout"}, ""),
    "height for width in colour": ("deep", height_and_width_swapped, {"layout"}, ""),
    "sign flipped": ("plain", bit_flipped(31), {"weights", "offset"}, ""),
    "exponent flipped": ("deep", bit_flipped(24), {"weights", "offset"}, "hidden"),
    "bias dropped": ("plain", bias_dropped, {"offset", "weights"}, ""),
    "bias dropped deep": ("deep", bias_dropped, {"offset", "weights"}, "hidden"),
    "padding off by one": ("deep", padded_before, {"padding"}, "first"),
}
ON_PLAIN = {key: breaking for key, (name, breaking, _, _) in CHANGES.items() if name == "plain"}


@pytest.fixture(params=list(CHANGES.values()), ids=list(CHANGES))
def changed(request, lab, tmp_path):
    """A whole model, its ONNX file with one change, and what explains it."""
    name, breaking, causes, layer = request.param
    whole = request.getfixturevalue(name)
    return whole, lab.written(broken(whole.onnx.path, breaking), tmp_path), causes, layer


def test_parity_catches_a_changed_graph(changed, lab):
    whole, variant, _, _ = changed
    assert lab.report(whole.onnx, whole.asked).passed

    report = lab.report(variant, whole.asked)

    assert not report.passed
    assert "over the float32 budget of" in report.failure


def test_explain_names_layer_and_cause_of_a_changed_graph(changed):
    whole, variant, causes, layer = changed

    found = explained(whole, variant)

    assert found.cause in causes, found.text
    assert layer in found.layer, found.text


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_explain_finds_nothing_in_what_is_right(name, request):
    whole = request.getfixturevalue(name)

    found = explained(whole, whole.onnx)

    assert not found.diverges, found.text
    assert (found.layer, found.cause) == ("", "")


# Another function than the model.


def in_training(model):
    """Return the serving function with every layer as it is in training."""

    @tf.function(input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, "image")])
    def serve(image):
        logits = model(image, training=True)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    return serve


@pytest.fixture(params=["plain", "deep"])
def training(request, lab, tmp_path):
    """A whole model, and its SavedModel as it is in training."""
    whole = request.getfixturevalue(request.param)
    return whole, lab.saved_model(whole.model, tmp_path, in_training(whole.model))


def test_parity_catches_dropout_and_batch_normalisation_left_in_training(training, lab):
    whole, variant = training
    assert lab.report(whole.saved_model, whole.asked).passed

    report = lab.report(variant, whole.asked)

    assert not report.passed
    assert "over the float32 budget of" in report.failure


def test_explain_says_that_a_model_was_left_in_training(training):
    whole, variant = training

    found = explained(whole, variant)

    assert found.cause == "training mode", found.text


def test_parity_catches_another_model_of_the_same_shape(plain, other, lab):
    report = lab.report(other[1], plain.asked)

    assert not report.passed
    assert "over the float32 budget of" in report.failure


def test_explain_says_that_it_is_another_model(plain, other):
    found = explained(plain, other[1])

    assert found.cause == "different model", found.text


# Fewer bits.


@pytest.fixture
def dark(plain, splits, lab, tmp_path):
    """int8, calibrated in the dark: layers have a fraction of the range that they need."""
    source = lab.written(plain.onnx.path.read_bytes(), tmp_path)
    return lab.int8(source, splits.train.inputs[:200] // 8)


def test_parity_catches_int8_that_saturates(plain, dark, splits, lab, tmp_path):
    report = lab.report(dark, plain.asked)
    assert not report.passed
    assert "over the int8 budget of" in report.failure

    source = lab.written(plain.onnx.path.read_bytes(), tmp_path)
    right = lab.report(lab.int8(source, splits.train.inputs[:200]), plain.asked)
    assert right.logits.p999 <= right.budget.max_logit, right.failure


def test_explain_says_that_an_int8_range_is_too_small(plain, dark):
    found = explained(plain, dark)

    assert found.cause in {"range", "saturation"}, found.text


def overflowing(model):
    """Give a hidden layer weights that float16 cannot hold; the next layer takes them back."""
    hidden, last = (node for node in model.graph.node if node.op_type == "Gemm")
    for name, power in ((hidden.input[1], 20), (hidden.input[2], 20), (last.input[1], -20)):
        change(model, name, weights(model)[name] * np.float32(2.0**power))


@pytest.fixture
def stretched(plain, lab, tmp_path):
    """The same function in float32, with a layer that is too large for float16."""
    return lab.written(broken(plain.onnx.path, overflowing), tmp_path)


def test_parity_catches_float16_that_overflows(plain, stretched, lab):
    assert lab.report(stretched, plain.asked).passed

    report = lab.report(lab.float16(stretched), plain.asked)

    assert not report.passed
    assert "over the float16 budget of" in report.failure


def test_parity_lets_float16_that_does_not_overflow_pass(plain, lab, tmp_path):
    source = lab.written(plain.onnx.path.read_bytes(), tmp_path)

    assert lab.report(lab.float16(source), plain.asked).passed


def test_explain_says_that_float16_overflows(plain, stretched, lab):
    found = explained(plain, lab.float16(stretched))

    assert found.cause == "overflow", found.text


# Files and options.


def cut_in_half(path, folder):
    content = path.read_bytes()
    cut = folder / path.name
    cut.write_bytes(content[: len(content) // 2])
    return cut


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_parity_catches_a_truncated_file(kind, plain, lab, tmp_path):
    whole = plain.onnx if kind == "onnx" else lab.tflite(plain.saved_model)

    report = lab.report(replace(whole, path=cut_in_half(whole.path, tmp_path)), plain.asked)

    assert not report.passed
    assert report.failure.startswith(f"{whole.path.name} cannot be run: ")


def fading(model):
    """Take activations below the normal range of float32 and back, which loses nothing."""
    relu = first(model, "Relu")
    name, relu.output[0] = relu.output[0], "before"
    at = list(model.graph.node).index(relu) + 1
    for constant, power in (("there", -126), ("back", 126)):
        value = np.array(2.0**power, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, constant))
    model.graph.node.insert(at, helper.make_node("Mul", ["before", "there"], ["faint"]))
    model.graph.node.insert(at + 1, helper.make_node("Mul", ["faint", "back"], [name]))


# What no logit shows, as the model is held against itself.


def kept(model, path):
    """Write a model as training leaves it."""
    model.save(path)
    epoch = Epoch(1, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Trained(path, bundle.file_sha256(path), model.count_params(), "adam", "CPU", (epoch,), 1)


@pytest.fixture(scope="session")
def trained(plain, tmp_path_factory):
    return kept(plain.model, tmp_path_factory.mktemp("trained") / "plain.keras")


@pytest.fixture(scope="session")
def exports(trained, data, tmp_path_factory):
    return export.convert(trained, data, tmp_path_factory.mktemp("run") / "exports", "run-1")


@pytest.fixture(scope="session")
def scores(trained, data):
    return evaluate.score(trained, data, GateConfig(min_accuracy=0.5))


def test_evaluation_catches_permuted_labels(splits, data, tmp_path):
    model = conv10(splits, 7, (splits.train.targets + 1) % 10)

    with pytest.raises(EvaluationError, match=r"test accuracy is \d+\.\d\d%, the gate is 60\.00%"):
        evaluate.score(kept(model, tmp_path / "permuted.keras"), data, GateConfig(min_accuracy=0.6))


@pytest.mark.parametrize("name", ["saved-model", "tflite-float32", "onnx-float32"])
def test_export_metadata_catches_permuted_labels(name, exports, data):
    variant = exports.named(name)
    metadata.check(variant, data, exports.parent_sha256)
    turned = replace(data, labels=(*data.labels[1:], data.labels[0]))

    with pytest.raises(ExportError, match=r"names the classes .*, in this order"):
        metadata.check(variant, turned, exports.parent_sha256)


def test_parity_catches_averaged_weights_that_were_evaluated_but_not_exported(
    splits, data, exports, tmp_path
):
    """Keras swaps the averages in when training ends, after the last epoch was written."""
    keras.utils.set_random_seed(8)
    model = models.build("conv10-dropout", (28, 28, 1), 10)
    early = tmp_path / "early.keras"
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: model.save(early))
    averaging = {"use_ema": True, "ema_momentum": 0.95}
    fitted(model, splits.train.inputs, splits.train.targets, [save], **averaging)
    averaged = kept(model, tmp_path / "averaged.keras")
    unswapped = replace(averaged, path=early, sha256=bundle.file_sha256(early))
    scored = evaluate.score(averaged, data, GateConfig(min_accuracy=0.5))

    with pytest.raises(ParityError) as caught:
        parity.check(
            unswapped,
            replace(exports, parent_sha256=unswapped.sha256),
            data,
            tmp_path / "parity",
            scored,
        )

    assert f"the model exported has sha256 {unswapped.sha256[:12]}…" in str(caught.value)
    assert f"{averaged.sha256[:12]}… was evaluated" in str(caught.value)


# What is published, and loaded.


@pytest.fixture(scope="session")
def checked(trained, exports, data, scores, tmp_path_factory):
    def free(variant, rows, options):
        return Cost(0.01, 1, {1: [0.001], 64: [0.01]})

    folder = tmp_path_factory.mktemp("parity")
    return parity.check(trained, exports, data, folder, scores, measure_cost=free)


@pytest.fixture(scope="session")
def published(trained, data, scores, exports, checked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = Config(preset="quick", publishing=PublishConfig(models=folder, name="garments"))
    return publish.stage(folder, "run-1", config, data, trained, scores, exports, checked).path


@pytest.fixture
def copy(published, tmp_path):
    """A bundle of one's own to break."""
    return shutil.copytree(published, tmp_path / "garments" / "1")


def load(path):
    usual = Settings(repository=Path(), max_batch_rows=32, instances=1, threads=2)
    return version.load(path, model_config.of_server(usual, cores=2))


def refusal(path):
    with pytest.raises((BundleError, ModelError)) as caught:
        load(path)
    return str(caught.value)


def edit(path, change):
    manifest = bundle.read_manifest(path)
    change(manifest)
    (path / bundle.MANIFEST).write_text(json_format.MessageToJson(manifest))


def sign(path, file, content):
    """Replace a file, and list it as if the pipeline had written it."""

    def listed(manifest):
        entry = next(entry for entry in manifest.files if entry.path == file)
        entry.sha256, entry.size_bytes = bundle.sha256(content), len(content)

    (path / file).write_bytes(content)
    edit(path, listed)


FILES = ["model.onnx", "golden.npz", "variants/model.float32.tflite"]
FAILS = "garments/1 fails its self-check on this host: max |Δlogit| is "


def test_the_load_gate_lets_a_whole_bundle_pass(copy):
    assert load(copy).self_check.report.passed


@pytest.mark.parametrize("breaking", ON_PLAIN.values(), ids=list(ON_PLAIN))
def test_the_load_gate_catches_a_changed_graph_that_was_signed(breaking, copy):
    sign(copy, "model.onnx", broken(copy / "model.onnx", breaking))

    assert refusal(copy).startswith(FAILS)


def test_the_load_gate_catches_another_model_of_the_same_shape_that_was_signed(copy, other):
    sign(copy, "model.onnx", other[1].path.read_bytes())

    assert refusal(copy).startswith(FAILS)


def answered_by(model, path):
    """Return the golden set of a bundle as another model would have answered it."""
    with np.load(path / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["logits"] = model.predict(golden["images"], verbose=0)
    golden["hostile_logits"] = model.predict(golden["hostile_images"], verbose=0)
    file = io.BytesIO()
    np.savez(file, **golden)
    return file.getvalue()


def test_the_load_gate_catches_a_golden_set_of_the_training_before(copy, other):
    sign(copy, "golden.npz", answered_by(other[0], copy))

    assert refusal(copy).startswith(FAILS)


def test_the_load_gate_catches_an_option_of_onnxruntime_that_changes_results(copy):
    """In a process of its own, as the server has it tried: the option is of a whole process."""
    sign(copy, "model.onnx", broken(copy / "model.onnx", fading))
    with Trials() as trials:
        attempt = partial(
            trials.run, copy, threads=1, max_batch_rows=32, providers=CPU, timeout_s=120
        )
        attempt()
        edit(copy, lambda manifest: manifest.session.config.update(FLUSHED))

        with pytest.raises(BundleError) as caught:
            attempt()

    assert str(caught.value).startswith(FAILS)


def test_the_load_gate_catches_permuted_labels_of_a_manifest(copy):
    edit(copy, lambda manifest: manifest.labels.reverse())

    message = refusal(copy)
    assert message.startswith("garments/1/model.onnx has the labels ['T-shirt/top', ")
    assert "its manifest ['Ankle boot', " in message


def test_the_load_gate_catches_a_model_of_another_run_with_a_golden_set_of_its_own(copy, other):
    model = onnx.load(other[1].path)
    model.metadata_props.add(key="parent.sha256", value="abc123" * 10)
    sign(copy, "model.onnx", model.SerializeToString())
    sign(copy, "golden.npz", answered_by(other[0], copy))

    assert refusal(copy).startswith(
        "garments/1/model.onnx comes from the original abc123abc123, its manifest is of "
    )


def scale_left_to_clients(model):
    """Take pixels from 0 to 1, in float32."""
    cast = first(model, "Cast")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        node.input[:] = ["image" if name == cast.output[0] else name for name in node.input]
    model.graph.node.remove(cast)
    scaled(255)(model)


def test_the_load_gate_catches_a_scale_that_is_left_to_clients(copy):
    sign(copy, "model.onnx", broken(copy / "model.onnx", scale_left_to_clients))

    message = refusal(copy)
    assert message.startswith("garments/1/model.onnx has the tensors [('image', 'FP32', ")
    assert "its manifest promises [('image', 'UINT8', " in message


def test_the_load_gate_catches_the_wrong_version_under_the_right_name(copy):
    assert refusal(copy.rename(copy.with_name("2"))) == (
        "garments/2/manifest.json is of garments version 1, expected garments version 2; "
        "a bundle may not be renamed"
    )


def test_the_digest_catches_the_model_of_another_version(copy, other):
    (copy / "model.onnx").write_bytes(other[1].path.read_bytes())

    assert refusal(copy).startswith("garments/1/model.onnx has ")
    assert refusal(copy).endswith("changed after it was published")


@pytest.mark.parametrize("file", FILES)
def test_the_digest_catches_one_flipped_bit_of_any_file(file, copy):
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)

    assert refusal(copy).startswith(f"garments/1/{file} has sha256 ")
    assert refusal(copy).endswith("it was changed after it was published")


@pytest.mark.parametrize("file", FILES)
def test_the_digest_catches_a_truncated_file(file, copy):
    whole = (copy / file).stat().st_size
    (copy / file).write_bytes((copy / file).read_bytes()[: whole // 2])

    assert refusal(copy) == (
        f"garments/1/{file} has {whole // 2} bytes, expected {whole}; "
        "it was cut or changed after it was published"
    )


# What clients send, and what becomes of a server that was right when it loaded.


@pytest.fixture
def live(checked, splits):
    """What is live of the published version: nothing yet."""
    with np.load(checked.answers) as answers:
        expected = agreement.distribution(answers["reference"], splits.test.inputs)
    allowed = agreement.Budget(checked.precision, checked.scale)
    return LiveStore().open(("garments", 1), allowed.message(), expected)


def told(live, plain, images, logits):
    """Shadow rows that were answered, and return what is live then."""
    reference = plain.model.predict(images, verbose=0)
    allowed = agreement.budget("float32", plain.asked.reference)
    live.count(sampled=len(images))
    live.add(agreement.figures(reference, logits, images, allowed=allowed))
    return live.message()


def served(variant, images):
    (logits,), _ = parity.runner(variant)([images])
    return logits


def test_live_shadow_is_content_with_what_it_should_see(live, plain, splits):
    images = splits.test.inputs[:1000]

    found = told(live, plain, images, served(plain.onnx, images))

    assert found.verdict == parity_pb2.LIVE_VERDICT_PASSED
    assert max(found.predicted_psi, found.pixel_mean_psi) < 0.1


def test_live_shadow_catches_a_scale_that_clients_apply_too(live, plain, splits):
    images = (splits.test.inputs[:1000] / 255).astype(np.uint8)

    found = told(live, plain, images, served(plain.onnx, images))

    assert found.pixel_mean_psi > 0.25
    assert found.predicted_psi > 0.25


ALONE = """
import sys, numpy as np
from protos import bundle_pb2
from service.session import Session
model, images, answers = sys.argv[1:]
options = bundle_pb2.SessionOptions(graph_optimization="all", config={"%s": "1"})
session = Session(open(model, "rb").read(), options, threads=1)
np.save(answers, session.run(np.load(images))["logits"])
"""


def test_live_shadow_catches_an_option_that_changes_results_in_flight(
    live, plain, splits, lab, tmp_path
):
    images = splits.test.inputs[:600]
    variant = lab.written(broken(plain.onnx.path, fading), tmp_path)
    right = told(live, plain, images, served(variant, images))
    assert right.verdict == parity_pb2.LIVE_VERDICT_PASSED
    asked, answers = tmp_path / "asked.npy", tmp_path / "answers.npy"
    np.save(asked, images)
    (option,) = FLUSHED
    command = [sys.executable, "-c", ALONE % option, variant.path, asked, answers]
    subprocess.run(command, check=True)

    found = told(live, plain, images, np.load(answers))

    assert found.verdict == parity_pb2.LIVE_VERDICT_FAILED
    assert "the float32 budget of" in found.failure


def test_live_shadow_catches_another_model_of_the_same_shape(live, plain, other, splits):
    images = splits.test.inputs[:600]

    found = told(live, plain, images, served(other[1], images))

    assert found.verdict == parity_pb2.LIVE_VERDICT_FAILED
    assert "rows change their top-1 class" in found.failure
