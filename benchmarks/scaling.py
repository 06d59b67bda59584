"""What more instances and more processes give, and how cost grows with the network.

    python benchmarks/scaling.py

Networks of different sizes with random weights, each served in several ways that are asked in turn,
round after round. Prints medians; writes them to benchmarks/results/scaling.json.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import load, measured, rounds, shown
from benchmarks.contenders import naive, ours, running
from benchmarks.load import Load
from benchmarks.rounds import Case, Made, Measured

NETWORKS = ("conv10", "conv32-64", "residual")
SECONDS = 1.0
CASES = (
    Case("1 image, 1 in flight", 1, Load(1)),
    Case("1 image, 64 in flight over 8 connections", 1, Load(8, 8)),
    Case("128 images, 4 in flight", 128, Load(4)),
)
WAYS = {
    "native, 1 instance": ("--front", "native", "--instances", "1", "--threads", "1"),
    "native, 1 instance of 2 threads": ("--front", "native", "--instances", "1", "--threads", "2"),
    "native, 2 instances": ("--front", "native", "--instances", "2", "--threads", "1"),
    "native, 2 workers": ("--front", "native", "--workers", "2"),
    "grpcio, 2 instances": ("--front", "grpcio"),
    "grpcio, 2 workers": ("--front", "grpcio", "--workers", "2"),
}


def main(
    times: Annotated[int, typer.Option("--rounds", min=3, help="Medians are of these.")] = 5,
) -> None:
    """Measure, print and write."""
    load.check_installed()
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)
        ) as progress,
    ):
        for network in NETWORKS:
            made = Made.make(Path(folder), network)
            found = _measured(made, times, progress)
            shown.console.rule(network)
            shown.outcomes(found, CASES)
            figures[network] = {
                f"{case}: {name}": [asdict(outcome) for outcome in outcomes]
                for (name, case), outcomes in found.outcomes.items()
            } | {"limit": found.limits}
    measured.write("scaling", {"seconds": SECONDS, "networks": figures})


def _measured(made: Made, times: int, progress: Progress) -> Measured:
    found = Measured()
    contenders = [
        naive("aio", made.onnx),
        *(ours(name, made.repository, *options) for name, options in WAYS.items()),
    ]
    with ExitStack() as stack:
        started = [stack.enter_context(running(one, made.images)) for one in contenders]
        measure = stack.enter_context(rounds.limit("onnx", made.onnx))
        rounds.ask_in_turn(
            started,
            CASES,
            made,
            found,
            times,
            progress,
            lambda: found.limits.setdefault("onnxruntime", []).append(measure()),
            seconds=SECONDS,
        )
    return found


if __name__ == "__main__":
    typer.run(main)
