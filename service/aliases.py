"""Names for versions of a model: `models/NAME/aliases.json`, one small file replaced at once.

`champion` answers requests that name no version. Moving it back is a rollback.
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import plain_file
from service.bundle import NAME, VERSION
from service.errors import BundleError

ALIASES = "aliases.json"
CHAMPION = "champion"
ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
MAX_BYTES = 1 << 16


def read(model: Path) -> dict[str, int]:
    """Return the aliases of the model in a folder; none where it has no file.

    Raises:
        BundleError: the file cannot be read, or is not names with whole numbers.
    """
    source = f"{model.name}/{ALIASES}"
    try:
        content = plain_file.read(model / ALIASES, MAX_BYTES)
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from error
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        known = isinstance(error, json.JSONDecodeError)
        why = str(error) if known else "not UTF-8, nested too deeply, or with too long a number"
        raise BundleError(f"{source} is not JSON: {why}") from error
    if not isinstance(found, dict) or not all(
        ALIAS.fullmatch(alias) and type(number) is int and VERSION.fullmatch(str(number))
        for alias, number in found.items()
    ):
        raise BundleError(
            f'{source} is not a set of aliases; expected such as {{"{CHAMPION}": 3}}, '
            "lower-case names with whole numbers"
        )
    return found


@contextmanager
def changing(model: Path) -> Iterator[None]:
    """Keep others from changing a model's aliases between a look at them and their replacement.

    Raises:
        BundleError: there is no such model.
    """
    _check_model(model)
    folder = os.open(model, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(model: Path, aliases: dict[str, int]) -> None:
    """Put aliases in place of those there are; a reader sees the old ones or the new.

    Raises:
        BundleError: a name is not an alias, a version is not there, or the file cannot be written.
    """
    _check_model(model)
    for alias, number in aliases.items():
        if not ALIAS.fullmatch(alias):
            raise BundleError(f"{alias!r} is not an alias; expected lower-case letters and digits")
        if not (model / str(number)).is_dir():
            raise BundleError(f"{model.name} has no version {number} for {alias} to point at")
    text = json.dumps(dict(sorted(aliases.items())), indent=1) + "\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=model, prefix=f".{ALIASES}.", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
                Path(file.name).replace(model / ALIASES)
            except OSError:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise BundleError(f"{model.name}/{ALIASES} cannot be written: {error.strerror}") from error


def _check_model(model: Path) -> None:
    if not NAME.fullmatch(model.name) or not model.is_dir():
        raise BundleError(f"there is no model {model.name!r}; name one that was published")
