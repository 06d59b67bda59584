"""Write files so that a crash leaves the old content or the new, never half of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BusyError


def shown(text: object) -> str:
    """Return a path or text fit to be printed and sent: what is not UTF-8 in it is escaped."""
    return str(text).encode(errors="backslashreplace").decode()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of the block name a path, which that of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, in words of its own
            raise OSError(f"{path} cannot be written: {error}") from error
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file's content at once, and have it on the disk before returning."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path), partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before returning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have everything below a folder on the disk before returning."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file; the system gives it back however this process ends.

    Raises:
        BusyError: another process holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(f"{path.parent} is in use by another run; wait for its end") from error
        yield


def is_locked(path: Path) -> bool:
    """Tell whether somebody holds a lock file; where there is none, none is made."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
