"""Every command of both programs, from the parsers that read them."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from docs.reference_text.table import UnsaidError, code, table
from pipeline import __main__ as pipeline_main
from pipeline import pytest_plugin
from service import command_line, commands

PROGRAMS = {"train-export": pipeline_main.app, "serve-export": commands.app}
MANY = 20  # options of another command, from which on they are not given twice
Options = dict[str, tuple[str, str]]  # by the option: its panel, and what it means


def of(program: str) -> Iterator[str]:
    """Give every command of a program, as its own help has it."""
    group: Any = typer.main.get_command(PROGRAMS[program])
    shown = {name: one for name, one in group.commands.items() if not one.hidden}
    yield from (group.help, "")
    yield from table(
        ("command", "for", "what it does"),
        (
            (f"[`{name}`](#{program}-{name})", one.rich_help_panel, one.help.split("\n\n")[0])
            for name, one in shown.items()
        ),
    )
    found = {name: _options(f"{program} {name}", one) for name, one in shown.items()}
    for name, command in shown.items():
        yield from (f"({program}-{name})=", f"## {program} {name}", "", command.help, "")
        yield from (command.epilog or "", "", f"```{{program}} {program} {name}", "```", "")
        yield from _own(program, name, found)


def exit_statuses() -> Iterator[str]:
    """Give what the exit statuses mean that all commands have alike."""
    rows = ((code(status), words) for status, words in command_line.STATUSES.items())
    yield from table(("status", "of every command of both programs"), rows)


def fixtures() -> Iterator[str]:
    """Give what the package adds to a user's own pytest."""
    for fixture in (pytest_plugin.parity_bundle, pytest_plugin.parity_check):
        yield from (f"```{{py:data}} {fixture.__name__}", inspect.getdoc(fixture) or "", "```", "")


def _options(command: str, parsed: Any) -> Options:  # noqa: ANN401  typer's, of no public type
    """Return a command's options and arguments, as its help shows them."""
    context, found = typer.Context(parsed), Options()
    for one in parsed.params:
        record = None if one.hidden else one.get_help_record(context)
        if record is None:
            continue
        if not one.help:
            raise UnsaidError(f"{command}: {one.name} has no help")
        panel = one.rich_help_panel if isinstance(one.rich_help_panel, str) else ""
        found[record[0]] = (panel, record[1])
    return found


def _own(program: str, name: str, found: Mapping[str, Options]) -> Iterator[str]:
    """Give a command's options, a directive each; if it takes all of another's, that one's name."""
    options, like = found[name], None
    for other, those in found.items():
        if other != name and len(those) >= MANY and those.items() <= options.items():
            options, like = dict(options.items() - those.items()), other
    panels = dict.fromkeys(panel for panel, _ in options.values())
    for panel in sorted(panels, key=bool):  # those without a heading come first
        if panel:
            yield from (f"**{panel}**", "")
        for option, (its, words) in options.items():
            if its == panel:
                yield from (f"```{{option}} {option}", words, "```", "")
    if like:
        yield from (f"And all options of [`{program} {like}`](#{program}-{like}).", "")
