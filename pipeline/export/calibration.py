"""Choose the training images from which integer variants take the ranges of their layers."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import dataset
from pipeline.records import Dataset

ROWS_PER_CLASS = 50
FEWEST_PER_CLASS = 10  # where the class has them, however few another one has
MAX_ROWS = 1000  # of all; every one of them goes through the model on one core
ROWS = 500  # where there are no classes
SEED = 42


@dataclass(frozen=True, slots=True)
class Calibration:
    """Real rows, as many of every class.

    Images uint8 (rows, height, width, channels); float32 (rows, …) of what does not classify.
    """

    images: NDArray[Any]
    rows: NDArray[np.intp]  # their positions among the training rows, rising
    sha256: str  # of their bytes, one after the other


def choose(data: Dataset) -> Calibration:
    """Draw `ROWS_PER_CLASS` images of every class, or as many as the smallest class has.

    Where there are no classes, `ROWS` rows of all. The same data always give the same rows.
    """
    train = dataset.load(data).train
    random = np.random.default_rng(SEED)
    if data.classifies:
        drawn = _of_every_class(train.targets, len(data.labels), random)
    else:
        drawn = random.permutation(len(train.inputs))[:ROWS]
    rows = np.sort(drawn)
    images = np.ascontiguousarray(train.inputs[rows])
    return Calibration(images, rows, hashlib.sha256(images.tobytes()).hexdigest())


def _of_every_class(
    targets: NDArray[Any], labels: int, random: np.random.Generator
) -> NDArray[np.intp]:
    classes = [np.flatnonzero(targets == label) for label in range(labels)]
    there = [mine for mine in classes if len(mine)]
    smallest = max(FEWEST_PER_CLASS, min(map(len, there)))
    count = max(1, min(ROWS_PER_CLASS, smallest, MAX_ROWS // len(there)))
    drawn = np.concatenate([random.permutation(mine)[:count] for mine in there])
    return drawn if len(drawn) <= MAX_ROWS else random.permutation(drawn)[:MAX_ROWS]


def write(chosen: Calibration, data: Dataset, path: Path) -> None:
    """Record which images they are, and of which training images they are a part."""
    record = {
        "dataset.sha256": data.sha256,
        "train_rows": data.train_rows,
        "validation_share": data.validation_share,
        "split_seed": data.split_seed,
        "sha256": chosen.sha256,
        "rows": chosen.rows.tolist(),
    }
    path.write_text(f"{json.dumps(record)}\n")
