"""Turn picture files into pixels to learn from, by the code with which the server reads them."""

import warnings
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
        picture = upright(path, channels)
    except PictureError as error:
        raise DatasetError(str(error)) from error
    _check_end(path)
    return picture


def _check_end(path: Path) -> None:
    """Refuse a PNG that was cut off: Pillow asks for no more than it has pixels to fill."""
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
        if opened.format != "PNG":
            return
        try:
            opened.verify()  # reads on to the last chunk, and holds each to its checksum
        except (OSError, SyntaxError) as error:
            raise DatasetError(
                f"{path} is damaged or was cut off: {error}; copy or make it again"
            ) from error


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return a picture of mode L or RGB as uint8 (height, width, channels)."""
    array = np.asarray(picture, np.uint8)
    return array.reshape(*array.shape[:2], -1)
