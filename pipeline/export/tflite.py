"""Write a TFLite file from a SavedModel.

Its metadata is a zip archive after the flatbuffer, as TFLite's own metadata tools leave it: the
runtime reads from the front, `unzip -p model.tflite metadata.json` from the back.
"""

import zipfile
from pathlib import Path

import tensorflow as tf

from pipeline.errors import ExportError
from pipeline.export.metadata import Metadata


def write(saved_model: Path, path: Path, metadata: Metadata) -> None:
    """Convert with TFLite's own operators only.

    Raises:
        ExportError: the model needs an operator that TFLite does not have.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:
        # The converter raises a bare Exception of many lines.
        raise ExportError(f"TFLite cannot hold this model: {str(error).splitlines()[0]}") from error
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), metadata.json())
