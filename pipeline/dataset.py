"""Bring the data that a run learns from into one form, checked, and fix the splits.

Whatever the source, what is kept is four IDX files in a folder of the cache: training inputs and
targets, test inputs and targets. `fashion_mnist`, `picture_folder` and `npz` read the sources.
"""

import difflib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import ArrayLike
from PIL import Image

from pipeline import (
    arrays,
    data_checks,
    duplicates,
    fashion_mnist,
    files,
    idx,
    npz,
    picture_folder,
    pictures,
)
from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.records import Dataset
from pipeline.splits import Found, Split, Splits, hold_out, split

__all__ = ["Split", "Splits", "from_arrays", "load", "prepare", "verify", "write_examples"]

log = logging.getLogger(__name__)

LINE = "line"
ABOUT = "dataset.json"  # written last; a folder without it is not whole
NAMES = "labels.txt"  # beside IDX files: the classes' names, one a line
EXPECTED = "expected a folder of pictures, one subfolder a class, or of IDX files, or an .npz"
MAX_EXAMPLES = 20
MAX_LETTERS = 60  # of a file's name; one of four bytes each stays below the 255 bytes it may have
Pair = tuple[ArrayLike, ArrayLike]


def prepare(config: DataConfig, cache: Path | None = None) -> Dataset:
    """Find the data, check them, and keep them as IDX files in the cache.

    A source that has not changed since is not read again.

    Args:
        config: what they are, where they are, and how to split them.
        cache: folder to keep them in; None: the user's cache folder.

    Raises:
        DatasetError: they are not there, cannot be read, are not those they should be, or cannot
            be learnt from.
    """
    kind = _kind(config)
    _refuse_source(config)
    home = _home(cache)
    if kind == "fashion-mnist":
        folder = home / fashion_mnist.NAME
        fashion_mnist.keep(config.source, folder)
        return _described(folder, fashion_mnist.NAME, fashion_mnist.LABELS, (), config)
    if kind == LINE:
        return _kept(_line(), config.name or LINE, replace(config, validation_share=0.0), home)
    source = _there(config, kind)
    name = config.name or (source.stem if source.is_file() else source.resolve().name)
    key = _key(kind, _content(source), config)
    folder = _folder(home, name, key)
    if not _is_whole(folder):
        log.info("reading %s from %s", kind, files.shown(source))
        read = {"idx": _idx, "npz": npz.read, "pictures": picture_folder.read}[kind]
        _keep(_named(read(source, config)), folder)
    return _from_cache(folder, name, config)


def from_arrays(
    train: Pair,
    test: Pair | None = None,
    *,
    labels: Sequence[str] = (),
    name: str = "arrays",
    config: DataConfig | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Keep arrays as a data set, checked.

    Args:
        train: inputs and targets. Images (rows, height, width) or with channels, whole values 0 to
            255, with classes (rows,), whole numbers from 0; or any numbers (rows, …) with floats
            (rows,) or (rows, outputs).
        test: the same, never trained on; None: `config.test_share` of `train`.
        labels: of the classes, in their order; empty: their numbers.
        name: of the data.
        config: how to split them; its `kind` and `source` mean nothing here.
        cache: folder to keep them in; None: the user's cache folder.

    Raises:
        DatasetError: they do not fit together, or cannot be learnt from.
    """
    config = config or DataConfig()
    classify = arrays.is_classes(train[1])
    rows = arrays.rows(*train, "training", classify=classify)
    if test is None:
        rows, rest = hold_out(rows, config)
    else:
        rest = arrays.rows(*test, "test", classify=classify)
    return _kept(Found(rows, rest, tuple(labels)), name, config, _home(cache))


def verify(config: DataConfig) -> None:
    """Look at a source for nothing but the errors that a second will find.

    Raises:
        DatasetError: it is not there, or is not what it should be.
    """
    kind = _kind(config)
    _refuse_source(config)
    if kind == "fashion-mnist" and config.source is not None:
        fashion_mnist.verify_folder(config.source)
    elif kind not in {"fashion-mnist", LINE}:
        source = _there(config, kind)
        if kind == "pictures":
            picture_folder.verify(source, config)
        elif kind == "idx":
            for part in idx.PARTS:
                idx.find(source, part)


def told(dataset: Dataset) -> Dataset:
    """Log what was noticed in data before training, a line each, and return their record."""
    for one in dataset.findings:
        log.warning("noticed in %s: %s", dataset.name, one)
    return dataset


def load(dataset: Dataset) -> Splits:
    """Read the prepared rows into memory.

    Raises:
        DatasetError: they changed on disk since they were prepared.
    """
    try:
        unchanged = _digest(dataset.folder) == dataset.sha256
    except (OSError, DatasetError):
        unchanged = False
    if not unchanged:
        raise DatasetError(f"{dataset.folder} changed during the run; start it again")
    found = _read(dataset.folder, dataset.labels)
    train, validation = split(
        found.train.targets,
        DataConfig(
            validation_share=dataset.validation_share,
            split_seed=dataset.split_seed,
            max_train_rows=dataset.train_rows,
        ),
    )
    rows = found.train
    return Splits(
        train=Split(rows.inputs[train], rows.targets[train]),
        validation=Split(rows.inputs[validation], rows.targets[validation]),
        test=found.test,
    )


def file_stem(label: str) -> str:
    """Return what the example of a class is called, without its suffix."""
    return re.sub(r"\W+", "-", label.lower()).strip("-")[:MAX_LETTERS].strip("-")


def write_examples(dataset: Dataset, folder: Path) -> Path:
    """Write the first test image of up to 20 classes as `LABEL.png`, to ask a server about.

    Nothing is written of data that are no pictures.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not dataset.classifies:
        return folder
    test = load(dataset).test
    if test.inputs.shape[-1] not in pictures.MODES:
        return folder
    written: set[str] = set()
    for index, label in enumerate(dataset.labels[:MAX_EXAMPLES]):
        rows = np.flatnonzero(test.targets == index)
        if len(rows):
            name = file_stem(label)
            if not name or name in written:
                name = f"{name}-{index}".strip("-")
            written.add(name)
            pixels = test.inputs[rows[0]]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            picture.save(folder / f"{name}.png")
    return folder


def _kind(config: DataConfig) -> str:
    source = config.source
    if config.kind != "auto":
        return config.kind
    if source is None:
        return "fashion-mnist"
    if source.suffix.lower() == ".npz":
        return "npz"
    if source.is_dir() and picture_folder.is_one(source):
        return "pictures"
    return "fashion-mnist"


def _refuse_source(config: DataConfig) -> None:
    """Refuse a path with nothing there, and a file that no kind of data is read from."""
    source = config.source
    if source is None or config.kind == LINE:
        return
    if not source.exists():
        alike = _alike(source)
        hint = f"did you mean {files.shown(alike)}?" if alike else EXPECTED
        raise DatasetError(f"{files.shown(source)} is not there; {hint}")
    if config.kind == "auto" and not source.is_dir() and source.suffix.lower() != ".npz":
        raise DatasetError(f"{files.shown(source)} is a file of another kind; {EXPECTED}")


def _alike(path: Path) -> Path | None:
    """Return what a path was perhaps meant to be: the likest name beside it."""
    try:
        names = [one.name for one in path.resolve().parent.iterdir()]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, n=1)
    return path.with_name(found[0]) if found else None


def _there(config: DataConfig, kind: str) -> Path:
    source = config.source
    if source is None:
        raise DatasetError(f"data.kind is {kind}, expected data.source as well: where they are")
    if source.is_dir() == (kind == "npz"):
        expected = "a file" if kind == "npz" else "a folder"
        raise DatasetError(f"{files.shown(source)} cannot be {kind} data, expected {expected}")
    return source


def _home(cache: Path | None) -> Path:
    return cache or platformdirs.user_cache_path("train-export")


def _folder(home: Path, name: str, key: str) -> Path:
    """Name a folder for people by its name, and for us by its key."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:MAX_LETTERS]
    return home / f"{stem or 'data'}-{key[:12]}"


def _key(kind: str, content: str, config: DataConfig) -> str:
    """Return a digest of all that the kept files follow from."""
    facts = [kind, content, config.size, config.colour, config.test_share, config.split_seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _content(source: Path) -> str:
    """Return a digest of a file, or of all files of a folder and their names."""
    if source.is_file():
        return _file_digest(source)
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    listed = [f"{_file_digest(path)} {path.relative_to(source)}" for path in paths]
    return hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{files.shown(path)} cannot be read: {error.strerror}") from error


def _idx(folder: Path, _: DataConfig) -> Found:
    """Read a folder of four IDX files, and the classes' names if they are beside them."""
    read = {part: idx.read(idx.find(folder, part)) for part in idx.PARTS}
    classify = arrays.is_classes(read["train-labels"])
    train, test = (
        arrays.rows(read[f"{part}-images"], read[f"{part}-labels"], name, classify=classify)
        for part, name in (("train", "training"), ("t10k", "test"))
    )
    path = folder / NAMES
    try:
        labels = tuple(path.read_text("utf-8-sig").split("\n")) if path.is_file() else ()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{files.shown(path)} cannot be read: {error}") from error
    return Found(train, test, tuple(one.strip() for one in labels if one.strip()))


def _line() -> Found:
    """Make the six points of y = 2x - 1 that a lone Dense(1) learns from, and more to test it."""
    six = np.arange(-1, 5, dtype=np.float32)[:, np.newaxis]
    more = (np.arange(-100, 101, dtype=np.float32) / 10)[:, np.newaxis]
    return Found(Split(six, 2 * six - 1), Split(more, 2 * more - 1), ())


def _named(found: Found) -> Found:
    """Give classes without names their numbers, and check all of it."""
    classifies = found.train.targets.ndim == 1
    if found.labels and not classifies:
        raise DatasetError("there are names of classes, and targets that are floats")
    if classifies and not found.labels and len(found.test.targets):
        count = len(np.unique(found.train.targets))
        found = replace(found, labels=tuple(map(str, range(count))))
    data_checks.refuse(found)
    return found


def _kept(found: Found, name: str, config: DataConfig, home: Path) -> Dataset:
    """Keep what was not read from files, under a digest of its own content."""
    found = _named(found)
    digest = hashlib.sha256(json.dumps(found.labels).encode())
    for content in _encoded(found).values():
        digest.update(content)
    folder = _folder(home, name, digest.hexdigest())
    if not _is_whole(folder):
        _keep(found, folder)
    return _from_cache(folder, name, config)


def _encoded(found: Found) -> dict[str, bytes]:
    train, test = found.train, found.test
    parts = zip(idx.PARTS, (train.inputs, train.targets, test.inputs, test.targets), strict=True)
    return {idx.name(part, array): idx.encode(array) for part, array in parts}


def _keep(found: Found, folder: Path) -> None:
    """Write the files into a hidden folder and show it at once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DatasetError(
            f"{folder.parent} cannot be the cache's folder, a file is in its place; move it away"
        ) from error
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in _encoded(found).items():
            with files.naming(hidden / name):
                (hidden / name).write_bytes(content)
        about = {"sha256": _digest(hidden), "labels": found.labels, "findings": found.findings}
        (hidden / ABOUT).write_text(json.dumps(about), "utf-8")
        files.sync_tree(hidden)
        hidden.rename(folder)
    except OSError:
        if not _is_whole(folder):  # else another run has kept the same
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    log.info("kept in %s", folder)


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds what was kept; one that does not is named and removed.

    Raises:
        DatasetError: a file or a link is in its place, which is for its owner to remove.
    """
    if not folder.exists():
        return False
    with suppress(OSError, ValueError, KeyError, TypeError, DatasetError):
        about = json.loads((folder / ABOUT).read_bytes())
        if about["sha256"] == _digest(folder) and all(
            _is_strings(about[key]) for key in ("labels", "findings")
        ):
            return True
    if folder.is_symlink() or not folder.is_dir():
        raise DatasetError(f"{folder} is a file or a link, expected a folder; move it away")
    log.warning("%s is damaged; it is made again", folder)
    shutil.rmtree(folder)
    return False


def _from_cache(folder: Path, name: str, config: DataConfig) -> Dataset:
    about: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
    data_checks.refuse_names(about["labels"])
    return _described(folder, name, tuple(about["labels"]), tuple(about["findings"]), config)


def _described(
    folder: Path,
    name: str,
    labels: tuple[str, ...],
    noticed: tuple[str, ...],
    config: DataConfig,
) -> Dataset:
    """Return the record of what is kept in a folder."""
    found = replace(_read(folder, labels), findings=noticed)
    train, validation = split(found.train.targets, config)
    if not len(validation):
        raise DatasetError(
            f"data.validation_share is {config.validation_share}, which leaves no validation row "
            f"of {len(found.train.targets)}; raise it, or set 0 to validate on the training rows"
        )
    described = Dataset(
        name=files.shown(name),
        folder=folder,
        sha256=_digest(folder),
        license=fashion_mnist.LICENSE if folder.name == fashion_mnist.NAME else "",
        labels=labels,
        train_rows=len(train),
        validation_rows=len(validation),
        test_rows=len(found.test.targets),
        validation_share=config.validation_share,
        split_seed=config.split_seed,
    )
    return replace(described, findings=_findings(described, found))


def _findings(dataset: Dataset, found: Found) -> tuple[str, ...]:
    """Return what the checks say; kept beside the files, because they take seconds."""
    code = [Path(str(module.__file__)).read_bytes() for module in (data_checks, duplicates)]
    facts = [
        dataset.sha256, dataset.labels, found.findings, dataset.train_rows,
        dataset.validation_share, dataset.split_seed,
        *(hashlib.sha256(one).hexdigest() for one in code),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = dataset.folder / f"findings-{key[:12]}.json"
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_bytes())
        if _is_strings(kept):
            return tuple(kept)
    split_by = DataConfig(
        validation_share=dataset.validation_share,
        split_seed=dataset.split_seed,
        max_train_rows=dataset.train_rows,
    )
    said = tuple(data_checks.findings(found, *split(found.train.targets, split_by)))
    with suppress(OSError):  # it is only slower without
        files.write_whole(path, json.dumps(said).encode())
    return said


def _is_strings(value: Any) -> bool:  # noqa: ANN401  as JSON has it
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _read(folder: Path, labels: tuple[str, ...]) -> Found:
    """Read the four files; images get the axis of their channels."""
    inputs, targets, test_inputs, test_targets = (
        idx.decode(path.read_bytes(), str(path)) for path in _paths(folder)
    )
    if labels and inputs.ndim == arrays.IMAGE_RANK - 1:
        inputs, test_inputs = inputs[..., np.newaxis], test_inputs[..., np.newaxis]
    return Found(Split(inputs, targets), Split(test_inputs, test_targets), labels)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _paths(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _paths(folder: Path) -> list[Path]:
    return [idx.find(folder, part) for part in idx.PARTS]
