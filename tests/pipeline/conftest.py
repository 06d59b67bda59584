"""A real model, trained for a few steps on real images and exported for real, once a session."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from pipeline import dataset, export, parity, train
from pipeline.config import DataConfig, TrainingConfig
from pipeline.records import Checked, Dataset, Exports, Trained


def pytest_collection_modifyitems(items) -> None:
    """Whatever needs the trained model is not for every save."""
    for item in items:
        if {"trained", "straight"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


DATA = DataConfig(max_train_rows=2_000)
TRAINING = TrainingConfig(epochs=1)


@pytest.fixture(scope="session")
def data() -> Dataset:
    return dataset.prepare(DATA)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> Trained:
    return train.fit(data, TRAINING, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exports(trained, data, tmp_path_factory) -> Exports:
    return export.convert(trained, data, tmp_path_factory.mktemp("run") / "exports", "run-1")


@pytest.fixture(scope="session")
def checked(trained, exports, data, tmp_path_factory) -> Checked:
    return parity.check(trained, exports, data, tmp_path_factory.mktemp("parity"))
