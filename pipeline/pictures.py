"""Turn picture files into pixels to learn from, by the code with which the server reads them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DatasetError
from service.errors import PictureError
from service.pictures import FORMATS, MODES, fit, upright

__all__ = ["FORMATS", "MODES", "fit", "is_picture", "pixels", "read"]
SUFFIXES = (".png", ".jpg", ".jpeg")


def is_picture(path: Path) -> bool:
    """Tell whether a file is meant to be a picture, by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read(path: Path, channels: int | None = None) -> Image.Image:
    """Read a PNG or JPEG file, of any size, as a picture of mode L or RGB.

    Args:
        path: of any size, gray, colour, with a palette or transparency.
        channels: 1 for gray, 3 for RGB; None: as the file has it.

    Raises:
        DatasetError: it cannot be read, or is too large.
    """
    try:
        return upright(path, channels)
    except PictureError as error:
        raise DatasetError(str(error)) from error


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return a picture of mode L or RGB as uint8 (height, width, channels)."""
    array = np.asarray(picture, np.uint8)
    return array.reshape(*array.shape[:2], -1)
