import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.splits import Split, hold_out, split


def test_every_class_has_its_share_on_either_side():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 6_000)

    train, validation = split(labels, DataConfig())

    assert (np.bincount(labels[train]) == 4_800).all()
    assert (np.bincount(labels[validation]) == 1_200).all()


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 5),
)
def test_no_row_is_on_both_sides_none_is_lost_and_every_class_is_trained_on(labels, share, seed):
    array = np.array(labels, np.uint8)

    train, validation = split(array, DataConfig(validation_share=share, split_seed=seed))

    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert set(array[train]) == set(labels)


def test_the_split_follows_from_the_seed_alone():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 20)

    first, again = (split(labels, DataConfig()) for _ in range(2))
    other = split(labels, DataConfig(split_seed=43))

    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_fewer_training_rows_leave_the_validation_rows_alone():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 100)

    all_train, all_validation = split(labels, DataConfig())
    few_train, few_validation = split(labels, DataConfig(max_train_rows=50))

    assert np.array_equal(all_validation, few_validation)
    assert len(few_train) == 50
    assert set(few_train) < set(all_train)


def test_numbers_are_divided_as_one_group():
    train, validation = split(np.arange(10.0)[:, np.newaxis], DataConfig())

    assert (len(train), len(validation)) == (8, 2)


@pytest.mark.parametrize("most", [None, 4])
def test_without_a_share_training_rows_are_validated_on(most):
    config = DataConfig(validation_share=0, max_train_rows=most)

    train, validation = split(np.zeros(6, np.uint8), config)

    assert len(train) == (most or 6)
    assert np.array_equal(train, validation)


def test_test_rows_are_held_out_of_every_class_and_not_of_none():
    rows = Split(np.arange(20), np.repeat([0, 1], 10))

    train, test = hold_out(rows, DataConfig(test_share=0.3))

    assert np.bincount(train.targets).tolist() == [7, 7]
    assert sorted([*train.inputs, *test.inputs]) == list(range(20))
    with pytest.raises(DatasetError, match=r"data\.test_share is 0\.0, which leaves no test row"):
        hold_out(rows, DataConfig(test_share=0.0))
