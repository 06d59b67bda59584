"""What a network must be to be trained, exported and served; refusals before any training.

One tensor in that fits the data, one out of the right width, logits, nothing that an export cannot
carry.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

from pipeline.errors import ConfigError, PipelineError
from pipeline.models import feature_map, layer_calls

Shape = tuple[int, ...]
TAKEN = {"uint8": ("uint8", "float32"), "float32": ("float32",)}  # by the input, of data so typed
AUGMENTATIONS = tuple(
    one
    for name, one in vars(layers).items()
    if name.startswith("Random") or name in ("AugMix", "CutMix", "MixUp", "RandAugment")
)
TRIED_ROWS = 4
COLOURS = re.compile(r"\x1b\[\d*m")  # of a terminal, in Keras' messages


def check_settings(
    architecture: str, function: Callable[..., keras.Model], settings: Mapping[str, Any]
) -> None:
    """Raise ConfigError unless a function can be called with (shape, outputs, **settings)."""
    signature = inspect.signature(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    every = list(signature.parameters.values())
    known = [one.name for one in every[2:] if one.kind in named]
    unknown = [name for name in settings if name not in known]
    if unknown and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in every):
        raise ConfigError(
            f"{architecture} has no setting {unknown[0]}; "
            + (f"its settings are {', '.join(known)}" if known else "it has no settings")
        )
    try:
        signature.bind((), 1, **settings)
    except TypeError as error:
        raise ConfigError(
            f"{architecture} cannot be called as (shape, outputs, **settings): {error}; set "
            "training.architecture_settings, or change the function"
        ) from error


def make(
    architecture: str, function: Callable[[], keras.Model], shape: Shape, dtype: str
) -> keras.Model:
    """Call a network's function, and give its model an input of the data's shape if it has none.

    Raises:
        ConfigError: the function raised, or returned something else than a model.
    """
    if dtype not in TAKEN:
        raise ConfigError(f"the data are {dtype}, networks take {' or '.join(TAKEN)}")
    with _translated(architecture):
        model = function()
        if not isinstance(model, keras.Model):
            raise ConfigError(
                f"{architecture} returned a {type(model).__name__}, expected a keras.Model"
            )
        return _with_input(model, shape, dtype)


def check(architecture: str, model: keras.Model, shape: Shape, outputs: int, dtype: str) -> None:
    """Raise ConfigError unless a model can be trained on the data, exported and served."""
    _check_alone(architecture, model)
    _check_input(architecture, model, shape, dtype)
    _check_output(architecture, model, outputs)
    _check_layers(architecture, model)
    with _translated(architecture):
        answer, calls = layer_calls.trace(model, dtype, TRIED_ROWS)
    empty = feature_map.emptied(calls)
    if empty:
        raise ConfigError(f"{architecture} cannot be built: {empty}")
    if dtype == "uint8" and _are_probabilities(answer(tf.constant(_noise(shape))).numpy()):
        raise ConfigError(
            f"{architecture} ends in a softmax, in layer {calls[-1].layer.name}: its answers to a "
            "row sum to 1, expected logits; leave it out, the export adds it"
        )
    if ":" in architecture:
        _check_loads(architecture, model)


def _with_input(model: keras.Model, shape: Shape, dtype: str) -> keras.Model:
    """Return the model itself if its input's sizes are all known, else one around it."""
    if isinstance(model, keras.Sequential) and not model.built:
        model.build((None, *shape))
    taken = getattr(model, "inputs", None)
    if taken and not (
        len(taken) == 1 and _is_open(tuple(taken[0].shape), shape) and not _held_in(model, "input")
    ):
        return model
    # A subclassed model gets float32: few layers take whole numbers.
    given = keras.Input(
        shape,
        dtype=taken[0].dtype if taken else "float32",
        name="image" if dtype == "uint8" else "x",
    )
    with warnings.catch_warnings():
        # Keras tries layers out to build them and warns of what it then raises.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"keras\..*")
        return keras.Model(given, model(given))


def _check_alone(architecture: str, model: keras.Model) -> None:
    for side, does in (("input", "takes"), ("output", "gives")):
        if held := _held_in(model, side):
            raise ConfigError(
                f"{architecture} {does} a {held}, expected one tensor; have its {side} be the "
                "tensor itself"
            )


def _check_input(architecture: str, model: keras.Model, shape: Shape, dtype: str) -> None:
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ConfigError(
            f"{architecture} has {len(model.inputs)} inputs and {len(model.outputs)} outputs, "
            "expected one of each"
        )
    given = model.inputs[0]
    if given.shape[0] is not None:
        raise ConfigError(
            f"{architecture} takes batches of {given.shape[0]} rows only, expected any number; "
            "give its input a shape, and no batch_shape or batch_size"
        )
    if not _fits(given.shape[1:], shape):
        raise ConfigError(
            f"{architecture} takes rows of shape {tuple(given.shape[1:])}, those of the data are "
            f"{shape}; build its input from the shape that the function is given"
        )
    if given.dtype not in TAKEN[dtype]:
        raise ConfigError(
            f"{architecture} takes {given.dtype}, the data are {dtype}; give its input the dtype "
            f"{' or '.join(TAKEN[dtype])}"
        )


def _check_output(architecture: str, model: keras.Model, outputs: int) -> None:
    made = tuple(model.outputs[0].shape)
    if len(made) != 2 or made[1] != outputs:  # noqa: PLR2004  rows and outputs
        raise ConfigError(
            f"{architecture} gives {made[1:]} for a row, expected ({outputs},): one logit a class, "
            "or as many numbers as a target has"
        )
    # Under a policy of mixed precision a float32 model of the same function is checked as well.
    taken = ("float32", keras.config.dtype_policy().compute_dtype)
    if model.outputs[0].dtype not in taken:
        raise ConfigError(
            f"{architecture} gives {model.outputs[0].dtype}, expected float32; leave out the cast "
            "or the dtype of its last layer"
        )


def _check_layers(architecture: str, model: keras.Model) -> None:
    for layer in layer_calls.inside(model):
        if isinstance(layer, layers.Lambda):
            raise ConfigError(
                f"{architecture} has the Lambda layer {layer.name}, which no file can hold safely; "
                "write a keras.Layer, or use keras.ops"
            )
        if isinstance(layer, AUGMENTATIONS):
            raise ConfigError(
                f"{architecture} has the layer {layer.name} ({type(layer).__name__}), which would "
                "be exported; leave it out and set training.augmentation"
            )


def _check_loads(architecture: str, model: keras.Model) -> None:
    """Try what a checkpoint needs of a user's classes, before there is one."""
    try:
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{architecture} cannot be saved and loaded again: {_text(error)}; give its classes "
            "@keras.saving.register_keras_serializable() and a get_config with all arguments"
        ) from error


@contextmanager
def _translated(architecture: str) -> Iterator[None]:
    """Make one sentence of whatever a network's function raises."""
    filtering = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()  # `feature_map` reads the frames
    try:
        yield
    except PipelineError:
        raise
    except (Exception, SystemExit) as error:
        eaten = feature_map.refused_by(error)
        text = f"cannot be built: {eaten}" if eaten else f"raised {_text(error)}"
        raise ConfigError(f"{architecture} {text}") from error
    finally:
        if filtering:
            keras.config.enable_traceback_filtering()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(COLOURS.sub('', str(error)).split())}"


def _fits(taken: tuple[int | None, ...], shape: Shape) -> bool:
    return len(taken) == len(shape) and all(
        size in (None, given) for size, given in zip(taken, shape, strict=True)
    )


def _is_open(taken: tuple[int | None, ...], shape: Shape) -> bool:
    """Say whether an input takes any number of rows, and these among others."""
    return taken[0] is None and None in taken[1:] and _fits(taken[1:], shape)


def _held_in(model: keras.Model, side: str) -> str:
    """Return in what a model's input or output is held; empty of a tensor, or a list of some."""
    found = getattr(model, side, None)  # a Sequential model has none
    plain = found is None or isinstance(found, list | keras.KerasTensor)
    return "" if plain else type(found).__name__


def _noise(shape: Shape) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (TRIED_ROWS, *shape), np.uint8)


def _are_probabilities(answers: NDArray[np.float32]) -> bool:
    return bool(answers.min() >= 0 and np.abs(answers.sum(axis=1) - 1).max() < 1e-3)  # noqa: PLR2004
