"""Bytes as golden.npz, signed in the manifest: the bundle is read, or refused in one sentence."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from service import bundle
from service.errors import BundleError
from tests.fuzz import mutate, signed
from tests.fuzz.promise import check_line, check_told


@contextlib.contextmanager
def running(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield what reads the bundle with other bytes as its golden set."""
    write = signed.writer(path, bundle.GOLDEN)

    def one(content: bytes) -> None:
        write(content)
        try:
            golden = bundle.read(path).golden
        except BundleError as error:
            check_line(str(error))
            check_told(str(error), content, path.parents[1])
        else:
            assert not any(
                array.dtype.hasobject
                for array in (golden.inputs, golden.outputs, golden.labels, golden.hostile_inputs)
            )

    yield one


def seeds(path: Path) -> list[bytes]:
    """Return the bundle's golden set."""
    return [(path / bundle.GOLDEN).read_bytes()]


def change(content: bytes, rng: random.Random, some: mutate.Bytes) -> bytes:
    """Change one array's file in the archive."""
    return mutate.zip_file(content, rng, some)
