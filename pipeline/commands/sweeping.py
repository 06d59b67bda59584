"""Compare settings: `sweep`."""

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline import config
from pipeline.commands.options import WHERE, Address, AsJson, Data, Runs, presets
from pipeline.commands.running import leave, reached, use_prefect, verify
from pipeline.commands.scoring import ENGINES, check_engine
from pipeline.commands.terminal import REFUSED, WRONG, fail, log_plainly, quietly, sentences
from service import command_line

if TYPE_CHECKING:
    from pipeline.sweep import Job, Outcome

log = logging.getLogger(__name__)
LOOK_S = 2.0  # between two looks at what is done
SUFFIXES = (".csv", ".json")


def sweep(  # noqa: PLR0913  one parameter an option
    grid: Annotated[
        list[str],
        typer.Option(help="SECTION.NAME=VALUE,VALUE,… of data or training; may be repeated."),
    ],
    preset: Annotated[
        str,
        typer.Option(help=f"One of: {', '.join(config.PRESETS)}.", autocompletion=presets),
    ] = "quick",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.NAME=VALUE for all of them; may be repeated."),
    ] = None,
    data: Data = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="File for the table, .csv or .json.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local: one after the other on this machine; ray: on a Ray cluster.",
            rich_help_panel=WHERE,
            autocompletion=command_line.one_of(*ENGINES),
        ),
    ] = "local",
    address: Address = "auto",
    cpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of a training, on Ray; TensorFlow takes what it gets.",
            rich_help_panel=WHERE,
        ),
    ] = 1,
    gpus: Annotated[
        float, typer.Option(min=0, help="Of a training, on Ray.", rich_help_panel=WHERE)
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Train every combination of some settings, and compare them.

    Publishes nothing. Each is trained and scored on the test rows in a process of its own, below
    runs/sweep. The table is sorted by the validation loss of the best epoch: choose by that. The
    same command goes on where it was stopped; combinations that are done are not trained again.

    Exit status: 0 at least one could be trained, 1 none could, 2 wrong options, settings or data,
    130 stopped with Ctrl-C, 143 by SIGTERM.

    Example: train-export sweep --preset quick --grid training.learning_rate=0.001,0.003
    --grid training.seed=1,2,3 --output sweep.csv
    """
    check_engine(engine)
    if output is not None and output.suffix not in SUFFIXES:
        fail(f"--output is {output}, expected a name in {' or '.join(SUFFIXES)}", status=WRONG)
    log_plainly()
    with sentences("stopped; the same command goes on where training was"):
        from pipeline import sweep  # noqa: PLC0415  not to print the help

        layers = [config.single(one) for one in assignments or []]
        layers.append(config.options(data__source=data, runs=runs))
        found = sweep.combinations(preset, layers, grid)
        for chosen in sweep.differing(found):
            verify(chosen)
        jobs = sweep.jobs(found)
        kept = [one for job in jobs if (one := sweep.kept(job))]
        left = [job for job in jobs if sweep.kept(job) is None]
        print(f"{len(jobs)} combinations, {len(kept)} of them done before", file=sys.stderr)
        if left:
            resources = None if engine == "local" else {"num_cpus": cpus, "num_gpus": gpus}
            kept += _trained(left, resources, address)
        outcomes = sweep.ranked(kept)
        _show(outcomes, output, as_json=as_json)


def _trained(
    jobs: "list[Job]", resources: dict[str, float] | None, address: str
) -> "list[Outcome]":
    """Train what is left, by a flow."""
    use_prefect()
    signal.signal(signal.SIGTERM, leave)
    with quietly("starting Prefect"):
        from pipeline import sweep_flow  # noqa: PLC0415  not to print the help
        from pipeline.flow import shield_server  # noqa: PLC0415  the same
        from pipeline.sweep import Outcome  # noqa: PLC0415  the same

        if resources is not None:
            from pipeline.scoring import cluster  # noqa: PLC0415  Ray: only for who asks

            cluster.connect(address)
    shield_server()
    runner = sweep_flow.local() if resources is None else sweep_flow.on_ray()
    with reached(), counted(jobs):
        flow = sweep_flow.train_export_sweep.with_options(task_runner=runner)
        tables = flow([str(job.folder) for job in jobs], resources)
    return [Outcome(**table) for table in tables]


@contextmanager
def counted(jobs: "list[Job]", every_s: float = LOOK_S) -> Iterator[None]:
    """Say in the log how many combinations are done, and how long the others may take."""
    from pipeline import sweep  # noqa: PLC0415  not to print the help

    over, started_s = threading.Event(), time.monotonic()

    def count() -> None:
        said = 0
        while not over.wait(every_s):
            done = sum(sweep.kept(job) is not None for job in jobs)
            if done > said and done < len(jobs):
                left_s = (time.monotonic() - started_s) / done * (len(jobs) - done)
                log.info(
                    "%d of %d combinations are done, about %d min left",
                    done, len(jobs), math.ceil(left_s / 60),
                )  # fmt: skip
            said = done

    counting = threading.Thread(target=count, name="counting", daemon=True)
    counting.start()
    try:
        yield
    finally:
        over.set()
        counting.join()


def _show(outcomes: "list[Outcome]", output: Path | None, *, as_json: bool) -> None:
    from pipeline import sweep  # noqa: PLC0415  not to print the help

    text = json.dumps(sweep.as_rows(outcomes), indent=1)
    if output is not None:
        output.write_text(sweep.as_csv(outcomes) if output.suffix == ".csv" else f"{text}\n")
    if as_json:
        print(text)
    else:
        Console().print(_table(outcomes))
        for one in outcomes:
            if one.failure:
                print(f"{sweep.described(one.values)}: {one.failure}")
    if all(one.failure for one in outcomes):
        fail("no combination could be trained", status=REFUSED)


def _table(outcomes: "list[Outcome]") -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in outcomes[0].values:
        drawn.add_column(name.partition(".")[2], overflow="fold")
    for name in ("validation loss", "accuracy", "test accuracy", "epoch", "seconds"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        values = [str(value) for value in one.values.values()]
        if one.failure:
            drawn.add_row(*values, "[red]failed[/]")
            continue
        drawn.add_row(
            *values,
            f"{one.validation_loss:.4f}",
            _share(one.validation_accuracy),
            _share(one.test_accuracy),
            f"{one.best_epoch} of {one.epochs}",
            f"{one.seconds:.0f}",
        )
    return drawn


def _share(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"
