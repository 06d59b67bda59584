import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service import pictures
from service.errors import PictureError

SHAPE = (28, 28, 1)


@pytest.fixture
def save(tmp_path):
    """Return a function that writes an array or image as a picture file."""

    def save(image, format="PNG", **options):
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        path = tmp_path / f"picture.{format.lower()}"
        image.save(path, format, **options)
        return path

    return save


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def refusal(path, shape=SHAPE):
    with pytest.raises(PictureError) as caught:
        pictures.read(path, shape)
    return str(caught.value)


def test_gray_picture_of_the_models_size_passes_unchanged(save):
    pixels = noise(28, 28)

    read = pictures.read(save(pixels), SHAPE)

    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels[:, :, None])


def test_colour_picture_of_a_colour_models_size_passes_unchanged(save):
    pixels = noise(32, 32, 3)

    np.testing.assert_array_equal(pictures.read(save(pixels), (32, 32, 3)), pixels)


def test_colour_becomes_gray_by_luma_and_gray_becomes_colour_by_repetition(save):
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255

    assert np.unique(pictures.read(save(red), (2, 2, 1))).tolist() == [76]  # 0.299 x 255
    gray = noise(2, 2)
    assert (pictures.read(save(gray), (2, 2, 3)) == gray[:, :, None]).all()


def test_invert_swaps_light_and_dark_before_the_border_is_added(save):
    read = pictures.read(save(np.full((2, 4), 255, np.uint8)), (4, 4, 1), invert=True)
    assert read.max() == 0

    read = pictures.read(save(np.zeros((2, 4), np.uint8)), (4, 4, 1), invert=True)
    assert read[:, 0, 0].tolist() == [0, 255, 255, 0]


def test_transparent_pixels_become_black(save):
    pixels = np.full((2, 2, 4), 255, np.uint8)
    pixels[0, :, 3] = 0

    assert pictures.read(save(pixels), (2, 2, 1))[..., 0].tolist() == [[0, 0], [255, 255]]
    assert pictures.read(save(pixels), (2, 2, 3))[..., 1].tolist() == [[0, 0], [255, 255]]


def test_palette_with_a_transparent_colour_is_laid_on_black(save):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 255, 255, 200, 200, 200])
    image.putdata([0, 1])

    assert pictures.read(save(image, transparency=0), (1, 2, 1)).ravel().tolist() == [0, 200]


def test_sixteen_bits_of_gray_are_scaled_and_not_cut_off(save):
    pixels = np.array([[0, 256, 65535, 32768]], np.uint16)

    assert pictures.read(save(pixels), (1, 4, 1)).ravel().tolist() == [0, 1, 255, 128]


def test_black_and_white_picture_is_read(save):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")

    assert pictures.read(save(image), (1, 2, 1)).ravel().tolist() == [0, 255]


def test_picture_is_turned_upright_as_its_exif_says(save):
    exif = Image.Exif()
    exif[0x112] = 6  # turned left by the camera
    pixels = np.array([[10, 20, 30]], np.uint8)

    read = pictures.read(save(pixels, exif=exif), (3, 1, 1))

    assert read.ravel().tolist() == [10, 20, 30]
    assert read.shape == (3, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(56, 28), (28, 56)])
def test_proportions_are_kept_and_the_rest_is_black(save, height, width):
    read = pictures.read(save(np.full((height, width), 255, np.uint8)), SHAPE)[..., 0]

    turned = read if width > height else read.T
    assert (turned[7:21] == 255).all()
    assert (turned[:7] == 0).all()
    assert (turned[21:] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (280, 280), (3, 5)])
def test_every_size_is_fitted(save, size):
    assert pictures.read(save(np.full(size, 200, np.uint8)), SHAPE).max() == 200


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_extremely_long_picture_is_read_or_refused(save, size):
    path = save(np.full(size, 200, np.uint8))

    try:
        assert pictures.read(path, SHAPE).shape == SHAPE
    except PictureError as error:
        assert "cannot be read as a picture" in str(error)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_model_of_other_channels_than_pictures_have_is_refused(save, channels):
    assert refusal(save(noise(2, 2)), (2, 2, channels)) == (
        f"the model takes {channels} channels, pictures have 1 or 3"
    )


def test_file_that_is_not_there_is_refused(tmp_path):
    assert refusal(tmp_path / "no.png") == f"{tmp_path / 'no.png'} is not there"


def test_folder_is_refused(tmp_path):
    assert "cannot be read as a picture" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_file_that_is_not_a_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)

    assert refusal(tmp_path / "a.png") == f"{tmp_path / 'a.png'} is not a PNG or JPEG picture"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(save, format):
    assert refusal(save(noise(8, 8), format)).endswith("is not a PNG or JPEG picture")


def test_picture_that_was_cut_is_refused(save):
    path = save(noise(64, 64))
    path.write_bytes(path.read_bytes()[:2000])

    assert "cannot be read as a picture" in refusal(path)


def test_picture_of_the_most_pixels_is_read_and_one_row_more_is_refused(save):
    assert pictures.read(save(Image.new("1", (8000, 8000), 1)), SHAPE).min() == 255

    path = save(Image.new("1", (8000, 8001)))
    assert refusal(path) == (
        f"{path} has 8000 x 8001 pixels, expected at most 64000000 in all; make it smaller"
    )


def test_picture_that_claims_a_billion_pixels_is_refused(save):
    path = save(noise(2, 2))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 1 << 15, 1 << 15)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)

    assert "has over 64000000 pixels; make it smaller" in refusal(path)


@pytest.mark.parametrize(("light", "border"), [(127, False), (128, True)])
def test_light_border_is_lighter_than_half(light, border):
    pixels = np.zeros((5, 5, 1), np.uint8)
    pixels[[0, -1]] = light
    pixels[:, [0, -1]] = light

    assert pictures.has_light_border(pixels) is border
    assert not pictures.has_light_border(np.pad(noise(3, 3, 1) | 128, ((1, 1), (1, 1), (0, 0))))


def seeds():
    """Picture files with everything in them that Pillow parses."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E], exif[0x11A] = 6, "a description", 72.5
    for pixels in (noise(20, 30), noise(20, 30, 3), noise(20, 30, 4), noise(20, 30).astype("<u2")):
        for format in ("PNG", "JPEG") if pixels.ndim < 3 or pixels.shape[2] == 3 else ("PNG",):
            if format == "JPEG" and pixels.dtype != np.uint8:
                continue
            file = io.BytesIO()
            Image.fromarray(pixels).save(
                file, format, exif=exif, dpi=(72, 72), icc_profile=b"abcd" * 20
            )
            yield file.getvalue()


SEEDS = list(seeds())


def signed(content):
    """Mend the checksums of a PNG, so that what was changed is parsed."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        if at + 12 + size > len(content):
            break
        chunk = content[at + 4 : at + 8 + size]
        parts += [content[at : at + 4], chunk, struct.pack(">I", zlib.crc32(chunk))]
        at += 12 + size
    return b"".join(parts) + content[at:]


def mutated(rng):
    content = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice([1, 1, 2, 5])):
        content[rng.randrange(min(len(content), rng.choice([60, 400, 10**6])))] = rng.randrange(256)
    cut = content[: rng.randrange(len(content))] if rng.random() < 0.1 else content
    return signed(bytes(cut)) if rng.random() < 0.7 else bytes(cut)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF data
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=250)
@given(st.integers(0, 2**32), st.sampled_from([1, 3]))
def test_mutated_picture_is_read_or_refused(tmp_path, seed, channels):
    path = tmp_path / "mutated"
    path.write_bytes(mutated(random.Random(seed)))

    try:
        pixels = pictures.read(path, (28, 28, channels))
    except PictureError as error:
        assert str(path) in str(error)
        return

    assert pixels.shape == (28, 28, channels)
    assert pixels.dtype == np.uint8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_picture_whose_exif_has_text_for_a_number_is_read_or_refused(tmp_path):
    path = tmp_path / "mutated"

    for content in SEEDS:
        for at in range(content.find(b"II*"), content.find(b"II*") + 36):
            damaged = bytearray(content)
            damaged[at] ^= 7
            path.write_bytes(signed(bytes(damaged)))
            try:
                assert pictures.read(path, SHAPE).shape == SHAPE
            except PictureError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
def test_very_thin_picture_leaves_a_line(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("L", size, 200).save(path)

    pixels = pictures.read(path, (28, 28, 1))

    assert (pixels == 200).sum() == 28
