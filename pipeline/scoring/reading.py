"""Read the rows of one shard as arrays that a model takes, or the reason why one cannot be read.

Pictures are decoded by the code with which the server decodes those of its clients.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import types

from pipeline.errors import ScoringError
from pipeline.runtimes import NUMPY
from pipeline.scoring import listing
from pipeline.scoring.listing import Piece
from protos import bundle_pb2
from service.errors import PictureError
from service.pictures import MAX_BYTES_PER_PIXEL, MAX_HEAD_BYTES, MAX_PIXELS, MODES, decode_all

RANK = 4  # of a batch of images
MAX_FILE_BYTES = MAX_HEAD_BYTES + MAX_PIXELS * MAX_BYTES_PER_PIXEL  # no picture has more
BUFFER_BYTES = 1 << 20  # of a parquet file, whose row groups may be larger than memory
GONE = "the row is not there any more"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    path: str
    number: int  # in its file
    value: NDArray[Any] | None  # as the model takes it, without the batch; None: see `error`
    error: str = ""


def check(spec: bundle_pb2.TensorSpec, column: str, of: pa.DataType) -> None:
    """Refuse an input that no row of a column can be.

    Args:
        spec: the model's input.
        column: of parquet files; empty for pictures.
        of: the column's type; binary for pictures.

    Raises:
        ScoringError: they do not fit.
    """
    shape = tuple(spec.shape[1:])
    if listing.is_binary(of):
        if (
            len(spec.shape) != RANK
            or min(shape) < 1
            or shape[2] not in MODES
            or (spec.datatype != "UINT8")
        ):
            raise ScoringError(
                f"the model takes {spec.datatype} {list(spec.shape)}, pictures are made UINT8 of "
                "(height, width, 1 or 3); give it rows of numbers, as parquet"
            )
        return
    numbers = listing.values(of)
    if numbers is None or np.dtype(numbers.to_pandas_dtype()) != NUMPY[spec.datatype]:
        raise ScoringError(
            f"the column {column!r} has {of}, the model takes {NUMPY[spec.datatype]} of "
            f"{list(shape)}; write it so"
        )
    if shape.count(-1) > 1:
        raise ScoringError(
            f"the model takes {list(spec.shape)}: a list of numbers does not say how long each "
            "axis is"
        )


class Reader:
    """Reads rows for one model.

    Args:
        above: folder that paths are relative to.
        column: of parquet files; empty for pictures.
        shape: the model's input without the batch; -1 for at most one free size.
    """

    def __init__(self, above: Path, column: str, shape: Sequence[int]) -> None:
        self._above = above
        self._column = column
        self._shape = tuple(shape)
        self._open: _Open | None = None  # where the last piece ended

    def read(self, piece: Piece, batch_rows: int) -> Iterator[list[Row]]:
        """Give the rows of a piece in their order, as many as it has, some at a time."""
        if not self._column:
            yield [self._picture(piece.path)]
            return
        done = piece.start
        why = GONE
        name = _text(piece.path)
        try:
            for values in self._values(piece, batch_rows):
                yield [self._row(name, done + at, one) for at, one in enumerate(values)]
                done += len(values)
        except (OSError, pa.ArrowException) as error:
            why = f"the file cannot be read here: {str(error).splitlines()[0]}"
        for start in range(done, piece.stop, batch_rows):
            stop = min(start + batch_rows, piece.stop)
            yield [Row(name, number, None, why) for number in range(start, stop)]

    def _picture(self, path: str) -> Row:
        try:
            with (self._above / path).open("rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    return Row(_text(path), 0, None, f"it has over {MAX_FILE_BYTES:,} bytes")
                content = file.read(MAX_FILE_BYTES)
        except OSError as error:
            return Row(_text(path), 0, None, f"it cannot be read: {error.strerror}")
        return self._row(_text(path), 0, content)

    def _row(self, path: str, number: int, value: bytes | NDArray[Any] | None) -> Row:
        try:
            return Row(path, number, self._fitted(value))
        except PictureError as error:
            return Row(path, number, None, str(error).replace("picture 0", "it", 1))
        except ValueError as error:
            return Row(path, number, None, str(error))

    def _fitted(self, value: bytes | NDArray[Any] | None) -> NDArray[Any]:
        if value is None:
            raise ValueError("there is no value, or one of its numbers is missing")
        if isinstance(value, bytes):
            height, width, channels = self._shape
            (pixels,) = decode_all([value], (height, width, channels), MAX_PIXELS)
            return np.asarray(pixels)
        known = prod(size for size in self._shape if size > 0)
        if not value.size or value.size % known or (-1 not in self._shape and value.size != known):
            raise ValueError(f"it has {value.size} numbers, the model takes {list(self._shape)}")
        return value.reshape(self._shape)

    def _values(
        self, piece: Piece, batch_rows: int
    ) -> Iterator[Sequence[bytes | NDArray[Any] | None]]:
        """Give the column's values in the rows of a piece."""
        file, self._open = self._open, None  # closed, and not used again, if it fails
        if file is None or not file.leads_to(self._above / piece.path, piece.start):
            if file is not None:
                file.close()
            file = _Open(self._above / piece.path, self._column, piece.start, batch_rows)
        for batch in file.rows(piece.start, piece.stop):
            yield _cells(batch)
        self._open = file


class _Open:
    """A parquet file that is read from a row on.

    A row group can only be read from its beginning, so what comes next is read from where the last
    piece ended: else the shards of a large row group would take ever longer.
    """

    def __init__(self, path: Path, column: str, start: int, batch_rows: int) -> None:
        self._about = _about(path)
        self._file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        self._begins = _begins(self._file.metadata)
        group = bisect_right(self._begins, start) - 1
        self._at = self._begins[group]  # row that `_left` begins with
        self._left: pa.Array | None = None
        self._batches = self._file.iter_batches(
            batch_rows,
            row_groups=list(range(group, len(self._begins))),
            columns=[column],
            use_threads=False,
        )
        self._inner = column.rpartition(".")[2]

    def leads_to(self, path: Path, start: int) -> bool:
        """Say whether a row is ahead, and no other row group would have to be read for it."""
        return self._about == _about(path) and (
            self._begins[bisect_right(self._begins, start) - 1] <= self._at <= start
        )

    def rows(self, start: int, stop: int) -> Iterator[pa.Array]:
        """Give the column's values in some rows, those that there are."""
        while self._at < stop:
            if not self._left:
                self._left = self._next()
            if self._left is None:
                return
            skipped = self._left[: max(0, start - self._at)]
            rest = self._left[len(skipped) :]
            taken = rest[: stop - self._at - len(skipped)]
            self._at += len(skipped) + len(taken)
            self._left = rest[len(taken) :]
            if len(taken):
                yield taken

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> pa.Array | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        array = batch.column(0)
        return pc.struct_field(array, self._inner) if types.is_struct(array.type) else array


def _about(path: Path) -> tuple[str, int, int, int]:
    """Return what tells a file from others, and from what it was."""
    about = path.stat()
    return str(path), about.st_ino, about.st_size, about.st_mtime_ns


def _begins(metadata: pq.FileMetaData) -> list[int]:
    """Return the first row of every row group."""
    counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    return [0, *accumulate(counts)][:-1] or [0]


def _cells(array: pa.Array) -> Sequence[bytes | NDArray[Any] | None]:
    """Return one value a row: the bytes of a picture, or numbers in one row."""
    if listing.is_binary(array.type):
        found: list[bytes | None] = array.to_pylist()
        return found
    if types.is_fixed_size_list(array.type):
        borders = (np.arange(len(array) + 1) + array.offset) * array.type.list_size
        inner = array.values
    elif types.is_list(array.type) or types.is_large_list(array.type):
        borders, inner = array.offsets.to_numpy(), array.values
    else:
        borders, inner = np.arange(len(array) + 1), array
    filled = inner.fill_null(0) if inner.null_count else inner
    numbers = filled.to_numpy(zero_copy_only=False)
    missing = np.concatenate([[0], np.cumsum(inner.is_null().to_numpy(zero_copy_only=False))])
    null = array.is_null().to_numpy(zero_copy_only=False) | (np.diff(missing[borders]) > 0)
    return [
        None if absent else numbers[start:stop]
        for absent, start, stop in zip(null, borders[:-1], borders[1:], strict=True)
    ]


def _text(path: str) -> str:
    """Return a file's name as text that can be written, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="backslashreplace")
