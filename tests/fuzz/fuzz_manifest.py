"""Bytes as manifest.json: the bundle is read, or refused in one sentence."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from service import bundle
from service.errors import BundleError
from tests.fuzz import mutate
from tests.fuzz.promise import check_line, check_told

SHORT = b'{"format": 1, "name": "tiny", "version": "1", "files": [], "labels": ["\\u00e4"]}'


@contextlib.contextmanager
def running(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield what reads the bundle with other bytes as its manifest."""

    def one(content: bytes) -> None:
        (path / bundle.MANIFEST).write_bytes(content)
        try:
            bundle.read(path)
        except BundleError as error:
            check_line(str(error))
            check_told(str(error), content, path.parents[1])

    yield one


def seeds(path: Path) -> list[bytes]:
    """Return a whole manifest and a short one."""
    return [(path / bundle.MANIFEST).read_bytes(), SHORT]


def change(content: bytes, rng: random.Random, some: mutate.Bytes) -> bytes:
    """Change a manifest's values."""
    return mutate.json_text(content, rng)
