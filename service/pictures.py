"""Turn a PNG or JPEG file into the pixels a model takes.

The steps, in order: turn it as its EXIF data say; lay transparency on black; make it gray (ITU-R
601-2 luma) or RGB, as the model's channels ask; shrink or enlarge it to fit, keeping its
proportions; centre it on black. A gray picture of the model's own size passes unchanged.
"""

import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import PictureError

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 64_000_000  # 192 MB once decoded as RGB; a phone's camera makes a fifth of it
# What Pillow's parsers raise on bytes that are not as their headers say.
NOT_A_PICTURE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    struct.error,
)
MODES = {1: "L", 3: "RGB"}


def read(path: Path, shape: tuple[int, int, int], *, invert: bool = False) -> NDArray[np.uint8]:
    """Read a picture as a model's input.

    Args:
        path: a PNG or JPEG file of any size, gray, colour, with a palette or transparency.
        shape: the model's (height, width, channels); 1 or 3 channels.
        invert: swap light and dark, for a model that learnt light things on black.

    Returns:
        uint8 of that shape, 0 to 255.

    Raises:
        PictureError: it cannot be read, is not a picture, or is too large.
    """
    height, width, channels = shape
    if channels not in MODES:
        raise PictureError(f"the model takes {channels} channels, pictures have 1 or 3")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
            _check_size(path, opened)
            flat = _flatten(ImageOps.exif_transpose(opened), MODES[channels])
        if invert:
            flat = ImageOps.invert(flat)
        fitted = flat if flat.size == (width, height) else _fit(flat, width, height)
    except FileNotFoundError as error:
        raise PictureError(f"{path} is not there") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} has over {MAX_PIXELS} pixels; make it smaller") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a {' or '.join(FORMATS)} picture") from error
    except NOT_A_PICTURE as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error
    return np.asarray(fitted, np.uint8).reshape(shape)


def has_light_border(pixels: NDArray[np.uint8]) -> bool:
    """Tell whether the outermost pixels are light, as in a photograph on white."""
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return float(np.mean([edge.mean() for edge in edges])) > 127  # noqa: PLR2004  half of 255


def _check_size(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"{path} has {image.width} x {image.height} pixels, "
            f"expected at most {MAX_PIXELS} in all; make it smaller"
        )


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture into the size with its proportions kept, centred on black.

    A side never shrinks to nothing. Where it shrinks, Pillow's bilinear filter averages all the
    pixels it covers.
    """
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new(image.mode, (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), corner)
    return canvas


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Return the picture in the given mode, without transparency."""
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "black"), colour)
    return image.convert("RGB").convert(mode) if image.mode == "RGBA" else image.convert(mode)
