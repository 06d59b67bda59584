import numpy as np
import pytest

from pipeline.config import Augmentation, TrainingConfig
from pipeline.dataset import Split
from pipeline.feed import Feed

ROWS = 103
SPLIT = Split(
    inputs=np.random.default_rng(0).integers(0, 256, (ROWS, 6, 6, 1)).astype(np.uint8),
    targets=np.arange(ROWS),
)


def batches(epoch=1, skip=0, **settings):
    feed = Feed(SPLIT, TrainingConfig(batch_rows=10, **settings))
    return [(one.numpy(), two.numpy()) for one, two in feed.epoch(epoch, skip)]


def order(found):
    return [int(row) for _, targets in found for row in targets]


def test_every_row_comes_once_an_epoch_with_its_own_target():
    found = batches()

    assert sorted(order(found)) == list(range(ROWS))
    for images, targets in found:
        np.testing.assert_array_equal(images, SPLIT.inputs[targets])


def test_the_last_batch_has_what_is_left():
    assert [len(targets) for _, targets in batches()] == [10] * 10 + [3]


def test_epochs_and_seeds_have_orders_of_their_own():
    assert order(batches()) == order(batches())
    assert order(batches()) != order(batches(epoch=2))
    assert order(batches()) != order(batches(seed=1))


@pytest.mark.parametrize("skip", [1, 5, 10])
def test_an_epoch_that_goes_on_has_the_very_batches_it_would_have_had(skip):
    settings = {"augmentation": Augmentation(flip=True, shift=0.2, erase=0.2)}
    whole, rest = batches(**settings), batches(skip=skip, **settings)

    assert len(rest) == 11 - skip
    for expected, found in zip(whole[skip:], rest, strict=True):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_row_is_changed_another_way_in_every_epoch():
    settings = {"augmentation": Augmentation(shift=0.3)}
    first, second = (
        {int(row): image for images, rows in batches(epoch, **settings)
         for image, row in zip(images, rows, strict=True)}
        for epoch in (1, 2)
    )  # fmt: skip

    assert sum(np.array_equal(first[row], second[row]) for row in first) < ROWS / 2


def test_targets_can_be_given_as_one_hot_vectors():
    feed = Feed(Split(SPLIT.inputs, SPLIT.targets % 4), TrainingConfig(batch_rows=10), one_hot=4)

    for _, targets in feed.epoch(1):
        assert targets.shape[1:] == (4,)
        np.testing.assert_array_equal(targets.numpy().sum(axis=1), 1)


def test_fewer_rows_than_a_batch_make_one_step():
    feed = Feed(Split(np.ones((6, 1), np.float32), np.ones((6, 1), np.float32)), TrainingConfig())

    assert feed.steps == 1
    assert [len(one) for one, _ in feed.epoch(1)] == [6]
