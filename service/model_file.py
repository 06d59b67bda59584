"""Whether an ONNX model file is all there is to its model.

onnxruntime follows what a file says about where its tensors are: into other files, and into the
memory of its own process. Both are refused before it sees a byte. What the model computes is not
looked at here: `service.version` holds it against its golden set.
"""

from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from protos import onnx_pb2
from service.errors import BundleError

ORT_FORMAT = b"ORTM"  # at offset 4, of onnxruntime's own format, which it loads as well
MAX_SHOWN_CHARACTERS = 64


def check(content: bytes, source: str) -> None:
    """Refuse a model file that reaches outside itself.

    Takes, for the time of the call, as much memory again as the file has bytes; several times as
    much for a file of millions of nodes.

    Args:
        content: of the file.
        source: how the errors name it, such as `tiny/1/model.onnx`.

    Raises:
        BundleError: it is not an ONNX model, or a tensor anywhere in it is kept in another file,
            at an address, or in the sparse form.
    """
    if content[4:8] == ORT_FORMAT:
        raise BundleError(
            f"{source} is in onnxruntime's own format, expected ONNX; publish the ONNX model"
        )
    try:
        model = onnx_pb2.Model.FromString(content)
    except DecodeError as error:
        raise BundleError(
            f"{source} is not an ONNX model: it was cut or changed, or is nested too deeply"
        ) from error
    if not model.HasField("graph"):
        raise BundleError(f"{source} is not an ONNX model: it has no graph")
    waiting: list[onnx_pb2.Graph | onnx_pb2.Function] = [model.graph, *model.functions]
    for training in model.training_info:
        waiting += [training.initialization, training.algorithm]
    while waiting:  # not by recursion: the sender chooses the depth
        body = waiting.pop()
        if isinstance(body, onnx_pb2.Graph):
            _check_tensors(body.initializer, body.sparse_initializer, source)
        for attribute in _attributes(body):
            waiting += _check_attribute(attribute, source)


def _attributes(body: onnx_pb2.Graph | onnx_pb2.Function) -> Iterator[onnx_pb2.Attribute]:
    for node in body.node:
        yield from node.attribute
    if isinstance(body, onnx_pb2.Function):
        yield from body.attribute_proto


def _check_attribute(attribute: onnx_pb2.Attribute, source: str) -> list[onnx_pb2.Graph]:
    """Refuse what an attribute itself holds; return the graphs in it."""
    dense, sparse = list(attribute.tensors), list(attribute.sparse_tensors)
    graphs = list(attribute.graphs)
    if attribute.HasField("t"):
        dense.append(attribute.t)
    if attribute.HasField("sparse_tensor"):
        sparse.append(attribute.sparse_tensor)
    if attribute.HasField("g"):
        graphs.append(attribute.g)
    _check_tensors(dense, sparse, source)
    return graphs


def _check_tensors(
    dense: Iterable[onnx_pb2.Tensor], sparse: Iterable[onnx_pb2.SparseTensor], source: str
) -> None:
    for tensor in dense:
        # A location may be left out where there is an entry, and an entry where there is one.
        if tensor.external_data or tensor.data_location != onnx_pb2.Tensor.LOCATION_DEFAULT:
            raise BundleError(
                f"{source} keeps the tensor {_shown(tensor.name)} outside the file; "
                "export the model with all its data in one file"
            )
    for one in sparse:
        raise BundleError(
            f"{source} has the sparse tensor {_shown(one.values.name)}, which is not taken; "
            "export the model with dense tensors"
        )


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN_CHARACTERS else f"{name[:MAX_SHOWN_CHARACTERS]}…")
