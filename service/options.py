"""Read a server's options without the library that explains them, which takes longer than serving.

Understands what is plainly right: known options with a value each, and their variables. Everything
else, a wrong value or a wish for help, is left to `service.commands`, which says what is wrong.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from service.settings import ENVIRONMENT_PREFIX, Settings, place

WHOLE = re.compile(r"-?[0-9]{1,18}")
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")
YES = frozenset({"1", "true", "t", "yes", "y", "on"})
NO = frozenset({"0", "false", "f", "no", "n", "off"})


def read(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
    *,
    of: Any = Settings,  # noqa: ANN401  a dataclass
) -> dict[str, Any] | None:
    """Return what `Settings` is to be made with, and more; None if not everything is plainly right.

    Args:
        arguments: of the command, its name left out.
        environment: with the options' variables.
        more: other options that must be given, and what their values are.
        of: the dataclass whose fields are the options.
    """
    kinds: dict[str, Any] = {one.name: one.type for one in fields(of)} | dict(more or {})
    needed = {one.name for one in fields(of) if one.default is MISSING} | set(more or ())
    texts = {
        name: text
        for name in kinds
        if (text := environment.get(f"{ENVIRONMENT_PREFIX}{name.upper()}"))
    }
    given = _given(arguments, {f"--{name.replace('_', '-')}": name for name in kinds}, kinds)
    if given is None:
        return None
    values: dict[str, Any] = {}
    for name, text in {**texts, **given}.items():
        try:
            values[name] = _READ[kinds[name]](text)
        except (KeyError, ValueError):
            return None
    return values if needed <= set(values) else None


def _given(
    arguments: Sequence[str], names: Mapping[str, str], kinds: Mapping[str, Any]
) -> dict[str, str] | None:
    """Return the text of every option that is among the arguments; None if something else is."""
    given: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        option, joined, text = argument.partition("=")
        name = names.get(option)
        if name is None:
            return None
        if kinds[name] is bool:
            if joined:
                return None
            text = "1"
        elif not joined:
            following = next(rest, None)
            if following is None or following.startswith("-"):
                return None
            text = following
        given[name] = text
    return given


def _bool(text: str) -> bool:
    if text.lower() not in YES | NO:
        raise ValueError(text)
    return text.lower() in YES


def _matching(pattern: re.Pattern[str], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:  # noqa: ANN401
        if not pattern.fullmatch(text):
            raise ValueError(text)
        return kind(text)

    return read


_READ: dict[Any, Callable[[str], Any]] = {
    str: str,
    bool: _bool,
    int: _matching(WHOLE, int),
    float: _matching(NUMBER, float),
    Path: Path,
    Path | None: Path,
    Path | str: place,
}
