"""Write an ONNX file: stable names, one axis name, metadata, checked."""

import logging
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx.helper
import tensorflow as tf
import tf2onnx
from tf2onnx import tf_loader

from pipeline.errors import ExportError
from pipeline.export import passes
from pipeline.export.metadata import Metadata

# 18 writes global average pooling as two slower operators; tf2onnx 1.17 refuses more than 18.
OPSET = 17
AXIS = "batch"
Tensors = dict[str, str]  # names of inputs and outputs, and ONNX's names of their element types
CLASSIFIER: Tensors = {"image": "uint8", "logits": "float", "probabilities": "float"}


def write(
    serve: tf.types.experimental.PolymorphicFunction,
    path: Path,
    metadata: Metadata,
    expected: Tensors = CLASSIFIER,
) -> None:
    """Convert, improve, describe, check.

    Raises:
        ExportError: the graph has other inputs or outputs than expected, or is not valid.
    """
    save(passes.improve(convert(serve)), path, metadata, expected)


def save(model: onnx.ModelProto, path: Path, metadata: Metadata, expected: Tensors) -> None:
    """Describe a graph, check it, write it.

    Args:
        model: gets the metadata.
        path: to write.
        metadata: in place of what it has.
        expected: its inputs and outputs.

    Raises:
        ExportError: the graph has other inputs or outputs than it should, or is not valid.
    """
    model.graph.name = "model"
    del model.metadata_props[:]
    for key, text in metadata.texts.items():
        model.metadata_props.add(key=key, value=text)
    _check(model, expected)
    onnx.save(model, path)


def tensors(model: onnx.ModelProto) -> Tensors:
    """Return the inputs and outputs of a graph."""
    return {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in (*model.graph.input, *model.graph.output)
    }


def tensors_of(serve: tf.types.experimental.PolymorphicFunction) -> Tensors:
    """Return the inputs and outputs that the graph of a function is to have."""
    outputs = serve.get_concrete_function().structured_outputs
    kinds = {one.name: one.dtype for one in serve.input_signature}
    kinds |= {name: one.dtype for name, one in outputs.items()}
    number = onnx.helper.np_dtype_to_tensor_dtype
    return {
        name: onnx.TensorProto.DataType.Name(number(np.dtype(kind.as_numpy_dtype))).lower()
        for name, kind in kinds.items()
    }


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


def _check(model: onnx.ModelProto, expected: Tensors) -> None:
    found = tensors(model)
    if found != expected or len(model.graph.input) != 1:
        raise ExportError(f"the graph has the inputs and outputs {found}, expected {expected}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        line = str(error).strip().partition("\n")[0]
        raise ExportError(f"the graph is not valid: {line}") from error
