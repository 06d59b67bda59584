"""Find Fashion-MNIST, verify every byte of it, and fix the splits.

Looks, in this order, in the folder it is told, its own cache, Debian's package, Keras' download
and, as root on Debian, apt. What counts is the SHA-256 of the decompressed IDX files: the gzip
files differ between the sources, their contents do not.
"""

import gzip
import hashlib
import logging
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.records import Dataset

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
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes in 3 dimensions, in 1
IMAGES_HEADER_BYTES, LABELS_HEADER_BYTES = 16, 8
MAX_FILE_BYTES = 60_000 * 28 * 28 + IMAGES_HEADER_BYTES  # the largest of the four
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
Files = Iterator[tuple[str, bytes]]  # name and verified content, decompressed, in SHA256's order
Source = tuple[str, Callable[[], Files]]


@dataclass(frozen=True, slots=True)
class Split:
    """What goes in and what should come out, row by row.

    For a classifier inputs are images, uint8 (rows, height, width, channels) with values 0 to 255,
    and targets are classes, whole numbers (rows,). Else inputs are float32 (rows, …) and targets
    float32 (rows, …).
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts; `test` never takes part in training or in choosing a model."""

    train: Split
    validation: Split
    test: Split


def prepare(config: DataConfig, cache: Path | None = None) -> Dataset:
    """Find the data, verify them and keep them decompressed in the cache.

    Args:
        config: where to look and how to split.
        cache: folder to keep them in; None: the user's cache folder.

    Raises:
        DatasetError: no source has them, or the folder of `config` has other files than these.
    """
    folder = (cache or platformdirs.user_cache_path("train-export")) / NAME
    if config.source is not None:
        _keep(read_folder(config.source), folder)
    elif not is_cached(folder):
        find(folder, _sources())
    labels = _labels((folder / "train-labels-idx1-ubyte").read_bytes())
    train, validation = split(labels, config)
    return Dataset(
        name=NAME,
        folder=folder,
        sha256=_digest(folder),
        license=LICENSE,
        labels=LABELS,
        train_rows=len(train),
        validation_rows=len(validation),
        test_rows=len(_labels((folder / "t10k-labels-idx1-ubyte").read_bytes())),
        validation_share=config.validation_share,
        split_seed=config.split_seed,
    )


def load(dataset: Dataset) -> Splits:
    """Read the prepared images into memory.

    Raises:
        DatasetError: they changed on disk since they were prepared.
    """
    if _digest(dataset.folder) != dataset.sha256:
        raise DatasetError(f"{dataset.folder} changed during the run; start it again")
    images, test_images, labels, test_labels = (
        decode((dataset.folder / name).read_bytes())
        for decode, name in (
            (_images, "train-images-idx3-ubyte"),
            (_images, "t10k-images-idx3-ubyte"),
            (_labels, "train-labels-idx1-ubyte"),
            (_labels, "t10k-labels-idx1-ubyte"),
        )
    )
    train, validation = split(
        labels,
        DataConfig(
            validation_share=dataset.validation_share,
            split_seed=dataset.split_seed,
            max_train_rows=dataset.train_rows,
        ),
    )
    return Splits(
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(test_images, test_labels),
    )


def write_examples(dataset: Dataset, folder: Path) -> Path:
    """Write the first test image of every class as `LABEL.png`, to ask a server about.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    test = load(dataset).test
    for index, label in enumerate(dataset.labels):
        first = int(np.flatnonzero(test.targets == index)[0])
        name = re.sub("[^a-z]+", "-", label.lower())
        Image.fromarray(test.inputs[first, ..., 0]).save(folder / f"{name}.png")
    return folder


def split(
    labels: NDArray[np.uint8], config: DataConfig
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Divide the training images, the same share of every class on either side.

    Returns:
        Positions of the training and of the validation images, each rising. The same labels and
        settings always give the same positions.
    """
    random = np.random.default_rng(config.split_seed)
    train: list[NDArray[np.intp]] = []
    validation: list[NDArray[np.intp]] = []
    for label in np.unique(labels):
        mine = random.permutation(np.flatnonzero(labels == label))
        border = round(len(mine) * config.validation_share)
        validation.append(mine[:border])
        train.append(mine[border:])
    kept = random.permutation(np.concatenate(train))[: config.max_train_rows]
    return np.sort(kept), np.sort(np.concatenate(validation))


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
            raise DatasetError(f"{folder} has neither {name} nor {name}.gz")
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
            f"{expected[:12]}…; it is damaged or not a file of {NAME}"
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
        magic = IMAGES_MAGIC if "images" in name else LABELS_MAGIC
        content = struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()
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


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SHA256:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _images(content: bytes) -> NDArray[np.uint8]:
    _, rows, height, width = struct.unpack_from(">4I", content)
    flat = np.frombuffer(content, np.uint8, offset=IMAGES_HEADER_BYTES)
    return flat.reshape(rows, height, width, 1)


def _labels(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8, offset=LABELS_HEADER_BYTES)
