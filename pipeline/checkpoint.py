"""Keep the state of training on disk, within an epoch too, and find it again.

`state-0003-000120.npz` holds every variable after 3 whole epochs and 120 steps of the next,
`state-0003-000120.json` the history, the settings and the digests of that file and of
`model-0002.keras`, the best epoch so far. Each is written under another name, synced and renamed;
the JSON comes last: without it, or with another digest, the checkpoint never happened.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import TrainingError
from pipeline.records import Epoch
from service import bundle

log = logging.getLogger(__name__)
PARTIAL = ".partial-"
Settings = Mapping[str, Any]  # as JSON has them


class Position(NamedTuple):
    """How far training is."""

    history: tuple[Epoch, ...]  # epochs that are over
    step: int  # steps done of the next
    seconds: float  # spent on those steps


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that is whole."""

    arrays: Path  # .npz of every variable, in their order
    history: tuple[Epoch, ...]  # epochs that are over
    step: int  # steps done of the next
    seconds: float  # spent on those steps
    model: Path | None  # .keras of the best epoch; None before the first one ended
    model_sha256: str


def write_model(folder: Path, number: int, save: Callable[[Path], object]) -> Path:
    """Write the model of one epoch, whole or not at all.

    Args:
        folder: of the checkpoints.
        number: of the epoch.
        save: writes the model to a path that it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model-{number:04}.keras"
    partial = folder / f"{PARTIAL}{path.name}"
    with files.naming(path):
        save(partial)
    files.sync(partial)
    partial.replace(path)
    return path


def write(
    folder: Path,
    settings: Settings,
    position: Position,
    arrays: Sequence[NDArray[Any]],
    keep: int,
) -> None:
    """Write a state, then drop what is no longer needed.

    Args:
        folder: of the checkpoints.
        settings: what a resumed run must have as well.
        position: what the state is of.
        arrays: every variable.
        keep: how many of the last states stay; the best model stays besides.
    """
    history, step, seconds = position
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{len(history):04}-{step:06}.npz"
    partial = folder / f"{PARTIAL}{path.name}"
    with files.naming(path):
        np.savez(partial, *arrays)
    files.sync(partial)
    partial.replace(path)
    record = {
        "settings": settings,
        "sha256": bundle.file_sha256(path),
        "model_sha256": bundle.file_sha256(_model(folder, history)) if history else "",
        "step": step,
        "seconds": seconds,
        "history": [asdict(epoch) for epoch in history],
    }
    files.write_whole(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    _drop(folder, keep)


def latest(folder: Path, settings: Settings) -> Checkpoint | None:
    """Return the last whole checkpoint; one that is damaged is named in the log and skipped.

    Raises:
        TrainingError: it was written with other settings.
    """
    for partial in folder.glob(f"{PARTIAL}*"):
        partial.unlink(missing_ok=True)  # of a run that died while it wrote
    for record in sorted(folder.glob("state-*.json"), reverse=True):
        found = _read(record, settings)
        if found is not None:
            return found
    return None


def read_arrays(found: Checkpoint) -> list[NDArray[Any]]:
    """Return every variable of a checkpoint, in their order."""
    with np.load(found.arrays, allow_pickle=False) as arrays:
        return [arrays[f"arr_{place}"] for place in range(len(arrays))]


def best(history: Sequence[Epoch]) -> Epoch:
    """Return the epoch with the lowest validation loss, the earliest of equals."""
    return min(history, key=lambda epoch: epoch.validation_loss)


def _model(folder: Path, history: Sequence[Epoch]) -> Path:
    return folder / f"model-{best(history).number:04}.keras"


def _read(record: Path, settings: Settings) -> Checkpoint | None:
    path = record.with_suffix(".npz")
    try:
        content = json.loads(record.read_text())
        history = tuple(Epoch(**epoch) for epoch in content["history"])
        written = dict(content["settings"])
        model = _model(record.parent, history) if history else None
        position = (history, int(content["step"]), float(content["seconds"]))
        found = Checkpoint(path, *position, model, content["model_sha256"])
        whole = bundle.file_sha256(path) == content["sha256"] and (
            model is None or bundle.file_sha256(model) == found.model_sha256
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("checkpoint %s cannot be read (%s); going back to the one before", path, error)
        return None
    if not whole:
        log.warning("checkpoint %s is damaged; going back to the one before", path)
        return None
    _compare(record, written, settings)
    return found


def _compare(record: Path, written: dict[str, Any], settings: Settings) -> None:
    expected = json.loads(json.dumps(settings))
    for name in sorted({*written, *expected}):
        if written.get(name) != expected.get(name):
            raise TrainingError(
                f"{record} was written with {name} {written.get(name)!r}, expected "
                f"{expected.get(name)!r}; train with --fresh, or in another folder"
            )


def _drop(folder: Path, keep: int) -> None:
    records = sorted(folder.glob("state-*.json"))
    for record in records[:-keep]:
        record.unlink()  # first: an .npz without it is nothing
        record.with_suffix(".npz").unlink(missing_ok=True)
    needed = {_needs(record) for record in records[-keep:]}
    for model in folder.glob("model-*.keras"):
        if model not in needed:
            model.unlink()


def _needs(record: Path) -> Path | None:
    """Return the model that a state goes with; none if there is none, or it cannot be read."""
    try:
        history = [Epoch(**epoch) for epoch in json.loads(record.read_text())["history"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _model(record.parent, history) if history else None
