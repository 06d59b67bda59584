"""Change training images at random, the same way whenever the same batch is made again.

Keras' own layers do the changing. What is drawn depends on (seed, epoch, batch) alone, so that a
resumed run sees the images that an undisturbed one sees, on however many threads they are made.
"""

from collections.abc import Callable

import keras
import tensorflow as tf
from keras import layers

from pipeline.config import Augmentation

ERASED_AT_LEAST = 0.02  # of the area, and every second image: as Zhong et al. (2017) have it
ERASED_IMAGES = 0.5
Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class _Keyed(keras.random.SeedGenerator):
    """Seeds that follow from a key, without the state that Keras' own generator counts in."""

    def __init__(self, key: tf.Tensor) -> None:
        # Without the parent's: it makes a variable.
        self._key = key
        self._drawn = 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._key, self._drawn)


def build(config: Augmentation) -> Augment | None:
    """Return what changes a batch; None if nothing is to be changed.

    The function takes images, uint8 or float32 (rows, height, width, channels) with values 0 to
    255, and a key, int32 (2,); it returns images of the same shape and dtype. Where an image moved
    away, its border is repeated.
    """
    chain = _layers(config)
    if not chain:
        return None

    def augment(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        changed = tf.cast(images, tf.float32)
        seeds = _Keyed(key)
        for layer in chain:
            drawn = layer.get_random_transformation(changed, training=True, seed=seeds)
            changed = layer.transform_images(changed, drawn, training=True)
        if images.dtype.is_integer:
            changed = tf.round(tf.clip_by_value(changed, 0.0, 255.0))
        return tf.ensure_shape(tf.cast(changed, images.dtype), images.shape)

    return augment


def _layers(config: Augmentation) -> list[layers.Layer]:
    moved = {"fill_mode": "nearest", "data_format": "channels_last"}
    chain = []
    if config.flip:
        chain.append(layers.RandomFlip("horizontal", data_format="channels_last"))
    if config.shift:
        chain.append(layers.RandomTranslation(config.shift, config.shift, **moved))
    if config.rotate:
        chain.append(layers.RandomRotation(config.rotate, **moved))
    if config.zoom:
        chain.append(layers.RandomZoom(config.zoom, **moved))
    if config.erase:
        area = (min(ERASED_AT_LEAST, config.erase), config.erase)
        chain.append(
            layers.RandomErasing((ERASED_IMAGES, ERASED_IMAGES), area, data_format="channels_last")
        )
    return chain
