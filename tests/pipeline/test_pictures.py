import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline import pictures
from pipeline.errors import DatasetError
from service import pictures as served

NOISE = np.random.default_rng(0).integers(0, 256, (7, 10, 4), np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    return exif


def kinds(folder):
    """Every kind of picture that the two readers treat in a way of its own."""
    rgb = Image.fromarray(NOISE[..., :3])
    yield save(folder / "gray.png", rgb.convert("L"))
    yield save(folder / "rgb.png", rgb)
    yield save(folder / "one.png", rgb.convert("1"))
    yield save(folder / "clear.png", Image.fromarray(NOISE))
    yield save(folder / "gray-clear.png", Image.fromarray(NOISE).convert("LA"))
    yield save(folder / "palette.png", rgb.quantize(16))
    yield save(folder / "deep.png", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257))
    yield save(folder / "turned.jpg", rgb, exif=turned())
    yield save(folder / "ink.jpg", rgb.convert("CMYK"))


@pytest.mark.parametrize("shape", [(7, 10, 1), (7, 10, 3), (28, 28, 1), (3, 30, 3), (2, 2, 3)])
def test_pictures_are_learnt_from_as_the_server_will_read_them(tmp_path, shape):
    for path in kinds(tmp_path):
        mine = pictures.pixels(pictures.fit(pictures.read(path, shape[2]), *shape[:2]))

        np.testing.assert_array_equal(mine, served.read(path, shape), err_msg=path.name)


def test_a_picture_is_gray_or_coloured_as_its_file_is(tmp_path):
    modes = {path.stem: pictures.read(path).mode for path in kinds(tmp_path)}

    assert {name for name, mode in modes.items() if mode == "L"} == {
        "gray", "one", "gray-clear", "deep"
    }  # fmt: skip
    assert pictures.read(tmp_path / "turned.jpg").size == (7, 10)


def png(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(kind, content):
        tail = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + tail

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def cut():
    file = io.BytesIO()
    Image.fromarray(NOISE[..., :3]).save(file, "JPEG")
    return file.getvalue()[:-40]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a PNG or JPEG picture"),
        (b"GIF89a", "is not a PNG or JPEG picture"),
        (png(9_000, 9_000), "has 9000 x 9000 pixels, expected at most 64000000"),
        (png(60_000, 60_000), "has too many pixels"),
        (png(5, 5), "cannot be read as a picture"),
        (cut(), "cannot be read as a picture"),
    ],
)
def test_what_is_no_picture_or_a_bomb_is_named(tmp_path, content, said):
    path = tmp_path / "bad.png"
    path.write_bytes(content)

    with pytest.raises(DatasetError, match=rf"bad\.png {said}"):
        pictures.read(path)


def test_what_is_called_so_is_a_picture(tmp_path):
    for name in ("a.PNG", "b.jpeg", "c.gif", "d"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    assert {path.name for path in tmp_path.iterdir() if pictures.is_picture(path)} == {
        "a.PNG", "b.jpeg"
    }  # fmt: skip


@pytest.mark.parametrize("missing", [12, 16, 20, 40])
def test_a_png_without_its_end_is_refused_by_its_name(tmp_path, missing):
    path = save(tmp_path / "cut.png", Image.fromarray(NOISE[..., 0]))
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(DatasetError, match=r"cut\.png .*cut off"):
        pictures.read(path)
