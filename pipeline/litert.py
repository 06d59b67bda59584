"""Answer batches with one TFLite file, ours or anybody's, in a process of its own.

    python -m pipeline.litert MODEL.tflite  # prints its tensors, as JSON
    python -m pipeline.litert MODEL.tflite BATCHES.npz ANSWERS.npz THREADS  # the seconds of each

A process apart because TFLite's runtime and TensorFlow bring the same native code in different
versions. Imports neither TensorFlow nor anything of this project.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Lite:
    """A file with one input, opened; it is not to be run from several threads."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Load it.

        Args:
            path: the .tflite file.
            threads: of the interpreter.
        """
        self._interpreter = Interpreter(str(path), num_threads=threads)
        self._names = _signature_names(self._interpreter)
        self._ready = 0  # rows that the tensors have room for

    def describe(self) -> dict[str, Any]:
        """Return its inputs and outputs: names, shapes with -1 for what is free, and dtypes.

        The names are those of its only signature where it has one.
        """
        return {
            kind: [
                {
                    "name": self._names.get(one["index"], one["name"]),
                    "shape": [int(size) for size in one["shape_signature"]],
                    "dtype": np.dtype(one["dtype"]).name,
                }
                for one in details
            ]
            for kind, details in (
                ("inputs", self._interpreter.get_input_details()),
                ("outputs", self._interpreter.get_output_details()),
            )
        }

    def run(self, rows: Array) -> dict[str, Array]:
        """Answer a batch with every output, by name.

        Args:
            rows: (rows, ...), of its dtype; answered in several calls if its own batch is smaller.
        """
        fixed = int(self._interpreter.get_input_details()[0]["shape_signature"][0])
        size = fixed if fixed > 0 else max(1, len(rows))
        parts = [
            self._call(rows[start : start + size], size) for start in range(0, len(rows), size)
        ]
        return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}

    def _call(self, part: Array, size: int) -> dict[str, Array]:
        reader = self._interpreter
        (taken,) = reader.get_input_details()
        given = np.concatenate([part, part[:1].repeat(size - len(part), 0)])
        if size != self._ready:
            if taken["shape_signature"][0] < 1:
                reader.resize_tensor_input(taken["index"], given.shape)
            reader.allocate_tensors()
            self._ready = size
        reader.set_tensor(taken["index"], given)
        reader.invoke()
        return {
            self._names.get(one["index"], one["name"]): _numbers(
                reader.get_tensor(one["index"]), one["quantization"]
            )[: len(part)]
            for one in reader.get_output_details()
        }


def answer(model: Path, batches: Path, answers: Path, threads: int) -> list[float]:
    """Run a file's rows in the batches they come in.

    Args:
        model: the .tflite file.
        batches: .npz of arrays, one a batch, as `numpy.savez` names them by their place.
        answers: .npz to write: every output by its name, of all rows.
        threads: of the interpreter.

    Returns:
        The seconds of each batch.
    """
    lite = Lite(model, threads)
    found: dict[str, list[Array]] = {}
    seconds = []
    with np.load(batches, allow_pickle=False) as arrays:
        for place in range(len(arrays.files)):
            batch = arrays[f"arr_{place}"]
            started_s = time.monotonic()
            outputs = lite.run(batch)
            seconds.append(time.monotonic() - started_s)
            for name, array in outputs.items():
                found.setdefault(name, []).append(array)
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    np.savez(answers, allow_pickle=False, **whole)
    return seconds


def _numbers(value: Array, quantization: tuple[float, int]) -> Array:
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
        told: object = Lite(Path(sys.argv[1])).describe()
    else:
        path, given, written, number = sys.argv[1:]
        told = answer(Path(path), Path(given), Path(written), int(number))
    print(json.dumps(told))  # noqa: T201  what the parent reads
