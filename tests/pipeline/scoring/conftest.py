"""Pictures and parquet files for the tiny model."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def png(pixels) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return png


@pytest.fixture
def folder(tiny, tmp_path) -> Callable[..., Path]:
    """Return a function that writes pictures into subfolders; their order is that of the rows."""

    def make(rows: int, name: str = "pictures") -> Path:
        root = tmp_path / name
        for place, pixels in enumerate(tiny.images(rows)):
            path = root / f"{place // 4:03d}" / f"{place:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
        return root

    return make


@pytest.fixture
def parquet(tmp_path) -> Callable[..., Path]:
    """Return a function that writes columns into a parquet file."""

    def make(file: str = "rows.parquet", group_rows: int = 3, **columns) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=group_rows)
        return path

    return make


@pytest.fixture
def pixels(tiny) -> Callable[..., pa.Array]:
    """Return a function that gives the tiny model's images as a column of lists."""

    def make(rows: int, seed: int = 0) -> pa.Array:
        return pa.array(list(tiny.images(rows, seed).reshape(rows, 4)), pa.list_(pa.uint8()))

    return make


@pytest.fixture
def probabilities(tiny):
    """Return a function that works out what the tiny model answers."""

    def softmax(images):
        logits = tiny.logits(images).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    return softmax
