"""Write a SavedModel; its metadata is `assets.extra/metadata.json`."""

from pathlib import Path

import keras
import tensorflow as tf

from pipeline.export.metadata import EXTRA, METADATA, Metadata

SIGNATURE = "serving_default"


def write(
    model: keras.Model,
    serve: tf.types.experimental.PolymorphicFunction,
    folder: Path,
    metadata: Metadata,
) -> None:
    """Write the serving function and the variables it needs."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(SIGNATURE, serve)
    archive.write_out(str(folder), verbose=False)
    (folder / EXTRA).mkdir()
    (folder / EXTRA / METADATA).write_bytes(metadata.json())
