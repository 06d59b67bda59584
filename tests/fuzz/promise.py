"""What no refusal may tell: where things are on the host, and what they are called inside."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from service.logs import printable

INSIDE = re.compile(
    r"Traceback|\.py\b|\.cc?\b| at 0x|\b(?:service|google|numpy|PIL)\.\w|\w+Error\b"
    r"|(?<![\w.-])/\w+/\w+"
)
LONGEST = 2000  # characters


def check_told(message: str, content: bytes, host: Path) -> None:
    """Hold a message against the rule; what the input said itself may be repeated.

    Args:
        message: as a client would see it.
        content: the input that was refused.
        host: a folder that is on this host only.
    """
    told = [found for found in INSIDE.findall(message) if found.encode() not in content]
    told = [found for found in told if found not in _unescaped(content)]
    if told or str(host) in message or sys.prefix in message:
        raise AssertionError(f"a refusal tells {told}: {message}")


def check_line(message: str) -> None:
    """Hold a reason that is logged and listed against the rule: one line, and not endless."""
    if not message.isprintable() or len(message) > LONGEST:
        raise AssertionError(f"a refusal is not one line of text: {message!r:.2000}")


def _unescaped(content: bytes) -> str:
    """Return what the strings of an input may read as where they are repeated.

    JSON writes one text in many ways ("\\/" and "\\u002f" are both "/"), and what is not to be
    printed is repeated escaped.
    """
    text = content.decode(errors="replace")
    values: list[Any] = []
    # A value of each object that is whole counts, also where what follows it is not JSON.
    with contextlib.suppress(ValueError, RecursionError):
        values.append(json.loads(text, object_pairs_hook=values.append))
    return printable(text) + repr(values)
