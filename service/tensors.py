"""Wire bytes to arrays and back, checked against what the model takes.

The data rules are Triton's. Raw contents are row-major, little-endian, one entry an input, and are
not copied on the way in; typed contents are one list of numbers an input.
"""

import math
import struct
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos import bundle_pb2, inference_pb2
from service.errors import InvalidRequestError, UnimplementedError

DTYPE: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPE = {dtype: name for name, dtype in DTYPE.items()}
BYTES = "BYTES"
# Which list of InferTensorContents holds a datatype; FP16 exists raw only.
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
WIDE = {
    "bool_contents": np.dtype("?"),
    "uint_contents": np.dtype("u4"),
    "uint64_contents": np.dtype("u8"),
    "int_contents": np.dtype("i4"),
    "int64_contents": np.dtype("i8"),
    "fp32_contents": np.dtype("f4"),
    "fp64_contents": np.dtype("f8"),
}
SHARED_MEMORY = "shared_memory_region"
CLASSIFICATION = "classification"
IMAGE_DIMENSIONS = 4
MAX_DIMENSIONS = 32  # of a shape that is looked at; a few bytes can say millions
InputTensor = inference_pb2.ModelInferRequest.InferInputTensor


class Output(NamedTuple):
    """One output that a request asks for; `classes` above 0 asks for that many labels instead."""

    name: str
    classes: int = 0


def decode(
    request: inference_pb2.ModelInferRequest, spec: bundle_pb2.TensorSpec, max_rows: int
) -> NDArray[np.generic] | list[bytes]:
    """View a request's one input as an array.

    Args:
        request: its input is in `raw_input_contents`, or in `contents`.
        spec: the model's input; its first dimension is the batch.
        max_rows: most rows one request may have.

    Returns:
        (rows, ...), of the model's dtype and shape; read-only where it shares the request's
        memory. Of a model of images, asked in BYTES: the encoded picture of each row.

    Raises:
        InvalidRequestError: name, datatype, shape or byte count are not the model's, or the batch
            is empty or too big.
        UnimplementedError: the input is said to be in shared memory.
    """
    if len(request.inputs) != 1:
        raise InvalidRequestError(
            f"expected 1 inputs but got {len(request.inputs)} inputs for model "
            f"'{request.model_name}'; its input is '{spec.name}'"
        )
    tensor = request.inputs[0]
    if tensor.name != spec.name:
        raise InvalidRequestError(
            f"unexpected inference input '{tensor.name}' for model '{request.model_name}'; "
            f"expected '{spec.name}'"
        )
    _refuse_shared_memory(tensor.name, tensor.parameters)
    if tensor.datatype == BYTES and takes_pictures(spec):
        return _pictures(request, tensor, max_rows)
    if tensor.datatype != spec.datatype:
        raise InvalidRequestError(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', "
            f"but model '{request.model_name}' expects '{spec.datatype}'"
        )
    shape = _checked_shape(tensor, tuple(spec.shape), request.model_name, max_rows)
    if tensor.HasField("contents"):
        return _typed(request, tensor).reshape(shape)
    return _raw(request, tensor).reshape(shape)


def requested(
    request: inference_pb2.ModelInferRequest, specs: Sequence[bundle_pb2.TensorSpec]
) -> list[Output]:
    """Return the outputs to answer with, in the order asked for; all of them if none is named.

    Raises:
        InvalidRequestError: an output is unknown or asked for twice, or its number of classes is
            not one.
        UnimplementedError: an output is wanted in shared memory.
    """
    known = [spec.name for spec in specs]
    if not request.outputs:
        return [Output(name) for name in known]
    found: dict[str, Output] = {}
    for output in request.outputs:
        if output.name not in known:
            raise InvalidRequestError(
                f"unexpected inference output '{output.name}' for model '{request.model_name}'; "
                f"it has {', '.join(known)}"
            )
        if output.name in found:
            raise InvalidRequestError(
                f"inference output '{output.name}' is requested twice "
                f"for model '{request.model_name}'"
            )
        _refuse_shared_memory(output.name, output.parameters)
        found[output.name] = Output(output.name, _classes(output))
    return list(found.values())


def append_output(
    response: inference_pb2.ModelInferResponse,
    output: Output,
    array: NDArray[np.generic],
    labels: Sequence[str],
) -> None:
    """Add one output to a response as raw contents, or as its highest classes.

    Classes are BYTES (rows, classes), highest first, each `value:index` or `value:index:label`; NaN
    comes last.
    """
    if output.classes:
        strings = _classified(array.reshape(len(array), -1), output.classes, labels)
        response.outputs.add(name=output.name, datatype=BYTES, shape=strings.shape)
        response.raw_output_contents.append(_framed(strings.ravel().tolist()))
        return
    response.outputs.add(name=output.name, datatype=DATATYPE[array.dtype], shape=array.shape)
    response.raw_output_contents.append(array.tobytes())


def takes_pictures(spec: bundle_pb2.TensorSpec) -> bool:
    """Tell whether a model's input is images of one size, gray or in colour."""
    return (
        spec.datatype == "UINT8"
        and len(spec.shape) == IMAGE_DIMENSIONS
        and spec.shape[3] in {1, 3}
        and min(spec.shape[1:]) > 0
    )


def _classes(output: inference_pb2.ModelInferRequest.InferRequestedOutputTensor) -> int:
    if CLASSIFICATION not in output.parameters:
        return 0
    parameter = output.parameters[CLASSIFICATION]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param < 1:
        raise InvalidRequestError(
            f"the parameter 'classification' of output '{output.name}' must be a positive "
            "int64_param: how many classes to return"
        )
    return parameter.int64_param


def _classified(
    rows: NDArray[np.generic], classes: int, labels: Sequence[str]
) -> NDArray[np.object_]:
    classes = min(classes, rows.shape[1])
    whole = rows.dtype.kind in "biu"
    # Stable, so that equal values keep the order of their classes. Inverting turns whole numbers
    # round without overflow.
    turned = np.invert if whole else np.negative
    highest = np.argsort(turned(rows), axis=1, kind="stable")[:, :classes]
    written = "d" if whole else "f"  # as Triton's, which are C++'s to_string
    strings = np.empty(highest.shape, np.object_)
    for place, index in np.ndenumerate(highest):
        label = f":{labels[int(index)]}" if index < len(labels) else ""
        strings[place] = f"{rows[place[0], index].item():{written}}:{index}{label}".encode()
    return strings


def _framed(strings: Sequence[bytes]) -> bytes:
    """Return BYTES as they are on the wire: each with its length before it, 4 bytes."""
    return b"".join(struct.pack("<I", len(string)) + string for string in strings)


def _unframed(content: bytes, tensor: InputTensor, rows: int) -> list[bytes]:
    strings: list[bytes] = []
    start = 0
    while start + 4 <= len(content) and len(strings) <= rows:
        (size,) = struct.unpack_from("<I", content, start)
        if start + 4 + size > len(content):
            break
        strings.append(content[start + 4 : start + 4 + size])
        start += 4 + size
    if start != len(content) or len(strings) != rows:
        raise InvalidRequestError(
            f"input '{tensor.name}' has {len(content)} bytes, which are not {rows} elements of "
            "datatype BYTES; expected 4 bytes of length before each"
        )
    return strings


def _pictures(
    request: inference_pb2.ModelInferRequest, tensor: InputTensor, max_rows: int
) -> list[bytes]:
    shape = _shape(tensor, request.model_name)
    if not (len(shape) == 1 or shape[1:] == (1,)) or shape[0] < 1:
        raise InvalidRequestError(
            f"unexpected shape for input '{tensor.name}' for model '{request.model_name}'. "
            f"Expected [-1] pictures, got {_listed(shape)}"
        )
    _check_rows(shape[0], request.model_name, max_rows)
    if not tensor.HasField("contents"):
        return _unframed(_raw_content(request, tensor), tensor, shape[0])
    _check_alone(request, tensor)
    strings = list(tensor.contents.bytes_contents)
    if len(strings) != shape[0]:
        raise InvalidRequestError(
            f"input '{tensor.name}' has {len(strings)} elements in bytes_contents, "
            f"expected {shape[0]}"
        )
    return strings


def _checked_shape(
    tensor: InputTensor, expected: tuple[int, ...], model: str, max_rows: int
) -> tuple[int, ...]:
    """Refuse a shape before its product is used for anything."""
    shape = _shape(tensor, model)
    fits = len(shape) == len(expected) and all(
        size > 0 and wanted in {size, -1} for size, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        raise InvalidRequestError(
            f"unexpected shape for input '{tensor.name}' for model '{model}'. "
            f"Expected {_listed(expected)}, got {_listed(shape)}"
        )
    _check_rows(shape[0], model, max_rows)
    return shape


def _shape(tensor: InputTensor, model: str) -> tuple[int, ...]:
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(
            f"unexpected shape for input '{tensor.name}' for model '{model}': it has "
            f"{len(tensor.shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    return tuple(tensor.shape)


def _check_rows(rows: int, model: str, max_rows: int) -> None:
    if rows > max_rows:
        raise InvalidRequestError(
            f"inference request batch-size must be <= {max_rows} for '{model}', got {rows}; "
            "split it into smaller requests"
        )


def _check_alone(request: inference_pb2.ModelInferRequest, tensor: InputTensor) -> None:
    if request.raw_input_contents:
        raise InvalidRequestError(
            "contents field must not be specified when using raw_input_contents for "
            f"'{tensor.name}' for model '{request.model_name}'"
        )


def _typed(request: inference_pb2.ModelInferRequest, tensor: InputTensor) -> NDArray[np.generic]:
    """Read an input from its `contents`; narrow integers are given in 32 bits."""
    _check_alone(request, tensor)
    if tensor.datatype not in CONTENTS:
        raise InvalidRequestError(
            f"input '{tensor.name}' is {tensor.datatype}, which has no contents field; "
            "send it in raw_input_contents"
        )
    field = CONTENTS[tensor.datatype]
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if filled not in ([field], []):
        raise InvalidRequestError(
            f"input '{tensor.name}' is {tensor.datatype} and has {', '.join(filled)}; "
            f"expected {field} alone"
        )
    values = getattr(tensor.contents, field)
    expected = math.prod(tensor.shape)
    if len(values) != expected:
        raise InvalidRequestError(
            f"input '{tensor.name}' has {len(values)} elements in {field}, expected {expected}"
        )
    array = np.array(values, WIDE[field])
    narrow = array.astype(DTYPE[tensor.datatype])
    if array.dtype.kind in "iu" and (narrow != array).any():
        raise InvalidRequestError(
            f"input '{tensor.name}' has values from {array.min()} to {array.max()} in {field}, "
            f"which {tensor.datatype} cannot hold"
        )
    return narrow


def _raw_content(request: inference_pb2.ModelInferRequest, tensor: InputTensor) -> bytes:
    if len(request.raw_input_contents) != 1:
        raise InvalidRequestError(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for model "
            f"'{request.model_name}', expected 1 for input '{tensor.name}'"
        )
    return request.raw_input_contents[0]


def _raw(request: inference_pb2.ModelInferRequest, tensor: InputTensor) -> NDArray[np.generic]:
    content = _raw_content(request, tensor)
    dtype = DTYPE[tensor.datatype]
    expected = math.prod(tensor.shape) * dtype.itemsize
    if len(content) != expected:
        raise InvalidRequestError(
            f"input byte size mismatch for input '{tensor.name}' for model "
            f"'{request.model_name}'. Expected {expected}, got {len(content)}"
        )
    if dtype.kind == "b" and content.strip(b"\x00\x01"):
        raise InvalidRequestError(f"input '{tensor.name}' is BOOL and has bytes beside 0 and 1")
    return np.frombuffer(content, dtype)


def _refuse_shared_memory(name: str, parameters: Container[str]) -> None:
    if SHARED_MEMORY in parameters:
        raise UnimplementedError(
            f"'{name}' is said to be in shared memory, which this server does not do; "
            "send it in raw contents"
        )


def _listed(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
