"""See what there is, and remove what is old: `status` and `clean`."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.commands.options import AsJson, Models, Runs
from pipeline.commands.terminal import log_plainly, print_json, sentences
from service import command_line

if TYPE_CHECKING:
    from pipeline.status import Run, Version

WHOLE = {"published", "changed", "size"}  # columns that are never broken
DAY = len("2026-01-31")


def status(
    models: Models = Path("models"), runs: Runs = Path("runs"), as_json: AsJson = False
) -> None:
    """Show what is published, and how far each run is.

    Reads the two folders and starts nothing: versions with their aliases, accuracy, size and
    parity; runs with their epochs and what came of them.

    Example: train-export status

    Example: train-export status --models /srv/models --runs /srv/runs --json
    """
    from pipeline import status  # noqa: PLC0415  not to print the help

    with sentences("stopped"):
        versions, found = status.versions(models), status.runs(runs)
    if as_json:
        tables = {
            "versions": [asdict(version) for version in versions],
            "runs": [asdict(run) | {"folder": str(run.folder)} for run in found],
        }
        print_json(tables)
        return
    console = Console()
    if versions:
        console.print(_versions(versions))
    else:
        print(f"nothing is published in {models}; train-export run does")
    if found:
        console.print(_runs(found))
    else:
        print(f"nothing has been trained in {runs}")


def clean(
    keep: Annotated[
        int,
        typer.Option(min=1, help="How many of each model's versions, of its runs and sweeps stay."),
    ],
    models: Models = Path("models"),
    runs: Runs = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; print what would go.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old versions, and what old runs and sweeps left.

    Prints what went. What an alias names stays, and so do a model's newest version, what a run is
    working in, and whatever is no version, run or sweep. A sweep stays whole or goes whole.

    Example: train-export clean --keep 3 --dry-run

    Example: train-export clean --keep 3 --models /srv/models --runs /srv/runs --json
    """
    from pipeline import cleaning  # noqa: PLC0415  not to print the help

    log_plainly()
    with sentences("stopped; what was named so far is gone, the rest is whole"):
        went = cleaning.clean(models, runs, keep=keep, dry_run=dry_run)
    if as_json:
        print_json([{"path": str(one.path), "size_bytes": one.size_bytes} for one in went])
        return
    for one in went:
        print(f"{one.path}  {command_line.size(one.size_bytes)}")
    total = command_line.size(sum(one.size_bytes for one in went))
    print(f"{'would remove' if dry_run else 'removed'} {len(went)}, {total}")


def _versions(versions: "list[Version]") -> Table:
    drawn = _table("model", "version", "aliases", "accuracy", "size", "published", "parity")
    for one in versions:
        drawn.add_row(
            one.model,
            str(one.number),
            ", ".join(one.aliases),
            "" if one.accuracy is None else f"{one.accuracy:.2%}",
            command_line.size(one.size_bytes),
            _when(one.created)[:DAY],
            one.parity,
        )
    return drawn


def _runs(found: "list[Run]") -> Table:
    drawn = _table("run", "epochs", "changed", "state")
    for one in found:
        drawn.add_row(
            one.folder.name,
            f"{one.epochs_done} of {one.epochs or '?'}",
            _when(one.changed),
            one.state,
        )
    return drawn


def _table(*columns: str) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        drawn.add_column(
            column,
            overflow="fold",
            no_wrap=place == 0 or column in WHOLE,
            min_width=len(column),  # no heading breaks within a word
        )
    return drawn


def _when(text: str) -> str:
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}" if text else ""
