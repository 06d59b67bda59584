"""The command line `train-export`: which commands there are; `commands` has them."""

from collections.abc import Callable

import typer

from pipeline.commands import (
    checking,
    housekeeping,
    machine,
    promoting,
    pushing,
    running,
    shadowing,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    running.run,
    housekeeping.status,
    promoting.promote,
    promoting.rollback,
    pushing.push,
    checking.check,
    checking.explain,
    shadowing.shadow,
    machine.models,
    machine.doctor,
    housekeeping.clean,
    running.deploy,
)
app = typer.Typer(
    help="Train a TensorFlow network, export it, prove that every export answers like it, "
    "publish it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in COMMANDS:
    app.command()(command)


if __name__ == "__main__":
    app()
