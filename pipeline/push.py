"""Put a published bundle into a repository behind a URL, so that one publisher has a number.

A store has no rename. A number is taken by creating NAME/VERSION/claim if it is absent; the files
follow; the version exists once manifest.json was created, last and only if it is absent. Readers
ignore a version without one. What a run that died has begun is ended by the same command.
"""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PublishError
from protos import bundle_pb2
from service import aliases, bundle
from service.errors import RepositoryError
from service.remote import Entry, Remote

log = logging.getLogger(__name__)
CLAIM = "claim"
CONFIG = "config.pbtxt"
SHOWN = 12  # characters of a digest that tell it from others
ALIAS_TRIES = 3


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a store has now."""

    url: str  # of the version
    already: bool  # it was there before
    files: int
    size_bytes: int


def push(path: Path, store: Remote) -> Pushed:
    """Put a bundle into a store, or end what was begun.

    Args:
        path: NAME/VERSION of a bundle; every file of it is verified first.
        store: of `service.remote.connect`.

    Raises:
        BundleError: the bundle is not what its manifest says.
        PublishError: another bundle has this number, or the store cannot be written to; nothing
            is visible then.
    """
    manifest = bundle.read(path).manifest
    content = (path / bundle.MANIFEST).read_bytes()
    folder = f"{manifest.name}/{manifest.version}"
    pushed = Pushed(
        url=f"{store.url}/{folder}",
        already=False,
        files=len(manifest.files),
        size_bytes=sum(file.size_bytes for file in manifest.files),
    )
    with _going_on():
        there = store.read(f"{folder}/{bundle.MANIFEST}", bundle.MAX_MANIFEST_BYTES)
        if there is None:
            claimed = _claim(store, folder, content)
            _upload(store, folder, path, manifest, claimed)
            config = path.parent / CONFIG
            if config.is_file():  # a store's own may have been changed there
                store.create(f"{manifest.name}/{CONFIG}", config.read_bytes())
            there = store.create(f"{folder}/{bundle.MANIFEST}", content)
            if there is None:
                log.info("published %s", pushed.url)
                return pushed
    if there != content:
        raise PublishError(
            f"{pushed.url} is another bundle already, {_shown(there)}, expected {_shown(content)}; "
            "a published version never changes: publish this one under a higher number"
        )
    return Pushed(pushed.url, True, pushed.files, pushed.size_bytes)


def set_alias(store: Remote, name: str, alias: str, number: int) -> int | None:
    """Point an alias of a model in a store at a version that is there.

    The file is read, changed and put back: who changes another alias in that moment may be lost,
    and this one is put back then.

    Returns:
        The version it pointed at before.

    Raises:
        PublishError: it is no alias, there is no such version, or the store cannot be written to.
    """
    if not aliases.ALIAS.fullmatch(alias):
        raise PublishError(f"{alias!r} is not an alias; expected lower-case letters and digits")
    with _going_on():
        version = f"{name}/{number}/{bundle.MANIFEST}"
        if store.read(version, bundle.MAX_MANIFEST_BYTES) is None:
            raise PublishError(f"{store.url}/{name} has no version {number} for {alias}")
        before = _aliases(store, name)
        for _ in range(ALIAS_TRIES):
            named = _aliases(store, name)
            if named.get(alias) == number:
                break
            text = json.dumps(dict(sorted({**named, alias: number}.items())), indent=1)
            store.replace(f"{name}/{aliases.ALIASES}", f"{text}\n".encode())
    return before.get(alias)


def _claim(store: Remote, folder: str, manifest: bytes) -> Entry | None:
    """Take a number for a bundle; return the claim of an earlier push of the same, if any.

    Raises:
        PublishError: it is taken for another bundle, or the store takes a number twice.
    """
    path = f"{folder}/{CLAIM}"
    claim = {
        "manifest_sha256": bundle.sha256(manifest),
        "host": socket.gethostname(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    mine = f"{json.dumps(claim, indent=1)}\n".encode()
    there = store.create(path, mine)
    if there is None:
        if store.create(path, mine) is None:
            raise PublishError(
                f"{store.url} creates a file that is there already; without conditional writes "
                "(If-None-Match) two publishers could take one number"
            )
        return None
    found = _fields(there)
    by = f"from {found.get('host')} at {found.get('at')}"
    if found.get("manifest_sha256") != claim["manifest_sha256"]:
        raise PublishError(
            f"{store.url}/{folder} is claimed for another bundle, {by}; publish this one under a "
            f"higher number, or remove all of {folder} there if nobody will end that push"
        )
    log.info("going on with a push %s", by)
    return store.list(folder).get(path)


def _upload(
    store: Remote,
    folder: str,
    path: Path,
    manifest: bundle_pb2.BundleManifest,
    claimed: Entry | None,
) -> None:
    """Upload what is not there since the claim was made; older files may be another bundle's."""
    there = store.list(folder) if claimed else {}
    for file in manifest.files:
        target = f"{folder}/{file.path}"
        if not _is_done(there, target, file.size_bytes, claimed):
            log.info("uploading %s, %d bytes", target, file.size_bytes)
            store.put(target, path / file.path)


def _is_done(there: Mapping[str, Entry], path: str, size_bytes: int, claimed: Entry | None) -> bool:
    entry = there.get(path)
    return (
        entry is not None
        and claimed is not None
        and entry.size_bytes == size_bytes
        and entry.changed_s >= claimed.changed_s > 0
    )


def _aliases(store: Remote, name: str) -> dict[str, int]:
    """Return a model's aliases in a store.

    Raises:
        PublishError: the file there is not one of aliases.
    """
    content = store.read(f"{name}/{aliases.ALIASES}", aliases.MAX_BYTES)
    found = _fields(content or b"{}")
    if not all(aliases.ALIAS.fullmatch(one) and type(to) is int for one, to in found.items()):
        raise PublishError(f"{store.url}/{name}/{aliases.ALIASES} is not a set of aliases; mend it")
    return found


def _fields(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {"": "damaged"}
    return found if isinstance(found, dict) else {"": "damaged"}


def _shown(manifest: bytes) -> str:
    return f"manifest sha256 {bundle.sha256(manifest)[:SHOWN]}…"


@contextmanager
def _going_on() -> Iterator[None]:
    """Say of a store that is lost that nothing is half done."""
    try:
        yield
    except RepositoryError as error:
        raise PublishError(
            f"{error}; no half of it is visible, and the same command goes on where this one ended"
        ) from error
