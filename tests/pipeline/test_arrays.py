import numpy as np
import pytest

from pipeline import arrays
from pipeline.errors import DatasetError

GRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def refusal(inputs, targets, *, classify=True):
    with pytest.raises(DatasetError) as caught:
        arrays.rows(inputs, targets, "training", classify=classify)
    return str(caught.value)


def test_gray_images_get_a_channel_and_columns_of_classes_become_rows():
    split = arrays.rows(GRAY, [[3], [300]], "training", classify=True)

    assert split.inputs.shape == (2, 3, 4, 1)
    assert split.targets.tolist() == [3, 300]
    assert split.targets.dtype == np.int32


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64", ">i2", "bool"])
def test_whole_pixels_of_any_dtype_are_taken(dtype):
    images = (GRAY > 3 if dtype == "bool" else GRAY).astype(dtype)

    split = arrays.rows(images, [0, 1], "training", classify=True)

    assert split.inputs.dtype == split.targets.dtype == np.uint8
    assert np.array_equal(split.inputs[..., 0], images)


@pytest.mark.parametrize(
    "wrong", [GRAY / 255, GRAY - 1.0, GRAY + 300.0, np.full_like(GRAY, np.nan, "f")]
)
def test_pixels_that_are_not_whole_are_refused_with_their_range(wrong):
    assert "expected whole pixels from 0 to 255" in refusal(wrong, [0, 1])


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (GRAY, [1], "2 training inputs and 1 targets"),
        (GRAY, [0.0, 1.0], "are float64 from 0.0 to 1.0, expected classes"),
        (GRAY, [-1, 1], "from -1 to 1"),
        (GRAY, [0, 2**40], "from 0 to"),
        (GRAY, [[0, 1], [1, 0]], "of one-hot rows give argmax"),
        (GRAY, ["a", "b"], "expected numbers"),
        (GRAY, [], "no rows"),
        (GRAY[:, 0], [0, 1], "expected images"),
        (np.zeros((2, 0, 3), np.uint8), [0, 1], "no rows"),
        (np.array([{}, {}]), [0, 1], "are object, expected numbers"),
    ],
)  # fmt: skip
def test_what_is_no_data_of_a_classifier_is_refused(inputs, targets, said):
    assert said in refusal(inputs, targets)


def test_other_data_are_float32_with_an_axis_of_outputs():
    split = arrays.rows([1, 2, 3], [1.0, 3.0, 5.0], "training", classify=False)

    assert split.inputs.shape == split.targets.shape == (3, 1)
    assert split.inputs.dtype == split.targets.dtype == np.float32


def test_numbers_that_are_none_are_refused_by_their_row():
    said = refusal([[1.0], [np.inf], [1e300]], [1.0, 2.0, 3.0], classify=False)

    assert "no finite float32 in 2 rows, the first is row 1" in said
    assert "expected (rows, outputs)" in refusal([1.0], [[[1.0]]], classify=False)
