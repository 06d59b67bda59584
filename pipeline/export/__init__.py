"""The trained model to SavedModel, TFLite and ONNX, in float32 and in fewer bits.

One `tf.function` feeds all, so that a difference between them is the exporter's and not ours:
uint8 `image` in, float32 `probabilities` and `logits` out, dropout off. A model that does not
classify keeps its own names and dtypes.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from numpy.typing import NDArray

from pipeline.config import ExportConfig
from pipeline.errors import ExportError
from pipeline.export import calibration, metadata, narrow, onnx, saved_model, tflite
from pipeline.export.metadata import Metadata
from pipeline.records import Dataset, Exports, Trained, Variant
from service import bundle

log = logging.getLogger(__name__)
DEFAULT = ExportConfig()


@dataclass(frozen=True, slots=True)
class Source:
    """What the variants are made from: the later ones from the files of the first."""

    model: keras.Model
    serve: tf.types.experimental.PolymorphicFunction
    tensors: onnx.Tensors
    saved_model: Path
    lite: Path  # the SavedModel that TFLite files are made from
    onnx: Path
    rows: NDArray[Any]  # for calibration


MakeServe = Callable[[keras.Model], tf.types.experimental.PolymorphicFunction]
Write = Callable[[Source, Path, Metadata], None]
WRITERS: dict[str, Write] = {
    "saved-model": lambda s, path, about: saved_model.write(s.model, s.serve, path, about),
    "tflite-float32": lambda s, path, about: tflite.write(s.lite, path, about),
    "tflite-float16": lambda s, path, about: tflite.write_float16(s.lite, path, about),
    "tflite-dynamic-range": lambda s, path, about: tflite.write_dynamic_range(s.lite, path, about),
    "tflite-int8": lambda s, path, about: tflite.write_int8(s.lite, path, about, s.rows),
    "tflite-int16x8": lambda s, path, about: tflite.write_int16x8(s.lite, path, about, s.rows),
    "onnx-float32": lambda s, path, about: onnx.write(s.serve, path, about, s.tensors),
    "onnx-float16": lambda s, path, about: narrow.write_float16(s.onnx, path, about),
    "onnx-int8": lambda s, path, about: narrow.write_int8(s.onnx, path, about, s.rows),
}
SOURCES = ("saved-model", "onnx-float32")  # of the others: without them there are none
CALIBRATED = {"tflite-int8", "tflite-int16x8", "onnx-int8"}


def names() -> tuple[str, ...]:
    """Return the names of all variants, in the order of the table."""
    return tuple(WRITERS)


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


def convert(
    trained: Trained,
    data: Dataset,
    folder: Path,
    run: str,
    config: ExportConfig = DEFAULT,
) -> Exports:
    """Export the trained model in every variant; leave out what cannot be, with its reason.

    Args:
        trained: the original.
        data: what it learnt from, for the labels and for calibration.
        folder: emptied first.
        run: what to call this run in the metadata of every file.
        config: which variants are required; `pipeline.parity` refuses a run without them, once
            it has reported them all.

    Raises:
        ExportError: the model does not take its data, a variant that others are made from cannot
            be written, a file does not say the right labels, or the original is no longer the file
            that was trained.
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
    model = keras.models.load_model(trained.path, compile=False)
    needed = {*config.required, config.serve}
    planned = {
        one.name: replace(one, required=one.required or one.name in needed) for one in plan(folder)
    }
    make = serving_function if data.classifies else generic_function
    serve = make(model)
    _check_input(serve, chosen.images, data)
    about = Metadata.of(trained, data, run)
    written = []
    with _lite_source(model, make, planned["saved-model"].path) as lite:
        source = Source(
            model=model,
            serve=serve,
            tensors=onnx.CLASSIFIER if data.classifies else onnx.tensors_of(serve),
            saved_model=planned["saved-model"].path,
            lite=lite,
            onnx=planned["onnx-float32"].path,
            rows=chosen.images,
        )
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
    whole = tuple(_in_range(written, source))
    return Exports(whole, parent_sha256=digest, calibration=folder / "calibration.json")


@contextmanager
def _lite_source(model: keras.Model, make: MakeServe, exported: Path) -> Iterator[Path]:
    """Give the SavedModel that TFLite is made from: the exported one, or one of its own.

    Where planes are averaged the latter, in which they are averaged as TFLite does it best.
    """
    averages = tflite.averages(model)
    if not averages:
        yield exported
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved_model")
        with tflite.in_two_steps(averages):
            saved_model.write(model, make(model), path, Metadata({}))
        yield path


def serving_function(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Return the one function that every format of a classifier is made from.

    Whatever dtype the model takes its pixels in, the function takes uint8: the cast is inside.
    """
    taken = model.inputs[0]
    shape = (None, *taken.shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="image")])
    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = model(tf.cast(image, taken.dtype), training=False)
        logits = tf.cast(logits, tf.float32)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    return serve


def generic_function(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Return the same of a model that does not classify: its own tensors, by their own names."""
    taken = model.inputs[0]
    output = (getattr(model, "output_names", None) or [model.layers[-1].name])[0]

    @tf.function(
        input_signature=[tf.TensorSpec((None, *taken.shape[1:]), taken.dtype, name=taken.name)]
    )
    def serve(rows: tf.Tensor) -> dict[str, tf.Tensor]:
        return {output: model(rows, training=False)}

    return serve


def _check_input(
    serve: tf.types.experimental.PolymorphicFunction, rows: NDArray[Any], data: Dataset
) -> None:
    """Refuse a model that takes other rows than its data have."""
    (taken,) = serve.input_signature
    if not taken.shape.is_compatible_with(rows.shape) or taken.dtype != rows.dtype:
        raise ExportError(
            f"the model takes {taken.dtype.name} of shape {taken.shape.as_list()}, {data.name} has "
            f"{rows.dtype} of shape {list(rows.shape)}"
        )


def _write(variant: Variant, source: Source, texts: Metadata) -> Variant:
    """Write one file; return the variant with the failure if it did and others need it not."""
    try:
        WRITERS[variant.name](source, variant.path, texts)
    except ExportError as error:
        if variant.name in SOURCES:
            raise
        return _left_out(variant, str(error))
    return variant


def _in_range(variants: list[Variant], source: Source) -> list[Variant]:
    """Leave out the float16 variants of a model that float16 cannot hold."""
    halves = [one.name for one in variants if one.precision == "float16" and not one.failure]
    failure = narrow.overflow(source.onnx, source.rows) if halves else ""
    if not failure:
        return variants
    return [_left_out(one, failure) if one.name in halves else one for one in variants]


def _left_out(variant: Variant, failure: str) -> Variant:
    log.warning("%s is left out: %s", variant.name, failure)
    variant.path.unlink(missing_ok=True)
    return replace(variant, failure=failure)
