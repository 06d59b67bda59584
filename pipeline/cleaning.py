"""Remove old versions and the folders of old runs.

Never what an alias names, nor a model's newest version, nor what a run is working in, nor what is
a link or no version or run at all. A version goes by one rename, so that a server sees it whole or
not at all, and its number stays taken. Sweeps go whole too: a table with rows missing compares
nothing.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pipeline import config, files, results, status, sweep
from pipeline.errors import BusyError
from service import aliases, bundle
from service.errors import ServiceError

log = logging.getLogger(__name__)
REMOVING = ".removing-"
LOCK = ".lock"  # of a model's folder, as `publish` holds it
PROMOTING = ".promoting"  # as `promote` holds it
COMBINATION = re.compile(r"[a-z-]+-[0-9a-f]{12}")  # as `sweep` names their folders


@dataclass(frozen=True, slots=True)
class Removed:
    """One folder or file that goes, or would."""

    path: Path
    size_bytes: int


def clean(models: Path, runs: Path, *, keep: int, dry_run: bool = False) -> list[Removed]:
    """Remove all versions, runs and sweeps but the newest, and results of what is gone.

    Args:
        models: folder of the bundles.
        runs: folder of the runs.
        keep: how many of each model's versions, of its runs and of its sweeps stay; at least 1.
        dry_run: only say what would go; nothing is written, no lock either.

    Returns:
        What went, or would.

    Raises:
        OSError: something cannot be removed; what went before it is gone.
    """
    return [
        *(one for home in _own(status.homes(models)) for one in _versions(home, keep, dry_run)),
        *_runs(runs, keep, dry_run),
        *_sweeps(runs / sweep.FOLDER, keep, dry_run),
        *_results(runs, dry_run),
    ]


def _versions(home: Path, keep: int, dry_run: bool) -> Iterator[Removed]:
    with ExitStack() as held:
        try:
            named = held.enter_context(_named(home, dry_run))
        except BusyError:
            log.warning("%s is left as it is: a version of it is being promoted", home)
            return
        except ServiceError as error:
            log.warning("%s is left as it is, since nobody knows what it names: %s", home, error)
            return
        for left in home.glob(f"{REMOVING}*"):  # by a command that was stopped
            if bundle.VERSION.fullmatch(left.name.removeprefix(REMOVING)):
                yield _removed(left, dry_run)
        for path in _own(status.numbered(home))[keep:]:
            if int(path.name) in named:
                continue
            size = _size(path)
            if not dry_run:
                hidden = path.rename(home / f"{REMOVING}{path.name}")
                files.sync(home)
                shutil.rmtree(hidden)
            yield Removed(path, size)


@contextmanager
def _named(home: Path, dry_run: bool) -> Iterator[set[int]]:
    """Give the versions that aliases name, and keep them from moving to what goes."""
    with ExitStack() as held:
        held.enter_context(_alone(home / PROMOTING, dry_run))
        if not dry_run:
            held.enter_context(files.locked(home / LOCK, wait=True))
            held.enter_context(aliases.changing(home))
        yield set(aliases.read(home).values())


def _runs(runs: Path, keep: int, dry_run: bool) -> Iterator[Removed]:
    of_model: dict[str, int] = {}
    for path in sorted(_own(status.run_folders(runs)), key=status.changed_s, reverse=True):
        name = _model_of(path)
        of_model[name] = of_model.get(name, 0) + 1
        if of_model[name] <= keep:
            continue
        try:
            with _alone(path / status.LOCK, dry_run):
                yield _removed(path, dry_run)
        except BusyError:
            log.warning("%s is left as it is: a run is working in it", path)


def _sweeps(folder: Path, keep: int, dry_run: bool) -> Iterator[Removed]:
    """Remove the combinations of old sweeps; the same grid with other values is the same sweep."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in _own(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if COMBINATION.fullmatch(path.name) and (which := _sweep_of(path)):
            found.setdefault(which, []).append(path)
    newest = sorted(found, key=lambda one: max(map(status.changed_s, found[one])), reverse=True)
    of_model: dict[str, int] = {}
    for which in newest:
        of_model[which[0]] = of_model.get(which[0], 0) + 1
        if of_model[which[0]] <= keep:
            continue
        with ExitStack() as held:
            try:
                for path in sorted(found[which]):
                    held.enter_context(_alone(path / sweep.LOCK, dry_run))
            except BusyError as error:
                log.warning("a sweep in %s is left as it is: %s", folder, error)
                continue
            yield from (_removed(path, dry_run) for path in sorted(found[which]))


def _sweep_of(combination: Path) -> tuple[str, str] | None:
    """Return a combination's model, and what all of its sweep have alike; None if it is none."""
    try:
        content: dict[str, Any] = json.loads((combination / sweep.JOB).read_bytes())
        tables, names = content["config"], sorted(content["values"])
        for name in names:
            *path, last = name.split(".")
            del reduce(getitem, path, tables)[last]
        return str(tables["publishing"]["name"]), json.dumps([names, tables], sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _own(paths: Iterable[Path]) -> list[Path]:
    """Leave out links: what they lead to belongs elsewhere."""
    return [path for path in paths if not path.is_symlink()]


@contextmanager
def _alone(lock: Path, dry_run: bool) -> Iterator[None]:
    """Hold a lock; a dry run, which writes nothing, only looks whether it could."""
    if not dry_run:
        with files.locked(lock, wait=False):
            yield
    elif files.is_locked(lock):
        raise BusyError(f"{lock.parent} is in use")
    else:
        yield


def _model_of(run: Path) -> str:
    """Return which model a run is to publish; nothing where it does not say."""
    try:
        return str(json.loads((run / config.FILE).read_text())["publishing"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _results(runs: Path, dry_run: bool) -> Iterator[Removed]:
    """Remove what stages returned of which a file is gone."""
    folder = runs / results.FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and not results.is_whole(path.read_bytes()):
            yield _removed(path, dry_run)


def _removed(path: Path, dry_run: bool) -> Removed:
    found = Removed(path, _size(path))
    if not dry_run and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not dry_run:
        path.unlink()
    return found


def _size(path: Path) -> int:
    """Count what goes with a path: of a link, nothing that it leads to."""
    inside = () if path.is_symlink() else path.rglob("*")
    return sum(one.lstat().st_size for one in (path, *inside) if one.is_symlink() or one.is_file())
