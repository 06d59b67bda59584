"""Every tensor inside a model for some rows: SavedModel, ONNX, TFLite.

ONNX files are run by the code that serves.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.framework import convert_to_constants

from pipeline import device
from pipeline.errors import ParityError
from pipeline.explain import scopes
from protos import bundle_pb2
from service.errors import ModelError
from service.session import Session

Rows = NDArray[np.generic]
Floats = NDArray[np.float32]
ONE = 1e-2  # how far the sum of a row's probabilities may be from it
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What one operator makes of the rows."""

    name: str
    value: Floats  # (rows, ...)
    inputs: tuple[str, ...] = ()  # names of tensors that it is made from; of a reference only
    operator: str = ""
    layer: str = ""  # as `scopes` names it; of a reference only
    inside: str = ""  # its operator's name inside the model; of a reference only


@dataclass(frozen=True, slots=True)
class Walked:
    """A model's tensors in the order in which they are made, and its answer."""

    tensors: tuple[Tensor, ...]
    logits: Floats
    precision: str  # float32, float16 or int8: the coarsest that it computes in


class Reference:
    """A SavedModel's serving graph, its variables frozen."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            ParityError: it cannot be loaded, or has no `serving_default` with one input.
        """
        device.prepare()
        try:
            loaded = tf.saved_model.load(str(folder))
            serve = loaded.signatures["serving_default"]
        except (OSError, KeyError, ValueError, tf.errors.OpError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ParityError(f"{folder} cannot be read as a SavedModel: {reason}") from error
        names = sorted(serve.structured_outputs)
        self._frozen = convert_to_constants.convert_variables_to_constants_v2(serve)
        if len(self._frozen.inputs) != 1:
            raise ParityError(f"{folder} has {len(self._frozen.inputs)} inputs, expected one")
        chosen = names.index("logits") if "logits" in names else 0
        self._output = self._frozen.outputs[chosen]
        self.operators: dict[str, Any] = {
            op.outputs[0].name: op
            for op in self._frozen.graph.get_operations()
            if len(op.outputs) == 1
            and op.type not in ("Softmax", "Identity")
            and op.outputs[0].dtype.is_floating
            and _has_batch(op)
        }
        self._places = scopes.places(op.name for op in self._frozen.graph.get_operations())

    def walk(self, rows: Rows) -> Walked:
        """Answer the rows and keep every tensor."""
        names = list(self.operators)
        fetched = [self.operators[name].outputs[0] for name in names]
        pruned = self._frozen.prune(self._frozen.inputs, [*fetched, self._output])
        values = [one.numpy() for one in pruned(tf.constant(rows))]
        tensors = tuple(
            self._tensor(name, value)
            for name, value in zip(names, values, strict=False)
            if value.ndim and len(value) == len(rows)
        )
        return Walked(tensors, values[-1], "float32")

    def _tensor(self, name: str, value: Floats) -> Tensor:
        op = self.operators[name]
        place = self._places[op.name]
        inputs = tuple(one.name for one in op.inputs)
        return Tensor(name, value, inputs, op.type, place.layer, place.inside)

    def kernel(self, name: str) -> tuple[Floats, tuple[int, int]] | None:
        """Return a convolution's kernel (height, width, in, out), strides, if it is one."""
        op = self.operators[name]
        if op.type != "Conv2D":
            return None
        kernel = self._frozen.prune(self._frozen.inputs, [op.inputs[1]])
        shape = (1, *(size or 1 for size in self._frozen.inputs[0].shape[1:]))
        value = kernel(tf.zeros(shape, self._frozen.inputs[0].dtype))[0].numpy()
        strides = op.get_attr("strides")
        return value, (int(strides[1]), int(strides[2]))


def walk(path: Path, rows: Rows, config: Mapping[str, str]) -> Walked:
    """Answer rows with any model and keep every tensor.

    Args:
        path: a SavedModel's folder, a .onnx or a .tflite file.
        rows: (rows, ...), of the model's input.
        config: switches of onnxruntime.

    Raises:
        ParityError: it is none of them, or cannot be run.
    """
    if path.is_dir():
        return _saved_model(path, rows)
    if path.suffix == ".onnx":
        return _onnx(path, rows, config)
    if path.suffix == ".tflite":
        return _tflite(path, rows)
    raise ParityError(f"{path} is no SavedModel folder, .onnx or .tflite file")


def _saved_model(path: Path, rows: Rows) -> Walked:
    try:
        return Reference(path).walk(rows)
    except ValueError:
        # A graph that changes its variables while it answers cannot be frozen: its answer is all.
        loaded = tf.saved_model.load(str(path))
        answers = loaded.signatures["serving_default"](tf.constant(rows))
        name = "logits" if "logits" in answers else min(answers)
        logits = answers[name].numpy()
        return Walked((Tensor(name, logits),), logits, "float32")


def answer(path: Path, rows: Rows, optimization: str, config: Mapping[str, str]) -> Floats:
    """Return the logits of an ONNX file as it is, with options of onnxruntime.

    Raises:
        ParityError: onnxruntime refuses the file or the options.
    """
    options = bundle_pb2.SessionOptions(graph_optimization=optimization, config=config)
    try:
        found = Session(path.read_bytes(), options, threads=1).run(rows)
    except (ModelError, OSError) as error:
        raise ParityError(f"{path.name} cannot be run: {error}") from error
    chosen = "logits" if "logits" in found else next(iter(found))
    return found[chosen].astype(np.float32)


def answer_again(path: Path, rows: Rows, config: Mapping[str, str]) -> Floats:
    """Return a model's second answer to the same rows; what is random moves on between them."""
    if not path.is_dir():
        return walk(path, rows, config).logits
    loaded = tf.saved_model.load(str(path))
    answers = [loaded.signatures["serving_default"](tf.constant(rows)) for _ in range(2)][1]
    logits: Floats = answers["logits" if "logits" in answers else min(answers)].numpy()
    return logits


def _has_batch(op: Any) -> bool:  # noqa: ANN401  TensorFlow's Operation
    shape = op.outputs[0].shape
    return shape.rank is not None and shape.rank > 0 and shape[0] is None


def _onnx(path: Path, rows: Rows, config: Mapping[str, str]) -> Walked:
    try:
        model = onnx.load(path)
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except Exception as error:
        # Each of protobuf's, onnx's and the system's own errors has another base class.
        raise ParityError(f"{path.name} cannot be read as ONNX: {error}") from error
    public = {value.name for value in model.graph.output}
    kinds = {value.name: value for value in (*inferred.value_info, *inferred.output)}
    made = [name for node in model.graph.node for name in node.output if name in kinds]
    inner = [name for name in made if name not in public and _is_of_rows(kinds[name])]
    model.graph.output.extend(kinds[name] for name in inner)
    options = bundle_pb2.SessionOptions(graph_optimization="disable", config=config)
    try:
        found = Session(model.SerializeToString(), options, threads=1).run(rows)
    except ModelError as error:
        raise ParityError(f"{path.name} cannot be run: {error}") from error
    order = [name for name in made if name in found]
    tensors = tuple(Tensor(name, found[name].astype(np.float32)) for name in order)
    logits = answer(path, rows, "all", config)  # as it is served: nothing inside is kept
    return Walked(tensors, logits, _precision(model))


def _is_of_rows(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    size = kind.shape.dim
    return kind.elem_type in FLOATS and bool(size) and not size[0].HasField("dim_value")


def _precision(model: onnx.ModelProto) -> str:
    if any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in model.graph.node):
        return "int8"
    kinds = {constant.data_type for constant in model.graph.initializer}
    return "float16" if onnx.TensorProto.FLOAT16 in kinds else "float32"


def _tflite(path: Path, rows: Rows) -> Walked:
    with tempfile.TemporaryDirectory() as folder:
        given, written, named = (Path(folder, one) for one in ("in.npy", "out.npz", "names.json"))
        np.save(given, rows)
        script = Path(__file__).with_name("lite.py")
        command = [sys.executable, "-P", *map(str, (script, path, given, written, named))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ParityError(f"{path.name} cannot be run by TFLite's runtime: {last}")
        names = json.loads(named.read_text())
        with np.load(written, allow_pickle=False) as arrays:
            values = [arrays[f"arr_{place}"] for place in range(len(names))]
    tensors = tuple(Tensor(name, value) for (name, _), value in zip(names, values, strict=True))
    logits = _tflite_logits(tensors)
    return Walked(tensors, logits, "int8" if any(one for _, one in names) else "float32")


def _tflite_logits(tensors: tuple[Tensor, ...]) -> Floats:
    """Return the input of the softmax that ends our models; else what is made last."""
    last = tensors[-1].value
    for tensor in reversed(tensors[:-1]):
        if tensor.value.shape == last.shape and np.abs(tensor.value.sum(axis=-1) - 1).max() > ONE:
            return tensor.value
    return last
