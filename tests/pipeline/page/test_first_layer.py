import keras
import numpy as np
import pytest
from keras import layers

from pipeline.page import first_layer

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)


def model(*inside):
    image = keras.Input((12, 12, 3), dtype="uint8")
    x = layers.Rescaling(1 / 255)(image)
    for one in inside:
        x = one(x)
    return keras.Model(image, layers.Dense(4)(layers.Flatten()(x)))


def test_kernels_and_maps_are_those_of_the_first_convolution():
    first = layers.Conv2D(5, 3, name="first")

    found = first_layer.find(model(first, layers.Conv2D(7, 3, name="second")), IMAGES)

    assert found.name == "first"
    np.testing.assert_array_equal(found.kernels, np.asarray(first.kernel))
    expected = first(IMAGES.astype(np.float32) / 255)
    np.testing.assert_allclose(found.maps, np.asarray(expected), atol=1e-5)


def test_one_inside_another_model_is_found():
    nested = keras.Sequential([layers.Conv2D(5, 3, name="inner")])

    assert first_layer.find(model(nested), IMAGES).name == "inner"


def test_kernels_of_one_pixel_are_passed_over():
    found = first_layer.find(model(layers.Conv2D(3, 1), layers.Conv2D(5, 3, name="next")), IMAGES)

    assert found.name == "next"


def test_a_network_without_a_convolution_has_none():
    assert first_layer.find(model(layers.ReLU()), IMAGES) is None


@pytest.mark.parametrize("kernels", [first_layer.MOST, first_layer.MOST + 1])
def test_no_more_kernels_are_kept_than_are_shown(kernels):
    found = first_layer.find(model(layers.Conv2D(kernels, 3)), IMAGES)

    assert found.kernels.shape[-1] == found.maps.shape[-1] == first_layer.MOST


def test_large_maps_are_thinned_out():
    image = keras.Input((100, 40, 1), dtype="uint8")
    x = layers.Conv2D(2, 3, padding="same")(layers.Rescaling(1.0)(image))

    found = first_layer.find(keras.Model(image, x), np.zeros((1, 100, 40, 1), np.uint8))

    assert found.maps.shape == (1, 34, 14, 2)


def test_the_model_is_afterwards_what_it_was():
    layer = layers.Conv2D(5, 3)
    whole = model(layer)

    first_layer.find(whole, IMAGES)

    assert "call" not in vars(layer)
