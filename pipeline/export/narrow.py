"""Write an ONNX model in fewer bits: float16, or int8 between quantised layers.

Both start from the float32 file and keep its inputs and outputs.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.errors import ExportError
from pipeline.export import onnx as float32
from pipeline.export.metadata import Metadata
from protos import bundle_pb2
from service.errors import ModelError
from service.host import cores

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service.session

from onnxruntime import quantization
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

from service.session import Session

log = logging.getLogger(__name__)
BATCH_ROWS = 50  # of calibration
LOOKED_AT, OPEN_ROWS = 100, 8  # rows, and in one call, whose every tensor is kept
HALF_MAX = float(np.finfo(np.float16).max)
LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # ours is as small as it gets: no advice


def overflow(source: Path, rows: NDArray[Any]) -> str:
    """Return which tensor of the float32 graph float16 cannot hold, and how large it is.

    Some runtimes compute in float32 with float16 weights, and answer rightly where another
    processor would overflow.

    Args:
        source: the float32 file.
        rows: as the model takes them; a hundred of them at most are run.

    Returns:
        Half a sentence; nothing if all are in range, or cannot be looked at.
    """
    model = onnx.load(source)
    inner = onnx.shape_inference.infer_shapes(model).graph.value_info
    floats = [one for one in inner if one.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    model.graph.output.extend(floats)
    largest = {
        constant.name: float(np.abs(numpy_helper.to_array(constant)).max(initial=0))
        for constant in model.graph.initializer
        if constant.data_type == onnx.TensorProto.FLOAT
    }
    options = bundle_pb2.SessionOptions(graph_optimization="disable")
    some = rows[:: -(-len(rows) // LOOKED_AT)]
    try:
        session = Session(model.SerializeToString(), options, threads=cores())
        for start in range(0, len(some), OPEN_ROWS):
            for name, array in session.run(some[start : start + OPEN_ROWS]).items():
                peak = float(np.abs(array).max(initial=0))
                largest[name] = max(largest.get(name, 0), peak)
    except ModelError as error:
        log.warning("what float16 can hold of %s is not known: %s", source.name, error)
        return ""
    worst = max(largest, key=lambda name: largest[name], default="")
    if not worst or largest[worst] <= HALF_MAX:
        return ""
    return f"{worst} reaches {largest[worst]:.3g}, float16 ends at {HALF_MAX:.0f}"


def write_float16(source: Path, path: Path, metadata: Metadata) -> None:
    """Convert weights and arithmetic to float16.

    A weight beyond its range is cut to it: parity shows whether that matters.

    Raises:
        ExportError: onnxruntime's converter fails, or what it wrote is not valid.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every weight that is cut
            whole = onnx.load(source)
            expected = float32.tensors(whole)
            model = float16.convert_float_to_float16(whole, keep_io_types=True)
        # It puts the cast of a float input behind the nodes that read it.
        OnnxModel.graph_topological_sort(model.graph)
    except Exception as error:
        # It raises whatever its helpers do.
        raise ExportError(f"onnxruntime cannot write float16: {_line(error)}") from error
    float32.save(model, path, metadata, expected)


def write_int8(source: Path, path: Path, metadata: Metadata, rows: NDArray[Any]) -> None:
    """Quantise weights for each channel, and what layers hand on by its range on the rows.

    The layer that makes the output stays float32: one step of an int8 logit is as wide as many
    margins. Weights have 7 bits: sums of two products fit 16 then, which processors without VNNI
    add them in and would saturate.

    Args:
        source: the float32 file.
        path: to write.
        metadata: of the new file.
        rows: for calibration, as the model takes them.

    Raises:
        ExportError: onnxruntime's quantiser fails, or what it wrote is not valid.
    """
    model = onnx.load(source)
    del model.metadata_props[:]
    model.metadata_props.add(key=PREPARED[0], value=PREPARED[1])
    expected, last = float32.tensors(model), _last(model)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.onnx")
        try:
            quantization.quantize_static(
                model,
                written,
                _Reader(model.graph.input[0].name, rows),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=last,
            )
        except Exception as error:
            raise ExportError(f"onnxruntime cannot quantise to int8: {_line(error)}") from error
        float32.save(onnx.load(written), path, metadata, expected)


def _last(model: onnx.ModelProto) -> list[str]:
    """Return the names of the layer that makes the output and of what comes behind it."""
    wanted = {value.name for value in model.graph.output}
    found = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            found.append(node.name)
            if node.op_type not in LAYERS:
                wanted.update(node.input[:1])
    return found


class _Reader:
    """Hands rows out in batches, until there are none, as the quantiser asks for them."""

    def __init__(self, name: str, rows: NDArray[Any]) -> None:
        self._name = name
        starts = range(0, len(rows), BATCH_ROWS)
        self._batches: Iterator[NDArray[Any]] = iter(
            [rows[start : start + BATCH_ROWS] for start in starts]
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
