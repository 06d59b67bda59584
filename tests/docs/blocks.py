"""The fenced blocks of a Markdown file, and whether an output is as one shows it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"# in (?:a|the) (\w+) terminal\n")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    line: int  # of its first fence, from 1
    language: str
    terminal: str  # second, third …; empty: the first
    text: str


def read(path: Path) -> list[Block]:
    """Return all blocks of a file, in order."""
    content = path.read_text(encoding="utf-8")
    return [_block(content, found) for found in FENCE.finditer(content)]


def _block(content: str, found: re.Match[str]) -> Block:
    line = content.count("\n", 0, found.start()) + 1
    place = PLACE.match(found[2])
    text = found[2][place.end() :] if place else found[2]
    return Block(line, found[1], place[1] if place else "", text)


def missing(shown: str, output: str) -> str:
    """Return the first line that is shown and was not put out; empty: none.

    Lines must come in the order in which they are shown. Of each, only the words count: what has a
    digit, or no letter, differs from run to run. `…` stands for any words, or any lines.
    """
    rest = iter([words(line) for line in output.splitlines()])
    for line in shown.splitlines():
        wanted = words(line)
        if wanted and not any(_contains(found, wanted) for found in rest):
            return line
    return ""


def words(line: str) -> list[str]:
    """Return a line's words, in order, without what differs from run to run."""
    bare = (word.strip(".,;:%()") for word in line.split())
    return [word for word in bare if re.search("[A-Za-z]", word) and not re.search(r"[\d/]", word)]


def _contains(found: list[str], wanted: list[str]) -> bool:
    rest: Iterator[str] = iter(found)
    return all(word in rest for word in wanted)
