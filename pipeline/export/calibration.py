"""Choose the training images from which integer variants take the ranges of their layers."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import dataset
from pipeline.records import Dataset

ROWS_PER_CLASS = 50
SEED = 42


@dataclass(frozen=True, slots=True)
class Calibration:
    """Real images, as many of every class: uint8 (rows, height, width, channels)."""

    images: NDArray[np.uint8]
    rows: NDArray[np.intp]  # their positions among the training images, rising
    sha256: str  # of their bytes, one after the other


def choose(data: Dataset) -> Calibration:
    """Draw `ROWS_PER_CLASS` images of every class, or as many as the smallest class has.

    The same data always give the same images.
    """
    train = dataset.load(data).train
    classes = [np.flatnonzero(train.targets == label) for label in range(len(data.labels))]
    count = min(ROWS_PER_CLASS, *map(len, classes))
    random = np.random.default_rng(SEED)
    rows = np.sort(np.concatenate([random.permutation(mine)[:count] for mine in classes]))
    images = np.ascontiguousarray(train.inputs[rows])
    return Calibration(images, rows, hashlib.sha256(images.tobytes()).hexdigest())


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
