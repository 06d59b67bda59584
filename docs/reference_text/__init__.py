"""The parts of the reference that the code says: Markdown, made anew whenever the site is built.

A page asks for one with `<!-- generated: NAME ARGUMENT -->`, as `docs/conf.py` reads it. What the
code leaves unsaid, such as a setting without its comment, ends the build.
"""

from collections.abc import Callable, Iterator

from docs.reference_text import commands, protos, server, settings

PARTS: dict[str, Callable[..., Iterator[str]]] = {
    "commands": commands.of,
    "exit-statuses": commands.exit_statuses,
    "fixtures": commands.fixtures,
    "settings": settings.all_sections,
    "presets": settings.presets,
    "proto": protos.of,
    "server": server.settings,
    "metrics": server.metrics,
    "statuses": server.statuses,
}


def text(name: str, *arguments: str) -> str:
    """Return a generated part as Markdown.

    Args:
        name: one of `PARTS`.
        arguments: what that function takes.
    """
    return "\n".join(PARTS[name](*arguments))
