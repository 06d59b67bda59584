import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.page import images


def read(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_is_read_back_as_it_was(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)

    assert read(images.data_uri(pixels)).reshape(pixels.shape).tolist() == pixels.tolist()


def test_the_gaps_of_a_mosaic_and_what_is_missing_in_its_last_row_are_transparent():
    laid = images.mosaic(np.full((3, 2, 2, 1), 9, np.uint8), columns=2)

    assert laid.shape == (5, 5, 2)
    assert laid[..., 1].tolist() == [
        [255, 255, 0, 255, 255],
        [255, 255, 0, 255, 255],
        [0] * 5,
        [255, 255, 0, 0, 0],
        [255, 255, 0, 0, 0],
    ]


def test_a_mosaic_of_few_tiles_is_no_wider_than_they_are():
    assert images.mosaic(np.zeros((2, 3, 3, 3), np.uint8), columns=16).shape == (3, 7, 4)


def test_each_kernel_is_scaled_by_its_own_largest_weight_and_zero_is_gray():
    values = np.zeros((1, 3, 1, 3), np.float32)
    values[0, :, 0, 0] = (-2, 0, 2)
    values[0, :, 0, 1] = (0, 0.1, 0.05)

    tiles = images.kernels(values)

    assert tiles.shape == (3, 1, 3, 1)
    assert tiles[..., 0].tolist() == [[[0, 128, 255]], [[128, 255, 191]], [[128] * 3]]


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 1), (64, 1)])
def test_kernels_of_three_channels_are_colours_and_of_others_their_mean(channels, shown):
    assert images.kernels(np.ones((3, 3, channels, 2), np.float32)).shape == (2, 3, 3, shown)
