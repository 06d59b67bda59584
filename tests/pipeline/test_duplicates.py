import numpy as np
import pytest

from pipeline import duplicates

RANDOM = np.random.default_rng(0)


def smooth(rows, shape=(12, 10, 1)):
    """Return images as real ones are: neighbours alike."""
    images = RANDOM.normal(size=(rows, *shape)).cumsum(axis=1).cumsum(axis=2)
    low, high = (one(images, axis=(1, 2, 3), keepdims=True) for one in (np.min, np.max))
    return (200 * (images - low) / (high - low) + 20).astype(np.uint8)


def brute(one, other):
    """Say which rows of `other` have a near copy, by numpy's own correlation."""
    rows = np.concatenate([one, other]).reshape(len(one) + len(other), -1)
    return (np.corrcoef(rows)[len(one) :, : len(one)] >= duplicates.ALIKE).any(axis=1)


def test_exact_copies_are_found_and_the_first_of_them_is_named():
    one = smooth(20)
    one[7] = one[3]
    other = np.concatenate([smooth(2), one[[7, 19]]])

    assert duplicates.exact(one, other).rows.tolist() == [-1, -1, 3, 19]


def test_one_different_value_is_no_exact_copy_but_a_near_one():
    one = smooth(20)
    other = one[5:6].copy()
    other[0, 0, 0] += 1

    assert duplicates.exact(one, other).rows.tolist() == [-1]
    assert duplicates.near(one, other).rows.tolist() == [5]


@pytest.mark.parametrize("shape", [(12, 10, 1), (8, 8, 3), (33, 1, 2), (40, 40, 1)])
def test_no_near_copy_is_missed_and_none_is_made_up(shape):
    one, noise = smooth(3_000, shape), RANDOM.normal(size=(1_000, *shape))
    strength = RANDOM.uniform(0, 12, (1_000, 1, 1, 1))  # about as many above the limit as below
    other = (one[:1_000] + noise * strength).clip(0, 255).astype(np.uint8)

    found = duplicates.near(one, other)

    expected = brute(one, other)
    assert 100 < expected.sum() < 900
    assert np.array_equal(found.rows >= 0, expected)
    assert found.compared == 1_000


def test_other_brightness_and_contrast_hide_no_copy():
    one = smooth(50)
    other = (one[:5] * 0.5 + 60).astype(np.uint8)

    assert duplicates.near(one, other).rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "images", [RANDOM.integers(0, 256, (2_000, 8, 8, 1), np.uint8), np.repeat(smooth(1), 2_000, 0)]
)
def test_noise_and_sameness_are_no_trouble(images):
    found = duplicates.near(images, images[::-4])

    assert (found.rows >= 0).all()
    assert np.array_equal(images[found.rows], images[::-4])


def test_images_of_one_shade_are_like_nothing():
    blank = np.full((3, 9, 9, 1), 7, np.uint8)

    assert duplicates.near(blank, blank).rows.tolist() == [-1, -1, -1]


def test_when_the_work_is_done_the_rest_is_not_compared():
    one = smooth(2_000)

    found = duplicates.near(one, one, max_work=1)

    assert found.compared in {duplicates.BLOCK_ROWS, 2_000 % duplicates.BLOCK_ROWS}
    assert (found.rows >= 0).sum() == found.compared


@pytest.mark.parametrize(("side", "compared"), [(7, 0), (8, 3)])
def test_tiny_images_are_alike_by_chance_and_not_compared(side, compared):
    images = smooth(3, (side, side, 1))

    assert duplicates.near(images, images).compared == compared
