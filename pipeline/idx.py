"""Read and write IDX, the format of MNIST: two zeros, a dtype, a shape, big-endian values.

Knows nothing of what the values mean. What a header claims is checked before memory is taken.
"""

import gzip
import io
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import memory
from pipeline.errors import DatasetError

Array = NDArray[Any]
# What the third byte of a file says its values are, and how MNIST's names spell it.
TYPES: dict[int, tuple[np.dtype[Any], str]] = {
    0x08: (np.dtype("u1"), "ubyte"),
    0x09: (np.dtype("i1"), "byte"),
    0x0B: (np.dtype(">i2"), "short"),
    0x0C: (np.dtype(">i4"), "int"),
    0x0D: (np.dtype(">f4"), "float"),
    0x0E: (np.dtype(">f8"), "double"),
}
CODES = {dtype.newbyteorder("="): code for code, (dtype, _) in TYPES.items()}
MAX_RANK = 8
MAX_LENGTH = 2**32 - 1  # of a dimension, 4 bytes each
CHUNK_BYTES = 1 << 20
PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def encode(array: Array) -> bytes:
    """Return the file of an array: uint8, int8, int16, int32, float32 or float64, 1 to 8 axes.

    Raises:
        DatasetError: it has another dtype, or a shape that IDX has no room for.
    """
    code = CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise DatasetError(f"IDX has no {array.dtype}, expected {', '.join(map(str, CODES))}")
    if not 0 < array.ndim <= MAX_RANK or not all(0 < one <= MAX_LENGTH for one in array.shape):
        raise DatasetError(
            f"an array of shape {list(array.shape)} cannot be written as IDX, expected 1 to "
            f"{MAX_RANK} axes of 1 to {MAX_LENGTH}"
        )
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(TYPES[code][0], copy=False).tobytes()


def decode(content: bytes, name: str) -> Array:
    """Return the array of a file's content, in this machine's byte order.

    Args:
        content: all of it, unpacked.
        name: what an error calls it.

    Raises:
        DatasetError: it is no IDX, or has more or fewer values than its header says.
    """
    return _parse(io.BytesIO(content), name)


def read(path: Path) -> Array:
    """Return the array of a file, packed if its name ends in .gz.

    Raises:
        DatasetError: as of `decode`; or it cannot be read, or does not fit into memory.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(file, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}; it is damaged") from error


def name(part: str, array: Array) -> str:
    """Return what MNIST would call the file of an array, such as train-images-idx3-ubyte."""
    return f"{part}-idx{array.ndim}-{TYPES[CODES[array.dtype]][1]}"


def find(folder: Path, part: str) -> Path:
    """Return the one file of a part of a data set; an unpacked one before its packed twin.

    Raises:
        DatasetError: there is none, or there are several.
    """
    pattern = re.compile(rf"{part}[-.]idx\d+-[a-z]+(\.gz)?")
    found = {path.name: path for path in folder.glob(f"{part}*") if pattern.fullmatch(path.name)}
    alone = sorted(
        one for one in found if one.removesuffix(".gz") not in found or one[-3:] != ".gz"
    )
    if not alone:
        raise DatasetError(
            f"{folder} has no file called {part}-idx… as MNIST's are, packed or not; expected one "
            f"for each of {', '.join(PARTS)}"
        )
    if len(alone) > 1:
        raise DatasetError(f"{folder} has {' and '.join(alone)}, expected one of them; move others")
    return found[alone[0]]


def _parse(file: io.BufferedIOBase, source: str) -> Array:
    zeros, code, rank = struct.unpack(">HBB", _exactly(file, 4, source))
    if zeros or code not in TYPES or not 0 < rank <= MAX_RANK:
        raise DatasetError(
            f"{source} begins with {zeros:04x}{code:02x}{rank:02x}, which no IDX file does; "
            "expected 0000, a dtype from 08 to 0e, and 01 to 08 axes"
        )
    shape = struct.unpack(f">{rank}I", _exactly(file, 4 * rank, source))
    dtype = TYPES[code][0]
    size_bytes = math.prod(shape) * dtype.itemsize
    if not size_bytes:
        raise DatasetError(f"{source} has shape {list(shape)}: no values")
    memory.check(source, size_bytes)
    content = _exactly(file, size_bytes, source)
    if file.read(1):
        raise DatasetError(
            f"{source} goes on after the {size_bytes} bytes of {list(shape)} {dtype}"
        )
    flat = np.frombuffer(content, dtype)
    array: Array = flat.reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    return array


def _exactly(file: io.BufferedIOBase, size_bytes: int, source: str) -> bytearray:
    """Read in pieces, so that a short file with a large claim costs no more than itself."""
    content = bytearray()
    while len(content) < size_bytes:
        piece = file.read(min(CHUNK_BYTES, size_bytes - len(content)))
        if not piece:
            raise DatasetError(
                f"{source} ends {size_bytes - len(content)} bytes early; it is damaged or cut off"
            )
        content += piece
    return content
