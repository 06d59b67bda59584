"""Real models, trained once a session on real images, and the ways of measuring their exports."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import dataset, export, parity
from pipeline.config import DataConfig
from pipeline.export import narrow, onnx, saved_model, tflite
from pipeline.export.metadata import Metadata
from pipeline.records import Dataset, Variant
from protos import bundle_pb2

Images = NDArray[np.uint8]
Session = tuple[tuple[str, str], ...]
ABOUT = Metadata({})


def pytest_collection_modifyitems(items) -> None:
    """What needs a model that was trained or exported is not for every save."""
    for item in items:
        if {"data", "lab"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


class Lab:
    """Writes models by the pipeline's own exporters, and has them measured by its parity."""

    @staticmethod
    def saved_model(model: keras.Model, folder: Path, serve=None) -> Variant:
        """Write a SavedModel; `serve` is what is exported in place of the model as it is."""
        path = folder / "saved_model"
        saved_model.write(model, serve or export.serving_function(model), path, ABOUT)
        return Variant("saved-model", "saved_model", "float32", path)

    @staticmethod
    def tflite(source: Variant) -> Variant:
        path = source.path.with_name("model.float32.tflite")
        tflite.write(source.path, path, ABOUT)
        return Variant("tflite-float32", "tflite", "float32", path)

    @staticmethod
    def onnx(model: keras.Model, folder: Path) -> Variant:
        path = folder / "model.float32.onnx"
        onnx.write(export.serving_function(model), path, ABOUT)
        return Variant("onnx-float32", "onnx", "float32", path)

    @staticmethod
    def float16(source: Variant) -> Variant:
        path = source.path.with_name("model.float16.onnx")
        narrow.write_float16(source.path, path, ABOUT)
        return Variant("onnx-float16", "onnx", "float16", path)

    @staticmethod
    def int8(source: Variant, images: Images) -> Variant:
        path = source.path.with_name("model.int8.onnx")
        narrow.write_int8(source.path, path, ABOUT, images)
        return Variant("onnx-int8", "onnx", "int8", path)

    @staticmethod
    def written(
        content: bytes, folder: Path, precision: str = "float32", session: Session = ()
    ) -> Variant:
        """Keep an ONNX model that was changed; `session` is what onnxruntime is told."""
        path = folder / "changed.onnx"
        path.write_bytes(content)
        return Variant(f"onnx-{precision}", "onnx", precision, path, session=session)

    @staticmethod
    def questions(model: keras.Model, images: Images, labels: NDArray[np.uint8]):
        """Ask a model what its exports are to be held against."""
        hostile = parity.hostile_images(images.shape[1:])
        return parity.Questions(
            inputs=images,
            targets=labels,
            class_names=tuple(map(str, range(model.output_shape[1]))),
            hostile=hostile,
            reference=model.predict(images, verbose=0),
            hostile_reference=model.predict(hostile, verbose=0),
        )

    @staticmethod
    def report(variant: Variant, asked: parity.Questions) -> bundle_pb2.ParityReport:
        """Return what parity says of a variant."""
        return parity.measure(variant, asked)[0]


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def data() -> Dataset:
    return dataset.prepare(DataConfig(max_train_rows=6_000))


@pytest.fixture(scope="session")
def splits(data) -> dataset.Splits:
    return dataset.load(data)


Crop = Callable[[tuple[int, int, int], int, int], tuple[Images, NDArray[np.uint8]]]


@pytest.fixture(scope="session")
def crop(splits) -> Crop:
    """Return a function that makes real images of any size, with the labels of the first channel.

    A channel is another garment, repeated where the image is larger, at a random place.
    """

    def crop(shape, rows, seed):
        height, width, channels = shape
        random = np.random.default_rng(seed)
        chosen = random.integers(0, len(splits.test.inputs), (channels, rows))
        planes = np.tile(splits.test.inputs[chosen, ..., 0], (1, 1, 2, 2))
        top, left = random.integers(0, 56 - height), random.integers(0, 56 - width)
        images = planes[:, :, top : top + height, left : left + width].transpose(1, 2, 3, 0)
        return np.ascontiguousarray(images), splits.test.targets[chosen[0]]

    return crop
