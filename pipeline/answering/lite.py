"""Answer rows with some TFLite files, for as long as there are questions on standard input.

    python -m pipeline.answering.lite MODEL.tflite... < questions > answers

A question is a line of JSON, {"file": 0, "dtype": "uint8", "rows": [...]}; its answer is one too,
{"outputs": {"logits": [...]}} or {"error": "..."}. A process apart because TFLite's runtime and
TensorFlow bring the same native code in different versions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.litert import Lite


def answer(question: dict[str, Any], paths: list[Path], opened: dict[int, Lite]) -> dict[str, Any]:
    """Answer a question with the file it names.

    Args:
        question: as above; `file` is a place in `paths`.
        paths: the .tflite files.
        opened: those that were asked before, by their places; a file is opened when it is first
            asked.
    """
    place = question["file"]
    try:
        if place not in opened:
            opened[place] = Lite(paths[place])
        found = opened[place].run(np.array(question["rows"], question["dtype"]))
    except (ValueError, RuntimeError) as error:
        return {"error": (str(error).strip().splitlines() or ["no reason given"])[0]}
    return {"outputs": {name: array.tolist() for name, array in found.items()}}


def main() -> None:
    """Answer until there are no more questions."""
    paths, opened = [Path(word) for word in sys.argv[1:]], dict[int, Lite]()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), paths, opened)), flush=True)  # noqa: T201  to our parent


if __name__ == "__main__":
    main()
