"""Write every tensor of a TFLite file for some rows, in a process of its own.

    python lite.py MODEL.tflite INPUT.npy TENSORS.npz NAMES.json

A process apart because TFLite's runtime and TensorFlow bring the same native code in different
versions. Imports neither TensorFlow nor anything of this project.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray


def tensors(model: Path, rows: NDArray[np.generic]) -> list[tuple[str, NDArray[np.float32], bool]]:
    """Return what each operator makes, in the order they run: name, value, whether quantised.

    Quantised values come back as the numbers that they stand for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says what this mode is for: this
        interpreter = Interpreter(str(model), experimental_preserve_all_tensors=True, num_threads=1)
    (taken,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(taken["index"], rows.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], rows)
    interpreter.invoke()
    details = {int(one["index"]): one for one in interpreter.get_tensor_details()}
    found, seen = [], set()
    for operator in interpreter._get_ops_details():
        for index in map(int, operator["outputs"]):
            if index in seen or index not in details:
                continue
            seen.add(index)
            value = interpreter.get_tensor(index)
            if value.ndim and len(value) == len(rows):
                found.append((details[index]["name"], *_number(value, details[index])))
    return found


def _number(value: NDArray[np.generic], detail: dict[str, Any]) -> tuple[NDArray[np.float32], bool]:
    scales, zeros = (detail["quantization_parameters"][k] for k in ("scales", "zero_points"))
    number = value.astype(np.float32)
    return ((number - zeros[0]) * scales[0], True) if len(scales) else (number, False)


if __name__ == "__main__":
    path, given, written, names = map(Path, sys.argv[1:])
    made = tensors(path, np.load(given, allow_pickle=False))
    np.savez(written, *(value for _, value, _ in made), allow_pickle=False)
    names.write_text(json.dumps([(name, quantised) for name, _, quantised in made]))
