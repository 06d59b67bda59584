import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline import dataset
from pipeline.config import DataConfig
from pipeline.export import calibration


@pytest.fixture(scope="module")
def chosen(data):
    return calibration.choose(data)


def test_every_class_has_as_many_images(chosen, data):
    labels = dataset.load(data).train.targets[chosen.rows]

    assert np.bincount(labels).tolist() == [50] * 10


def test_they_are_the_training_images_at_the_recorded_rows(chosen, data, tmp_path):
    path = tmp_path / "calibration.json"

    calibration.write(chosen, data, path)

    record = json.loads(path.read_bytes())
    images = dataset.load(data).train.inputs[record["rows"]]
    assert len(record["rows"]) == len(set(record["rows"])) == 500
    assert (images == chosen.images).all()
    assert record["sha256"] == chosen.sha256 == hashlib.sha256(images.tobytes()).hexdigest()
    assert record["train_rows"] == data.train_rows


def test_the_same_data_give_the_same_images(chosen, data):
    assert calibration.choose(data).sha256 == chosen.sha256


def made(tmp_path, counts, shape=(3, 3)):
    """Return data with so many training rows of each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), np.uint8)
    config = DataConfig(validation_share=0.0)
    return dataset.from_arrays((images, labels), (images, labels), cache=tmp_path, config=config)


def per_class(data):
    chosen = calibration.choose(data)
    targets = dataset.load(data).train.targets[chosen.rows]
    return np.bincount(targets, minlength=len(data.labels)).tolist()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([30, 20], [20, 20]), ([90, 1], [10, 1]), ([90, 10], [10, 10]), ([90, 11], [11, 11])],
)
def test_the_smallest_class_decides_but_leaves_the_others_ten(tmp_path, counts, expected):
    assert per_class(made(tmp_path, counts)) == expected


def test_many_classes_share_a_thousand_rows(tmp_path):
    assert per_class(made(tmp_path, [20] * 100)) == [10] * 100
    assert sum(per_class(made(tmp_path, [1] * 1_200, (1, 1)))) == 1_000


def test_a_class_that_few_rows_leave_without_one_is_passed_over(tmp_path):
    few = replace(made(tmp_path, [5, 5]), train_rows=1)

    assert sum(per_class(few)) == 1


def test_rows_without_classes_are_drawn_from_all_of_them(tmp_path):
    inputs = np.arange(800, dtype=np.float32)[:, np.newaxis]
    config = DataConfig(validation_share=0.0)
    data = dataset.from_arrays(
        (inputs, inputs / 2), (inputs, inputs), cache=tmp_path, config=config
    )

    chosen = calibration.choose(data)

    assert chosen.images.shape == (500, 1)
    assert chosen.images.dtype == np.float32
    assert np.array_equal(chosen.images[:, 0], chosen.rows)
