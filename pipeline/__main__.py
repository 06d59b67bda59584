"""The command line `train-export`: which commands there are; `commands` has them."""

from collections.abc import Callable

from pipeline.commands import (
    answering,
    checking,
    housekeeping,
    machine,
    promoting,
    pushing,
    reporting,
    running,
    scoring,
    shadowing,
    sweeping,
)
from service import command_line

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (running.run, sweeping.sweep, machine.models),
    "Prove": (checking.check, checking.explain, reporting.report),
    "Publish": (promoting.promote, promoting.rollback, pushing.push),
    "Use": (scoring.score, shadowing.shadow, answering.answer),
    "This machine": (
        housekeeping.status,
        machine.doctor,
        housekeeping.clean,
        running.deploy,
    ),
}
app = command_line.program(
    "Train a TensorFlow network, export it, prove that every export answers like it, publish it."
)
for group, commands in COMMANDS.items():
    for command in commands:
        command_line.add(app, command, group=group)
command_line.add_completion(app, "train-export", group=group)


if __name__ == "__main__":
    app()
