"""Wire bytes to arrays and back, checked against what the model takes.

The data rules are Triton's: raw contents only in row-major, little-endian order, one entry an
input. Nothing is copied on the way in.
"""

import math

import numpy as np
from numpy.typing import NDArray

from protos import bundle_pb2, inference_pb2
from service.errors import InvalidRequestError

DTYPE: dict[str, np.dtype[np.generic]] = {
    "UINT8": np.dtype("u1"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
}


def decode(
    request: inference_pb2.ModelInferRequest, spec: bundle_pb2.TensorSpec, max_rows: int
) -> NDArray[np.generic]:
    """View a request's one input as an array.

    Args:
        request: `raw_input_contents` holds the input, row-major, little-endian.
        spec: the model's input; its first dimension is the batch.
        max_rows: most rows one request may have.

    Returns:
        (rows, *spec.shape[1:]), read-only: it shares the request's memory.

    Raises:
        InvalidRequestError: name, datatype, shape or byte count are not the model's, or the batch
            is empty or too big.
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
    if tensor.datatype != spec.datatype:
        raise InvalidRequestError(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', "
            f"but model '{request.model_name}' expects '{spec.datatype}'"
        )
    shape = _checked_shape(tuple(tensor.shape), spec, request.model_name, max_rows)
    return _raw(request, tensor, DTYPE[spec.datatype]).reshape(shape)


def requested(
    request: inference_pb2.ModelInferRequest, specs: list[bundle_pb2.TensorSpec]
) -> list[str]:
    """Return the outputs to answer with, in the order asked for; all of them if none is named.

    Raises:
        InvalidRequestError: an output is unknown, asked for twice, or asked for as classes.
    """
    known = [spec.name for spec in specs]
    names = [output.name for output in request.outputs]
    for output in request.outputs:
        if "classification" in output.parameters:
            raise InvalidRequestError(
                f"inference output '{output.name}' asks for classification, which this server "
                "does not do; take the probabilities and the labels in the model's metadata"
            )
    for position, name in enumerate(names):
        if name not in known:
            raise InvalidRequestError(
                f"unexpected inference output '{name}' for model '{request.model_name}'; "
                f"it has {', '.join(known)}"
            )
        if name in names[:position]:
            raise InvalidRequestError(
                f"inference output '{name}' is requested twice for model '{request.model_name}'"
            )
    return names or known


def append_output(
    response: inference_pb2.ModelInferResponse, name: str, array: NDArray[np.generic]
) -> None:
    """Add one output to a response as raw contents."""
    datatype = next(wire for wire, dtype in DTYPE.items() if dtype == array.dtype)
    response.outputs.add(name=name, datatype=datatype, shape=array.shape)
    response.raw_output_contents.append(np.ascontiguousarray(array).tobytes())


def _checked_shape(
    shape: tuple[int, ...], spec: bundle_pb2.TensorSpec, model: str, max_rows: int
) -> tuple[int, ...]:
    """Refuse a shape before its product is used for anything."""
    expected = tuple(spec.shape)
    if len(shape) != len(expected) or shape[1:] != expected[1:] or shape[0] < 1:
        raise InvalidRequestError(
            f"unexpected shape for input '{spec.name}' for model '{model}'. "
            f"Expected {_listed(expected)}, got {_listed(shape)}"
        )
    if shape[0] > max_rows:
        raise InvalidRequestError(
            f"inference request batch-size must be <= {max_rows} for '{model}', got {shape[0]}; "
            "split it into smaller requests"
        )
    return shape


def _raw(
    request: inference_pb2.ModelInferRequest,
    tensor: inference_pb2.ModelInferRequest.InferInputTensor,
    dtype: np.dtype[np.generic],
) -> NDArray[np.generic]:
    if tensor.HasField("contents"):
        raise InvalidRequestError(
            f"input '{tensor.name}' for model '{request.model_name}' is in its 'contents' field; "
            "send it in raw_input_contents"
        )
    if len(request.raw_input_contents) != 1:
        raise InvalidRequestError(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for model "
            f"'{request.model_name}', expected 1"
        )
    content = request.raw_input_contents[0]
    expected = math.prod(tensor.shape) * dtype.itemsize
    if len(content) != expected:
        raise InvalidRequestError(
            f"input byte size mismatch for input '{tensor.name}' for model "
            f"'{request.model_name}'. Expected {expected}, got {len(content)}"
        )
    return np.frombuffer(content, dtype)


def _listed(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
