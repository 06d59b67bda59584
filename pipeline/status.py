"""Say what has been published, and how far each run is; reads only, and starts nothing."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import config, files
from pipeline.errors import UsageError
from protos import bundle_pb2
from service import aliases, bundle
from service.errors import ServiceError

log = logging.getLogger(__name__)
LOCK, PUBLISHED, REFUSED = "lock", "published.json", "refused.md"
CHECKPOINTS = "checkpoints"  # state-EPOCHS-STEPS.json each, as `checkpoint` writes them


@dataclass(frozen=True, slots=True)
class Version:
    """One published version of a model."""

    model: str
    number: int
    aliases: tuple[str, ...]
    created: str  # RFC 3339, as the manifest has it
    size_bytes: int  # of every file of the bundle
    accuracy: float | None  # on the test rows; None where it does not classify, or is unreadable
    parity: str  # passed; else how many variants are left out, or why nothing is known


@dataclass(frozen=True, slots=True)
class Run:
    """One folder of checkpoints and exports."""

    folder: Path
    epochs_done: int
    epochs: int | None  # asked for; None where the run left no word of it
    changed: str  # RFC 3339
    state: str  # running; else what came of it: published NAME VERSION, refused, trained, stopped


def versions(models: Path) -> list[Version]:
    """Return every version in a folder of models: by name, the newest first."""
    return [
        _version(path, names)
        for home in homes(models)
        for names in [_aliases(home)]
        for path in numbered(home)
    ]


def home(models: Path, name: str) -> Path:
    """Return the folder of a model in a folder of models, whether it is there or not.

    Raises:
        UsageError: no model can have this name; a path is none.
    """
    if not bundle.NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a model, expected a name of letters, digits, dots, dashes and "
            "underscores, such as fashion-mnist; the folder it is in goes with --models"
        )
    return models / name


def homes(models: Path) -> list[Path]:
    """Return the folders of models that have versions."""
    found = sorted(models.iterdir()) if models.is_dir() else []
    return [one for one in found if bundle.NAME.fullmatch(one.name) and numbered(one)]


def numbered(home: Path) -> list[Path]:
    """Return a model's versions, the newest first; a folder without a manifest is none."""
    found = [
        path
        for path in (home.iterdir() if home.is_dir() else ())
        if bundle.VERSION.fullmatch(path.name) and (path / bundle.MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def runs(folder: Path) -> list[Run]:
    """Return every run below a folder, the one that changed last first."""
    found = [_run(path) for path in run_folders(folder)]
    return sorted(found, key=lambda run: run.changed, reverse=True)


def run_folders(folder: Path) -> Iterator[Path]:
    """Give the folders that runs have worked in: a lock alone may be anybody's."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        left = (path / config.FILE).is_file() or (path / CHECKPOINTS).is_dir()
        if left and (path / LOCK).is_file():
            yield path


def is_busy(run: Path) -> bool:
    """Say whether a run is working in its folder now."""
    return files.is_locked(run / LOCK)


def changed_s(run: Path) -> float:
    """Return when a run's folder changed last, in seconds since 1970."""
    return max(path.stat().st_mtime for path in (run, *run.iterdir(), *_states(run)))


def _version(path: Path, names: dict[str, int]) -> Version:
    number = int(path.name)
    try:
        manifest = bundle.read_manifest(path)
    except ServiceError as error:
        return Version(path.parent.name, number, (), "", 0, None, f"unreadable: {error}")
    counted = manifest.evaluation.accuracy
    return Version(
        model=path.parent.name,
        number=number,
        aliases=tuple(sorted(name for name, of in names.items() if of == number)),
        created=manifest.provenance.created,
        size_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        accuracy=counted.value if counted.rows and manifest.labels else None,
        parity=_verdict(manifest),
    )


def _verdict(manifest: bundle_pb2.BundleManifest) -> str:
    if not manifest.served.passed:
        return "failed as served"
    left_out = [report.variant for report in manifest.parity if not report.passed]
    return f"passed, without {', '.join(left_out)}" if left_out else "passed"


def _aliases(home: Path) -> dict[str, int]:
    try:
        return aliases.read(home)
    except ServiceError as error:
        log.warning("%s", error)
        return {}


def _run(path: Path) -> Run:
    newest = _states(path)[-1:]
    done = int(newest[0].stem.split("-")[1]) if newest else 0
    epochs = _fields(path / config.FILE).get("training", {}).get("epochs")
    return Run(
        folder=path,
        epochs_done=done,
        epochs=epochs,
        changed=datetime.fromtimestamp(changed_s(path), UTC).isoformat(timespec="seconds"),
        state=_state(path, is_whole=epochs is not None and done >= epochs),
    )


def _state(run: Path, *, is_whole: bool) -> str:
    if is_busy(run):
        return "running"
    published = _fields(run / PUBLISHED)
    if published:
        return f"published {published.get('name')} {published.get('version')}"
    if (run / REFUSED).is_file():
        return "refused"
    return "trained, not published" if is_whole else "stopped"


def _states(run: Path) -> list[Path]:
    return sorted((run / CHECKPOINTS).glob("state-*-*.json"))


def _fields(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
