import keras
import numpy as np
import pytest

from pipeline import models
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_network_takes_pixels_and_gives_one_logit_a_class(name):
    model = models.build(name, (28, 28, 1), 10)

    assert (model.inputs[0].name, model.inputs[0].dtype) == ("image", "uint8")
    assert model(np.zeros((3, 28, 28, 1), np.uint8)).shape == (3, 10)


def test_the_textbook_network_has_the_textbooks_parameters():
    assert models.build("conv10-dropout", (28, 28, 1), 10).count_params() == 197_210


def test_scaling_to_one_is_inside_the_network():
    model = models.build("conv10-dropout", (28, 28, 1), 10)

    scaled = keras.Model(model.input, model.get_layer("scale").output)

    assert float(scaled(np.full((1, 28, 28, 1), 255, np.uint8))[0, 0, 0, 0]) == pytest.approx(1)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="architecture is 'x', expected one of conv10-dropout"):
        models.build("x", (28, 28, 1), 10)
