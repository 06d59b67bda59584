"""Answer rows with every variant of a bundle: `answer`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.terminal import quietly, sentences


def answer(
    bundle: Annotated[Path, typer.Option(help="NAME/VERSION in the models' folder.")],
) -> None:
    """Answer rows with every variant of a bundle, as JSON lines.

    A question is a line such as {"id": 1, "rows": [[...]]}: rows of the model's input. The first
    line said names the variants; then each answers as soon as it can, ten seconds after the first
    question for the original, which needs TensorFlow: {"id": 1, "variant": "onnx-int8", "outputs":
    [[...]], "seconds": 0.002}. Ends with the input. The playground (serve-export playground) starts
    it to show all variants beside what a server answers.

    Exit status: 0 all was answered, though perhaps with errors; 1 the bundle is not whole.

    Example: train-export answer --bundle models/fashion-mnist/1 < questions.jsonl
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is no answer

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    with sentences("stopped"), quietly():
        from pipeline.answering import answers  # noqa: PLC0415  not to print the help

        answers.answer(bundle, sys.stdin, say)
