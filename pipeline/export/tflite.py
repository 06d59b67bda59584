"""Write TFLite files from a SavedModel.

Their metadata is a zip archive after the flatbuffer, as TFLite's own metadata tools leave it: the
runtime reads from the front, `unzip -p model.tflite metadata.json` from the back. Whatever is
inside, input and outputs stay what they are in the SavedModel: no client has to know a scale.
"""

import os
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.metadata import METADATA, Metadata

NOISE = b"fully_quantize: "  # how a line of the converter begins that says nothing to anybody
INT16X8 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8


def averages(model: keras.Model) -> list[keras.Layer]:
    """Return the layers that average whole planes, nested ones too."""
    kind = keras.layers.GlobalAveragePooling2D
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, kind) and layer.data_format == "channels_last"
    ]


@contextmanager
def in_two_steps(layers: list[keras.Layer]) -> Iterator[None]:
    """Let layers average over the width first and then over the height, until the block ends.

    TFLite adds up one value after the other. Over 28 x 28 equal ones, as behind a black image, it
    is off by 5e-6 of them, which has taken the logits of a batch-normalised network over float32's
    budget; a row and then a column are off by a sixth of that.
    """
    for layer in layers:
        layer.call = partial(_averaged, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call  # the class' own again


def _averaged(layer: keras.Layer, inputs: keras.KerasTensor) -> keras.KerasTensor:
    rows = keras.ops.mean(inputs, axis=2, keepdims=layer.keepdims)
    return keras.ops.mean(rows, axis=1, keepdims=layer.keepdims)


def write(saved_model: Path, path: Path, metadata: Metadata) -> None:
    """Convert with TFLite's own operators only.

    Raises:
        ExportError: the model needs an operator that TFLite does not have.
    """
    _save(_converter(saved_model), path, metadata)


def write_float16(saved_model: Path, path: Path, metadata: Metadata) -> None:
    """Keep weights as float16; whether they are computed in it is the runtime's choice.

    Raises:
        ExportError: as for `write`.
    """
    converter = _converter(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    _save(converter, path, metadata)


def write_dynamic_range(saved_model: Path, path: Path, metadata: Metadata) -> None:
    """Keep weights as int8, of layers that have many; ranges of the rest are found at each call.

    Raises:
        ExportError: as for `write`.
    """
    converter = _converter(saved_model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    _save(converter, path, metadata)


def write_int8(saved_model: Path, path: Path, metadata: Metadata, rows: NDArray[Any]) -> None:
    """Compute in int8, by the ranges that layers have on the rows.

    Args:
        saved_model: the folder.
        path: to write.
        metadata: of the new file.
        rows: for calibration, as the model takes them.

    Raises:
        ExportError: the model needs an operator that TFLite does not have in int8.
    """
    converter = _converter(saved_model)
    _calibrate(converter, rows)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    _save(converter, path, metadata)


def write_int16x8(saved_model: Path, path: Path, metadata: Metadata, rows: NDArray[Any]) -> None:
    """Compute with int16 between layers and int8 weights; what has no such kernel stays float32.

    Args:
        saved_model: the folder.
        path: to write.
        metadata: of the new file.
        rows: as for `write_int8`.

    Raises:
        ExportError: as for `write`.
    """
    converter = _converter(saved_model)
    _calibrate(converter, rows)
    # Alone, the first refuses the cast from uint8.
    converter.target_spec.supported_ops = [INT16X8, tf.lite.OpsSet.TFLITE_BUILTINS]
    _save(converter, path, metadata)


def _converter(saved_model: Path) -> tf.lite.TFLiteConverter:
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter


def _calibrate(converter: tf.lite.TFLiteConverter, rows: NDArray[Any]) -> None:
    def batches() -> Iterator[list[NDArray[Any]]]:
        for start in range(len(rows)):
            yield [rows[start : start + 1]]  # its only input

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = batches


@contextmanager
def without_noise() -> Iterator[None]:
    """Leave out one line of what native code writes to standard error in the block.

    The converter has no switch for it. All else is passed on at the end, also if the block fails.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with os.fdopen(kept, "wb") as terminal, tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            said.seek(0)
            terminal.writelines(line for line in said if not line.startswith(NOISE))


def _save(converter: tf.lite.TFLiteConverter, path: Path, metadata: Metadata) -> None:
    try:
        with warnings.catch_warnings(), without_noise():
            # It calibrates with an interpreter that it calls deprecated itself.
            warnings.simplefilter("ignore")
            content = converter.convert()
    except Exception as error:
        # The converter raises a bare Exception of many lines.
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"TFLite cannot hold this model: {line}") from error
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(METADATA), metadata.json())
