"""What every exported file says about itself, in the same words."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Self

from pipeline.records import Dataset, Trained

TOOLS = ("tensorflow", "keras", "tf2onnx", "onnx")


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
                "preprocessing": "none: uint8 0 to 255 in, scaling is part of the graph",
                "dataset.name": data.name,
                "dataset.sha256": data.sha256,
                "dataset.license": data.license,
                "parent.sha256": trained.sha256,
                "run": run,
                **{f"version.{tool}": version(tool) for tool in TOOLS},
            }
        )

    def json(self) -> bytes:
        """Return it as one JSON object."""
        return json.dumps(self.texts, indent=1).encode()
