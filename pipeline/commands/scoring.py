"""Score many pictures or rows with a published model: `score`."""

from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import WHERE, Address, AsJson, Bundle, Models, folder_of
from pipeline.commands.terminal import WRONG, fail, log_plainly, print_json, quietly, sentences
from pipeline.errors import UsageError
from service import command_line
from service.host import cores

if TYPE_CHECKING:
    from pipeline.scoring import Engine

ENGINES = ("local", "ray")


def score(  # noqa: PLR0913  one parameter an option
    bundle: Bundle,
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
        str,
        typer.Option(
            help="local: this machine's cores; ray: a Ray cluster's.",
            rich_help_panel=WHERE,
            autocompletion=command_line.one_of(*ENGINES),
        ),
    ] = "local",
    address: Address = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Processes of the local engine; 0: one a core.", rich_help_panel=WHERE
        ),
    ] = 0,
    part_rows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rows of a part; a process that is lost costs no more.",
            rich_help_panel=WHERE,
        ),
    ] = 4096,
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Score a folder of pictures, or parquet files, with a model.

    Every row that goes in comes out, with its label and all probabilities, or with the reason why
    it cannot be read: as parquet files in --output, in the order of the input. The bundle is
    verified, and its golden set answered, on every host that scores. Needs no server.

    The same command goes on where it was stopped: parts that are whole are not scored again. On a
    Ray cluster what was lost with a node is scored on another; the bundle, the input and the
    output are on a file system that all nodes share.

    Exit status: 0 every row came out, 1 the bundle, the input or the output cannot be used, 2 wrong
    options, or a bundle or an input that is not there, 130 stopped with Ctrl-C.

    Example: train-export score --bundle fashion-mnist/1 --input pictures --output scores

    Example: train-export score --bundle fashion-mnist/1 --input rows.parquet
    --column image.bytes --output scores --workers 4 --json
    """
    check_engine(engine)
    log_plainly()
    with sentences("stopped; parts that are whole are kept, and the same command goes on"):
        path = folder_of(bundle, models)
        if not source.exists():
            raise UsageError(f"{source} is not there; --input is a folder or a parquet file")
        with quietly("looking at the bundle"):
            from pipeline import scoring  # noqa: PLC0415  not to print the help

            chosen = _engine(engine, address, workers or cores())
        with command_line.progress("scoring") as show:
            scored = scoring.score(
                path,
                source,
                output,
                chosen,
                column=column,
                shard_rows=part_rows,
                show=show,
            )
    if as_json:
        print_json(asdict(scored) | {"output": str(scored.output)})
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
