"""Keep a folder of this host like a repository behind a URL, so that it can be served from there.

A version is copied once its manifest.json is there: what the manifest lists and nothing else, into
a hidden folder that is renamed when every file was what the manifest says. Which versions are
served is for `service.repository`, which reads the copies as any other folder.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from protos import bundle_pb2
from service import aliases, bundle, remote
from service.aliases import ALIASES, CHAMPION
from service.errors import BundleError, RepositoryError
from service.model_config import CONFIG, MAX_CONFIG_BYTES
from service.remote import Entry, Remote
from service.settings import Settings

log = logging.getLogger(__name__)
LOCK = ".lock"
HIDDEN = ".copy-"  # of what is being copied, or removed
START_S = 60.0  # a store that cannot be reached is waited for, where there is no copy to serve
PAUSE_S = 2.0
MAX_NAME_BYTES = 255  # of one file, on most file systems
STOP_S = 1.0  # for a copy in progress to notice that it is over
Files = Mapping[str, Entry]


class Mirror:
    """Copies of the versions behind a URL, in a folder.

    `look` may block for long. Several processes may keep one folder; they take turns.
    """

    def __init__(self, source: Remote, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._stamps: dict[str, str] = {}  # of the store's files that the copies are like
        self._refused: dict[str, str] = {}  # versions that are not what they should be
        self._notes: dict[str, str] = {}

    def look(self, until: Callable[[], bool] = lambda: False) -> None:
        """Copy what is new and remove what is gone; what is refused is logged.

        A store that has become empty changes nothing: a lost one may look like that.

        Args:
            until: asked before each version; true ends it there.

        Raises:
            RepositoryError: the store cannot be read, or the folder cannot be written to; whatever
                can be copied all the same is.
        """
        with self._alone():
            files = self._source.list()
            found = published(files)
            lost = not found and not self.is_empty()
            self._note("", f"{self._source.url} is empty; the copies of it stay" if lost else "")
            if lost:
                return
            troubles = []
            for step in self._steps(found, files):
                if until():
                    return
                try:
                    step()
                except RepositoryError as error:
                    troubles.append(error)
            self._remove_gone(found)
            if troubles:
                raise troubles[0]

    def reach(self) -> None:
        """Ask the store once.

        Raises:
            RepositoryError: it cannot be read.
        """
        self._source.list()

    def is_empty(self) -> bool:
        """Tell whether there is no copy."""
        return not any(self._copies())

    def _steps(
        self, found: Mapping[str, Mapping[int, Files]], files: Files
    ) -> Iterator[Callable[[], None]]:
        """Yield what makes the folder like the store; of each model the highest version first."""
        for name, versions in sorted(found.items()):
            yield partial(self._copy_small, f"{name}/{CONFIG}", files, MAX_CONFIG_BYTES)
            yield partial(self._copy_aliases, name, versions, files)
            for number in sorted(versions, reverse=True):
                yield partial(self._copy_version, name, number, versions[number])

    def _copy_aliases(self, name: str, versions: Mapping[int, Files], files: Files) -> None:
        """Copy a model's aliases, after its champion: no other is to answer in its place."""
        path = f"{name}/{ALIASES}"
        entry = files.get(path)
        if entry and entry.size_bytes <= aliases.MAX_BYTES and not self._is_like(path, entry):
            with self._hidden() as hidden:
                (hidden / name).mkdir()
                content = self._source.read(path, aliases.MAX_BYTES)
                (hidden / path).write_bytes(content or b"{}")
                try:
                    champion = aliases.read(hidden / name).get(CHAMPION)
                except BundleError:  # said by who serves it
                    champion = None
            if champion is not None and champion in versions:
                self._copy_version(name, champion, versions[champion])
        self._copy_small(path, files, aliases.MAX_BYTES)

    def _copy_small(self, path: str, files: Files, max_bytes: int) -> None:
        """Copy a file that may change, at once and whole; or remove it."""
        entry, copy = files.get(path), self._folder / path
        if entry is None:
            copy.unlink(missing_ok=True)
            return
        if self._is_like(path, entry):
            return
        large = entry.size_bytes > max_bytes
        self._note(path, f"{path} has over {max_bytes} bytes; it is not copied" if large else "")
        content = None if large else self._source.read(path, max_bytes)
        if content is None:
            return
        with self._hidden() as hidden:
            (hidden / copy.name).write_bytes(content)
            copy.parent.mkdir(exist_ok=True)
            (hidden / copy.name).replace(copy)
        self._stamps[path] = entry.stamp

    def _copy_version(self, name: str, number: int, files: Files) -> None:
        """Have a version here, or refuse it until one of its files is another."""
        folder = f"{name}/{number}"
        path, entry = f"{folder}/{bundle.MANIFEST}", files[bundle.MANIFEST]
        stamps = " ".join(f"{file} {one.stamp}" for file, one in sorted(files.items()))
        if self._is_like(path, entry) or self._refused.get(folder) == stamps:
            return
        try:
            manifest, content = self._manifest(name, number, files)
            if not self._has(folder, manifest, content):
                self._fetch(folder, manifest, content)
        except BundleError as error:
            self._refused[folder] = stamps
            log.warning("version not copied: %s", error, extra={"model": name, "version": number})
            return
        self._refused.pop(folder, None)
        self._stamps[path] = entry.stamp

    def _manifest(
        self, name: str, number: int, files: Files
    ) -> tuple[bundle_pb2.BundleManifest, bytes]:
        """Read a manifest whose files are all there, with their sizes.

        Raises:
            BundleError: it is none, of another bundle, or lists what is not there or leaves it.
        """
        source = f"{name}/{number}/{bundle.MANIFEST}"
        if files[bundle.MANIFEST].size_bytes > bundle.MAX_MANIFEST_BYTES:
            raise BundleError(f"{source} has over {bundle.MAX_MANIFEST_BYTES} bytes")
        content = self._source.read(source, bundle.MAX_MANIFEST_BYTES)
        if content is None:
            raise BundleError(f"{source} was removed")
        manifest = bundle.parse_manifest(content, source)
        if (manifest.name, manifest.version) != (name, number):
            raise BundleError(f"{source} is of {manifest.name} version {manifest.version}")
        paths = {file.path for file in manifest.files}
        folders = {str(one) for path in paths for one in PurePosixPath(path).parents}
        if len(paths) < len(manifest.files) or paths & folders:
            raise BundleError(f"{source} lists a file twice, or inside another")
        for file in manifest.files:
            if not _stays_inside(file.path):
                raise BundleError(f"{source} lists {file.path[:200]!r}, which leaves the bundle")
            there = files.get(file.path)
            if there is None or there.size_bytes != file.size_bytes:
                size = f"has {there.size_bytes} bytes" if there else "is missing"
                raise BundleError(
                    f"{name}/{number}/{file.path} {size}, expected {file.size_bytes} bytes"
                )
        return manifest, content

    def _has(self, folder: str, manifest: bundle_pb2.BundleManifest, content: bytes) -> bool:
        """Tell whether the copy that is here, of an earlier process perhaps, is this bundle."""
        copy = self._folder / folder
        try:
            return (copy / bundle.MANIFEST).read_bytes() == content and all(
                bundle.file_sha256(copy / file.path) == file.sha256 for file in manifest.files
            )
        except OSError:
            return False

    def _fetch(self, folder: str, manifest: bundle_pb2.BundleManifest, content: bytes) -> None:
        copy = self._folder / folder
        with self._hidden() as hidden:
            new, old = hidden / "new", hidden / "old"
            new.mkdir()
            for file in manifest.files:
                self._fetch_file(f"{folder}/{file.path}", file, new / file.path)
            (new / bundle.MANIFEST).write_bytes(content)
            copy.parent.mkdir(exist_ok=True)
            if copy.exists():
                copy.rename(old)
            new.rename(copy)
        size = sum(file.size_bytes for file in manifest.files)
        log.info("version copied: %s, %d bytes from %s", folder, size, self._source.url)

    def _fetch_file(self, path: str, file: bundle_pb2.File, target: Path) -> None:
        """Copy one file and verify what was written; never more than its size.

        Raises:
            BundleError: it is not what the manifest says.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, left_bytes = hashlib.sha256(), file.size_bytes
        with target.open("xb") as copy:
            for piece in self._source.pieces(path):
                left_bytes -= len(piece)
                if left_bytes < 0:
                    break
                digest.update(piece)
                copy.write(piece)
        if left_bytes or digest.hexdigest() != file.sha256:
            raise BundleError(
                f"{path} in {self._source.url} is not what {bundle.MANIFEST} says: its size or "
                "its sha256 is another; publish it again under a new number"
            )

    def _remove_gone(self, found: Mapping[str, Mapping[int, Files]]) -> None:
        """Remove copies of what the store no longer has; each disappears at once."""
        for copy in self._copies():
            name, number = copy.parent.name, int(copy.name)
            if number not in found.get(name, {}):
                with self._hidden() as hidden:
                    copy.rename(hidden / copy.name)
                self._stamps.pop(f"{name}/{number}/{bundle.MANIFEST}", None)
                log.info("version removed: %s/%d is gone from %s", name, number, self._source.url)
        for model in self._folder.iterdir():
            if model.is_dir() and bundle.NAME.fullmatch(model.name) and model.name not in found:
                shutil.rmtree(model)

    def _copies(self) -> Iterator[Path]:
        for path in self._folder.glob("*/*"):
            if bundle.NAME.fullmatch(path.parent.name) and bundle.VERSION.fullmatch(path.name):
                yield path

    def _is_like(self, path: str, entry: Entry) -> bool:
        return self._stamps.get(path) == entry.stamp and (self._folder / path).exists()

    def _note(self, topic: str, message: str) -> None:
        """Log a lasting trouble once, and not at every look; empty: it is over."""
        if message and self._notes.get(topic) != message:
            log.warning("%s", message)
        self._notes[topic] = message

    @contextmanager
    def _hidden(self) -> Iterator[Path]:
        """Give a folder that no reader looks into; what is in it in the end is removed."""
        with tempfile.TemporaryDirectory(prefix=HIDDEN, dir=self._folder) as hidden:
            yield Path(hidden)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only process that writes to the folder; remove what one left that was killed."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in self._folder.glob(f"{HIDDEN}*"):
                    shutil.rmtree(left)
                yield
        except OSError as error:
            full = ", the disk is full" if error.errno == errno.ENOSPC else ""
            raise RepositoryError(
                f"the folder of copies {self._folder} cannot be written to: "
                f"{error.strerror}{full}; name another with --cache"
            ) from error


def published(files: Files) -> dict[str, dict[int, dict[str, Entry]]]:
    """Return the files of each version that has a manifest, by name and number."""
    versions: dict[tuple[str, str], dict[str, Entry]] = {}
    for path, entry in files.items():
        name, _, rest = path.partition("/")
        number, _, file = rest.partition("/")
        if file and bundle.NAME.fullmatch(name) and bundle.VERSION.fullmatch(number):
            versions.setdefault((name, number), {})[file] = entry
    found: dict[str, dict[int, dict[str, Entry]]] = {}
    for (name, number), own in versions.items():
        if bundle.MANIFEST in own:
            found.setdefault(name, {})[int(number)] = own
    return found


def folder_of(settings: Settings) -> Path:
    """Return where the copies of a repository behind a URL are kept: one folder a URL."""
    url = str(settings.repository)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", url)[:80].strip("-.")
    name = f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    return (settings.cache or _user_cache() / "train-export" / "repositories") / name


@contextmanager
def mirrored(settings: Settings, *, wait_s: float = START_S) -> Iterator[Settings]:
    """Give the same settings with a folder of this host, kept like the URL while the block runs.

    Where there are copies, they are served at once, whatever the store does. Where there are
    none, or nothing will look again, the store is waited for.

    Args:
        settings: with a URL.
        wait_s: longest time for a store that cannot be read.

    Raises:
        SettingsError: the URL, or what is installed, cannot work.
        RepositoryError: there is no copy, and the store could not be read.
    """
    source, folder = remote.connect(str(settings.repository)), folder_of(settings)
    mirror, over = Mirror(source, folder), threading.Event()
    polls = settings.model_control != "none"
    if mirror.is_empty() or settings.model_control != "poll":
        ask = mirror.reach if settings.model_control == "poll" else mirror.look
        _insist(ask, mirror, wait_s if mirror.is_empty() else 0.0)
    keeper = threading.Thread(
        target=_keep, args=(mirror, source.url, settings.poll_s, over), daemon=True
    )
    if polls:
        keeper.start()
    log.info("copies of %s are kept in %s", source.url, folder)
    try:
        yield replace(settings, repository=folder)
    finally:
        over.set()
        if polls:
            keeper.join(STOP_S)


def _insist(ask: Callable[[], None], mirror: Mirror, wait_s: float) -> None:
    """Ask until it works or the time is over, which is no trouble where there are copies."""
    until_s = time.monotonic() + wait_s
    said = ""
    while True:
        try:
            ask()
        except RepositoryError as error:
            if time.monotonic() >= until_s:
                if mirror.is_empty():
                    raise
                log.warning("%s; the copies of it are served", error)
                return
            if str(error) != said:
                log.warning("%s; trying again for up to %g s", error, wait_s)
            said = str(error)
            time.sleep(PAUSE_S)
        else:
            return


def _keep(mirror: Mirror, url: str, poll_s: float, over: threading.Event) -> None:
    """Look again and again; a trouble that lasts is logged once."""
    said = ""
    while not over.is_set():
        try:
            mirror.look(over.is_set)
        except RepositoryError as error:
            if str(error) != said:
                log.warning("%s; what was copied is still served", error)
            said = str(error)
        except Exception:
            log.exception("%s could not be looked at; what was copied is still served", url)
        else:
            if said:
                log.info("%s can be read again", url)
            said = ""
        over.wait(poll_s)


def _stays_inside(path: str) -> bool:
    """Tell whether a manifest's path is plainly of a file below the bundle."""
    plain = PurePosixPath(path)
    return (
        0 < len(path) <= bundle.MAX_PATH_CHARACTERS
        and path.isprintable()
        and plain.as_posix() == path
        and not plain.is_absolute()
        and all(part != ".." and len(part.encode()) <= MAX_NAME_BYTES for part in plain.parts)
        and path not in {".", bundle.MANIFEST}
    )


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~")  # noqa: PTH111  pathlib's raises where there is no home
    if os.path.isabs(given):  # noqa: PTH117
        return Path(given)
    return Path(home) / ".cache" if home != "~" else Path(tempfile.gettempdir())
