"""Tables and words that all generated parts have alike."""

from collections.abc import Iterable, Iterator


class UnsaidError(Exception):
    """The code has no sentence for something that the reference must explain."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Give the lines of a table, and an empty one after it."""
    columns = [*head]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""


def code(value: object) -> str:
    """Return a value as code."""
    return f"`{value}`"


def sentence(words: str) -> str:
    """Return words as a sentence."""
    whole = words[:1].upper() + words[1:]
    return whole if whole.endswith((".", "…")) else f"{whole}."


def setting(name: str, values: str, default: str, words: str) -> Iterator[str]:
    """Give the lines of a setting's directive, by which it is found and linked to.

    Raises:
        UnsaidError: there are no words.
    """
    if not words:
        raise UnsaidError(f"{name} has no comment that says what it is")
    yield from (f"```{{confval}} {name}", f":type: {values}")
    if default:
        yield f":default: {default}"
    yield from ("", words, "```", "")
