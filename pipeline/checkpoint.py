"""Keep the state of training on disk, an epoch at a time, and find it again.

`epoch-0003.keras` holds the model with its optimizer, `epoch-0003.json` the history and the
digest of the other. The JSON is written last: without it, or with another digest, the epoch never
happened. What belongs to which settings is the caller's business: a folder holds one run's.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import keras

from pipeline import files
from pipeline.records import Epoch
from service import bundle

log = logging.getLogger(__name__)


class State(NamedTuple):
    """A checkpoint that is whole."""

    path: Path  # of the .keras file
    sha256: str
    history: tuple[Epoch, ...]


def save(folder: Path, model: keras.Model, history: tuple[Epoch, ...]) -> None:
    """Write the state after the last epoch of `history`, then drop what is no longer needed.

    The last and the best epoch are kept.
    """
    number = history[-1].number
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".epoch-{number:04}.partial.keras"
    model.save(partial)
    files.sync(partial)
    path = folder / f"epoch-{number:04}.keras"
    partial.replace(path)
    record = {
        "sha256": bundle.file_sha256(path),
        "history": [asdict(epoch) for epoch in history],
    }
    files.write_whole(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    kept = {number, best(history).number}
    for other in folder.glob("epoch-*.json"):
        if _number(other) not in kept:
            other.unlink()  # first: a .keras without it is nothing
            other.with_suffix(".keras").unlink(missing_ok=True)


def latest(folder: Path) -> State | None:
    """Return the last whole checkpoint; one that is damaged is named in the log and skipped."""
    for record in sorted(folder.glob("epoch-*.json"), reverse=True):
        state = _read(record)
        if state is not None:
            return state
    return None


def of_epoch(folder: Path, number: int) -> State | None:
    """Return the checkpoint of one epoch, or None if it is not whole."""
    return _read(folder / f"epoch-{number:04}.json")


def best(history: tuple[Epoch, ...]) -> Epoch:
    """Return the epoch with the lowest validation loss, the earliest of equals."""
    return min(history, key=lambda epoch: epoch.validation_loss)


def _read(record: Path) -> State | None:
    path = record.with_suffix(".keras")
    try:
        content = json.loads(record.read_text())
        history = tuple(Epoch(**epoch) for epoch in content["history"])
        digest = bundle.file_sha256(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("checkpoint %s cannot be read (%s); going back to the one before", path, error)
        return None
    if digest != content["sha256"] or not history or history[-1].number != _number(record):
        log.warning("checkpoint %s is damaged; going back to the one before", path)
        return None
    return State(path, digest, history)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("epoch-"))
