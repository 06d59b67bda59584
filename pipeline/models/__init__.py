"""Networks by name, one file an architecture, and a user's own by `module:function`.

Each is a function from the shape of one row, the number of outputs and settings of its own to a
Keras model with fresh weights. A classifier takes uint8 `image` and gives float32 `logits`; scaling
is inside, so that no client can get it wrong, and softmax is not: it is added in export.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras

from pipeline.errors import ConfigError
from pipeline.models import contract, layer_calls, own
from pipeline.models.accurate import accurate
from pipeline.models.conv10 import conv10, conv10_dropout
from pipeline.models.conv32_64 import conv32_64
from pipeline.models.conv64 import conv64, conv64x2
from pipeline.models.dense import dense
from pipeline.models.linear import linear
from pipeline.models.rps import rps
from pipeline.models.small import small

# A function's defaults are its network's natural shape and outputs, which `listing` shows.
ARCHITECTURES: dict[str, Callable[..., keras.Model]] = {
    "dense": dense,
    "conv10": conv10,
    "conv10-dropout": conv10_dropout,
    "conv64": conv64,
    "conv64x2": conv64x2,
    "conv32-64": conv32_64,
    "rps": rps,
    "linear": linear,
    "small": small,
    "accurate": accurate,
}


def build(
    architecture: str,
    shape: tuple[int, ...],
    outputs: int,
    dtype: str = "uint8",
    **settings: Any,  # noqa: ANN401  each network has its own
) -> keras.Model:
    """Build a network with fresh weights, and refuse one that cannot be trained and exported.

    Args:
        architecture: one of `ARCHITECTURES`, or module:function.
        shape: of one row: (height, width, channels) of images.
        outputs: how many logits or numbers.
        dtype: of the data: uint8 for images with classes, float32 for numbers with numbers.
        settings: what the network's function takes besides.

    Returns:
        One tensor in, (rows, *shape), uint8, or float32 where a user's network or the data say so;
        one out, (rows, outputs), float32, or what Keras' policy of the moment computes in. A model
        without an input of its own, or with open sizes in it, comes inside another that has one.

    Raises:
        ConfigError: there is no such network or setting, its function fails, or the model does not
            fit: see docs/networks.md.
    """
    function = find(architecture, settings)
    with own.importing():
        model = contract.make(
            architecture, partial(function, tuple(shape), outputs, **settings), tuple(shape), dtype
        )
        contract.check(architecture, model, tuple(shape), outputs, dtype)
    return model


def find(architecture: str, settings: Mapping[str, Any]) -> Callable[..., keras.Model]:
    """Return a network's function, without calling it.

    A user's module is imported, so that models with classes of its own can be loaded.

    Raises:
        ConfigError: there is no such network, or it takes other settings.
    """
    if ":" in architecture:
        function = own.find(architecture)
    elif architecture in ARCHITECTURES:
        function = ARCHITECTURES[architecture]
    else:
        raise ConfigError(
            f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}, "
            "or module:function"
        )
    contract.check_settings(architecture, function, settings)
    return function


def files(architecture: str) -> dict[str, Path]:
    """Return the files of code that decide what a network is, by names that tell them apart.

    They are ours, and a user's module with all that it imports of the user's.

    Raises:
        ConfigError: there is no such network.
    """
    here = Path(__file__).parent
    ours = {f"pipeline/{here.name}/{path.name}": path for path in sorted(here.glob("*.py"))}
    return ours | (own.files(architecture) if ":" in architecture else {})


def count(model: keras.Model) -> tuple[int, int]:
    """Return the parameters of a built model, and the multiply-adds of one row through it.

    Convolutions and dense layers are counted, other layers are not; a layer that is called twice
    counts twice.
    """
    _, calls = layer_calls.trace(model, model.inputs[0].dtype)
    return model.count_params(), sum(call.multiply_adds for call in calls)
