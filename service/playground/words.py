"""Words that come from elsewhere, such as labels, as they may stand on the page."""

from typing import Any

KEPT = frozenset("\n\u00a0")


def plain(value: Any) -> Any:  # noqa: ANN401  of JSON
    """Return what becomes JSON without characters that nobody sees, as in a report.

    Those for writing from right to left would turn what stands around them.
    """
    if isinstance(value, str):
        return value if value.isprintable() else "".join(map(_seen, value))
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


def _seen(character: str) -> str:
    return (
        character if character.isprintable() or character in KEPT else "\N{REPLACEMENT CHARACTER}"
    )
