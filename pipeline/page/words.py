"""Numbers as a page shows them: short, in columns that line up, never more than they are worth."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from service import command_line

DIGITS = 10  # below it a figure has two places behind the point, below its square one
SMALLEST_P = 1e-9  # nobody needs to know how much smaller
MILLION = 1_000_000
SPACE = "\u00a0"  # between a figure and its unit, where no line ends
NONE = "\u2013"  # where there is no figure


def percent(value: float, places: int = 2) -> str:
    """Return a share, 0 to 1, in percent."""
    return f"{100 * value:.{places}f}{SPACE}%" if math.isfinite(value) else NONE


def count(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def tiny(value: float) -> str:
    """Return a difference, of any size, with two digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value and (value < 0.001 or value >= MILLION) else f"{value:.2g}"  # noqa: PLR2004


def size(size_bytes: int) -> str:
    """Return a size as on a terminal, in KiB or larger units."""
    return command_line.size(size_bytes).replace(" ", SPACE)


def milliseconds(seconds: float) -> str:
    """Return a duration in milliseconds, without the unit."""
    value = 1000 * seconds
    if not value or not math.isfinite(value):
        return NONE
    if value < DIGITS:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < DIGITS**2 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 90:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004


def large(value: float) -> str:
    """Return a count of many, such as of multiplications."""
    return f"{value / MILLION:,.1f} M" if value >= MILLION else count(value)


def chance(p: float) -> str:
    """Return a p-value."""
    if p < SMALLEST_P:
        return f"below{SPACE}{SMALLEST_P:g}"
    return f"{p:.2f}" if p >= 0.01 else f"{p:.0e}"  # noqa: PLR2004


def plain(text: str) -> str:
    """Return a text without what is not to be printed, such as what ends a terminal's line."""
    return "".join(one if one.isprintable() or one in "\n\u00a0" else "�" for one in text)


def date(text: str) -> str:
    """Return a time of RFC 3339, in UTC, without its seconds."""
    day, _, rest = text.partition("T")
    return f"{day} {rest[:5]} UTC" if rest else text


def flat(tables: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Give settings as `section.name` and value, in the order of the names."""
    for name, value in sorted(tables.items()):
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _setting(value)


def _setting(value: Any) -> str:  # noqa: ANN401  of JSON
    if value is None or value in ([], {}, ""):
        return NONE
    return str(value).lower() if isinstance(value, bool) else str(value)
