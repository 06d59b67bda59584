"""Answer arrays with any TFLite file, in a process of its own.

    python -m pipeline.interpreter MODEL.tflite            # its tensors, as JSON
    python -m pipeline.interpreter MODEL.tflite INPUT.npy ANSWERS.npz THREADS

A process apart because TFLite's runtime and TensorFlow bring the same native code in different
versions. Imports neither TensorFlow nor anything of this project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

BATCH_ROWS = 256


def describe(model: Path) -> dict[str, Any]:
    """Return its inputs and outputs: names, shapes with -1 for what is free, and dtypes.

    The names are those of its only signature where it has one.
    """
    interpreter = Interpreter(str(model))
    names = _signature_names(interpreter)
    return {
        kind: [
            {
                "name": names.get(one["index"], one["name"]),
                "shape": [int(size) for size in one["shape_signature"]],
                "dtype": np.dtype(one["dtype"]).name,
            }
            for one in details
        ]
        for kind, details in (
            ("inputs", interpreter.get_input_details()),
            ("outputs", interpreter.get_output_details()),
        )
    }


def answer(
    model: Path, inputs: NDArray[np.generic], threads: int
) -> dict[str, NDArray[np.generic]]:
    """Answer rows with every output, by name, in batches of the model's own size or of 256.

    Args:
        model: the .tflite file, with one input.
        inputs: (rows, ...), of its dtype.
        threads: of the interpreter.
    """
    interpreter = Interpreter(str(model), num_threads=threads)
    names = _signature_names(interpreter)
    (taken,) = interpreter.get_input_details()
    fixed = int(taken["shape_signature"][0])
    size = fixed if fixed > 0 else BATCH_ROWS
    ready = 0
    found: dict[str, list[NDArray[np.generic]]] = {}
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        missing = max(0, fixed - len(part))
        given = np.concatenate([part, part[:1].repeat(missing, 0)])
        if len(given) != ready:
            ready = len(given)
            if fixed < 1:
                interpreter.resize_tensor_input(taken["index"], given.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], given)
        interpreter.invoke()
        for one in interpreter.get_output_details():
            name = names.get(one["index"], one["name"])
            value = _numbers(interpreter.get_tensor(one["index"]), one["quantization"])
            found.setdefault(name, []).append(value[: len(part)])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _numbers(value: NDArray[np.generic], quantization: tuple[float, int]) -> NDArray[np.generic]:
    """Return what integers stand for, by the scale and the zero point of their tensor."""
    scale, zero = quantization
    return (value.astype(np.float32) - zero) * np.float32(scale) if scale else value


def _signature_names(interpreter: Interpreter) -> dict[int, str]:
    """Return the names that a file's only signature gives its tensors, by their indices."""
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    return {
        int(details["index"]): name
        for tensors in (runner.get_input_details(), runner.get_output_details())
        for name, details in tensors.items()
    }


if __name__ == "__main__":
    if len(sys.argv) == 2:  # noqa: PLR2004  the command and a model
        print(json.dumps(describe(Path(sys.argv[1]))))  # noqa: T201  what the parent reads
    else:
        path, given, written, number = sys.argv[1:]
        np.savez(
            Path(written),
            allow_pickle=False,
            **answer(Path(path), np.load(given, allow_pickle=False), int(number)),
        )
