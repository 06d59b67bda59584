"""See what the first convolution of a network makes of a few images; a network may have none."""

from typing import Any

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from pipeline.models import layer_calls
from pipeline.page.evidence import FirstLayer

MOST = 32  # kernels that are kept
SIDE = 48  # of a map: a larger one is thinned out


def find(model: keras.Model, images: NDArray[np.uint8]) -> FirstLayer | None:
    """Run a few images through a model, and keep what the first layer of kernels makes of them.

    Args:
        model: of any kind, nested and subclassed ones too.
        images: (images, height, width, channels).

    Returns:
        At most MOST kernels and maps, the maps at most SIDE high and wide; None where there is no
        two-dimensional convolution with kernels larger than a pixel.
    """
    seen: list[tuple[layers.Conv2D, NDArray[np.float32]]] = []
    observed = [one for one in layer_calls.inside(model) if _has_kernels(one)]
    for layer in observed:
        layer.call = _noting(layer, seen)
    try:
        model(images, training=False)
    finally:
        for layer in observed:
            del layer.call
    if not seen:
        return None
    layer, made = seen[0]
    if layer.data_format == "channels_first":
        made = made.transpose(0, 2, 3, 1)
    step = max(1, -(-max(made.shape[1:3]) // SIDE))
    return FirstLayer(
        name=layer.name,
        kernels=np.asarray(layer.kernel, np.float32)[..., :MOST],
        maps=made[:, ::step, ::step, :MOST],
    )


def _has_kernels(layer: keras.Layer) -> bool:
    return isinstance(layer, layers.Conv2D) and max(layer.kernel_size) > 1


def _noting(layer: layers.Conv2D, seen: list[tuple[layers.Conv2D, NDArray[np.float32]]]) -> Any:  # noqa: ANN401  Keras' call
    """Return the layer's own `call`, which also keeps what it makes."""
    call = layer.call

    def noted(*args: Any, **options: Any) -> Any:  # noqa: ANN401  as the layer's own
        made = call(*args, **options)
        seen.append((layer, np.asarray(made, np.float32)))
        return made

    return noted
