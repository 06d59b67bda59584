import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline import dataset
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


def test_the_smallest_class_decides_where_images_are_few(data):
    few = replace(data, train_rows=100)

    chosen = calibration.choose(few)

    counts = np.bincount(dataset.load(few).train.targets[chosen.rows], minlength=10)
    assert len(set(counts.tolist())) == 1
    assert 0 < counts[0] < 10
