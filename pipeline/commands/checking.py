"""Hold model files against each other: `check` and `explain`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.commands.options import (
    PAIR,
    AsJson,
    Bundle,
    Models,
    folder_of,
    variants,
)
from pipeline.commands.terminal import REFUSED, WRONG, fail, quietly, sentences
from service import command_line

NOTHING = "stopped; nothing was written"
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
    bundle: Bundle = "",
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
            autocompletion=command_line.one_of("float32", "float16", "int8"),
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
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Say whether a bundle, or two model files, still answer alike.

    Made for your CI. Of a bundle: its digests, the labels in its files, and the answers of every
    variant to its golden set, on this machine. Of a pair: every row of --data. Writes nothing.

    Exit status: 0 they do, 1 they do not, and one sentence says why, 2 wrong options, or asked
    about what is not there, 130 stopped with Ctrl-C.

    Example: train-export check --bundle fashion-mnist/1

    Example: train-export check --bundle fashion-mnist/1 --against saved_model --json

    Example: train-export check --reference saved_model --candidate model.onnx --data images.npz
    """
    files = [reference, candidate, data]
    whole = bundle and not any([*files, labels])
    if not (whole or (not bundle and against is None and None not in files)):
        fail(
            "give --bundle, with --against or not; or --reference, --candidate and --data",
            status=WRONG,
        )
    with sentences(NOTHING), quietly("starting TensorFlow, then checking") as show:
        path = folder_of(bundle, models) if bundle else None
        from pipeline import check, questions  # noqa: PLC0415  not to print the help

        if path is not None:
            found = check.whole_bundle(path, against, show)
        else:
            found = check.pair(
                reference or Path(),
                candidate or Path(),
                questions.read(data or Path(), labels=labels, resize=resize),
                precision=precision,
                output=output,
                signature=signature,
                show=show,
            )
    if as_json:
        print(check.as_json(found))
    else:
        Console().print(check.table(found))
    if found.failure:
        fail(found.failure, status=REFUSED)


def explain(  # noqa: PLR0913  one parameter an option
    variant: Annotated[
        str,
        typer.Argument(
            help="Of the bundle, such as onnx-int8; nothing for a pair.", autocompletion=variants
        ),
    ] = "",
    bundle: Bundle = "",
    reference: Annotated[
        Path | None, typer.Option(help="SavedModel that is right.", rich_help_panel=PAIR)
    ] = None,
    candidate: Candidate = None,
    data: Rows = None,
    rows: Annotated[int, typer.Option(min=2, help="How many of the worst rows to walk.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path(),
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Name the first layer where a variant departs, and why.

    Walks the tensors inside a variant and its reference on the worst rows, of the bundle's golden
    set or of --data, and draws how the error grows: NAME.explained.png in --out.

    Exit status: 0 the variant answers as the reference does, 1 it does not, or cannot be run, 2
    wrong options, or asked about what is not there, 130 stopped with Ctrl-C.

    Example: train-export explain onnx-int8 --bundle fashion-mnist/1

    Example: train-export explain --reference saved_model --candidate model.onnx --data images.npz
    """
    pair = (reference, candidate, data)
    if any(pair) if bundle and variant else bundle or variant or None in pair:
        fail(
            "give VARIANT and --bundle; or --reference, --candidate and --data",
            status=WRONG,
        )
    with sentences(NOTHING), quietly("starting TensorFlow, then walking both") as show:
        path = folder_of(bundle, models) if bundle else None
        from pipeline.explain import shown, worst  # noqa: PLC0415  not to print the help

        if path is not None:
            asked = worst.of_bundle(path, variant, rows, show)
        else:
            asked = worst.of_pair(
                reference or Path(), candidate or Path(), data or Path(), rows, show
            )
        found = worst.explain(asked)
        picture = shown.picture(found, out / f"{asked.candidate.stem}.explained.png")
    if as_json:
        print(shown.as_json(found, picture))
    else:
        Console().print(shown.table(found))
        print(f"picture: {picture}")
    if found.diverges or asked.failure:
        fail(found.text, status=REFUSED)
    if not as_json:
        print(f"{found.text}.")
