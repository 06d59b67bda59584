"""Write an ONNX file: stable names, one axis name, metadata, checked."""

import logging
from pathlib import Path
from typing import cast

import onnx
import tensorflow as tf
import tf2onnx
from tf2onnx import tf_loader

from pipeline.errors import ExportError
from pipeline.export import passes
from pipeline.export.metadata import Metadata

# 18 writes global average pooling as two slower operators; tf2onnx 1.17 refuses more than 18.
OPSET = 17
AXIS = "batch"


def write(serve: tf.types.experimental.PolymorphicFunction, path: Path, metadata: Metadata) -> None:
    """Convert, improve, describe, check.

    Raises:
        ExportError: the graph has other inputs or outputs than the function, or is not valid.
    """
    save(passes.improve(convert(serve)), path, metadata)


def save(model: onnx.ModelProto, path: Path, metadata: Metadata) -> None:
    """Describe a graph, check it, write it.

    Raises:
        ExportError: the graph has other inputs or outputs than it should, or is not valid.
    """
    model.graph.name = "model"
    del model.metadata_props[:]
    for key, text in metadata.texts.items():
        model.metadata_props.add(key=key, value=text)
    _check(model)
    onnx.save(model, path)


def convert(serve: tf.types.experimental.PolymorphicFunction) -> onnx.ModelProto:
    """Return the graph as tf2onnx writes it, but for the name of the batch axis."""
    # tf2onnx tells every step of its optimiser as a warning or less.
    logging.getLogger(tf2onnx.__name__).setLevel(logging.ERROR)
    logging.getLogger(tf_loader.__name__).setLevel(logging.ERROR)
    model, _ = tf2onnx.convert.from_function(
        serve, input_signature=serve.input_signature, opset=OPSET
    )
    _name_batch_axis(model)
    return cast(onnx.ModelProto, model)


def _name_batch_axis(model: onnx.ModelProto) -> None:
    """Name the first axis of inputs and outputs; forget the shapes inside, which have names too."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = AXIS
    del model.graph.value_info[:]


def _check(model: onnx.ModelProto) -> None:
    found = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in (*model.graph.input, *model.graph.output)
    }
    expected = {"image": "uint8", "logits": "float", "probabilities": "float"}
    if found != expected or len(model.graph.input) != 1:
        raise ExportError(f"the graph has the inputs and outputs {found}, expected {expected}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph is not valid: {error}") from error
