"""Run small stages through Prefect in the ways that a run meets; write what became of each."""

import errno
import sys
from contextlib import suppress
from pathlib import Path

from prefect import flow
from prefect.transactions import transaction

from pipeline import tasks
from pipeline.records import Variant

calls: list[str] = []
failures: list[OSError] = []
HOME = Path(sys.argv[1])
SOURCE, FOLDER = HOME / "source", HOME / "folder"
stages = tasks.Stages(HOME / "results", "CPU")


def make(source: Variant, folder: Path) -> Variant:
    """Write a file, and say so."""
    calls.append("made")
    (folder / "made").write_bytes(source.path.read_bytes())
    return Variant("made", "onnx", "float32", folder / "made")


def attempt() -> None:
    """Fail as often as there are errors left."""
    calls.append("tried")
    if failures:
        raise failures.pop()


def tell(what: str) -> None:
    """Write what was called since the last line."""
    sys.stdout.write(f"{what}: {', '.join(calls)}\n")
    calls.clear()


def once(content: bytes) -> None:
    """Have something made of a file with this content."""
    SOURCE.write_bytes(content)
    stages.kept(make)(Variant("source", "onnx", "float32", SOURCE), FOLDER)


@flow
def reuse() -> None:
    """Meet what takes a result again, and what does not."""
    FOLDER.mkdir()
    once(b"one")
    tell("first")
    once(b"one")
    tell("again")
    (FOLDER / "made").write_bytes(b"damaged")
    once(b"one")
    tell("changed on disk")
    once(b"two")
    tell("another argument")
    with suppress(ZeroDivisionError), transaction():
        once(b"three")
        raise ZeroDivisionError
    tell("in a transaction that fails")
    once(b"three")
    tell("after it")


@flow
def retry() -> None:
    """Meet what is tried again, and what is not."""
    failures.append(OSError(errno.EIO, "input/output error"))
    stages.once(attempt)()
    tell("a disk behind a network")
    failures.append(OSError(errno.ENOSPC, "no space left on device"))
    with suppress(OSError):
        stages.once(attempt)()
    tell("a full disk")


reuse()
tasks.RETRY_AFTER_S = (0.1, 0.1)
retry()
