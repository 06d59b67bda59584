"""Write an ONNX model in fewer bits: float16, or int8 between quantised layers.

Both start from the float32 file and keep its inputs and outputs: uint8 in, float32 out.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export import onnx as float32
from pipeline.export.metadata import Metadata

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in service.session

from onnxruntime import quantization
from onnxruntime.transformers import float16

BATCH_ROWS = 50  # of calibration
PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # ours is as small as it gets: no advice


def write_float16(source: Path, path: Path, metadata: Metadata) -> None:
    """Convert weights and arithmetic to float16.

    A weight beyond its range is cut to it: parity shows whether that matters.

    Raises:
        ExportError: onnxruntime's converter fails, or what it wrote is not valid.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every weight that is cut
            model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    except Exception as error:
        # It raises whatever its helpers do.
        raise ExportError(f"onnxruntime cannot write float16: {_line(error)}") from error
    float32.save(model, path, metadata)


def write_int8(source: Path, path: Path, metadata: Metadata, images: NDArray[np.uint8]) -> None:
    """Quantise weights for each channel, and what layers hand on by its range on the images.

    The layer that makes the logits stays float32: one step of an int8 logit is as wide as many
    margins. Weights have 7 bits: sums of two products fit 16 then, which processors without VNNI
    add them in and would saturate.

    Args:
        source: the float32 file.
        path: to write.
        metadata: of the new file.
        images: uint8 (rows, height, width, channels).

    Raises:
        ExportError: onnxruntime's quantiser fails, or what it wrote is not valid.
    """
    model = onnx.load(source)
    del model.metadata_props[:]
    model.metadata_props.add(key=PREPARED[0], value=PREPARED[1])
    last = [n.name for n in model.graph.node if n.op_type == "Softmax" or "logits" in n.output]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.onnx")
        try:
            quantization.quantize_static(
                model,
                written,
                _Reader(images),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=last,
            )
        except Exception as error:
            raise ExportError(f"onnxruntime cannot quantise to int8: {_line(error)}") from error
        float32.save(onnx.load(written), path, metadata)


class _Reader:
    """Hands images out in batches, until there are none, as the quantiser asks for them."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        starts = range(0, len(images), BATCH_ROWS)
        self._batches: Iterator[NDArray[np.uint8]] = iter(
            [images[start : start + BATCH_ROWS] for start in starts]
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
