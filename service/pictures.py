"""Turn a PNG or JPEG file into the pixels a model takes.

The steps, in order: turn it as its EXIF data say; lay transparency on black; make it gray (ITU-R
601-2 luma) or RGB, as the model's channels ask; shrink or enlarge it to fit, keeping its
proportions; centre it on black. A gray picture of the model's own size passes unchanged.
"""

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import PictureError

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 64_000_000  # 192 MB once decoded as RGB; a phone's camera makes a fifth of it
# Of pictures that strangers send. What comes before the pixels is parsed in Python, and every scan
# of a JPEG goes over all of its pixels, be it of 30 bytes.
MAX_HEAD_BYTES = 4 << 20  # colour profiles take up to 2 MiB
MAX_BYTES_PER_PIXEL = 8  # RGBA of 16 bits, uncompressed
MAX_SCANS = 64  # progressive ones are made in about 10
SCAN = b"\xff\xda"  # within a scan, 255 is never followed by this
# What Pillow's parsers raise, with a text that helps, on bytes that are not as their headers say.
NOT_A_PICTURE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    struct.error,
)
MODES = {1: "L", 3: "RGB"}  # by channels
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


def read(path: Path, shape: tuple[int, int, int], *, invert: bool = False) -> NDArray[np.uint8]:
    """Read a picture file as a model's input.

    Args:
        path: a PNG or JPEG file of any size, gray, colour, with a palette or transparency.
        shape: the model's (height, width, channels); 1 or 3 channels.
        invert: swap light and dark, for a model that learnt light things on black.

    Returns:
        uint8 of that shape, 0 to 255.

    Raises:
        PictureError: it cannot be read, is not a picture, or is too large.
    """
    with warnings.catch_warnings(action="ignore"):  # of a damaged EXIF block, and the like
        return _pixels(path, str(path), shape, max_pixels=MAX_PIXELS, invert=invert)


def decode_all(
    contents: Sequence[bytes], shape: tuple[int, int, int], max_pixels: int
) -> NDArray[np.uint8]:
    """Decode the pictures of one request as a model's input; safe in several threads at once.

    Args:
        contents: a PNG or JPEG each.
        shape: the model's (height, width, channels); 1 or 3 channels.
        max_pixels: of all of them together, before they are fitted into the model's size.

    Returns:
        uint8 (len(contents), *shape).

    Raises:
        PictureError: one is not a picture or is meant to waste time, or together they are too
            large; counts from 0.
    """
    pixels = np.empty((len(contents), *shape), np.uint8)
    left = max_pixels
    for place, content in enumerate(contents):
        name = f"picture {place}"
        left -= _checked_pixels(content, name)
        if left < 0:
            raise PictureError(
                f"the pictures up to {place} have {max_pixels - left} pixels, "
                f"expected at most {max_pixels} in one request; send smaller ones, or fewer"
            )
        pixels[place] = _pixels(io.BytesIO(content), name, shape, max_pixels=max_pixels)
    return pixels


def _checked_pixels(content: bytes, name: str) -> int:
    """Return how many pixels a picture says it has, from its head; refuse what is out of bounds."""
    head = io.BytesIO(content[:MAX_HEAD_BYTES])
    with _refusing(name), Image.open(head, formats=FORMATS) as opened:
        pixels, is_png = opened.width * opened.height, opened.format == "PNG"
    if len(content) > MAX_HEAD_BYTES + pixels * MAX_BYTES_PER_PIXEL:
        raise PictureError(
            f"{name} has {len(content)} bytes for {pixels} pixels; take out what is not the picture"
        )
    if not is_png and content.count(SCAN) > MAX_SCANS:
        raise PictureError(f"{name} has more than {MAX_SCANS} scans; save it as a baseline JPEG")
    return pixels


def _pixels(
    source: Path | io.BytesIO,
    name: str,
    shape: tuple[int, int, int],
    *,
    max_pixels: int,
    invert: bool = False,
) -> NDArray[np.uint8]:
    height, width, channels = shape
    if channels not in MODES:
        raise PictureError(f"the model takes {channels} channels, pictures have 1 or 3")
    with _refusing(name):
        flat = _opened(source, name, channels, max_pixels)
        if invert:
            flat = ImageOps.invert(flat)
        return np.asarray(fit(flat, height, width), np.uint8).reshape(shape)


def upright(path: Path, channels: int | None = None) -> Image.Image:
    """Read a picture file in its own size, turned and without transparency.

    Args:
        path: a PNG or JPEG file.
        channels: 1 for gray, 3 for RGB; None: as the file has it.

    Returns:
        A picture of mode L or RGB.

    Raises:
        PictureError: it cannot be read, is not a picture, or is too large.
    """
    with warnings.catch_warnings(action="ignore"), _refusing(str(path)):
        return _opened(path, str(path), channels, MAX_PIXELS)


def _opened(
    source: Path | io.BytesIO, name: str, channels: int | None, max_pixels: int
) -> Image.Image:
    with Image.open(source, formats=FORMATS) as opened:
        _check_size(name, opened, max_pixels)
        own = 1 if opened.mode in GRAY_MODES else 3
        return _flatten(ImageOps.exif_transpose(opened), MODES[channels or own])


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on bytes that are no picture into one sentence about them."""
    try:
        yield
    except FileNotFoundError as error:
        raise PictureError(f"{name} is not there") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} has too many pixels; make it smaller") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} is not a {' or '.join(FORMATS)} picture") from error
    except NOT_A_PICTURE as error:
        why = "it is cut off" if "truncated" in str(error).lower() else "it is damaged"
        raise PictureError(f"{name} cannot be read as a picture: {why}") from error
    except (PictureError, MemoryError):
        raise
    except Exception as error:
        # Whatever else: its parsers were not written for those who mean harm.
        raise PictureError(f"{name} cannot be read as a picture") from error


def has_light_border(pixels: NDArray[np.uint8]) -> bool:
    """Tell whether the outermost pixels are light, as in a photograph on white."""
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return float(np.mean([edge.mean() for edge in edges])) > 127  # noqa: PLR2004  half of 255


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise PictureError(
            f"{name} has {image.width} x {image.height} pixels, "
            f"expected at most {max_pixels} in all; make it smaller"
        )


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture into the size with its proportions kept, centred on black.

    A side never shrinks to nothing. Where it shrinks, Pillow's bilinear filter averages all the
    pixels it covers. One that fits is returned as it is.
    """
    if image.size == (width, height):
        return image
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
