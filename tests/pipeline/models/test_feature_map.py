import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from pipeline import models
from pipeline.errors import ConfigError

ODD = "tests.pipeline.models.odd_nets"
REMEDY = "; use fewer strides or pools before it, padding='same', or larger inputs"


def refusal(name, shape, **options):
    with pytest.raises(ConfigError) as refused:
        models.build(f"{ODD}:{name}", shape, 10, **options)
    return str(refused.value).removeprefix(f"{ODD}:{name} cannot be built: ").removesuffix(REMEDY)


@pytest.mark.parametrize(
    ("name", "shape", "options", "told"),
    [
        (  # 13 -> 5 -> 1, and a pool of two
            "eaten",
            (13, 13, 1),
            {},
            "layer pool (MaxPooling2D) leaves nothing: its input is 1 x 1 and its window 2 x 2",
        ),
        (
            "eaten",
            (40, 4, 1),
            {},
            "layer first (Conv2D) leaves nothing: its input is 40 x 4 and its window 5 x 5",
        ),
        (
            "eaten_lazily",
            (8, 9, 1),
            {},
            "layer wide (Conv2D) leaves nothing: its input is 8 x 9 and its window 9 x 9",
        ),
        (
            "subclassed",
            (4, 9, 1),
            {"size": 5},
            "layer conv (Conv2D) leaves nothing: its input is 4 x 9 and its window 5 x 5",
        ),
        (  # the third call, of a layer that was built for the first
            "subclassed",
            (5, 5, 1),
            {"times": 3},
            "layer conv (Conv2D) leaves nothing: its input is 1 x 1 and its window 3 x 3",
        ),
        (
            "subclassed",
            (6, 6, 1),
            {"times": 3},
            "layer conv (Conv2D) leaves nothing: its input is 2 x 2 and its window 3 x 3",
        ),
        (
            "sliced",
            (9, 9, 1),
            {},
            "layer conv (Conv2D) leaves nothing: its input is 0 x 9 and its window 3 x 3",
        ),
        (
            "sliced_flat",
            (9, 9, 1),
            {},
            "layer flat (Flatten) is given nothing: its input is 0 x 9 x 1",
        ),
        ("cut", (9, 9, 1), {}, "layer cut (Cut) leaves nothing: its input is 9 x 9"),
        (  # Keras asks this layer for its shape only: the pool inside would end the process
            "trusted",
            (9, 3, 1),
            {},
            "layer hidden (MaxPooling2D) leaves nothing: its input is 9 x 3 and its window 4 x 4",
        ),
    ],
)
def test_the_layer_that_leaves_nothing_is_named_with_its_input_and_window(
    name, shape, options, told
):
    assert refusal(name, shape, **options) == told


def test_one_pixel_more_is_enough():
    assert models.build(f"{ODD}:eaten", (17, 17, 1), 10).output_shape == (None, 10)
    assert models.build(f"{ODD}:eaten_lazily", (9, 9, 1), 10).output_shape == (None, 10)
    assert models.build(f"{ODD}:subclassed", (7, 7, 1), 10, times=3).output_shape == (None, 10)
    with pytest.raises(ConfigError, match=r"layer pool .* its input is 1 x 1"):
        models.build(f"{ODD}:eaten", (16, 16, 1), 10)


pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))
kinds = st.sampled_from(
    [layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.MaxPooling2D,
     layers.AveragePooling2D]
)  # fmt: skip
steps = st.tuples(kinds, pairs, st.integers(1, 3), st.sampled_from(["valid", "same"]))
stacks = st.lists(steps, max_size=4)


def stacked(shape, outputs, *, stack):
    x = image = keras.Input(shape, dtype="uint8")
    x = layers.Rescaling(1 / 255)(x)
    for place, (kind, window, strides, padding) in enumerate(stack):
        wide = {"filters": 2} if kind in (layers.Conv2D, layers.SeparableConv2D) else {}
        # Depthwise kernels take equal strides only; so do all of these.
        layer = kind(
            **wide, **_window(kind, window), strides=strides, padding=padding, name=f"at{place}"
        )
        x = layer(x)
    return keras.Model(image, layers.Dense(outputs)(layers.Flatten()(x)))


def _window(kind, window):
    pools = kind in (layers.MaxPooling2D, layers.AveragePooling2D)
    return {"pool_size" if pools else "kernel_size": window}


def size_after(shape, stack):
    """Work out by hand which layer eats the image; None if none does."""
    sizes = list(shape[:2])
    for place, (_, window, strides, padding) in enumerate(stack):
        if padding == "same":
            sizes = [-(-size // strides) for size in sizes]
        elif any(size < wide for size, wide in zip(sizes, window, strict=True)):
            by = " and its window ".join(f"{high} x {wide}" for high, wide in (sizes, window))
            return f"layer at{place} .* leaves nothing: its input is {by};"
        else:
            sizes = [(size - wide) // strides + 1 for size, wide in zip(sizes, window, strict=True)]
    return None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 16), st.integers(1, 16), st.sampled_from([1, 3])), stack=stacks
)
def test_a_stack_of_windows_is_refused_by_name_or_answers(shape, stack):
    eats = size_after(shape, stack)

    if eats:
        with pytest.raises(ConfigError, match=eats):
            models.build(f"{__name__}:stacked", shape, 3, stack=stack)
        return
    model = models.build(f"{__name__}:stacked", shape, 3, stack=stack)
    answers = np.asarray(model(np.full((2, *shape), 255, np.uint8)))
    assert answers.shape == (2, 3)
    assert np.isfinite(answers).all()
