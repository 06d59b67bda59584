"""What every exported file says about itself, in the same words, and what it says when read."""

import json
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from typing import Self

import onnx

from pipeline.errors import ExportError
from pipeline.records import Dataset, Trained, Variant

TOOLS = ("tensorflow", "keras", "tf2onnx", "onnx")
METADATA = "metadata.json"
IMAGES = "none: uint8 0 to 255 in, scaling is part of the graph"
NUMBERS = "none: the data's own numbers in"
EXTRA = "assets.extra"  # where TensorFlow Serving too looks for what is not a graph


@dataclass(frozen=True, slots=True)
class Metadata:
    """Flat names and texts: the form that all three formats can hold."""

    texts: dict[str, str]

    @classmethod
    def of(cls, trained: Trained, data: Dataset, run: str) -> Self:
        """Collect it from what the run knows."""
        return cls(
            {
                "labels": json.dumps(data.labels),
                "preprocessing": IMAGES if data.classifies else NUMBERS,
                "dataset.name": data.name,
                "dataset.sha256": data.sha256,
                "dataset.license": data.license,
                "parent.sha256": trained.sha256,
                "run": run,
                **{f"version.{tool}": version(tool) for tool in TOOLS},
            }
        )

    @classmethod
    def read(cls, variant: Variant) -> Self:
        """Read it back from an exported file.

        Raises:
            ExportError: the file has none, or none that can be read.
        """
        try:
            return cls(_texts(variant))
        except Exception as error:
            # Three readers, each with exceptions of its own.
            raise ExportError(
                f"{variant.path.name} has no metadata that can be read: {error}"
            ) from error

    def with_texts(self, **texts: str) -> Self:
        """Return it with more, a _ in a name for the dot."""
        return type(self)(self.texts | {name.replace("_", "."): texts[name] for name in texts})

    def json(self) -> bytes:
        """Return it as one JSON object."""
        return json.dumps(self.texts, indent=1).encode()


def check(variant: Variant, data: Dataset, parent_sha256: str) -> None:
    """Read a file back and refuse labels or a parent that are not the run's.

    Logits do not show either: permuted labels leave every answer as it was.

    Raises:
        ExportError: the file says otherwise.
    """
    texts = Metadata.read(variant).texts
    labels = json.loads(texts.get("labels", "null"))
    if labels != list(data.labels):
        raise ExportError(
            f"{variant.path.name} names the classes {labels}, expected {list(data.labels)}, "
            "in this order"
        )
    if texts.get("parent.sha256") != parent_sha256:
        raise ExportError(
            f"{variant.path.name} says it comes from {texts.get('parent.sha256')}, "
            f"expected {parent_sha256}"
        )


def _texts(variant: Variant) -> dict[str, str]:
    if variant.format == "onnx":
        model = onnx.load(variant.path)
        return {entry.key: entry.value for entry in model.metadata_props}
    if variant.format == "tflite":
        with zipfile.ZipFile(variant.path) as archive:
            content = archive.read(METADATA)
    else:
        content = (variant.path / EXTRA / METADATA).read_bytes()
    texts: dict[str, str] = json.loads(content)
    return texts
