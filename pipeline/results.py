"""Decide whether what a stage returned in an earlier run may be taken again.

Two questions. Does it follow from the same things: arguments and the files that they name, the
stage's code and all of ours that it imports, the installed packages, the host? These make its key.
Are the files that it names still what they were? Their digests are kept with it. Where and when
results are written is Prefect's; see `tasks`.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import imports, records
from pipeline.config import TrainingConfig
from service import bundle, host

log = logging.getLogger(__name__)
FOLDER = "results"  # below the runs' own
PARTS = ("data or settings", "code", "packages", "hardware")  # what a result follows from
DIGITS = 16
KIND = "pipeline record"  # marks a record among the objects of a JSON file
# What a stage is told, or measured, and no result follows from.
WITHOUT_EFFECT: dict[type, frozenset[str]] = {
    TrainingConfig: frozenset({"fresh", "keep", "checkpoint_every_s", "tensorboard"}),
    records.Scores: frozenset({"images_per_second", "champion"}),
}


class StaleError(Exception):
    """A file that a result names is gone, or is not what it was."""


def key(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    device: str,
    places: frozenset[str] = frozenset(),
) -> str:
    """Name what a stage would return: equal keys, equal results.

    Args:
        function: the stage.
        arguments: by name, those that its result follows from. A path among them stands for the
            content of the file or folder.
        device: what TensorFlow computes on.
        places: names of arguments that say where to write; their content is nothing to go by.

    Returns:
        The stage's name and one digest for each of `PARTS`, with hyphens between.
    """
    given = {
        name: str(value) if name in places else _described(value)
        for name, value in arguments.items()
    }
    processor = host.processor()
    follows_from = (
        given,
        code_sha256(function.__module__),
        packages_sha256(),
        [device, processor.name, *processor.kernel_flags, host.cores()],
    )
    texts = [json.dumps(part, sort_keys=True, default=str) for part in follows_from]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:DIGITS] for text in texts]
    return "-".join([name_of(function), *digests])


def why_anew(kept: Path, wanted: str) -> str:
    """Say why a stage has to be run, in words; empty where a result of that key is kept.

    Args:
        kept: folder of results.
        wanted: the stage's key.
    """
    if (kept / wanted).is_file():
        return ""
    name, *parts = wanted.split("-")
    earlier = sorted(kept.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    if not earlier:
        return "nothing is kept of an earlier run"
    last = earlier[-1].name.split("-")[1:]
    changed = [what for what, one, now in zip(PARTS, last, parts, strict=True) if one != now]
    return f"since the last run there are other {' and '.join(changed)}"


def name_of(function: Callable[..., Any]) -> str:
    """Return how a stage is called: `train.fit`, `export.convert`."""
    words = function.__module__.removeprefix("pipeline.").split(".")
    return f"{words[0]}.{function.__name__}"


def encode(record: Any) -> dict[str, Any]:  # noqa: ANN401  one of `records`
    """Return a record as JSON can hold it, with the digest of every file that it names.

    Of an error, which Prefect keeps too, only the text: nothing is made of it again.
    """
    if isinstance(record, BaseException):
        return {"error": str(record)}
    return {
        KIND: type(record).__name__,
        "files": {str(path): bundle.file_sha256(path) for path in files_of(record)},
        "fields": TypeAdapter(type(record)).dump_python(record, mode="json"),
    }


def decode(found: dict[str, Any]) -> Any:  # noqa: ANN401  one of `records`, or what it is made of
    """Return the record that `encode` wrote, if the files that it names are what they were.

    Raises:
        StaleError: one is not.
    """
    if KIND not in found:
        return found
    for path, digest in found["files"].items():
        why = _departs(Path(path), digest)
        if why:
            log.warning("%s %s: what an earlier run made of it is made again", path, why)
            raise StaleError(f"{path} {why}")
    kinds = {name: one for name, one in vars(records).items() if isinstance(one, type)}
    return TypeAdapter(kinds[found[KIND]]).validate_python(found["fields"])


def is_whole(kept: bytes) -> bool:
    """Say whether all files that a kept result names are there, whatever they are now.

    Args:
        kept: the content of a file of `FOLDER`, a record inside Prefect's own JSON.
    """
    try:
        found = json.loads(json.loads(kept)["result"])
        return all(Path(path).is_file() for path in found["files"])
    except (ValueError, KeyError, TypeError):
        return False


def files_of(value: Any) -> Iterator[Path]:  # noqa: ANN401  a record, or what it is made of
    """Give every file that a record names, those in its folders too but for hidden ones."""
    if isinstance(value, Path):
        found = sorted(value.rglob("*")) if value.is_dir() else [value]
        yield from (one for one in found if one.is_file() and not one.name.startswith("."))
    elif is_dataclass(value):
        for field in fields(value):
            yield from files_of(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from files_of(one)


@cache
def code_sha256(module: str) -> str:
    """Return one digest of a module's source and of all of ours that it imports."""
    lines = [
        f"{name} {bundle.file_sha256(path)}"
        for name, path in sorted(imports.closure(module, imports.root_of_ours).items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def packages_sha256() -> str:
    """Return one digest of Python's version and of every installed package's."""
    found = {f"{one.metadata['Name']} {one.version}" for one in metadata.distributions()}
    return hashlib.sha256("\n".join([sys.version, *sorted(found)]).encode()).hexdigest()


def _departs(path: Path, digest: str) -> str:
    if not path.is_file():
        return "is gone"
    return "" if bundle.file_sha256(path) == digest else "is not what it was"


def _described(value: Any) -> Any:  # noqa: ANN401  an argument of a stage
    """Return what a result follows from in an argument, as JSON can hold it."""
    if isinstance(value, Path):
        return [[str(path), bundle.file_sha256(path)] for path in files_of(value)]
    if is_dataclass(value):
        skipped = WITHOUT_EFFECT.get(type(value), frozenset())
        return {
            field.name: _described(getattr(value, field.name))
            for field in fields(value)
            if field.name not in skipped
        }
    if isinstance(value, tuple | list):
        return [_described(one) for one in value]
    return value
