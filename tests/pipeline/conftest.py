"""A real model, trained for a few steps on real images and exported for real, once a session."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dataclasses import replace

import keras
import pytest

from pipeline import cost, dataset, evaluate, export, parity, train
from pipeline.config import DataConfig, GateConfig, TrainingConfig
from pipeline.cost import Cost
from pipeline.records import Checked, Dataset, Exports, Scores, Trained
from service import bundle


def pytest_collection_modifyitems(items) -> None:
    """Whatever needs the trained model is not for every save."""
    for item in items:
        if {"trained", "straight", "overflowing"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def free(variant, rows, options) -> Cost:
    """Say what a variant costs without measuring it."""
    return Cost(0.01, 1, {size: [0.001 * size] for size in cost.BATCHES})


@pytest.fixture(scope="session")
def no_cost():
    return free


DATA = DataConfig(max_train_rows=6_000)  # with fewer, an int8 step is as wide as many margins
TRAINING = TrainingConfig(epochs=4)


@pytest.fixture(scope="session")
def data() -> Dataset:
    return dataset.prepare(DATA)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> Trained:
    return train.fit(data, TRAINING, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def scores(trained, data) -> Scores:
    return evaluate.score(trained, data, GateConfig(min_accuracy=0.3))


@pytest.fixture(scope="session")
def exports(trained, data, tmp_path_factory) -> Exports:
    return export.convert(trained, data, tmp_path_factory.mktemp("run") / "exports", "run-1")


@pytest.fixture(scope="session")
def checked(trained, exports, data, scores, tmp_path_factory) -> Checked:
    folder = tmp_path_factory.mktemp("parity")
    return parity.check(trained, exports, data, folder, scores, measure_cost=free)


@pytest.fixture(scope="session")
def overflowing(trained, data, tmp_path_factory) -> tuple[Trained, Scores, Exports, Checked]:
    """The same function with a hidden layer a million times larger, and the next as much smaller.

    Nothing to float32, whose exponent takes it; float16 ends at 65504.
    """
    folder = tmp_path_factory.mktemp("overflowing")
    model = keras.models.load_model(trained.path)
    hidden, logits = [one for one in model.layers if isinstance(one, keras.layers.Dense)]
    for layer, factors in ((hidden, (2.0**20, 2.0**20)), (logits, (2.0**-20, 1.0))):
        layer.set_weights(
            [one * factor for one, factor in zip(layer.get_weights(), factors, strict=True)]
        )
    path = folder / "model.keras"
    model.save(path)
    large = replace(trained, path=path, sha256=bundle.file_sha256(path))
    scores = evaluate.score(large, data, GateConfig(min_accuracy=0.3))
    exports = export.convert(large, data, folder / "exports", "run-1")
    found = parity.check(large, exports, data, folder / "parity", scores, measure_cost=free)
    return large, scores, exports, found
