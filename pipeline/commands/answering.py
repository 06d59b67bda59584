"""Answer rows with every variant of a bundle: `answer`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.commands.options import Bundle, Models, folder_of
from pipeline.commands.terminal import quietly, sentences


def answer(bundle: Bundle, models: Models = Path("models")) -> None:
    """Answer rows with every variant of a bundle, as JSON lines.

    A question is a line such as {"id": 1, "rows": [[...]]}: rows of the model's input. The first
    line said names the variants; then each answers as soon as it can, ten seconds after the first
    question for the original, which needs TensorFlow: {"id": 1, "variant": "onnx-int8", "outputs":
    [[...]], "seconds": 0.002}. Ends with the input. The playground (serve-export playground) starts
    it to show all variants beside what a server answers.

    Exit status: 0 all was answered, though perhaps with errors, 1 the bundle is not whole, 2 wrong
    options, or a bundle that is not there, 130 stopped with Ctrl-C.

    Example: train-export answer --bundle fashion-mnist/1 < questions.jsonl
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is no answer

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    with sentences("stopped"), quietly():
        path = folder_of(bundle, models)
        from pipeline.answering import answers  # noqa: PLC0415  not to print the help

        answers.answer(path, sys.stdin, say)
