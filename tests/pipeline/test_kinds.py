"""Networks of every shape, and a model that does not classify, all the way to a real server."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from pipeline import (
    check,
    config,
    dataset,
    evaluate,
    export,
    models,
    parity,
    promote,
    publish,
    verify,
)
from pipeline.config import DataConfig, ExportConfig, GateConfig
from pipeline.endpoint import Endpoint
from pipeline.errors import ExportError, ParityError
from pipeline.explain import worst
from pipeline.records import Dataset, Exports, Scores, Trained
from protos import bundle_pb2
from service import aliases, bundle
from service.client import Client

pytestmark = pytest.mark.slow
GATE = GateConfig(min_accuracy=0, champion=False)
FEW = ("onnx-float32", "tflite-float32", "onnx-int8")
SETTINGS = config.build("smoke")


@dataclass(frozen=True)
class Run:
    """One model on its way."""

    data: Dataset
    trained: Trained
    scores: Scores
    exports: Exports


def kept(model, data, folder):
    """Export a trained model as the pipeline does."""
    path = folder / "model.keras"
    model.save(path)
    trained = Trained(
        path=path,
        sha256=bundle.file_sha256(path),
        parameters=model.count_params(),
        optimizer="adam",
        device="CPU",
        history=(),
        best_epoch=1,
    )
    scores = evaluate.score(trained, data, GATE)
    exports = export.convert(trained, data, folder / "exports", "run-1")
    return Run(data, trained, scores, exports)


def served(run, folder, variants, no_cost):
    """Prove, stage and serve a model; return its bundle, published."""
    few = replace(run.exports, variants=tuple(run.exports.named(name) for name in variants))
    checked = parity.check(
        run.trained, few, run.data, folder / "parity", run.scores, measure_cost=no_cost
    )
    publishing = replace(SETTINGS.publishing, models=folder / "models", name=run.data.name)
    settings = replace(SETTINGS, publishing=publishing)
    with publish.staging(publishing) as hidden:
        staged = publish.stage(
            hidden, "run-1", settings, run.data, run.trained, run.scores, few, checked
        )
        answered = verify.ask(staged, checked, run.data, folder / "parity")
        return publish.publish(staged, answered, publishing).path


def stripes(shape, classes, rows, seed):
    """Make images that are told apart by their brightness and by how often it changes."""
    random = np.random.default_rng(seed)
    targets = np.arange(rows) % classes
    height = np.arange(shape[0]).reshape(1, -1, 1, 1)
    waves = np.sin(height * (1 + targets.reshape(-1, 1, 1, 1)) / 3)
    noise = random.normal(0, 20, (rows, *shape))
    light = 60 + 120 * targets.reshape(-1, 1, 1, 1) / classes
    images = np.clip(light + 40 * waves + noise, 0, 255).astype(np.uint8)
    return images, targets.astype(np.uint8)


def stride_two(x):
    x = layers.Conv2D(8, 3, 2, "same", activation="relu")(x)
    return layers.Flatten()(layers.Conv2D(8, 3, 2, "same", activation="relu")(x))


def average_pooling(x):
    x = layers.AveragePooling2D(2)(layers.Conv2D(10, 3, activation="relu")(x))
    return layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu")(x))


def residual(x):
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    shortcut = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(shortcut)
    x = layers.Add()([layers.BatchNormalization(momentum=0.5)(x), shortcut])
    return layers.GlobalAveragePooling2D()(layers.ReLU()(x))


def pyramid(x):
    for kernels in (8, 16, 16):
        x = layers.MaxPooling2D(3)(layers.Conv2D(kernels, 3, activation="relu")(x))
    return layers.Flatten()(x)


def column(x):
    x = layers.Conv2D(8, (3, 1), padding="same", activation="relu")(x)
    return layers.Flatten()(layers.MaxPooling2D((2, 1))(x))


def even_kernels(x):
    x = layers.Conv2D(6, 4, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D(2, padding="same")(x)
    return layers.Flatten()(layers.Conv2D(8, 2, padding="same", activation="relu")(x))


NETWORKS = [  # the layers, the shape of an image, classes, the dtype that the model takes
    pytest.param(stride_two, (28, 28, 1), 4, "uint8", id="stride-2-same"),
    pytest.param(average_pooling, (28, 28, 1), 4, "uint8", id="average-pooling"),
    pytest.param(residual, (28, 28, 1), 4, "uint8", id="batchnorm-residual"),
    pytest.param(pyramid, (150, 150, 3), 3, "uint8", id="colour-150x150"),
    pytest.param(column, (28, 1, 1), 2, "uint8", id="one-pixel-wide"),
    pytest.param(even_kernels, (27, 27, 1), 120, "float32", id="27x27-even-kernels"),
]


@pytest.mark.parametrize(("body", "shape", "classes", "dtype"), NETWORKS)
def test_a_network_is_exported_proven_and_served(body, shape, classes, dtype, tmp_path, no_cost):
    keras.utils.set_random_seed(2)
    large = shape[0] > 100
    data = dataset.from_arrays(
        stripes(shape, classes, max(60 if large else 240, 2 * classes), 0),
        stripes(shape, classes, max(20 if large else 120, classes), 1),
        name=body.__name__,
        config=DataConfig(validation_share=0.0),
        cache=tmp_path / "cache",
    )
    image = keras.Input(shape, dtype=dtype, name="image")
    features = body(layers.Rescaling(1 / 255)(image))
    model = keras.Model(image, layers.Dense(classes, name="logits")(features))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train = dataset.load(data).train
    model.fit(train.inputs, train.targets, epochs=3 if large else 12, batch_size=32, verbose=0)

    path = served(kept(model, data, tmp_path), tmp_path, FEW, no_cost)

    manifest = bundle.read_manifest(path)
    assert manifest.kind == bundle_pb2.KIND_CLASSIFIER
    assert (manifest.input.name, manifest.input.datatype) == ("image", "UINT8")
    assert list(manifest.input.shape) == [-1, *shape]
    assert {(one.name, *one.shape) for one in manifest.outputs} == {
        ("logits", -1, classes),
        ("probabilities", -1, classes),
    }
    assert {one.variant for one in manifest.parity if one.passed} >= set(FEW[:2])
    assert manifest.served.accuracy.rows == data.test_rows
    keras.backend.clear_session()


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Y = 2x - 1, learnt from six points."""
    folder = tmp_path_factory.mktemp("line")
    data = dataset.prepare(DataConfig(kind="line"), cache=folder / "cache")
    model = models.build("linear", (1,), 1, dtype="float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    train = dataset.load(data).train
    model.fit(train.inputs, train.targets, epochs=100, verbose=0)
    return kept(model, data, folder)


@pytest.fixture(scope="module")
def published(line, tmp_path_factory, no_cost):
    """Its bundle, with every variant that there is."""
    folder = tmp_path_factory.mktemp("published")
    return served(line, folder, tuple(one.name for one in line.exports.variants), no_cost)


def test_a_line_is_served_and_says_about_nineteen_for_ten(published):
    with verify.server(published.parent.parent) as address, Client(address) as client:
        answer = client.predict(np.array([[10]], np.float32), model=published.parent.name)

    (name,) = answer.outputs
    assert answer.outputs[name].item() == pytest.approx(19, abs=0.2)
    assert name not in {"logits", "probabilities"}


def test_a_line_is_of_the_kind_generic_with_its_own_tensors(published, line):
    manifest = bundle.read_manifest(published)
    model = keras.models.load_model(line.trained.path)

    assert manifest.kind == bundle_pb2.KIND_GENERIC
    assert (manifest.input.name, manifest.input.datatype) == (model.inputs[0].name, "FP32")
    assert [(one.name, list(one.shape)) for one in manifest.outputs] == [
        (model.layers[-1].name, [-1, 1])
    ]
    assert not manifest.labels
    assert not manifest.HasField("test_distribution")


def test_every_variant_of_a_line_passes_or_says_why(published):
    reports = {one.variant: one for one in bundle.read_manifest(published).parity}

    assert list(reports) == list(export.names())
    for name in ("saved-model", "tflite-float32", "tflite-float16", "onnx-float32"):
        assert reports[name].passed, reports[name].failure
    assert reports["onnx-float16"].passed, reports["onnx-float16"].failure
    # Its ranges are those of six points, the test rows go beyond them.
    assert "over the int8 budget" in reports["tflite-int8"].failure


def test_a_bundle_of_a_line_passes_the_check_and_is_explained(published):
    assert check.whole_bundle(published, published / "variants/saved_model").failure == ""
    assert not worst.explain(worst.of_bundle(published, "onnx-float16", 4)).diverges


def test_a_line_is_promoted_by_its_differences_alone(published, line):
    home = published.parent
    with verify.server(home.parent) as address:
        promote.promote(published, line.data, [Endpoint(address)])

    assert aliases.read(home) == {"champion": 1}


def test_a_line_of_another_error_than_the_evaluations_is_refused(line, tmp_path, no_cost):
    other = replace(line.scores, loss=line.scores.loss + 1)
    few = replace(line.exports, variants=(line.exports.named("onnx-float32"),))

    with pytest.raises(ParityError, match=r"squared error of .*, the evaluated one"):
        parity.check(line.trained, few, line.data, tmp_path, other, measure_cost=no_cost)


def test_a_required_variant_that_fails_is_refused_once_all_are_reported(line, tmp_path, no_cost):
    required = tuple(
        replace(one, required=one.name == "tflite-int8")
        for one in line.exports.variants
        if one.format != "saved_model"
    )

    with pytest.raises(ParityError, match=r"nothing is published, tflite-int8: 99\.9th percentile"):
        parity.check(
            line.trained, replace(line.exports, variants=required), line.data, tmp_path,
            line.scores, measure_cost=no_cost,
        )  # fmt: skip

    assert {path.stem for path in tmp_path.glob("*.json")} == {one.name for one in required}


def test_a_model_that_takes_other_rows_than_its_data_is_refused(line, tmp_path):
    x = keras.Input((2,), name="x")
    path: Path = tmp_path / "model.keras"
    keras.Model(x, layers.Dense(1, name="y")(x)).save(path)
    wide = replace(line.trained, path=path, sha256=bundle.file_sha256(path))

    with pytest.raises(ExportError, match=r"takes float32 of shape \[None, 2\], line has float32"):
        export.convert(wide, line.data, tmp_path / "exports", "run-1", ExportConfig())
