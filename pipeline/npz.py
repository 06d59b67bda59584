"""Read a data set from numpy's .npz: `x_train` and its like as Keras has them, or `images`.

Nothing that a file says is executed, and what it claims is checked before memory is taken.
"""

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline import arrays, files, memory
from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.splits import Found, Split, hold_out

KERAS = ("x_train", "y_train", "x_test", "y_test")
PLAIN = ("images", "labels")
NAMES = "class_names"
DAMAGED = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile)


def read(path: Path, config: DataConfig) -> Found:
    """Read training and test rows, and the classes' names where the file has them.

    Raises:
        DatasetError: it cannot be read, lacks an array, or has arrays that do not fit.
    """
    found = _arrays(path)
    if set(KERAS) <= set(found):
        classify = arrays.is_classes(found["y_train"])
        train, test = (
            arrays.rows(found[f"x_{part}"], found[f"y_{part}"], name, classify=classify)
            for part, name in (("train", "training"), ("test", "test"))
        )
    elif set(PLAIN) <= set(found):
        train, test = hold_out(_plain(found), config)
    else:
        raise DatasetError(
            f"{files.shown(path)} has the arrays {', '.join(sorted(found)) or 'of nobody'}; "
            f"expected {', '.join(KERAS)}, or {' and '.join(PLAIN)}"
        )
    return Found(train, test, _names(found, path))


def _plain(found: dict[str, NDArray[Any]]) -> Split:
    labels = found["labels"]
    return arrays.rows(found["images"], labels, "given", classify=arrays.is_classes(labels))


def _names(found: dict[str, NDArray[Any]], path: Path) -> tuple[str, ...]:
    if NAMES not in found:
        return ()
    names = found[NAMES]
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DatasetError(
            f"{NAMES} in {files.shown(path)} has shape {list(names.shape)} and dtype "
            f"{names.dtype}, expected one string for each class"
        )
    return tuple(map(str, names))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    wanted, shown = {*KERAS, *PLAIN, NAMES}, files.shown(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                stem: _array(archive, info, f"{stem} in {shown}")
                for info in archive.infolist()
                if (stem := info.filename.removesuffix(".npy")) in wanted
            }
    except DatasetError:
        raise
    except DAMAGED as error:
        raise DatasetError(f"{shown} cannot be read as .npz: {error}") from error
    except Exception as error:
        # Whatever else: neither parser was written for those who mean harm.
        raise DatasetError(f"{shown} cannot be read as .npz") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> NDArray[Any]:
    """Read one array, once its header and the archive agree on its size."""
    memory.check(name, info.file_size)
    with archive.open(info) as file:
        shape, dtype = _header(file)
        if dtype.hasobject:
            raise DatasetError(f"{name} has Python objects, which are not loaded; expected numbers")
        claimed, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if claimed != there:
            raise DatasetError(f"{name} has {there} bytes for {list(shape)} {dtype}; it is damaged")
    with archive.open(info) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return shape, dtype
