"""The trained model to SavedModel, TFLite and ONNX.

One `tf.function` feeds all three, so that a difference between them is the exporter's and not
ours: uint8 `image` in, float32 `probabilities` and `logits` out, dropout off.
"""

import logging
import shutil
from pathlib import Path

import keras
import tensorflow as tf

from pipeline.export import onnx, saved_model, tflite
from pipeline.export.metadata import Metadata
from pipeline.records import Dataset, Exports, Trained

log = logging.getLogger(__name__)


def convert(trained: Trained, data: Dataset, folder: Path, run: str) -> Exports:
    """Export the trained model in every format.

    Args:
        trained: the original.
        data: what it learnt from, for the labels.
        folder: emptied first.
        run: what to call this run in the metadata of every file.

    Raises:
        ExportError: a file would not be what was asked for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exports = Exports(
        saved_model=folder / "saved_model",
        tflite=folder / "model.float32.tflite",
        onnx=folder / "model.float32.onnx",
    )
    metadata = Metadata.of(trained, data, run)
    model = keras.models.load_model(trained.path)
    serve = serving_function(model)
    saved_model.write(model, serve, exports.saved_model, metadata)
    tflite.write(exports.saved_model, exports.tflite, metadata)
    onnx.write(serve, exports.onnx, metadata)
    log.info("exported SavedModel, TFLite and ONNX to %s", folder)
    return exports


def serving_function(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Return the one function that every format is made from."""
    shape = (None, *model.inputs[0].shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="image")])
    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = model(image, training=False)
        return {"probabilities": tf.nn.softmax(logits), "logits": logits}

    return serve
