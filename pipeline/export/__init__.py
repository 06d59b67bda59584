"""The trained model to SavedModel, TFLite and ONNX, in float32 and in fewer bits.

One `tf.function` feeds all, so that a difference between them is the exporter's and not ours:
uint8 `image` in, float32 `probabilities` and `logits` out, dropout off.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export import calibration, metadata, narrow, onnx, saved_model, tflite
from pipeline.export.metadata import Metadata
from pipeline.records import Dataset, Exports, Trained, Variant
from service import bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """What the variants are made from: the later ones from the files of the first."""

    model: keras.Model
    serve: tf.types.experimental.PolymorphicFunction
    saved_model: Path
    onnx: Path
    images: NDArray[np.uint8]  # for calibration


Write = Callable[[Source, Path, Metadata], None]
WRITERS: dict[str, Write] = {
    "saved-model": lambda s, path, about: saved_model.write(s.model, s.serve, path, about),
    "tflite-float32": lambda s, path, about: tflite.write(s.saved_model, path, about),
    "tflite-float16": lambda s, path, about: tflite.write_float16(s.saved_model, path, about),
    "tflite-dynamic-range": lambda s, path, about: tflite.write_dynamic_range(
        s.saved_model, path, about
    ),
    "tflite-int8": lambda s, path, about: tflite.write_int8(s.saved_model, path, about, s.images),
    "tflite-int16x8": lambda s, path, about: tflite.write_int16x8(
        s.saved_model, path, about, s.images
    ),
    "onnx-float32": lambda s, path, about: onnx.write(s.serve, path, about),
    "onnx-float16": lambda s, path, about: narrow.write_float16(s.onnx, path, about),
    "onnx-int8": lambda s, path, about: narrow.write_int8(s.onnx, path, about, s.images),
}
CALIBRATED = {"tflite-int8", "tflite-int16x8", "onnx-int8"}


def plan(folder: Path) -> tuple[Variant, ...]:
    """Return every variant that is tried, in the order of the table, each with its class."""

    def lite(kind: str, precision: str) -> Variant:
        path = folder / f"model.{kind}.tflite"
        return Variant(f"tflite-{kind}", "tflite", precision, path, required=kind == "float32")

    def open_exchange(precision: str) -> Variant:
        path = folder / f"model.{precision}.onnx"
        required = precision == "float32"
        return Variant(f"onnx-{precision}", "onnx", precision, path, required=required)

    return (
        Variant("saved-model", "saved_model", "float32", folder / "saved_model", required=True),
        lite("float32", "float32"),
        lite("float16", "float16"),
        lite("dynamic-range", "int8"),
        lite("int8", "int8"),
        lite("int16x8", "int8"),
        open_exchange("float32"),
        open_exchange("float16"),
        open_exchange("int8"),
    )


def convert(trained: Trained, data: Dataset, folder: Path, run: str) -> Exports:
    """Export the trained model in every variant; leave out what cannot be and is not required.

    Args:
        trained: the original.
        data: what it learnt from, for the labels and for calibration.
        folder: emptied first.
        run: what to call this run in the metadata of every file.

    Raises:
        ExportError: a required variant cannot be written, a file does not say the right labels, or
            the original is no longer the file that was trained.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    digest = bundle.file_sha256(trained.path)
    if digest != trained.sha256:
        raise ExportError(
            f"{trained.path} has sha256 {digest[:12]}…, expected {trained.sha256[:12]}… of the "
            "model that was trained; run again"
        )
    chosen = calibration.choose(data)
    calibration.write(chosen, data, folder / "calibration.json")
    model = keras.models.load_model(trained.path)
    planned = {variant.name: variant for variant in plan(folder)}
    source = Source(
        model=model,
        serve=serving_function(model),
        saved_model=planned["saved-model"].path,
        onnx=planned["onnx-float32"].path,
        images=chosen.images,
    )
    about = Metadata.of(trained, data, run)
    written = []
    for variant in planned.values():
        calibrated = {"calibration_sha256": chosen.sha256} if variant.name in CALIBRATED else {}
        texts = about.with_texts(
            variant=variant.name,
            precision=variant.precision,
            session=json.dumps(dict(variant.session)),
            **calibrated,
        )
        written.append(_write(variant, source, texts))
        if not written[-1].failure:
            metadata.check(written[-1], data, digest)
    log.info("exported SavedModel, TFLite and ONNX to %s", folder)
    return Exports(tuple(written), parent_sha256=digest, calibration=folder / "calibration.json")


def serving_function(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Return the one function that every format is made from."""
    shape = (None, *model.inputs[0].shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="image")])
    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = model(image, training=False)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    return serve


def _write(variant: Variant, source: Source, texts: Metadata) -> Variant:
    """Write one file; return the variant with the failure if it may fail and did."""
    try:
        WRITERS[variant.name](source, variant.path, texts)
    except ExportError as error:
        if variant.required:
            raise
        log.warning("%s is left out: %s", variant.name, error)
        variant.path.unlink(missing_ok=True)
        return replace(variant, failure=str(error))
    return variant
