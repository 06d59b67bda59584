import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import augment
from pipeline.config import Augmentation

EVERYTHING = Augmentation(shift=0.1, flip=True, rotate=0.05, zoom=0.1, erase=0.2)
ONE_BY_ONE = [
    Augmentation(shift=0.2),
    Augmentation(flip=True),
    Augmentation(rotate=0.1),
    Augmentation(zoom=0.3),
    Augmentation(erase=0.3),
]


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(1)
    return tf.constant(random.integers(0, 256, (32, 12, 9, 3)).astype(np.uint8))


def changed(config, images, key=(1, 2)):
    augmented = augment.build(config)
    assert augmented is not None
    return tf.function(augmented)(images, tf.constant(key, tf.int32)).numpy()


def test_nothing_is_built_where_nothing_is_asked_for():
    assert augment.build(Augmentation()) is None


@pytest.mark.parametrize("config", ONE_BY_ONE)
def test_images_change_but_not_their_shape_or_dtype(config, images):
    found = changed(config, images)

    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    assert not np.array_equal(found, images)


@pytest.mark.parametrize("config", [EVERYTHING, *ONE_BY_ONE])
def test_the_same_key_changes_images_the_same_way_in_a_new_process_too(config, images):
    keras.utils.set_random_seed(1)
    first = changed(config, images)
    keras.utils.set_random_seed(2)

    np.testing.assert_array_equal(changed(config, images), first)


@pytest.mark.parametrize("config", [EVERYTHING, *ONE_BY_ONE])
def test_another_key_changes_them_another_way(config, images):
    assert not np.array_equal(changed(config, images), changed(config, images, key=(1, 3)))


def test_a_flip_turns_about_half_of_the_images_and_changes_no_pixel(images):
    found = changed(Augmentation(flip=True), images)
    turned = [np.array_equal(one, was[:, ::-1]) for one, was in zip(found, images, strict=True)]
    same = [np.array_equal(one, was) for one, was in zip(found, images, strict=True)]

    assert all(a != b for a, b in zip(turned, same, strict=True))
    assert 8 <= sum(turned) <= 24


def test_images_of_one_batch_are_moved_differently():
    images = np.zeros((16, 20, 20, 1), np.uint8)
    images[:, 10, 10] = 255

    found = changed(Augmentation(shift=0.3), tf.constant(images))
    places = {int(one.argmax()) for one in found}

    assert len(places) > 8


def test_what_moves_in_repeats_the_border():
    found = changed(Augmentation(shift=0.4), tf.constant(np.full((8, 10, 10, 1), 77, np.uint8)))

    assert (found == 77).all()


def test_an_image_is_erased_by_at_most_the_share_that_was_asked_for():
    images = np.full((64, 20, 20, 1), 128, np.uint8)

    found = changed(Augmentation(erase=0.25), tf.constant(images))
    shares = (found != 128).mean(axis=(1, 2, 3))

    assert 0 < (shares > 0).mean() < 1
    assert shares.max() <= 0.25 + 2 / 20  # whole pixels on both sides


def test_float_images_stay_float(images):
    found = changed(EVERYTHING, tf.cast(images, tf.float32))

    assert found.dtype == np.float32
