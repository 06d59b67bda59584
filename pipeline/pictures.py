"""Turn picture files into pixels, in the steps in which the server does it.

Turned as the EXIF data say, transparency laid on black, 16 bits of gray cut to 8, and made to fit
a size with its proportions kept, centred on black.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
MODES = {1: "L", 3: "RGB"}  # by channels
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
MAX_PIXELS = 64_000_000  # as of the server; 192 MB once decoded as RGB


def is_picture(path: Path) -> bool:
    """Tell whether a file is meant to be a picture, by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read(path: Path, channels: int | None = None) -> Image.Image:
    """Read a PNG or JPEG file.

    Args:
        path: of any size, gray, colour, with a palette or transparency.
        channels: 1 for gray, 3 for RGB; None: as the file has it.

    Returns:
        A picture of mode L or RGB.

    Raises:
        DatasetError: it cannot be read, or is too large.
    """
    with _refusing(path), Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise DatasetError(
                f"{path} has {opened.width} x {opened.height} pixels, expected at most "
                f"{MAX_PIXELS} in all; make it smaller"
            )
        own = 1 if opened.mode in GRAY_MODES else 3
        return _flatten(ImageOps.exif_transpose(opened), MODES[channels or own])


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture into a size with its proportions kept, centred on black."""
    if picture.size == (width, height):
        return picture
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    canvas = Image.new(picture.mode, (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    canvas.paste(picture.resize(size, Image.Resampling.BILINEAR), corner)
    return canvas


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return a picture of mode L or RGB as uint8 (height, width, channels)."""
    array = np.asarray(picture, np.uint8)
    return array.reshape(*array.shape[:2], -1)


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "black"), colour)
    return image.convert("RGB").convert(mode) if image.mode == "RGBA" else image.convert(mode)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a file that is no picture into one sentence."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a damaged EXIF block, and the like
            yield
    except (DatasetError, MemoryError):
        raise
    except Exception as error:
        # Whatever there is: its parsers were not written for those who mean harm.
        raise DatasetError(f"{path} cannot be read as a picture: {error}") from error
