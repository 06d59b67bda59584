"""Write down what is to be scored, in one order, and cut it into shards.

The order is that of the names, folder by folder, so that it is the same every time; memory is
taken for the names of one folder, never for all. What is in the files is not looked at, but for
the counts and the columns of parquet.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from pipeline.errors import ScoringError
from pipeline.pictures import SUFFIXES

PARQUET = ".parquet"
HIDDEN = (".", "_")  # with which others begin the names of what is no data
BYTES = "bytes"  # of a picture, where it is a struct with its path


@dataclass(frozen=True, slots=True)
class Shard:
    """Some rows of a listing, one part of the output."""

    number: int
    offset: int  # in bytes, of the listing's line with the first row
    skip: int  # rows of that line that are in shards before
    rows: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All that is to be scored."""

    column: str  # of the parquet files; empty: the files are pictures
    type: pa.DataType  # of that column; binary for pictures
    rows: int
    sha256: str  # of the names, sizes, times and counts of rows
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one file."""

    path: str  # relative to the input
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: pa.DataType


def root(source: Path) -> Path:
    """Return the folder that listed paths are relative to."""
    return source if source.is_dir() else source.parent


def write(source: Path, to: Path, *, column: str, shard_rows: int) -> Listing:
    """List an input, a line a file, and cut it.

    Args:
        source: a folder of pictures or of parquet files, at any depth; or one parquet file.
        to: file for the list.
        column: of parquet files; empty: the only one that has pictures or rows of numbers.
        shard_rows: of every shard but the last.

    Raises:
        ScoringError: there is nothing to score, or what there is cannot be read.
    """
    found = _files(source)
    first = next(found, None)
    if first is None:
        raise ScoringError(
            f"{source} has no PNG, JPEG or {PARQUET} file; there is nothing to score"
        )
    with ExitStack() as opened:
        file = opened.enter_context(to.open("wb"))
        if _is_parquet(first.name):
            taken = _column(Path(first.path), column)
            counted = ((one, _rows(one, taken)) for one in _only(chain([first], found), True))
            return _written(counted, source, file, taken, shard_rows)
        if column:
            raise ScoringError(f"{source} has pictures, which have no column {column!r}")
        pictures = ((one, 1) for one in _only(chain([first], found), False))
        return _written(pictures, source, file, _Column("", pa.binary()), shard_rows)


def pieces(listing: Path, shard: Shard) -> Iterator[Piece]:
    """Give the rows of a shard, file by file."""
    left, skip = shard.rows, shard.skip
    with listing.open("rb") as file:
        file.seek(shard.offset)
        while left:
            path, _, _, rows = json.loads(file.readline())
            stop = min(rows, skip + left)
            if stop > skip:
                yield Piece(path, skip, stop)
            left -= stop - skip
            skip = 0


def field(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, or of a struct's field that is named with a dot between."""
    if column in schema.names:
        return schema.field(column).type
    outer, _, inner = column.rpartition(".")
    of = schema.field(outer).type if outer in schema.names else None
    if of is None or not types.is_struct(of) or of.get_field_index(inner) < 0:
        return None
    return of.field(inner).type


def values(of: pa.DataType) -> pa.DataType | None:
    """Return the type of the numbers in a column of rows; None where it has none."""
    inner = of.value_type if _is_list(of) else of
    return inner if types.is_integer(inner) or types.is_floating(inner) else None


def is_binary(of: pa.DataType) -> bool:
    """Say whether a column has pictures, as the bytes of their files."""
    return bool(types.is_binary(of) or types.is_large_binary(of))


def _is_list(of: pa.DataType) -> bool:
    return bool(types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of))


def _written(
    entries: Iterator[tuple["os.DirEntry[str] | _Lone", int]],
    source: Path,
    file: BinaryIO,
    column: _Column,
    shard_rows: int,
) -> Listing:
    """Write the lines, and note where every shard begins."""
    above = root(source)
    digest = hashlib.sha256(f"{column.name}:{column.type}".encode())
    begins: list[tuple[int, int]] = []
    total = offset = 0
    for entry, rows in entries:
        about = entry.stat()
        line = json.dumps(
            [os.path.relpath(entry.path, above), about.st_size, about.st_mtime_ns, rows]
        )
        content = f"{line}\n".encode()
        file.write(content)
        digest.update(content)
        nearest = -total % shard_rows  # rows of this file before the next shard begins
        begins += [(offset, skip) for skip in range(nearest, rows, shard_rows)]
        offset += len(content)
        total += rows
    if not total:
        raise ScoringError(f"{source} has no rows; there is nothing to score")
    shards = (
        Shard(number, *begin, rows=min(shard_rows, total - number * shard_rows))
        for number, begin in enumerate(begins)
    )
    return Listing(column.name, column.type, total, digest.hexdigest(), tuple(shards))


class _Lone:
    """A file that was named itself, as `os.scandir` gives those of a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = str(path), path.name

    def stat(self) -> os.stat_result:
        """Return its size and time."""
        return Path(self.path).stat()


def _files(source: Path) -> Iterator["os.DirEntry[str] | _Lone"]:
    """Give all pictures and parquet files."""
    if source.is_dir():
        yield from _walk(source)
    elif not source.is_file():
        raise ScoringError(f"{source} is not there, expected a folder or a {PARQUET} file")
    elif not _is_parquet(source.name):
        raise ScoringError(f"{source} is a file, expected a {PARQUET} file or a folder of pictures")
    else:
        yield _Lone(source)


def _walk(folder: str | Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):  # a link to a folder may lead around in a circle
            yield from _walk(entry.path)
        elif _is_taken(entry.name) and entry.is_file():
            yield entry


def _is_taken(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or (_is_parquet(name) and not name.startswith(HIDDEN))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET)


def _only(
    entries: Iterator["os.DirEntry[str] | _Lone"], parquet: bool
) -> Iterator["os.DirEntry[str] | _Lone"]:
    """Give all, and refuse an input that has both kinds."""
    for entry in entries:
        if _is_parquet(entry.name) is not parquet:
            raise ScoringError(
                f"{entry.path} is of another kind than the files before it; score a folder of "
                "pictures or a folder of parquet files"
            )
        yield entry


def _rows(entry: "os.DirEntry[str] | _Lone", column: _Column) -> int:
    """Return how many rows a parquet file has, if its column is as that of the first file."""
    metadata = _metadata(Path(entry.path))
    of = field(metadata.schema.to_arrow_schema(), column.name)
    if of != column.type:
        raise ScoringError(
            f"{entry.path} has {of or 'nothing'} in the column {column.name!r}, the files before "
            f"it have {column.type}"
        )
    rows: int = metadata.num_rows
    return rows


def _column(path: Path, wanted: str) -> _Column:
    """Return the column to read."""
    schema = _metadata(path).schema.to_arrow_schema()
    if wanted:
        of = field(schema, wanted)
        if of is None or not (is_binary(of) or values(of)):
            raise ScoringError(
                f"the column {wanted!r} of {path} has {of or 'no values: it is not there'}, "
                f"expected the bytes of pictures, or numbers; the file has "
                f"{', '.join(f'{one.name} ({one.type})' for one in schema)}"
            )
        return _Column(wanted, of)
    found = [one for one in _named(schema) if _is_likely(one.type)]
    if len(found) != 1:
        raise ScoringError(
            f"{path} has {len(found) or 'no'} columns with pictures or lists of numbers, of "
            f"{', '.join(f'{one.name} ({one.type})' for one in schema) or 'none at all'}; "
            "name one with --column"
        )
    return found[0]


def _named(schema: pa.Schema) -> Iterator[_Column]:
    for one in schema:
        inner = f"{one.name}.{BYTES}"
        of = field(schema, inner)
        yield _Column(one.name, one.type) if of is None else _Column(inner, of)


def _is_likely(of: pa.DataType) -> bool:
    return is_binary(of) or (_is_list(of) and values(of) is not None)


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        said = str(error).partition("\n")[0]
        raise ScoringError(
            f"{path} cannot be read as parquet, it may have been cut: {said}"
        ) from error
