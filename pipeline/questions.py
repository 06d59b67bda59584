"""The rows that models are asked about, from a file or a folder of pictures.

Knows no model, only the shape and dtype of an input.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import pictures
from pipeline.errors import DatasetError, UsageError
from pipeline.runtimes import Array, Tensor

RANK = 4  # of a batch of images
ONLY = "arr_0"  # what numpy calls an array without a name


@dataclass(frozen=True, slots=True)
class Questions:
    """What two models are asked."""

    rows: Array  # (rows, ...) as the reference takes them
    labels: NDArray[np.integer] | None = None  # (rows,), the true classes where they are known


def read(
    data: Path, *, labels: Path | None = None, resize: bool = False
) -> Callable[[Tensor], Questions]:
    """Return how the rows in a file or folder become a model's input.

    Args:
        data: .npy of rows; .npz with `images` or its only array, and perhaps `labels`; or a folder
            of PNG and JPEG files, in the order of their names.
        labels: .npy of true classes.
        resize: whether pictures of other sizes are made to fit.

    Raises:
        UsageError: when it is called: there are none, or they do not fit.
    """

    def questions(taken: Tensor) -> Questions:
        found = {} if data.is_dir() else _arrays(data)
        rows = found["images"] if found else _pictures(data, taken, resize=resize)
        if labels is not None:
            found |= {"labels": _labels(labels)}
        return Questions(_fitted(rows, taken, data), _truth(found.get("labels"), len(rows)))

    return questions


def fits(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Tell whether rows have a tensor's shape; the number of rows is free."""
    return len(found) == len(wanted) and all(
        size in {-1, one} for one, size in zip(found[1:], wanted[1:], strict=True)
    )


def cast(rows: Array, taken: Tensor) -> Array:
    """Return the same numbers in an input's dtype; raises UsageError where it lacks some."""
    with np.errstate(invalid="ignore"):  # what has no such value is refused, not warned about
        given = rows.astype(taken.dtype)
    if not np.array_equal(given.astype(np.float64), rows.astype(np.float64)):
        raise UsageError(
            f"{taken.name} is {taken.dtype}, and the rows, {rows.dtype}, have values that are none"
        )
    return given


def _fitted(rows: Array, taken: Tensor, source: Path) -> Array:
    if not fits(rows.shape, taken.shape) and fits((*rows.shape, 1), taken.shape):
        rows = rows[..., np.newaxis]  # gray images without their channel
    if not fits(rows.shape, taken.shape):
        raise UsageError(
            f"{source} has rows of shape {list(rows.shape[1:])}, the reference takes "
            f"{list(taken.shape[1:])}"
        )
    return rows if rows.dtype == taken.dtype else cast(rows, taken)


def _truth(labels: Array | None, rows: int) -> NDArray[np.integer] | None:
    if labels is None:
        return None
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise UsageError(
            f"the labels have shape {list(labels.shape)} and dtype {labels.dtype}, expected "
            f"{rows} whole numbers"
        )
    return labels.astype(np.int64)


def _labels(path: Path) -> Array:
    found = _load(path)
    name = "labels" if "labels" in found else ONLY
    if name not in found:
        raise UsageError(f"{path} has the arrays {sorted(found)}, expected one called labels")
    return found[name]


def _arrays(path: Path) -> dict[str, Array]:
    """Return `images`, and `labels` where the file has them."""
    found = _load(path)
    others = [name for name in found if name != "labels"]
    if "images" not in found and len(others) == 1:
        found["images"] = found.pop(others[0])
    if "images" not in found:
        raise UsageError(f"{path} has the arrays {sorted(found)}, expected one called images")
    return found


def _load(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file:  # which numpy leaves open where it is none of its own
            loaded = np.load(file, allow_pickle=False)
            return {ONLY: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as .npy or .npz: {error}") from error


def _pictures(folder: Path, taken: Tensor, *, resize: bool) -> Array:
    paths = sorted(path for path in folder.rglob("*") if pictures.is_picture(path))
    if not paths:
        raise UsageError(f"{folder} has no PNG or JPEG file, expected pictures or an .npz file")
    if len(taken.shape) != RANK or taken.shape[3] not in pictures.MODES:
        raise UsageError(
            f"the reference takes {list(taken.shape)}, expected images with one channel or three; "
            "give its rows as .npy"
        )
    return np.stack([_picture(path, taken.shape[1:], resize=resize) for path in paths])


def _picture(path: Path, shape: Sequence[int], *, resize: bool) -> NDArray[np.uint8]:
    try:
        picture = pictures.read(path, shape[2])
    except DatasetError as error:
        raise UsageError(str(error)) from error
    height = shape[0] if shape[0] > 0 else picture.height
    width = shape[1] if shape[1] > 0 else picture.width
    if picture.size != (width, height) and not resize:
        raise UsageError(
            f"{path} is {picture.width} x {picture.height}, the reference takes {width} x "
            f"{height}; add --resize to have pictures made to fit"
        )
    return pictures.pixels(pictures.fit(picture, height, width))
