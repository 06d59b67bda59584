"""Give the batches of an epoch, from any step on, in an order set by (seed, epoch) alone."""

import numpy as np
import tensorflow as tf

from pipeline import augment
from pipeline.config import TrainingConfig
from pipeline.dataset import Split

AHEAD = 4  # batches that are ready before they are asked for


class Feed:
    """The training rows, shuffled anew and changed anew in every epoch.

    Args:
        split: what is learnt.
        config: batch size, seed and augmentation.
        one_hot: number of classes to give targets as one-hot float32; 0: as they are.
    """

    def __init__(self, split: Split, config: TrainingConfig, one_hot: int = 0) -> None:
        self.rows = len(split.inputs)
        self.steps = -(-self.rows // config.batch_rows)  # the last batch may be smaller
        self._config = config
        self._inputs = tf.constant(split.inputs)
        targets = tf.constant(split.targets)
        self._targets = tf.one_hot(targets, one_hot) if one_hot else targets
        self._augment = augment.build(config.augmentation)
        # Traced once, not once an epoch.
        self._make = tf.function(self._batch, reduce_retracing=True)

    def epoch(self, number: int, skip: int = 0) -> tf.data.Dataset:
        """Return the batches of an epoch.

        Args:
            number: 1 is the first.
            skip: how many batches to leave out at its beginning.

        Returns:
            Pairs of inputs and targets, `steps` - `skip` of them.
        """
        order = np.random.default_rng((self._config.seed, number)).permutation(self.rows)
        rows = tf.data.Dataset.from_tensor_slices(order).batch(self._config.batch_rows)
        keyed = tf.data.Dataset.zip(tf.data.Dataset.range(self.steps), rows).skip(skip)
        key = tf.constant((self._config.seed & 0x7FFFFFFF, number), tf.int32)
        return keyed.map(
            lambda step, chosen: self._make(key, step, chosen),
            num_parallel_calls=tf.data.AUTOTUNE,
        ).prefetch(AHEAD)

    def _batch(
        self, key: tf.Tensor, step: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = tf.gather(self._inputs, rows)
        if self._augment is not None:
            inputs = self._augment(inputs, tf.random.experimental.stateless_fold_in(key, step))
        return inputs, tf.gather(self._targets, rows)
