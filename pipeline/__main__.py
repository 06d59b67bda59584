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
    scoring,
    shadowing,
    sweeping,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    running.run,
    sweeping.sweep,
    housekeeping.status,
    promoting.promote,
    promoting.rollback,
    pushing.push,
    scoring.score,
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
