"""Bring arrays as people have them into the forms that a split promises, or say why not.

Nothing is scaled or rounded: a value that the form lacks is refused.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import DatasetError
from pipeline.splits import Split

IMAGE_RANK = 4  # rows, height, width, channels
NUMBERS = "biuf"  # kinds of dtype, as numpy abbreviates them


def is_classes(targets: ArrayLike) -> bool:
    """Tell whether targets are classes, which whole numbers are."""
    return np.asarray(targets).dtype.kind in "biu"


def rows(inputs: ArrayLike, targets: ArrayLike, name: str, *, classify: bool) -> Split:
    """Return inputs and targets as a classifier, or another model, learns from them.

    Args:
        inputs: images (rows, height, width) or with channels, values 0 to 255 in any dtype; for
            other models any numbers (rows, …).
        targets: classes (rows,) or (rows, 1); for other models numbers (rows,) or (rows, outputs).
        name: what an error calls them, such as training.
        classify: whether targets are classes.

    Raises:
        DatasetError: they do not fit each other, or have values that they may not have.
    """
    given, wanted = np.asarray(inputs), np.asarray(targets)
    for what, one in (("inputs", given), ("targets", wanted)):
        if one.dtype.kind not in NUMBERS:
            raise DatasetError(f"the {name} {what} are {one.dtype}, expected numbers")
        if not one.size or not one.ndim:
            raise DatasetError(f"the {name} {what} have shape {list(one.shape)}: no rows")
    if len(given) != len(wanted):
        raise DatasetError(
            f"there are {len(given)} {name} inputs and {len(wanted)} targets; expected one target "
            "for each input"
        )
    if classify:
        return Split(_images(given, name), _classes(wanted, name))
    outputs = _floats(wanted, f"{name} targets")
    if outputs.ndim > 2:  # noqa: PLR2004  rows and outputs
        raise DatasetError(
            f"the {name} targets have shape {list(outputs.shape)}, expected (rows, outputs)"
        )
    return Split(_floats(given, f"{name} inputs"), outputs)


def _images(given: NDArray[Any], name: str) -> NDArray[np.uint8]:
    images = given[..., np.newaxis] if given.ndim == IMAGE_RANK - 1 else given
    if images.ndim != IMAGE_RANK:
        raise DatasetError(
            f"the {name} inputs have shape {list(given.shape)}, expected images: (rows, height, "
            "width) or (rows, height, width, channels); targets that are no classes are floats"
        )
    if images.dtype == np.uint8:
        return images
    with np.errstate(invalid="ignore"):  # what is no such value is refused, not warned about
        pixels = images.astype(np.uint8)
    if not np.array_equal(pixels, images):
        raise DatasetError(
            f"the {name} inputs are {images.dtype} from {images.min():g} to {images.max():g}, "
            "expected whole pixels from 0 to 255; bring them there, scaling is part of the network"
        )
    return pixels


def _classes(wanted: NDArray[Any], name: str) -> NDArray[Any]:
    classes = wanted[:, 0] if wanted.ndim > 1 and wanted.shape[1:] == (1,) else wanted
    if classes.ndim > 1:
        raise DatasetError(
            f"the {name} targets have shape {list(wanted.shape)}, expected one class for each row; "
            "of one-hot rows give argmax(axis=1)"
        )
    low, high = classes.min(), classes.max()
    if not is_classes(classes) or low < 0 or high > np.iinfo(np.int32).max:
        raise DatasetError(
            f"the {name} targets are {classes.dtype} from {low} to {high}, expected classes: whole "
            "numbers from 0"
        )
    return classes.astype(np.uint8 if high <= np.iinfo(np.uint8).max else np.int32)


def _floats(given: NDArray[Any], what: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too large is refused, not warned about
        floats = given.astype(np.float32)
    bad = ~np.isfinite(floats).reshape(len(floats), -1).all(axis=1)
    if bad.any():
        raise DatasetError(
            f"the {what} have values that are no finite float32 in {bad.sum()} rows, the first is "
            f"row {int(bad.argmax())}; leave those rows out"
        )
    return floats[:, np.newaxis] if floats.ndim == 1 else floats
