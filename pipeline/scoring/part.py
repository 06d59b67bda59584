"""Score one shard: the work that any engine hands to any process, on any host.

A shard becomes one file, under its own name only when it is whole. Doing it twice, or twice at the
same time, leaves the same file.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import ScoringError
from pipeline.runtimes import NUMPY
from pipeline.scoring import listing
from pipeline.scoring.listing import Shard
from pipeline.scoring.plan import PART
from pipeline.scoring.reading import Reader, Row
from protos import bundle_pb2
from service import bundle, candidate, version
from service.session import CPU, Session

BATCH_ROWS = 256
BATCH_BYTES = 64 << 20  # of the model's input; large pictures go in smaller batches
PROBABILITIES = "probabilities"
UNREAD = b"train-export.unread"  # in a part: how many of its rows have an error
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Job:
    """What all shards of one run have in common; paths are absolute, and the same on all hosts."""

    bundle: Path
    bundle_sha256: str  # of its manifest, which has the digests of all its files
    above: Path  # folder that listed paths are relative to
    column: str  # of parquet files; empty for pictures
    listing: Path
    output: Path

    def part(self, number: int) -> Path:
        """Return where the scores of a shard are."""
        return self.output / f"{PART}{number:06d}.parquet"


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is scored."""

    rows: int
    unread: int  # of them, those with an error instead of an answer


Answered = tuple[Row, NDArray[np.generic]]  # a row without its value; its answer, flat or empty


def score(job: Job, shard: Shard) -> Done:
    """Score a shard, and write its part.

    The model is loaded as a server loads it, and answers its golden set on this host, once a
    process.

    Raises:
        ServiceError: the bundle is not what it should be, or its model fails.
        ScoringError: the bundle is another one by now.
        OSError: the part cannot be written.
    """
    manifest, session = _load(job.bundle, job.bundle_sha256)
    answered = list(_answered(job, shard, manifest, session))
    unread = sum(1 for row, _ in answered if row.error)
    _write(_table(job, answered, manifest), job.part(shard.number), unread)
    return Done(len(answered), unread)


def done(job: Job, shard: Shard) -> Done | None:
    """Return what came of a shard; None if there is no whole part of it."""
    try:
        metadata = pq.read_metadata(job.part(shard.number))
        unread = int(metadata.metadata[UNREAD])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return Done(metadata.num_rows, unread) if metadata.num_rows == shard.rows else None


def manifest_sha256(path: Path) -> str:
    """Return the digest of a bundle's manifest, which has those of all its files."""
    return bundle.file_sha256(path / bundle.MANIFEST)


@lru_cache(maxsize=1)
def _load(path: Path, sha256: str) -> tuple[bundle_pb2.BundleManifest, Session]:
    options = candidate.options(threads=1, max_batch_rows=BATCH_ROWS, providers=CPU)
    loaded = version.load(path, options)
    if manifest_sha256(path) != sha256:
        raise ScoringError(f"{path} was changed while it was used; give the command again")
    names = {output.name for output in loaded.manifest.outputs}
    if loaded.manifest.labels and PROBABILITIES not in names:
        raise ScoringError(f"{bundle.shown(path)} gives {names}, and no {PROBABILITIES}")
    return loaded.manifest, loaded.session


@lru_cache(maxsize=1)
def _reader(above: Path, column: str, shape: tuple[int, ...]) -> Reader:
    """Return a reader that knows where the shard before has ended."""
    return Reader(above, column, shape)


def _answered(
    job: Job, shard: Shard, manifest: bundle_pb2.BundleManifest, session: Session
) -> Iterator[Answered]:
    """Give every row with its answer.

    Rows meet in the same batches wherever the shard is scored, so that they round the same.
    """
    shape = tuple(manifest.input.shape[1:])
    item_bytes = np.dtype(NUMPY[manifest.input.datatype]).itemsize
    row_bytes = item_bytes * prod(size for size in shape if size > 0)
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
    reader = _reader(job.above, job.column, shape)
    rows = (
        row
        for piece in listing.pieces(job.listing, shard)
        for read in reader.read(piece, batch_rows)
        for row in read
    )
    output = PROBABILITIES if manifest.labels else bundle.checked_output(manifest)
    while batch := list(islice(rows, batch_rows)):
        answers = _run(session, output, [row.value for row in batch])
        for row, answer in zip(batch, answers, strict=True):
            yield Row(row.path, row.number, None, row.error), answer


def _run(
    session: Session, output: str, values: Sequence[NDArray[Any] | None]
) -> list[NDArray[np.generic]]:
    """Return an answer for each value, empty for what is None; values may differ in size."""
    answers: list[NDArray[np.generic]] = [np.empty(0, np.float32)] * len(values)
    alike: dict[tuple[int, ...], list[tuple[int, NDArray[Any]]]] = {}
    for place, value in enumerate(values):
        if value is not None:
            alike.setdefault(value.shape, []).append((place, value))
    for members in alike.values():
        found = session.run(np.stack([value for _, value in members]))[output]
        for (place, _), answer in zip(members, found, strict=True):
            answers[place] = answer.reshape(-1)
    return answers


def _table(job: Job, answered: Sequence[Answered], manifest: bundle_pb2.BundleManifest) -> pa.Table:
    """Return the scores as they are written."""
    rows = [row for row, _ in answered]
    answers = [answer for _, answer in answered]
    unread = np.array([bool(row.error) for row in rows])
    columns = {"path": pa.array([row.path for row in rows], pa.string())}
    if job.column:
        columns["row"] = pa.array([row.number for row in rows], pa.int64())
    found = _lists(answers, unread)
    if manifest.labels:
        columns |= _classes(answers, manifest.labels)
        columns[PROBABILITIES] = found
    else:
        columns["output"] = found
    columns["model"] = pa.array([manifest.name] * len(rows), pa.string())
    columns["version"] = pa.array([manifest.version] * len(rows), pa.int32())
    columns["error"] = pa.array([row.error or None for row in rows], pa.string())
    return pa.table(columns)


def _lists(answers: Sequence[NDArray[np.generic]], unread: NDArray[np.bool_]) -> pa.Array:
    borders = np.cumsum([0, *map(len, answers)]).astype(np.int32)
    read = [answer for answer, absent in zip(answers, unread, strict=True) if not absent]
    numbers = np.concatenate(read) if read else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(numbers), mask=pa.array(unread))


def _classes(answers: Sequence[NDArray[np.generic]], labels: Sequence[str]) -> dict[str, pa.Array]:
    """Return the most probable label of every row, and how probable it is."""
    best = [int(answer.argmax()) if len(answer) else None for answer in answers]
    probabilities = [
        None if place is None else float(answer[place])
        for place, answer in zip(best, answers, strict=True)
    ]
    return {
        "label": pa.array(
            [None if place is None else labels[place] for place in best], pa.string()
        ),
        "probability": pa.array(probabilities, pa.float32()),
    }


def _write(table: pa.Table, path: Path, unread: int) -> None:
    """Write a part whole: under a name of its own, which no other process has, then renamed."""
    metadata = {UNREAD: str(unread).encode()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), partial)
        files.sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    files.sync(path.parent)
