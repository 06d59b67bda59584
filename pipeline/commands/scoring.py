"""Score many pictures or rows with a published model: `score`."""

import json
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.commands.options import Address, AsJson
from pipeline.commands.terminal import WRONG, fail, log_plainly, quietly, sentences
from service.host import cores

if TYPE_CHECKING:
    from pipeline.scoring import Engine

ENGINES = ("local", "ray")


def score(  # noqa: PLR0913  one parameter an option
    bundle: Annotated[Path, typer.Option(help="NAME/VERSION in the models' folder.")],
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            help="Folder of PNG and JPEG files, or of parquet files, at any depth; or one parquet "
            "file.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the scores, parquet files; it is made.")],
    column: Annotated[
        str,
        typer.Option(
            help="Of parquet files: bytes of pictures, or lists of numbers; by default the only "
            "one. A dot leads into a struct, such as image.bytes."
        ),
    ] = "",
    engine: Annotated[
        str, typer.Option(help="local: this machine's cores; ray: a Ray cluster's.")
    ] = "local",
    address: Address = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes of the local engine; 0: one a core.")
    ] = 0,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Rows of a part; a process that is lost costs no more.")
    ] = 4096,
    as_json: AsJson = False,
) -> None:
    """Score a folder of pictures, or the rows of parquet files, with a published model.

    Every row that goes in comes out, with its label and all probabilities, or with the reason why
    it cannot be read. The bundle is verified, and its golden set answered, on every host that
    scores. The output is a folder of parquet files, in the order of the input.

    The same command goes on where it was stopped: parts that are whole are not scored again. On a
    Ray cluster what was lost with a node is scored on another; the bundle, the input and the
    output are on a file system that all nodes share.

    Example: train-export score --bundle models/fashion-mnist/1 --input pictures --output scores
    """
    check_engine(engine)
    log_plainly()
    with sentences("stopped; parts that are whole are kept, and the same command goes on"):
        with quietly():
            from pipeline import scoring  # noqa: PLC0415  not to print the help

            chosen = _engine(engine, address, workers or cores())
        with _bar() as progress:
            task = progress.add_task("scoring", total=None)
            scored = scoring.score(
                bundle,
                source,
                output,
                chosen,
                column=column,
                shard_rows=part_rows,
                show=lambda done, rows: progress.update(task, completed=done, total=rows),
            )
    if as_json:
        print(json.dumps(asdict(scored) | {"output": str(scored.output)}))
        return
    print(f"scored by {scored.model} version {scored.version}: {output}")
    print(f"parts:  {scored.parts:,}, of which {scored.kept:,} were there")
    print(f"rows:   {scored.rows:,} in, {scored.rows:,} out")
    print(f"errors: {scored.unread:,}, see the column error")


def check_engine(engine: str) -> None:
    """End if there is no such engine here."""
    if engine not in ENGINES:
        fail(f"--engine is {engine!r}, expected one of {', '.join(ENGINES)}", status=WRONG)
    if engine == "ray" and find_spec("ray") is None:
        fail("Ray is not installed here; install the extra ray, on all nodes", status=WRONG)


def _engine(engine: str, address: str, workers: int) -> "Engine":
    if engine == "local":
        from pipeline.scoring import local  # noqa: PLC0415  not to print the help

        return partial(local.run, workers=workers)
    from pipeline.scoring import cluster  # noqa: PLC0415  Ray: only for who asks

    cluster.connect(address)
    return cluster.run


def _bar() -> Progress:
    """Return a bar with the time left, on a terminal; the log has the same elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
