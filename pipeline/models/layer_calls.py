"""What each layer of a network is given and makes, seen while TensorFlow traces it.

Nested and subclassed models show their layers only while they are called, so `call` of each layer
is wrapped meanwhile. Traced and not run: for a window larger than its image, TensorFlow 2.21's own
kernels on a CPU end the process (MaxPool) or answer with the wrong shape (Conv2D).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf
from keras import layers

Shape = tuple[int, ...]
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of one layer: the shapes of its first input and first output, rows first.

    A size that only a run would tell is 1.
    """

    layer: keras.Layer
    given: Shape
    made: Shape

    @property
    def multiply_adds(self) -> int:
        """How often a weight is multiplied for one row; 0 of layers other than these.

        Padding is counted as if it were pixels.
        """
        layer = self.layer
        given, made = math.prod(self.given[1:]), math.prod(self.made[1:])
        counted: int = 0
        if isinstance(layer, layers.SeparableConv2D):
            kernels = (layer.depthwise_kernel, layer.pointwise_kernel)
            counted = made // layer.filters * sum(math.prod(one.shape) for one in kernels)
        elif isinstance(layer, layers.DepthwiseConv2D):
            counted = made * math.prod(layer.kernel_size)
        elif isinstance(layer, layers.Conv2DTranspose):  # each pixel given meets every weight
            counted = given // layer.kernel.shape[-1] * math.prod(layer.kernel.shape)
        elif isinstance(layer, CONVOLUTIONS):
            counted = made // layer.filters * math.prod(layer.kernel.shape)
        elif isinstance(layer, layers.Dense):
            counted = made * layer.kernel.shape[0]
        return counted


def trace(
    model: keras.Model, dtype: str, rows: int = 1
) -> tuple[tf.types.experimental.ConcreteFunction, tuple[LayerCall, ...]]:
    """Trace a built model as for prediction.

    Args:
        model: with one input, all of whose sizes are known.
        dtype: of what it is given.
        rows: how many it is given.

    Returns:
        A function from that many rows to answers, and the calls of the model's layers in the order
        in which they ended.
    """
    calls: list[LayerCall] = []
    given = tf.TensorSpec((rows, *model.inputs[0].shape[1:]), dtype)
    with _wrapped([one for one in inside(model) if not isinstance(one, keras.Model)], calls):
        traced = tf.function(partial(model, training=False)).get_concrete_function(given)
    return traced, tuple(calls)


def inside(model: keras.Layer) -> Iterator[keras.Layer]:
    """Yield every layer inside a model, of nested ones as well, each once."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        for layer in waiting.pop()._layers:  # `layers` of a model leaves out what its layers hold
            if id(layer) not in seen:
                seen.add(id(layer))
                waiting.append(layer)
                yield layer


@contextmanager
def _wrapped(observed: list[keras.Layer], calls: list[LayerCall]) -> Iterator[None]:
    """Note each call of these layers while the block runs."""

    def noting(layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:  # noqa: ANN401  as the layer's own
            made = call(*args, **options)
            given, first = (_first_shape(one) for one in ((args, options), made))
            calls.append(LayerCall(layer, given, first))
            return made

        return noted

    for layer in observed:
        layer.call = noting(layer, layer.call)
    try:
        yield
    finally:
        for layer in observed:
            del layer.call


def _first_shape(tensors: Any) -> Shape:  # noqa: ANN401  in whatever a layer takes or makes
    first = next((one for one in keras.tree.flatten(tensors) if tf.is_tensor(one)), None)
    sizes = first.shape.as_list() if first is not None and first.shape.rank else ()
    return tuple(1 if size is None else size for size in sizes)
