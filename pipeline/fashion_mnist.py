"""Find Fashion-MNIST and verify every byte of it.

Looks, in this order, in the folder it is told, its own cache, Debian's package, Keras' download
and, as root on Debian, apt. What counts is the SHA-256 of the decompressed IDX files: the gzip
files differ between the sources, their contents do not.
"""

import gzip
import hashlib
import logging
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import idx
from pipeline.errors import DatasetError

log = logging.getLogger(__name__)

NAME = "fashion-mnist"
LICENSE = "MIT"
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Of the decompressed files, whose order here is the order in the data set's own digest.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MAX_FILE_BYTES = 60_000 * 28 * 28 + 16  # the largest of the four, and its header
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
Files = Iterator[tuple[str, bytes]]  # name and verified content, decompressed, in SHA256's order
Source = tuple[str, Callable[[], Files]]


def keep(source: Path | None, folder: Path) -> None:
    """Have the four files in a folder, verified and unpacked.

    Args:
        source: the folder to take them from; None: `folder` itself, or else the usual places.
        folder: where they are kept.

    Raises:
        DatasetError: no source has them, or `source` has other files than these.
    """
    if source is not None:
        _keep(read_folder(source), folder)
    elif not is_cached(folder):
        find(folder, _sources())


def find(folder: Path, sources: tuple[Source, ...]) -> None:
    """Fill a folder from the first source that has the data.

    Raises:
        DatasetError: none has; says what became of each.
    """
    reasons = []
    for name, read in sources:
        log.info("looking for %s in %s", NAME, name)
        try:
            _keep(read(), folder)
        except DatasetError as error:
            reasons.append(f"{name}: {error}")
        else:
            log.info("found %s in %s, kept in %s", NAME, name, folder)
            return
    raise DatasetError(
        f"{NAME} was not found ({'; '.join(reasons)}); go online, or put its four files into a "
        "folder and name it with --data DIR or TRAIN_EXPORT_DATA"
    )


def _sources() -> tuple[Source, ...]:
    return (
        (str(DEBIAN_FOLDER), lambda: read_folder(DEBIAN_FOLDER)),
        ("Keras' download", _download_with_keras),
        (f"apt's {DEBIAN_PACKAGE}", lambda: install_with_apt(user=os.geteuid())),
    )


def is_cached(folder: Path) -> bool:
    """Tell whether a folder has all four files; one that is wrong is named and removed."""
    whole = True
    for name in SHA256:
        path = folder / name
        try:
            _verify(path, path.read_bytes())
        except FileNotFoundError:
            whole = False
        except DatasetError as error:
            log.warning("%s; it is fetched again", error)
            path.unlink()
            whole = False
    return whole


def verify_folder(folder: Path) -> None:
    """Read a folder's four files for nothing but their errors, in a second.

    Raises:
        DatasetError: one is missing or wrong, by name.
    """
    for _ in read_folder(folder):
        pass


def read_folder(folder: Path) -> Files:
    """Give the four files of a folder, packed or not, each verified.

    Raises:
        DatasetError: one is missing or wrong, by name.
    """
    for name in SHA256:
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.is_file():
            content = plain.read_bytes()
            _verify(plain, content)
        elif packed.is_file():
            content = _unpack(packed)
            _verify(packed, content)
        else:
            raise DatasetError(
                f"{folder} has neither {name} nor {name}.gz; other data than {NAME} are IDX files "
                "with data.kind=idx, or pictures in one subfolder a class"
            )
        yield name, content


def _unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            # One byte too many is enough to be refused, however much more there is.
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be unpacked: {error}; it is damaged") from error


def _verify(path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    expected = SHA256[path.name.removesuffix(".gz")]
    if digest != expected:
        raise DatasetError(
            f"{path} has {len(content)} bytes with sha256 {digest[:12]}…, expected "
            f"{expected[:12]}…; it is damaged or not a file of {NAME}; for other IDX files set "
            "data.kind=idx"
        )


def _keep(files: Files, folder: Path) -> None:
    """Write verified files, each under its own name only once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        partial = folder / f".{name}.{os.getpid()}"
        try:
            partial.write_bytes(content)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)


def _download_with_keras() -> Files:
    """Let Keras download its copy, which it does not verify."""
    from keras.datasets import fashion_mnist  # noqa: PLC0415  seconds, and seldom needed

    try:
        train, test = fashion_mnist.load_data()
    except Exception as error:
        # Keras raises a bare Exception when it cannot reach the address.
        raise DatasetError(f"it failed ({error})") from error
    yield from as_idx((*train, *test))


def as_idx(arrays: Iterable[NDArray[np.uint8]]) -> Files:
    """Write arrays as the IDX files they were read from, each verified.

    Args:
        arrays: train images, train labels, test images, test labels.

    Raises:
        DatasetError: one is not the file it should be.
    """
    for name, array in zip(SHA256, arrays, strict=True):
        content = idx.encode(array)
        _verify(Path(name), content)
        yield name, content


def install_with_apt(*, user: int) -> Files:
    """Install Debian's package and read it.

    Raises:
        DatasetError: `user` is not root (0), there is no apt, or it fails.
    """
    if user != 0 or shutil.which("apt-get") is None:
        raise DatasetError("it needs root on Debian or Ubuntu")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (("update",), ("install", "--yes", "--no-install-recommends", DEBIAN_PACKAGE)):
        done = subprocess.run(  # noqa: S603  fixed words
            ("apt-get", "--quiet", *step),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DatasetError(f"apt-get {step[0]} failed ({last})")
    yield from read_folder(DEBIAN_FOLDER)
