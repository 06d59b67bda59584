"""What the commands of both programs have alike: help, statuses, completion, progress, sizes.

Knows no command. A command's text is the docstring of its function: what it does, then perhaps
`Exit status: …` and one `Example: …` or more, a paragraph each.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Protocol, TextIO

import typer

STATUSES = {  # of every command of both programs
    0: "done",
    1: "refused or failed, or what was asked about does not hold; `error: …` says why",
    2: "what was typed cannot work: an option, a setting, a value, or the name of a bundle or file "
    "that is not there",
    75: "training was stopped by SIGTERM; the same command goes on where it was",
    130: "stopped with Ctrl-C",
    143: "stopped by SIGTERM",
}
USUAL = "Exit status: 0 done, 1 refused or failed, 2 wrong options, 130 stopped with Ctrl-C."
WIDTH = 72  # of an example, so that it fits 80 columns
EXAMPLE, STATUS = "Example: ", "Exit status: "
SLOWEST_S = 600  # between two steps of what is done, for the time left
KIB, MANY, FEW = 1024, 999.5, 100  # of a size: from many on the next unit; a fraction of few
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON, for scripts. A command that fails without one prints "
        "nothing but its sentence on standard error, and ends with its status.",
    ),
]
Shell = Literal["bash", "zsh", "fish"]


class Show(Protocol):
    """Says how far something is."""

    def __call__(self, done: float, total: float | None = None) -> None:
        """Show it; None: the total is what it was."""


def program(about: str) -> typer.Typer:
    """Return a program without commands; its help says what every exit status means.

    Args:
        about: what it does, a sentence.
    """
    rows = "\n".join(f"| {status} | {text} |" for status, text in STATUSES.items())
    return typer.Typer(
        help=about,
        epilog=f"| exit status | of every command |\n|---|---|\n{rows}",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )


def add(app: typer.Typer, function: Callable[..., None], *, group: str) -> None:
    """Make a function a command.

    Args:
        app: of the program.
        function: its docstring is the command's text.
        group: under which heading the program's help lists it.
    """
    paragraphs = [" ".join(one.split()) for one in (function.__doc__ or "").split("\n\n")]
    examples = [one.removeprefix(EXAMPLE) for one in paragraphs if one.startswith(EXAMPLE)]
    status = next((one for one in paragraphs if one.startswith(STATUS)), USUAL)
    about = [one for one in paragraphs if not one.startswith((EXAMPLE, STATUS))]
    code = "\n".join(f"    {line}" for one in examples for line in _folded(one))
    app.command(
        help="\n\n".join(about),
        epilog=f"{status}\n\n**Examples**\n\n{code}" if code else status,
        rich_help_panel=group,
    )(function)


def add_completion(app: typer.Typer, program: str, *, group: str) -> None:
    """Add the command `completion`, which the programs have alike."""

    def completion(
        context: typer.Context, shell: Annotated[Shell, typer.Argument(help="Which one you use.")]
    ) -> None:
        from typer.completion import show_callback  # noqa: PLC0415  only for who asks

        show_callback(context, context.command.params[0], shell)

    completion.__doc__ = f"""Print the script with which a shell completes the commands.

    Commands, options, presets, networks, published models and their versions are completed, all
    else as a path. Start the shell anew after the command; zsh looks into ~/.zfunc if ~/.zshrc has
    `fpath+=~/.zfunc` before `compinit`.

    Example: {program} completion bash > ~/.local/share/bash-completion/completions/{program}

    Example: {program} completion zsh > ~/.zfunc/_{program}

    Example: {program} completion fish > ~/.config/fish/completions/{program}.fish
    """
    add(app, completion, group=group)


def models(repository: Path) -> list[str]:
    """Return the names of the folders that have versions in them, for completion."""
    return sorted({one.parent.parent.name for one in repository.glob("*/[1-9]*/manifest.json")})


def versions(repository: Path, model: str) -> list[str]:
    """Return the versions of a model, the newest first, for completion."""
    found = [one.parent.name for one in (repository / model).glob("[1-9]*/manifest.json")]
    return sorted(filter(str.isdecimal, found), key=int, reverse=True)


def beginning(found: list[str], incomplete: str) -> list[str]:
    """Return those that a word that is being typed can become."""
    return [one for one in found if one.startswith(incomplete)]


def bundles(repository: Path) -> list[str]:
    """Return NAME/VERSION of all that a folder has, for completion."""
    return [f"{name}/{one}" for name in models(repository) for one in versions(repository, name)]


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Return what completes one of a few words."""
    return lambda incomplete: beginning(list(words), incomplete)


def size(size_bytes: int) -> str:
    """Return a size in at most eight characters, such as 776 KiB or 2.3 MiB."""
    value, unit, larger = size_bytes / KIB, "KiB", ["MiB", "GiB", "TiB"]
    while value >= MANY and larger:
        value, unit = value / KIB, larger.pop(0)
    digits = int(unit != "KiB" and value < FEW)
    return f"{value:,.{digits}f} {unit}"


@contextmanager
def progress(task: str) -> Iterator[Show]:
    """Show how far something is, and the time left: on a terminal, on standard error, else nothing.

    Args:
        task: what is done, such as "scoring".
    """
    with shown(task) as show, _above():
        yield show


@contextmanager
def shown(task: str, terminal: TextIO | None = None) -> Iterator[Show]:
    """Show a bar, gone when it ends, and nothing where there is no terminal.

    How much there is to do may be known from the start, later, or never: the time left is shown
    once it is, and until then only the time that has been taken.

    Args:
        task: what is done.
        terminal: where; None: standard error, above which others may write.
    """
    from rich import progress as rich  # noqa: PLC0415  only for who waits
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=terminal is None, file=terminal)
    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=terminal is None,
        speed_estimate_period=SLOWEST_S,
        disable=not console.file.isatty() or console.is_dumb_terminal,
    ) as drawn:
        number = drawn.add_task(task, total=None, left="")

        def show(done: float, total: float | None = None) -> None:
            drawn.update(number, completed=done, total=total, left="left")

        yield show


@contextmanager
def _above() -> Iterator[None]:
    """Have log lines go where the bar has put itself, above it."""
    handlers = [
        one
        for one in logging.getLogger().handlers
        if type(one) is logging.StreamHandler and one.stream is sys.__stderr__
    ]
    for one in handlers:
        one.setStream(sys.stderr)
    try:
        yield
    finally:
        for one in handlers:
            one.setStream(sys.__stderr__)


def _folded(example: str) -> Iterator[str]:
    """Give the lines of an example, which a shell reads as one."""
    line = ""
    for part in re.split(r" (?=--|> |&& )", example):  # an option stays with its value
        if line and len(line) + len(part) > WIDTH - 3:  # a space, and the backslash after another
            yield f"{line} \\"
            line = "   "
        line = f"{line} {part}" if line else part
    yield line
