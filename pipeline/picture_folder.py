"""Read a folder of pictures: one subfolder a class, or `train` and `test` with one each."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import files, memory, pictures
from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.splits import Found, Split, hold_out

PARTS = ("train", "test")
SHOWN = 10  # of what cannot be read, by name
# How many pictures are read before anything else is done: those of so many bytes, which takes a
# second or two, and no fewer and no more than these.
TRIED_BYTES, TRIED, MOST_TRIED = 8 * 2**20, 30, 2000
# Of the square that pictures of several sizes are best made to fit: a multiple, at most so much.
SIDE, LARGEST_SIDE = 16, 128
CHANNELS = {"gray": 1, "rgb": 3}
MOST_IN_A_BYTE = 256


def is_one(folder: Path) -> bool:
    """Tell whether a folder has subfolders with pictures."""
    return any(pictures.is_picture(path) for sub in _subfolders(folder) for path in sub.rglob("*"))


def read(folder: Path, config: DataConfig) -> Found:
    """Read all pictures, in the order of their names.

    Raises:
        DatasetError: a class has none, some cannot be read (the first ten are named), or they have
            several sizes and `config` names none.
    """
    labels, parts = _parts(folder)
    both = [one for part in parts for one in part]
    images = _images([path for path, _ in both], config)
    targets = np.array([label for _, label in both])
    targets = targets.astype(np.uint8 if len(labels) <= MOST_IN_A_BYTE else np.int32)
    left = _left_out(folder, {path for path, _ in both})
    if len(parts) == 1:
        train, test = hold_out(Split(images, targets), config)
        return Found(train, test, labels, left)
    border = len(parts[0])
    train = Split(images[:border], targets[:border])
    return Found(train, Split(images[border:], targets[border:]), labels, left)


def verify(folder: Path, config: DataConfig) -> None:
    """Read pictures from all over a folder, all of them if they are few and small; keep nothing.

    Raises:
        DatasetError: as `read`, of these pictures.
    """
    _, parts = _parts(folder)
    paths = [path for part in parts for path, _ in part]
    _images(_spread(paths, _tried(paths)), config)


def _tried(paths: list[Path]) -> int:
    """Return how many pictures are read at a first look, by the sizes of a few files."""
    few = [path.stat().st_size for path in _spread(paths, TRIED)]
    return min(max(TRIED, TRIED_BYTES * len(few) // max(1, sum(few))), MOST_TRIED)


def _spread(paths: list[Path], most: int) -> list[Path]:
    return paths[:: -(-len(paths) // most)]


def _parts(folder: Path) -> tuple[tuple[str, ...], list[list[tuple[Path, int]]]]:
    """Return the classes, and every picture with its class: of training, then of the test."""
    homes = [folder / part for part in PARTS]
    if not all(home.is_dir() for home in homes):
        homes = [folder]
    labels = tuple(one.name for one in _subfolders(homes[0]))
    strange = [files.shown(one) for one in labels if one != files.shown(one)]
    if strange:
        raise DatasetError(
            f"{files.shown(homes[0])} has classes whose names are not UTF-8: "
            f"{', '.join(strange[:SHOWN])}; rename these folders"
        )
    parts = [_files(home, labels) for home in homes]
    _each_has_some(homes[0], labels, parts[0])
    return labels, parts


def _subfolders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    """Return those of a class; what begins with a dot is another system's notes."""
    found = folder.rglob("*")
    return sorted(one for one in found if not one.name.startswith(".") and pictures.is_picture(one))


def _files(home: Path, labels: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return every picture of a part with its class."""
    unknown = [one.name for one in _subfolders(home) if one.name not in labels]
    if unknown:
        raise DatasetError(
            f"{files.shown(home)} has classes that {PARTS[0]} lacks: "
            f"{files.shown(', '.join(unknown[:SHOWN]))}; add training pictures of them, or move "
            "them away"
        )
    return [(path, at) for at, label in enumerate(labels) for path in _pictures(home / label)]


def _each_has_some(home: Path, labels: tuple[str, ...], found: list[tuple[Path, int]]) -> None:
    there = {label for _, label in found}
    empty = [label for at, label in enumerate(labels) if at not in there]
    if empty or not labels:
        raise DatasetError(
            f"{files.shown(home)} has no PNG or JPEG file in "
            f"{', '.join(empty[:SHOWN]) or 'any subfolder'}; expected one subfolder a class with "
            "pictures in each"
        )


def _images(paths: list[Path], config: DataConfig) -> NDArray[np.uint8]:
    """Read all, then refuse if there is a reason; gray ones become RGB beside coloured ones."""
    read: list[Image.Image] = []
    refusals: list[str] = []
    sizes: list[tuple[int, int]] = []
    odd: Path | None = None
    size = config.size
    for path in paths:
        try:
            picture = pictures.read(path, CHANNELS.get(config.colour))
        except DatasetError as error:
            refusals.append(files.shown(error))
            continue
        own = picture.height, picture.width
        sizes.append(own)
        size = size or own
        if config.size is None and own != size:
            odd = odd or path
            continue
        memory.check("the folder of pictures", size[0] * size[1] * len(picture.mode) * len(paths))
        read.append(pictures.fit(picture, *size))
    if refusals or odd:
        more = len(refusals) - SHOWN
        also = f"{more} more cannot be read" if more > 0 else ""
        several = _several_sizes(odd, sizes) if odd else ""
        raise DatasetError("; ".join(filter(None, (*refusals[:SHOWN], also, several))))
    mode = "RGB" if any(one.mode == "RGB" for one in read) else "L"
    return np.stack([pictures.pixels(one.convert(mode)) for one in read])


def _several_sizes(path: Path, sizes: list[tuple[int, int]]) -> str:
    """Name the first picture that has another size than the first, and a size for all."""
    own = next(size for size in sizes if size != sizes[0])
    median = float(np.median(sizes))
    side = min(max(round(median / SIDE), 1) * SIDE, LARGEST_SIDE)
    return (
        f"{files.shown(path)} is {own[0]} x {own[1]} (height x width), those before it are "
        f"{sizes[0][0]} x {sizes[0][1]}; set data.size to have all made to fit, such as "
        f"--set 'data.size=[{side},{side}]'"
    )


def _left_out(folder: Path, taken: set[Path]) -> tuple[str, ...]:
    left = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path not in taken and not path.name.startswith(".")
    )
    if not left:
        return ()
    names = files.shown(", ".join(str(path.relative_to(folder)) for path in left[:3]))
    return (
        f"files that are no PNG or JPEG of a class were left out: {len(left)}, such as {names}",
    )
