"""Hold model files against each other: `check` and `explain`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.commands.options import PAIR, AsJson
from pipeline.commands.terminal import fail, quietly, stoppable
from pipeline.errors import CheckError, PipelineError, UsageError
from service import command_line
from service.errors import ServiceError


def _precisions(incomplete: str) -> list[str]:
    return command_line.beginning(["float32", "float16", "int8"], incomplete)


Candidate = Annotated[
    Path | None,
    typer.Option(help="SavedModel, .onnx or .tflite to hold against it.", rich_help_panel=PAIR),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        help=".npy, .npz (images, labels), or a folder of PNG and JPEG files.",
        rich_help_panel=PAIR,
    ),
]


def check(  # noqa: PLR0913  one parameter an option
    bundle: Annotated[
        Path | None, typer.Option(help="NAME/VERSION in the models' folder: check all of it.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="SavedModel that the bundle must have been made from.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="SavedModel, .onnx or .tflite that is right.", rich_help_panel=PAIR),
    ] = None,
    candidate: Candidate = None,
    data: Rows = None,
    labels: Annotated[
        Path | None, typer.Option(help=".npy of the true classes.", rich_help_panel=PAIR)
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="The candidate's: float32, float16 or int8.",
            rich_help_panel=PAIR,
            autocompletion=_precisions,
        ),
    ] = "float32",
    output: Annotated[
        str, typer.Option(help="Output to compare; by default logits.", rich_help_panel=PAIR)
    ] = "",
    signature: Annotated[
        str, typer.Option(help="Of SavedModels.", rich_help_panel=PAIR)
    ] = "serving_default",
    resize: Annotated[
        bool,
        typer.Option("--resize", help="Make pictures of other sizes fit.", rich_help_panel=PAIR),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a bundle, or two model files, still answer alike.

    Made for your CI. Of a bundle: its digests, the labels in its files, and the answers of every
    variant to its golden set, on this machine. Of a pair: every row of --data. Writes nothing.

    Exit status: 0 they do, 1 they do not, and one sentence says why, 2 wrong options, or asked
    about what is not there, 130 stopped with Ctrl-C.

    Example: train-export check --bundle models/fashion-mnist/1

    Example: train-export check --bundle models/fashion-mnist/1 --against saved_model --json

    Example: train-export check --reference saved_model --candidate model.onnx --data images.npz
    """
    files = [reference, candidate, data]
    whole = bundle is not None and not any([*files, labels])
    if not (whole or (bundle is None and against is None and None not in files)):
        fail(
            "give --bundle, with --against or not; or --reference, --candidate and --data",
            status=2,
        )
    try:
        with stoppable(), quietly("starting TensorFlow, then checking"):
            from pipeline import check, questions  # noqa: PLC0415  not to print the help

            if bundle is not None:
                found = check.whole_bundle(bundle, against)
            else:
                found = check.pair(
                    reference or Path(),
                    candidate or Path(),
                    questions.read(data or Path(), labels=labels, resize=resize),
                    precision=precision,
                    output=output,
                    signature=signature,
                )
    except CheckError as error:
        fail(str(error), status=2 if isinstance(error, UsageError) else 1)
    if as_json:
        print(check.as_json(found))
    else:
        Console().print(check.table(found))
    if found.failure:
        fail(found.failure, status=1)


def explain(  # noqa: PLR0913  one parameter an option
    variant: Annotated[
        str, typer.Argument(help="Of the bundle, such as onnx-int8; nothing for a pair.")
    ] = "",
    bundle: Annotated[Path | None, typer.Option(help="NAME/VERSION in the models' folder.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="SavedModel that is right.", rich_help_panel=PAIR)
    ] = None,
    candidate: Candidate = None,
    data: Rows = None,
    rows: Annotated[int, typer.Option(min=2, help="How many of the worst rows to walk.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Name the first layer where a variant departs, and why.

    Walks the tensors inside a variant and its reference on the worst rows, of the bundle's golden
    set or of --data, and draws how the error grows: NAME.explained.png in --out.

    Exit status: 0 the variant answers as the reference does, 1 it does not, 2 wrong options, or
    what cannot be explained, 130 stopped with Ctrl-C.

    Example: train-export explain onnx-int8 --bundle models/fashion-mnist/1

    Example: train-export explain --reference saved_model --candidate model.onnx --data images.npz
    """
    if (bundle is None or not variant) and None in (reference, candidate, data):
        fail(
            "give VARIANT and --bundle; or --reference, --candidate and --data",
            status=2,
        )
    try:
        with stoppable(), quietly("starting TensorFlow, then walking both"):
            from pipeline.explain import shown, worst  # noqa: PLC0415  not to print the help

            if bundle is not None and variant:
                asked = worst.of_bundle(bundle, variant, rows)
            else:
                asked = worst.of_pair(
                    reference or Path(), candidate or Path(), data or Path(), rows
                )
            found = worst.explain(asked)
            picture = shown.picture(found, out / f"{asked.candidate.stem}.explained.png")
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=2)
    if as_json:
        print(shown.as_json(found, picture))
    else:
        Console().print(shown.table(found))
        print(f"picture: {picture}")
    if found.diverges:
        fail(found.text, status=1)
    if not as_json:
        print(f"{found.text}.")
