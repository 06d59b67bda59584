"""Open a model file in its own runtime, whoever made it: SavedModel, ONNX, TFLite.

ONNX files are run by the code that serves.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CheckError, ParityError, UsageError
from protos import bundle_pb2
from service.errors import ModelError
from service.host import cores
from service.session import Session

BATCH_ROWS = 256
PART_ROWS = 8 * BATCH_ROWS  # between two words of how far it is; each starts TFLite anew
NUMPY = {  # by the names on the wire
    "BOOL": "bool",
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
Array = NDArray[np.generic]
Show = Callable[[int, int], None]  # what is done, of how much


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output; -1 in its shape for what is free, the batch first."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy's name


@dataclass(frozen=True, slots=True)
class Model:
    """A model with one input, opened."""

    path: Path
    input: Tensor
    outputs: tuple[Tensor, ...]
    texts: dict[str, str]  # what the file says about itself
    run: Callable[[Array], dict[str, Array]]  # rows in, every output by name; any number of rows


def open_model(
    path: Path,
    *,
    signature: str = "serving_default",
    options: bundle_pb2.SessionOptions | None = None,
) -> Model:
    """Open a SavedModel's folder, a .onnx or a .tflite file.

    Args:
        path: where it is.
        signature: of a SavedModel.
        options: for onnxruntime; None: those that bundles are served with.

    Raises:
        CheckError: it is none of them, cannot be loaded, or has not exactly one input.
    """
    if path.is_dir():
        return _saved_model(path, signature)
    if not path.is_file():
        raise UsageError(f"{path} is not there; expected a SavedModel's folder, .onnx or .tflite")
    if path.suffix == ".onnx":
        return _onnx(path, options or bundle_pb2.SessionOptions(graph_optimization="all"))
    if path.suffix == ".tflite":
        return _tflite(path)
    raise UsageError(f"{path} is a {path.suffix or 'nameless'} file, expected .onnx or .tflite")


def counted(show: Show, total: int) -> Callable[[int], None]:
    """Return what is told how much more is done."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        show(done, total)

    told(0)
    return told


def answers(model: Model, rows: Array, told: Callable[[int], None]) -> dict[str, Array]:
    """Run a model, and say how many rows it has answered as it goes on.

    Returns:
        Every output by name.

    Raises:
        CheckError: it cannot be run.
    """
    parts = []
    for start in range(0, len(rows), PART_ROWS):
        part = rows[start : start + PART_ROWS]
        parts.append(model.run(part))
        told(len(part))
    return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def _saved_model(path: Path, signature: str) -> Model:
    import tensorflow as tf  # noqa: PLC0415  ten seconds; not for who has no SavedModel

    from pipeline import device  # noqa: PLC0415

    device.prepare()
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise CheckError(
            f"{path} cannot be loaded as a SavedModel: {_first_line(error)}"
        ) from error
    if signature not in loaded.signatures:
        raise UsageError(
            f"{path} has the signatures {sorted(loaded.signatures)}, not {signature!r}; "
            "choose one with --signature"
        )
    serve = loaded.signatures[signature]
    inputs = [_tf_tensor(name, spec) for name, spec in serve.structured_input_signature[1].items()]
    outputs = [_tf_tensor(name, spec) for name, spec in serve.structured_outputs.items()]

    def run(rows: Array) -> dict[str, Array]:
        serve = loaded.signatures[signature]  # `loaded` owns the variables: keep it alive
        try:
            found = serve(**{inputs[0].name: tf.constant(rows)})
        except tf.errors.OpError as error:
            raise CheckError(f"{path} cannot be run: {_first_line(error)}") from error
        return {name: array.numpy() for name, array in found.items()}

    return _model(path, inputs, outputs, _saved_texts(path), run)


def _saved_texts(path: Path) -> dict[str, str]:
    try:
        found = json.loads((path / "assets.extra" / "metadata.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tf_tensor(name: str, spec: Any) -> Tensor:  # noqa: ANN401  TensorFlow's TensorSpec
    shape = spec.shape.as_list() if spec.shape.rank is not None else [-1]
    sizes = tuple(-1 if size is None else int(size) for size in shape)
    return Tensor(name, sizes, spec.dtype.name)


def _onnx(path: Path, options: bundle_pb2.SessionOptions) -> Model:
    try:
        session = Session(path.read_bytes(), options, threads=cores())
    except ModelError as error:
        raise CheckError(f"{path} cannot be loaded: {error}") from error
    inputs, outputs = (
        [Tensor(one.name, one.shape, NUMPY.get(one.datatype, one.datatype)) for one in tensors]
        for tensors in (session.inputs, session.outputs)
    )

    def run(rows: Array) -> dict[str, Array]:
        try:
            return session.run(rows)
        except ModelError as error:
            raise CheckError(f"{path} cannot be run: {error}") from error

    return _model(path, inputs, outputs, dict(session.metadata), run)


def _tflite(path: Path) -> Model:
    try:
        tensors = json.loads(_interpreted(path))
    except ParityError as error:
        raise CheckError(f"{path} cannot be loaded: {error}") from error
    inputs, outputs = (
        [Tensor(one["name"], tuple(one["shape"]), one["dtype"]) for one in tensors[kind]]
        for kind in ("inputs", "outputs")
    )

    def run(rows: Array) -> dict[str, Array]:
        starts = range(0, len(rows), BATCH_ROWS)
        try:
            return interpreted(path, [rows[start : start + BATCH_ROWS] for start in starts])[0]
        except ParityError as error:
            raise CheckError(f"{path} cannot be run: {error}") from error

    _check_tensors(path, inputs, outputs)
    return Model(path, inputs[0], tuple(outputs), _tflite_texts(path), run)


def interpreted(path: Path, batches: list[Array]) -> tuple[dict[str, Array], list[float]]:
    """Answer batches with a TFLite file, in a process of its own.

    Returns:
        Every output by its name, of all rows; and the seconds of each batch.

    Raises:
        ParityError: TFLite's runtime refuses the file or a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, written = Path(folder, "batches.npz"), Path(folder, "answers.npz")
        np.savez(given, *batches)
        seconds = json.loads(_interpreted(path, given, written, cores()))
        with np.load(written, allow_pickle=False) as arrays:
            return dict(arrays), seconds


def _tflite_texts(path: Path) -> dict[str, str]:
    """Return our own metadata, which stand in a zip at the end of the file, as TFLite's do."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read("metadata.json"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
    return found if isinstance(found, dict) else {}


def _interpreted(path: Path, *words: object) -> str:
    command = [sys.executable, "-m", "pipeline.litert", str(path), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  ours
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ParityError(f"TFLite's runtime says: {last}")
    return done.stdout


def _model(
    path: Path,
    inputs: list[Tensor],
    outputs: list[Tensor],
    texts: dict[str, str],
    run: Callable[[Array], dict[str, Array]],
) -> Model:
    """Return the model; its rows are run in calls of its own batch, or of `BATCH_ROWS`."""
    _check_tensors(path, inputs, outputs)
    fixed = inputs[0].shape[0] if inputs[0].shape else -1
    size = fixed if fixed > 0 else BATCH_ROWS

    def in_calls(rows: Array) -> dict[str, Array]:
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            missing = size - len(part) if fixed > 0 else 0
            filled = np.concatenate([part, part[:1].repeat(missing, 0)]) if missing else part
            parts.append({name: array[: len(part)] for name, array in run(filled).items()})
        return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}

    return Model(path, inputs[0], tuple(outputs), texts, in_calls)


def _check_tensors(path: Path, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    if len(inputs) != 1 or not outputs or not inputs[0].shape:
        raise CheckError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs, expected one input with "
            "a batch: parity is of one tensor in"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
