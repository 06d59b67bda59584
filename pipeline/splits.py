"""Decide which rows take part in what; the same rows and settings always give the same parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.errors import DatasetError

Positions = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Split:
    """What goes in and what should come out, row by row.

    For a classifier inputs are images, uint8 (rows, height, width, channels) with values 0 to 255,
    and targets are classes, whole numbers (rows,). Else inputs are float32 (rows, …) and targets
    float32 (rows, outputs).
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts; `test` never takes part in training or in choosing a model."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True, slots=True)
class Found:
    """What a source has, before anything is written."""

    train: Split
    test: Split
    labels: tuple[str, ...]  # of the classes; empty: targets are numbers to come close to
    findings: tuple[str, ...] = ()  # what was noticed while reading, a sentence each


def split(targets: NDArray[Any], config: DataConfig) -> tuple[Positions, Positions]:
    """Divide the training rows, the same share of every class on either side.

    Numbers to come close to, (rows, outputs), are divided at random. A class, or all of the
    numbers, keeps at least one row for training. Without a validation share the rows that are
    trained on are also validated on.

    Returns:
        Positions of the training and of the validation rows, each rising.
    """
    random = np.random.default_rng(config.split_seed)
    if not config.validation_share:
        kept = np.sort(random.permutation(len(targets))[: config.max_train_rows])
        return kept, kept
    train: list[Positions] = []
    validation: list[Positions] = []
    for members in _groups(targets):
        mine = random.permutation(members)
        border = min(round(len(mine) * config.validation_share), len(mine) - 1)
        validation.append(mine[:border])
        train.append(mine[border:])
    kept = random.permutation(np.concatenate(train))[: config.max_train_rows]
    return np.sort(kept), np.sort(np.concatenate(validation))


def hold_out(rows: Split, config: DataConfig) -> tuple[Split, Split]:
    """Divide rows that come without test rows of their own, `test_share` of every class.

    Returns:
        The rows to train on, and the test rows.

    Raises:
        DatasetError: that leaves no test rows.
    """
    share = DataConfig(validation_share=config.test_share, split_seed=config.split_seed)
    train, test = split(rows.targets, share)
    if not config.test_share or not len(test):
        raise DatasetError(
            f"data.test_share is {config.test_share}, which leaves no test row of "
            f"{len(rows.targets)}; raise it, or give test rows"
        )
    return (
        Split(rows.inputs[train], rows.targets[train]),
        Split(rows.inputs[test], rows.targets[test]),
    )


def _groups(targets: NDArray[Any]) -> list[Positions]:
    if targets.ndim > 1:
        return [np.arange(len(targets))]
    return [np.flatnonzero(targets == label) for label in np.unique(targets)]
