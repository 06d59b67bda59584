"""What a stranger is given: where the server is, what to ask it, and what it must answer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

MODEL = "tiny"
SHAPE = (2, 2, 1)
WAIT_S = 30


@dataclass(frozen=True)
class Asked:
    """Of one server, which has the tiny model."""

    address: str
    images: Any  # uint8 (rows, 2, 2, 1)
    logits: Any  # float32 (rows, classes)
    pictures: tuple[bytes, ...]  # the first images as PNG files
    labels: tuple[str, ...]
    token: str
    admin_token: str
    max_batch_rows: int
    compressions: tuple[str, ...]  # that the server knows
    authority: str  # PEM files: who signed the server's certificate
    certificate: str  # of the client
    key: str

    @property
    def probabilities(self) -> Any:
        raised = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    @property
    def admin(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.admin_token}"}

    def client(self) -> InferenceServerClient:
        return InferenceServerClient(self.address)

    def inputs(self, start: int = 0, stop: int | None = None) -> list[InferInput]:
        return [image_input(self.images[start:stop])]

    def check(self, result: Any, start: int = 0, stop: int | None = None) -> None:
        """Require that an answer to those images has both outputs, right."""
        np.testing.assert_allclose(
            result.as_numpy("logits"), self.logits[start:stop], rtol=1e-5, atol=1e-3
        )
        np.testing.assert_allclose(
            result.as_numpy("probabilities"), self.probabilities[start:stop], rtol=1e-4, atol=1e-6
        )


def read(folder: Path) -> Asked:
    pictures = sorted((folder / "pictures").iterdir(), key=lambda path: int(path.stem))
    return Asked(
        images=np.load(folder / "images.npy"),
        logits=np.load(folder / "logits.npy"),
        pictures=tuple(path.read_bytes() for path in pictures),
        **json.loads((folder / "asked.json").read_text()),
    )


def image_input(images: Any) -> InferInput:
    tensor = InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor


@contextmanager
def refused(status: str, *phrases: str) -> Iterator[None]:
    """Require that what happens inside is refused with this status and these words."""
    try:
        yield
    except InferenceServerException as error:
        check_refusal(error, status, *phrases)
    else:
        raise AssertionError(f"was not refused with {status}")


async def refused_later(call: Any, status: str, *phrases: str) -> None:
    """Require the same of an awaitable."""
    try:
        await call
    except InferenceServerException as error:
        check_refusal(error, status, *phrases)
    else:
        raise AssertionError(f"was not refused with {status}")


def check_refusal(error: Any, status: str, *phrases: str) -> None:
    assert error.status() == f"StatusCode.{status}", (error.status(), error.message())
    for phrase in phrases:
        assert phrase in error.message(), (phrase, error.message())
