"""A folder behind a URL: what is in it, and how a file gets there whole, or only if it is absent.

The only module that knows fsspec, which it imports at the first use. What the files mean is for
`service.mirror`, which reads them, and `pipeline.push`, which writes them.
"""

import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from service.errors import RepositoryError, SettingsError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Stores that create a file only if it is absent; what is imported for each, and brings it.
SCHEMES = {
    "file": ("fsspec", "fsspec"),
    "s3": ("s3fs", "train-export[s3]"),
    "gs": ("gcsfs", "train-export[gcs]"),
}
STAMPS = ("size", "ETag", "etag", "generation", "LastModified", "updated", "mtime", "ino")
CHANGED = ("LastModified", "mtime", "updated")
QUERY = re.compile(r"\?[^\s\"']*")
MAX_SAID_CHARACTERS = 200
MAX_SMALL_BYTES = 8 << 20  # of what is created if it is absent
PIECE_BYTES = 8 << 20
CREATE_TRIES = 4  # a store may refuse one of two at once and have neither
CREATE_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the folder, as the store lists it."""

    size_bytes: int
    stamp: str  # another one: the file may have been replaced
    changed_s: float  # when it was put there, by the store's clock; 0 where it does not say


def connect(url: str) -> "Remote":
    """Return the folder behind a URL; nothing is asked of the store yet.

    Args:
        url: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER.

    Raises:
        SettingsError: it is no such URL, or what reads it is not installed.
    """
    match = URL.fullmatch(url)
    scheme, place = match.groups() if match else ("", url)
    if "@" in place:
        raise SettingsError(
            f"an address of {scheme}:// with an @ in it may hold a secret; leave that to the "
            "store's own variables, such as AWS_ACCESS_KEY_ID"
        )
    if scheme not in SCHEMES:
        raise SettingsError(
            f"{url} is not an address of bundles; expected s3://BUCKET/FOLDER, "
            "gs://BUCKET/FOLDER, file:///FOLDER"
        )
    if not place.strip("/") or (scheme == "file") != place.startswith("/"):
        raise SettingsError(
            f"{url} names no folder; expected such as {scheme}://{_example(scheme)}"
        )
    library, package = SCHEMES[scheme]
    if importlib.util.find_spec(library) is None:
        raise SettingsError(
            f"{scheme}:// needs {library}, which is not installed; pip install '{package}'"
        )
    return Remote(f"{scheme}://{place.rstrip('/')}")


class Remote:
    """A folder behind a URL. Paths are relative to it; every method asks the store and may block.

    All of them raise RepositoryError where the store cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def list(self, below: str = "") -> dict[str, Entry]:
        """Return every file below the folder, or below one in it, by its path."""
        # Without it a folder that cannot be read would look empty.
        strict = {"on_error": "raise"} if self._is_local else {}
        with self._sentences("listed"):
            found = self._files.find(self._path(below), detail=True, **strict)
        start = len(self._root) + 1
        return {
            path[start:]: _entry(info)
            for path, info in found.items()
            if info["type"] == "file" and path.startswith(f"{self._root}/")
        }

    def read(self, path: str, max_bytes: int) -> bytes | None:
        """Return a file's content; None where there is no file.

        Raises:
            RepositoryError: also where it has more than `max_bytes`.
        """
        with self._sentences("read", path):
            try:
                with self._opened(path) as file:
                    content: bytes = file.read(max_bytes + 1)
            except FileNotFoundError:
                return None
        if len(content) > max_bytes:
            raise RepositoryError(f"{self.url}/{path} has over {max_bytes} bytes")
        return content

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield a file's content, a few MiB at a time."""
        with self._sentences("read", path), self._opened(path) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def put(self, path: str, source: Path) -> None:
        """Put a file of this host there, whole or not at all; what was there is replaced."""
        with self._sentences("written", path):
            if self._is_local:
                with _beside(Path(self._path(path)), source) as partial:
                    partial.replace(self._path(path))
            else:
                self._files.put_file(str(source), self._path(path))

    def replace(self, path: str, content: bytes) -> None:
        """Put a small file there, in the place of the one that may be there."""
        with self._sentences("written", path):
            if self._is_local:
                with _beside(Path(self._path(path)), content) as partial:
                    partial.replace(self._path(path))
            else:
                self._files.pipe_file(self._path(path), content)

    def create(self, path: str, content: bytes) -> bytes | None:
        """Put a small file there if there is none; of several who try, one does.

        Returns:
            None if it did; else what is there. A request whose answer was lost is sent again, so
            that what is there may be what this call has put there.
        """
        for tries_left in reversed(range(CREATE_TRIES)):
            try:
                with self._sentences("created", path):
                    self._create(self._path(path), content)
            except RepositoryError:  # each store refuses in its own words: look what is there
                there = self.read(path, MAX_SMALL_BYTES)
                if there is not None:
                    return there
                if not tries_left:
                    raise
                time.sleep(CREATE_PAUSE_S)
            else:
                break
        return None

    def _create(self, path: str, content: bytes) -> None:
        if self._is_local:
            with _beside(Path(path), content) as partial:
                os.link(partial, path)  # a reader sees it whole, and a second one is refused
        else:
            self._files.pipe_file(path, content, mode="create")

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec  # noqa: PLC0415  only for who has a URL

        # What others have written since must be seen.
        files, root = fsspec.core.url_to_fs(
            self.url, use_listings_cache=False, skip_instance_cache=True
        )
        return files, root.rstrip("/")

    @property
    def _files(self) -> Any:  # noqa: ANN401  a file system of fsspec, which has no types
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    @property
    def _is_local(self) -> bool:
        return self.url.startswith("file:")

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _opened(self, path: str) -> Any:  # noqa: ANN401
        return self._files.open(self._path(path), "rb", cache_type="none")

    @contextmanager
    def _sentences(self, done: str, path: str = "") -> Iterator[None]:
        """Say what could not be done where; stores' libraries raise all kinds of errors."""
        try:
            yield
        except RepositoryError:
            raise
        except Exception as error:
            where = f"{self.url}/{path}".rstrip("/")
            raise RepositoryError(f"{where} cannot be {done}: {_reason(error)}") from error


def _example(scheme: str) -> str:
    return "/FOLDER" if scheme == "file" else "BUCKET/FOLDER"


def _entry(info: Mapping[str, Any]) -> Entry:
    changed = next((info[key] for key in CHANGED if info.get(key)), 0.0)
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    return Entry(
        size_bytes=int(info["size"] or 0),
        stamp=" ".join(str(info.get(key, "")) for key in STAMPS),
        changed_s=changed.timestamp() if isinstance(changed, datetime) else float(changed),
    )


@contextmanager
def _beside(target: Path, content: bytes | Path) -> Iterator[Path]:
    """Write a hidden file in the target's folder; what is left of it in the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        prefix=f".{target.name}.", dir=target.parent, delete=False
    ) as file:
        partial = Path(file.name)
        try:
            if isinstance(content, Path):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Return what a library says, in one line and without what it asked for."""
    said = QUERY.sub("", str(error)).strip().partition("\n")[0] or type(error).__name__
    return said if len(said) <= MAX_SAID_CHARACTERS else f"{said[:MAX_SAID_CHARACTERS]}…"
