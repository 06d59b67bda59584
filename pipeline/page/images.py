"""Arrays as PNG files inside a page."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GAP = 1  # pixels between the tiles of a mosaic, transparent
TRANSPARENT = 2  # channels of gray with alpha


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return an image as a PNG in a URI.

    Args:
        pixels: (height, width, channels): gray, gray with alpha, RGB or RGB with alpha.
    """
    content = io.BytesIO()
    flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(np.ascontiguousarray(flat)).save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def mosaic(tiles: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay tiles out row by row, with gaps that show what is behind.

    Args:
        tiles: (tiles, height, width, 1 or 3).
        columns: of the mosaic.

    Returns:
        The same with a channel of alpha, (height, width, 2 or 4).
    """
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    size = (lines * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels + 1)
    laid = np.zeros(size, np.uint8)
    for place, tile in enumerate(tiles):
        line, column = divmod(place, columns)
        top, left = line * (height + GAP), column * (width + GAP)
        laid[top : top + height, left : left + width, :channels] = tile
        laid[top : top + height, left : left + width, channels] = 255
    return laid


def kernels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return kernels as tiles, each scaled by its largest weight; zero is the middle gray.

    Args:
        values: (height, width, channels, kernels). Three channels become colours; others than one
            or three their mean.

    Returns:
        (kernels, height, width, 1 or 3).
    """
    if values.shape[2] not in (1, 3):
        values = values.mean(axis=2, keepdims=True)
    largest = np.abs(values).max(axis=(0, 1, 2), keepdims=True)
    scaled = 127.5 * (1 + values / np.where(largest > 0, largest, 1))
    return np.ascontiguousarray(scaled.round().astype(np.uint8).transpose(3, 0, 1, 2))
