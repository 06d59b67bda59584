"""Look at data before they are learnt from: refuse what cannot work, say what is odd.

What is merely odd is for a person to judge and stops nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import duplicates, files
from pipeline.errors import DatasetError
from pipeline.splits import Found, Positions, Split

SHOWN = 3  # of the rows or classes that a sentence is about
FEW_ROWS = 3  # of a class; with fewer it cannot be in all three parts
UNEVEN = 3  # how many times the smallest class the largest one may have
DARK = 127  # no value above this is half of the range unused


def refuse(found: Found) -> None:
    """Refuse what no model can be trained or tested on.

    Raises:
        DatasetError: says which rows or classes, and what to do.
    """
    train, test = found.train, found.test
    for name, part in (("training", train), ("test", test)):
        if not len(part.inputs):
            raise DatasetError(f"there are no {name} rows; expected one at least")
    for what, one, other in (
        ("inputs", train.inputs, test.inputs),
        ("targets", train.targets, test.targets),
    ):
        if one.shape[1:] != other.shape[1:]:
            raise DatasetError(
                f"the training {what} have rows of shape {list(one.shape[1:])}, those of the test "
                f"rows are {list(other.shape[1:])}; expected the same"
            )
    if len(train.inputs) > 1 and (train.inputs == train.inputs[:1]).all():
        raise DatasetError(
            f"all {len(train.inputs)} training rows are the same; there is nothing to learn"
        )
    refuse_names(found.labels)
    if train.targets.ndim == 1:
        _refuse_classes(found)


def refuse_names(labels: Sequence[str]) -> None:
    """Refuse names of classes that no manifest can hold.

    Raises:
        DatasetError: says which.
    """
    strange = [files.shown(one) for one in labels if one != files.shown(one)]
    if strange:
        raise DatasetError(
            f"the names of classes are not UTF-8: {_some(strange)}; give these other names"
        )


def _refuse_classes(found: Found) -> None:
    labels, there = found.labels, np.unique(found.train.targets)
    if len(set(labels)) < len(labels) or not all(labels):
        raise DatasetError(f"the classes are called {list(labels)}, expected names that all differ")
    if len(labels) < 2:  # noqa: PLR2004  one is no choice
        raise DatasetError("all training rows are of one class; a classifier needs two or more")
    missing = np.setdiff1d(np.arange(len(labels)), there)
    if len(missing):
        raise DatasetError(
            f"no training row is of {_some([_called(labels, one) for one in missing])}; expected "
            f"the classes 0 to {len(labels) - 1}, each at least once"
        )
    highest = max(int(there[-1]), int(found.test.targets.max()))
    if highest >= len(labels):
        raise DatasetError(
            f"there are {len(labels)} classes, and a row of class {highest}; expected 0 to "
            f"{len(labels) - 1}"
        )


def findings(found: Found, train: Positions, validation: Positions) -> list[str]:
    """Return what is odd about data that can be learnt from, a sentence each.

    Args:
        found: all rows.
        train: positions among the rows of `found.train` of those that are trained on.
        validation: of those that are validated on.
    """
    said = [files.shown(one) for one in found.findings]  # they may name files
    if np.array_equal(train, validation):
        said.append(
            "the training rows are also the validation rows: validation says nothing about new ones"
        )
    if found.labels:
        said += _of_classes(found, train)
        said += _of_pixels("training", found.train.inputs)
        said += _of_pixels("test", found.test.inputs)
    kept = Split(found.train.inputs[train], found.train.targets[train])
    said += _shared("test", kept, train, found.test, np.arange(len(found.test.inputs)))
    if not np.array_equal(train, validation):
        held = Split(found.train.inputs[validation], found.train.targets[validation])
        said += _shared("validation", kept, train, held, validation)
    return said


def _of_classes(found: Found, train: Positions) -> list[str]:
    labels = found.labels
    every = np.bincount(found.train.targets, minlength=len(labels))
    kept = np.bincount(found.train.targets[train], minlength=len(labels))
    tested = np.bincount(found.test.targets, minlength=len(labels))
    most, least = int(every.argmax()), int(every.argmin())
    said = []
    if every[most] > every[least] * UNEVEN:
        said.append(
            f"the classes are uneven: {every[most]:,} training rows of {labels[most]}, "
            f"{every[least]:,} of {labels[least]}"
        )
    for counts, sentence in (
        (every < FEW_ROWS, f"fewer than {FEW_ROWS} training rows"),
        ((kept == 0) & (every > 0), "no row among those that are trained on"),
        (tested == 0, "no test row, so that nothing is known of its accuracy"),
    ):
        if counts.any():
            said.append(f"{sentence}: {_some([labels[one] for one in np.flatnonzero(counts)])}")
    return said


def _of_pixels(name: str, images: NDArray[Any]) -> list[str]:
    said = []
    highest = int(images.max())
    if highest <= DARK:
        advice = "; they look scaled already, which the network does itself" if highest <= 1 else ""
        said.append(f"no {name} pixel is above {highest} of 255{advice}")
    flat = images.reshape(len(images), -1)
    blank = np.flatnonzero((flat == flat[:, :1]).all(axis=1))
    if len(blank):
        said.append(f"{len(blank):,} {name} images are of one shade: {_some(blank, 'row')}")
    return said


def _shared(  # the rows' own numbers are those of the files, not of the parts
    name: str, train: Split, train_numbers: Positions, other: Split, numbers: Positions
) -> list[str]:
    """Say which rows of another part the training rows have too."""
    same = duplicates.exact(train.inputs, other.inputs)
    at = np.flatnonzero(same.rows >= 0)
    total, said = len(other.inputs), []

    def pairs(rows: Positions, matches: Positions) -> str:
        shown = zip(numbers[rows[:SHOWN]], train_numbers[matches[rows[:SHOWN]]], strict=True)
        return ", ".join(f"{name} row {one} and training row {two}" for one, two in shown)

    if len(at):
        said.append(
            f"{len(at):,} of {total:,} {name} rows are training rows too: {pairs(at, same.rows)}"
        )
        wrong = at[(other.targets[at] != train.targets[same.rows[at]]).reshape(len(at), -1).any(1)]
        if len(wrong):
            said.append(
                f"{len(wrong):,} of these have another target there: {pairs(wrong, same.rows)}"
            )
    if train.targets.ndim > 1:
        return said
    alike = duplicates.near(train.inputs, other.inputs)
    at = np.flatnonzero((alike.rows >= 0) & (same.rows < 0))
    if len(at):
        said.append(
            f"{len(at):,} of {alike.compared:,} {name} rows are nearly a training row (their "
            f"values correlate at {duplicates.ALIKE} or more): {pairs(at, alike.rows)}"
        )
    if 0 < alike.compared < total:
        said.append(f"only {alike.compared:,} of {total:,} {name} rows were compared with all rows")
    return said


def _called(labels: tuple[str, ...], number: int) -> str:
    return (
        f"class {number} ({labels[number]})" if labels[number] != str(number) else f"class {number}"
    )


def _some(things: Sequence[Any] | NDArray[Any], word: str = "") -> str:
    shown = ", ".join(f"{word} {one}".strip() for one in things[:SHOWN])
    return f"{shown} and {len(things) - SHOWN} more" if len(things) > SHOWN else shown
