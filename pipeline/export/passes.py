"""The same function in fewer and cheaper operators.

A pass is exact to float32 rounding: constants are multiplied or put in another order, operators
change places, and nothing else. It applies where its whole pattern stands and leaves any other
graph as it is. onnxslim does what it does well; the rest is here.
"""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import onnx
import onnxslim
from numpy.typing import NDArray

# onnxslim folds with onnxruntime, which reports to its maker unless it is told not to.
import service.session  # noqa: F401
from pipeline.export.graph import Graph, attribute, is_a

# Operators that only move elements, whatever the elements are.
MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
ARITHMETIC = ("Mul", "Div", "Add", "Sub")
DENSE = ("MatMul", "Gemm")
LINEAR = (*DENSE, "Conv", "ConvTranspose")  # in their first input; padding adds zeros
DATA, KERNEL, BIAS = 0, 1, 2  # their inputs
POOLINGS = ("MaxPool", "AveragePool")
MATRIX, PLANES = 2, 4  # axes
BLOCKS = (8, 16)  # channels that onnxruntime computes together, by the processor's vectors
ALIGNED = 4  # it takes as many channels as are a multiple of this, or fewer than a block
ROUNDING = float(np.finfo(np.float32).eps)


def improve(model: onnx.ModelProto) -> onnx.ModelProto:
    """Apply every pass; the model itself is not changed.

    Names of inputs and outputs, the batch axis, opset and IR version stay what they are.
    """
    for apply in PASSES:
        model = apply(model)
    return model


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute once what no image changes, and drop operators that do nothing; by onnxslim.

    The arithmetic by which Keras' `Flatten` finds its shape becomes one constant, in which the
    batch is still open. Batch normalisation that tf2onnx left behind a convolution goes into it.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)  # onnxslim changes what it is given
    folded = cast(onnx.ModelProto, onnxslim.slim(folded))
    del folded.graph.value_info[:]  # shapes inside, which have names too
    return folded


def raise_moves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move an image's elements before it is scaled and shifted, not after; the same to the bit.

    onnxruntime computes with a constant a last axis at a time. As long as that is the channel, one
    or three elements, a multiplication costs more than a small convolution, and a fiftieth of that
    once the axes are in the convolution's order.
    """
    graph = Graph(model)
    for node in graph.find(*MOVES):
        while _raise(graph, node):
            pass
    return graph.model()


def fold_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Multiply the kernels behind a scale instead of every pixel.

    All that read the scaled tensor must be linear in it. An offset stays where it is: the zeros
    that a convolution pads with are not zero before it.
    """
    graph = Graph(model)
    for node in reversed(graph.find("Mul", "Div")):
        _fold_scale(graph, node)
    return graph.model()


def flatten_planes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a dense layer its features in the order in which a convolution leaves them.

    Keras flattens (height, width, channels), a convolution in ONNX leaves (channels, height,
    width). The kernel's rows are put in that order, once, instead of the features of every image.
    """
    graph = Graph(model)
    for node in graph.find("Reshape"):
        _flatten(graph, node)
    return graph.model()


def fuse_gemms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write a product of matrices and the addition of a bias as one operator.

    A product without bias becomes one as well where a Relu reads it: onnxruntime joins a Relu to a
    Gemm and to no MatMul.
    """
    graph = Graph(model)
    for node in graph.find("MatMul"):
        _fuse_gemm(graph, node)
    return graph.model()


def fill_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a convolution that is pooled as many channels as are computed anyway.

    onnxruntime convolves in blocks of channels and fills the last block with zeros that nobody
    sees. It pools in blocks too, but only if there was nothing to fill; else it takes the blocks
    apart before the pooling, when there is four times as much to move (`TransformConv` and
    `TransformPool` in its nchwc_transformer.cc). So the zeros are written down, and cut off behind
    the pooling: measured, a sixth of the default network's time in batches, and nothing is lost
    with single images. Zeros in the dense layer behind instead of the cut lost more than was won.

    Equal to the bit, but for the order in which an average is summed. Only where blocks of either
    size are filled up to as many channels; elsewhere it would be more work for one of them.
    """
    graph = Graph(model)
    for node in graph.find("Conv"):
        _fill(graph, node)
    return graph.model()


PASSES: tuple[Callable[[onnx.ModelProto], onnx.ModelProto], ...] = (
    fold_constants,
    raise_moves,
    fold_scales,
    flatten_planes,
    fuse_gemms,
    fill_blocks,
)


def _raise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Let a node that moves elements change places with arithmetic above it; say whether it did."""
    above = graph.maker(node.input[0])
    data = None if above is None else _beside_constant(graph, above)
    if above is None or data is None or not _is_alone(graph, above.output[0]):
        return False
    if not _is_of_image(graph, above.input[data]):
        return False
    constant = _moved(graph, above, data, node)
    if constant is None:
        return False
    graph.give(above, 1 - data, constant)
    graph.swap(above, data, node)
    return True


def _beside_constant(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return which input of arithmetic with a constant is not it; None for any other node."""
    if not is_a(node, *ARITHMETIC):
        return None
    constants = [graph.weights(name) is not None for name in node.input]
    return constants.index(False) if any(constants) and not all(constants) else None


def _is_of_image(graph: Graph, tensor: str) -> bool:
    """Say whether a tensor is an input that was cast, moved or computed with constants at most."""
    maker = graph.maker(tensor)
    while maker is not None:
        data = 0 if is_a(maker, "Cast", *MOVES) else _beside_constant(graph, maker)
        if data is None:
            return False
        maker = graph.maker(maker.input[data])
    return True


def _moved(
    graph: Graph, node: onnx.NodeProto, data: int, move: onnx.NodeProto
) -> NDArray[np.float32] | None:
    """Return the constant of arithmetic as it must be once its data is moved; None if unknown."""
    constant = graph.weights(node.input[1 - data])
    axes = attribute(move, "perm")
    rank = _rank(graph, node.input[data])
    if constant is None or constant.ndim > rank:
        return None
    if constant.size == 1:
        return constant.reshape(())
    if not is_a(move, "Transpose") or not isinstance(axes, list) or len(axes) != rank:
        return None
    return constant.reshape((1,) * (rank - constant.ndim) + constant.shape).transpose(axes)


def _rank(graph: Graph, tensor: str) -> int:
    """Return how many axes a tensor has; at least the batch."""
    shape = graph.shape(tensor)
    return 1 if shape is None else len(shape)


def _is_alone(graph: Graph, tensor: str) -> bool:
    """Say whether one node reads a tensor, and nothing else."""
    return graph.is_private(tensor) and len(graph.readers(tensor)) == 1


def _fold_scale(graph: Graph, node: onnx.NodeProto) -> None:
    factor, data = _factor(graph, node)
    scaled = node.output[0]
    layers = graph.readers(scaled)
    if not layers or not graph.is_private(scaled):
        return
    kernels = [_kernel(graph, layer, scaled) for layer in layers]
    products = [_product(kernel, factor) for kernel in kernels if kernel is not None]
    folded = [product for product in products if product is not None]
    if len(folded) == len(layers):
        for layer, kernel in zip(layers, folded, strict=True):
            graph.give(layer, KERNEL, kernel)
        graph.bypass(node, data)


def _factor(graph: Graph, node: onnx.NodeProto) -> tuple[float, int]:
    """Return what a node multiplies every element by, and which input it multiplies.

    The factor is NaN if it is not one number.
    """
    data = _beside_constant(graph, node)
    value = None if data is None else graph.weights(node.input[1 - data])
    if data is None or value is None or value.size != 1:
        return math.nan, DATA
    if value.ndim > _rank(graph, node.input[data]):
        return math.nan, DATA
    if node.op_type == "Mul":
        return value.item(), data
    return 1 / value.item() if value.item() and data == DATA else math.nan, data


def _kernel(graph: Graph, layer: onnx.NodeProto, tensor: str) -> NDArray[np.float32] | None:
    """Return the kernel of a layer that is linear in a tensor; None if it is not."""
    if not is_a(layer, *LINEAR) or list(layer.input).count(tensor) != 1:
        return None
    return graph.weights(layer.input[KERNEL]) if layer.input[DATA] == tensor else None


def _product(kernel: NDArray[np.float32], factor: float) -> NDArray[np.float32] | None:
    """Multiply and round once; None if float32 cannot hold the result."""
    exact = kernel.astype(np.float64) * factor
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    # Half the last place of the largest: what is lost of a smaller one is lost in the sum anyway.
    largest = np.abs(exact).max(initial=0)
    near = np.abs(rounded - exact) <= ROUNDING / 2 * largest
    return rounded if near.all() else None


def _flatten(graph: Graph, node: onnx.NodeProto) -> None:
    flat = node.output[0]
    planes = graph.maker(node.input[0])
    layers = graph.readers(flat)
    if planes is None or not layers or not graph.is_private(flat):
        return
    order = _order(graph, planes, node)
    kernels = [_kernel(graph, layer, flat) for layer in layers if _is_dense(graph, layer)]
    given = [kernel for kernel in kernels if kernel is not None]
    if order is None or len(given) < len(layers):
        return
    for layer, kernel in zip(layers, given, strict=True):
        axis = 1 if attribute(layer, "transB", 0) else 0
        graph.give(layer, KERNEL, kernel.take(order, axis=axis))
    graph.become(node, "Flatten", [planes.input[0]], axis=1)


def _order(graph: Graph, planes: onnx.NodeProto, flat: onnx.NodeProto) -> NDArray[np.intp] | None:
    """Return where each element of a row is after a Transpose and a Reshape to rows.

    None if they are something else, or move elements from one row to another.
    """
    axes = attribute(planes, "perm")
    shape = graph.shape(planes.input[0])
    target = graph.constant(flat.input[1])
    if not is_a(planes, "Transpose") or not isinstance(axes, list) or not shape or target is None:
        return None
    sizes = [size for size in shape[1:] if size is not None]
    if axes[0] != 0 or len(sizes) != len(shape) - 1 or target.tolist() != [-1, math.prod(sizes)]:
        return None
    places = np.arange(math.prod(sizes)).reshape(sizes)
    return np.argsort(places.transpose([axis - 1 for axis in axes[1:]]), axis=None)


def _is_dense(graph: Graph, layer: onnx.NodeProto) -> bool:
    """Say whether it multiplies each row by one matrix."""
    kernel = graph.weights(layer.input[KERNEL]) if is_a(layer, *DENSE) else None
    return kernel is not None and kernel.ndim == MATRIX and not attribute(layer, "transA", 0)


def _fuse_gemm(graph: Graph, node: onnx.NodeProto) -> None:
    product = node.output[0]
    rows = graph.shape(node.input[DATA])
    if not _is_dense(graph, node) or rows is None or len(rows) != MATRIX:
        return
    if not _is_alone(graph, product):
        return
    reader = graph.readers(product)[0]
    bias = _bias(graph, reader, product, node.input[KERNEL])
    if bias is not None:
        graph.become(reader, "Gemm", [*node.input, bias])
    elif is_a(reader, "Relu"):
        graph.become(node, "Gemm", list(node.input))


def _bias(graph: Graph, addition: onnx.NodeProto, product: str, kernel: str) -> str | None:
    """Return the constant that an Add adds to every row alike; None if it is not that."""
    others = [name for name in addition.input if name != product]
    value = graph.weights(others[0]) if is_a(addition, "Add") and len(others) == 1 else None
    matrix = graph.weights(kernel)
    if value is None or matrix is None:
        return None
    row = (1, matrix.shape[1])
    return others[0] if np.broadcast_shapes(value.shape, row) == row else None


def _fill(graph: Graph, node: onnx.NodeProto) -> None:
    kernel = graph.weights(node.input[KERNEL])
    pooling = _pooling(graph, node)
    if kernel is None or pooling is None or not _is_in_blocks(graph, node, kernel):
        return
    channels = len(kernel)
    missing = -channels % max(BLOCKS)
    if not missing or missing >= min(BLOCKS):
        return
    for index in range(KERNEL, len(node.input)):
        value = graph.weights(node.input[index])
        if value is not None:
            zeros = np.zeros((missing, *value.shape[1:]), np.float32)
            graph.give(node, index, np.concatenate([value, zeros]))
    graph.follow(pooling, "Slice", np.array([0]), np.array([channels]), np.array([1]))


def _pooling(graph: Graph, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the pooling that alone reads a convolution, or its Relu; None if there is none."""
    node = conv
    for _ in range(2):
        if not _is_alone(graph, node.output[0]):
            return None
        node = graph.readers(node.output[0])[0]
        if not is_a(node, "Relu"):
            break
    one = len(node.output) == 1  # a second output counts the channels
    return node if one and is_a(node, *POOLINGS) and _is_alone(graph, node.output[0]) else None


def _is_in_blocks(graph: Graph, conv: onnx.NodeProto, kernel: NDArray[np.float32]) -> bool:
    """Say whether onnxruntime computes a convolution in blocks, whatever their size."""
    bias = conv.input[BIAS] if len(conv.input) > BIAS else ""
    if kernel.ndim != PLANES or attribute(conv, "group", 1) != 1:
        return False
    channels = kernel.shape[1]
    taken = channels < min(BLOCKS) or channels % ALIGNED == 0
    return taken and (not bias or graph.weights(bias) is not None)
