"""Score many pictures or rows with a published model, in parts that can be done anywhere and again.

Every row of the input is one row of the output, an error in place of an answer where it cannot be
read. Memory is bounded by one shard a process, whatever there is to score.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline import files
from pipeline.errors import ScoringError
from pipeline.scoring import listing, part, plan, reading
from pipeline.scoring.listing import Listing, Shard
from pipeline.scoring.part import PARTIAL, Done, Job
from pipeline.scoring.plan import Plan
from protos import bundle_pb2
from service import bundle

log = logging.getLogger(__name__)
SHARD_ROWS = 4096  # a second or so of small pictures; a part that is lost costs no more
TELL_EVERY_S = 10.0
Engine = Callable[[Job, Sequence[Shard]], Generator[Done, None, None]]
Show = Callable[[int, int], None]  # rows that are done, of how many


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run came to; parts of an earlier one are counted in."""

    output: Path
    model: str
    version: int
    rows: int  # of the input, and of the output
    unread: int  # of them, those with an error instead of an answer
    parts: int
    kept: int  # parts of an earlier run of the same command


def score(  # noqa: PLR0913  one argument an option of the command
    path: Path,
    source: Path,
    output: Path,
    engine: Engine,
    *,
    column: str = "",
    shard_rows: int = SHARD_ROWS,
    show: Show | None = None,
) -> Scored:
    """Score all of an input, or what an earlier run has left of it.

    Args:
        path: the bundle, NAME/VERSION.
        source: a folder of pictures or of parquet files, at any depth; or one parquet file.
        output: folder for the parts; it is made.
        engine: who does the shards, in any order.
        column: of parquet files; empty: the only one that can be meant.
        shard_rows: rows of a part, and so the work that is lost with a process.
        show: told of the progress, at every part.

    Raises:
        ScoringError: the input cannot be scored by this model, the folder has scores of something
            else, or rows were lost.
        BusyError: the same is being done now.
        ServiceError: the bundle is not what it should be, or fails its check on a host.
    """
    path, source, output = path.absolute(), source.absolute(), output.absolute()
    manifest = bundle.read_manifest(path)
    sha256 = part.manifest_sha256(path)
    _make(output, source)
    with files.locked(output / plan.LOCK, wait=False):
        found = _planned(source, output, (manifest, sha256), column, shard_rows)
        job = Job(path, sha256, listing.root(source), found.column, output / plan.LISTING, output)
        kept = {one: came for one in found.shards if (came := part.done(job, one))}
        left = [one for one in found.shards if one not in kept]
        if kept:
            log.info("%d of %d parts are there from an earlier run", len(kept), len(found.shards))
        _work(engine(job, left), sum(one.rows for one in kept.values()), found.rows, show)
        return _counted(job, manifest, found, len(kept))


def _make(output: Path, source: Path) -> None:
    """Make the folder of the parts, unless it is where it would be scored itself."""
    if output == source or source in output.parents:
        raise ScoringError(f"{output} is in what is to be scored; choose another --output")
    if output.exists() and not output.is_dir():
        raise ScoringError(f"{output} is a file, expected a folder for the parts")
    output.mkdir(parents=True, exist_ok=True)


def _planned(
    source: Path,
    output: Path,
    model: tuple[bundle_pb2.BundleManifest, str],
    column: str,
    shard_rows: int,
) -> Listing:
    """List the input, see that the model can take it, and that the folder is for just this."""
    manifest, sha256 = model
    partial = output / f".{plan.LISTING}{PARTIAL}"
    try:
        found = listing.write(source, partial, column=column, shard_rows=shard_rows)
        reading.check(manifest.input, found.column, found.type)
        plan.keep(
            output,
            Plan(
                model=manifest.name,
                version=manifest.version,
                bundle_sha256=sha256,
                column=found.column,
                listing_sha256=found.sha256,
                rows=found.rows,
                shard_rows=shard_rows,
                shards=len(found.shards),
            ),
        )
        partial.replace(output / plan.LISTING)
    finally:
        partial.unlink(missing_ok=True)
    return found


def _work(came: Generator[Done, None, None], before: int, rows: int, show: Show | None) -> None:
    """Have the shards scored, and say from time to time how far that is."""
    started_s = told_s = time.monotonic()
    done = 0
    with closing(came):  # which ends the processes at Ctrl-C
        for one in came:
            done += one.rows
            if show is not None:
                show(before + done, rows)
            now_s = time.monotonic()
            if now_s - told_s >= TELL_EVERY_S:
                told_s = now_s
                left_s = (rows - before - done) * (now_s - started_s) / done
                log.info(
                    "%s of %s rows, about %.0f s to go", f"{before + done:,}", f"{rows:,}", left_s
                )


def _counted(job: Job, manifest: bundle_pb2.BundleManifest, found: Listing, kept: int) -> Scored:
    """Count the rows that are in the parts now, by the files themselves."""
    parts = [part.done(job, shard) for shard in found.shards]
    lost = [shard.number for shard, one in zip(found.shards, parts, strict=True) if one is None]
    rows = sum(one.rows for one in parts if one)
    if lost or rows != found.rows:
        raise ScoringError(
            f"{found.rows:,} rows went in and {rows:,} are in {job.output}; parts that are not "
            f"whole: {lost[:3] or 'none'}; the same command makes them"
        )
    for left in job.output.glob(f".{plan.PART}*{PARTIAL}"):  # of processes that were killed
        left.unlink(missing_ok=True)
    return Scored(
        output=job.output,
        model=manifest.name,
        version=manifest.version,
        rows=rows,
        unread=sum(one.unread for one in parts if one),
        parts=len(parts),
        kept=kept,
    )
