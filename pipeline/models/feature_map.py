"""Name the layer that leaves nothing of its feature map, or the one that is left with nothing.

Keras refuses such layers while it builds them, in words that name neither the layer nor what to do.
A slice makes a tensor of no elements without a word, and so does a user's layer.
"""

import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from pipeline.models.layer_calls import LayerCall

REMEDY = "use fewer strides or pools before it, padding='same', or larger inputs"
Sizes = tuple[int, ...]


def refused_by(error: BaseException) -> str:
    """Return what is wrong as Keras raised it; empty if it is anything else.

    The layer and its input are in the frames that the error went through, so Keras must not have
    filtered them out.
    """
    for chained in _chain(error):
        for frame, _ in reversed(list(traceback.walk_tb(chained.__traceback__))):
            layer = frame.f_locals.get("self")
            if isinstance(layer, keras.Layer):
                given = _given(frame.f_locals)
                if _too_small(layer, given):
                    return _sentence(layer, given)
    return ""


def emptied(calls: Iterable[LayerCall]) -> str:
    """Return which layer first made nothing, or was given nothing; empty if none was."""
    for call in calls:
        if 0 in call.given[1:]:
            name = f"{call.layer.name} ({type(call.layer).__name__})"
            return f"layer {name} is given nothing: its input is {_by(call.given[1:])}; {REMEDY}"
        if 0 in call.made[1:]:
            return _sentence(call.layer, call.given)
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _given(names: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the shape that a frame of a layer works on."""
    shape = names.get("input_shape", getattr(names.get("inputs"), "shape", None))
    return tuple(shape) if isinstance(shape, Iterable) else ()


def _too_small(layer: keras.Layer, given: tuple[int | None, ...]) -> bool:
    window, sizes = _window(layer), _sizes(layer, given)
    return len(window) == len(sizes) > 0 and any(
        size is not None and size < wide for size, wide in zip(sizes, window, strict=True)
    )


def _sentence(layer: keras.Layer, given: tuple[int | None, ...]) -> str:
    window = _window(layer)
    its_window = f" and its window {_by(window)}" if window else ""
    return (
        f"layer {layer.name} ({type(layer).__name__}) leaves nothing: its input is "
        f"{_by(_sizes(layer, given))}{its_window}; {REMEDY}"
    )


def _window(layer: keras.Layer) -> Sizes:
    """Return the height and width, or only the length, that a layer looks at."""
    pool = getattr(layer, "pool_size", None)
    kernel = getattr(layer, "kernel_size", None)
    if kernel:
        holes = getattr(layer, "dilation_rate", (1,) * len(kernel))
        return tuple((size - 1) * hole + 1 for size, hole in zip(kernel, holes, strict=True))
    return (pool,) if isinstance(pool, int) else tuple(pool or ())


def _sizes(layer: keras.Layer, given: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Return height and width without rows and channels."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return given[2:] if first else given[1:-1]


def _by(sizes: Iterable[int | None]) -> str:
    return " x ".join("?" if size is None else str(size) for size in sizes)
