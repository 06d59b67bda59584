"""Networks with random weights, for what does not depend on what they have learnt.

    python -m benchmarks.networks FOLDER conv10 residual

writes FOLDER/NAME/model.onnx and FOLDER/NAME/saved_model as the pipeline exports them.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

from pipeline.export import onnx, saved_model, serving_function
from pipeline.export.metadata import Metadata
from pipeline.models import build

SHAPE = (28, 28, 1)
CLASSES = 10


def conv10() -> keras.Model:
    """Return the network that the pipeline trains by default: 0.27 million multiply-adds."""
    return build("conv10-dropout", SHAPE, CLASSES)


def dense() -> keras.Model:
    """Return two dense layers: 0.1 million multiply-adds."""
    image, scaled = _scaled()
    hidden = layers.Dense(128, activation="relu")(layers.Flatten()(scaled))
    return keras.Model(image, layers.Dense(CLASSES)(hidden))


def conv32_64() -> keras.Model:
    """Return the textbook's larger network: 13.8 million multiply-adds, 1,101,526 parameters."""
    image, x = _scaled()
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D(2)(layers.Conv2D(64, 3, activation="relu")(x))
    hidden = layers.Dense(100, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(CLASSES)(hidden))


def residual() -> keras.Model:
    """Return a small residual network: normalised convolutions, one of two strides, two sums."""
    image, x = _scaled()
    x = layers.ReLU()(_normalised(x, 16, 3))
    for filters, strides in ((16, 1), (32, 2)):
        inner = layers.ReLU()(_normalised(x, filters, 3, strides))
        inner = _normalised(inner, filters, 3)
        beside = x if strides == 1 else _normalised(x, filters, 1, strides)
        x = layers.ReLU()(layers.Add()([beside, inner]))
    return keras.Model(image, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "conv10": conv10,
    "dense": dense,
    "conv32-64": conv32_64,
    "residual": residual,
}


def write(folder: Path, name: str) -> None:
    """Build one network and export it."""
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    serve = serving_function(model)
    (folder / name).mkdir(parents=True)
    saved_model.write(model, serve, folder / name / "saved_model", Metadata({}))
    onnx.write(serve, folder / name / "model.onnx", Metadata({}))


def _scaled() -> tuple[keras.KerasTensor, keras.KerasTensor]:
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    return image, layers.Rescaling(1 / 255)(image)


def _normalised(
    x: keras.KerasTensor, filters: int, size: int, strides: int = 1
) -> keras.KerasTensor:
    conv = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)
    return layers.BatchNormalization()(conv(x))


if __name__ == "__main__":
    for asked in sys.argv[2:]:
        write(Path(sys.argv[1]), asked)
