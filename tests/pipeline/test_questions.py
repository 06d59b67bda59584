import numpy as np
import pytest
from PIL import Image

from pipeline import questions
from pipeline.errors import UsageError
from pipeline.runtimes import Tensor

GRAY = Tensor("image", (-1, 4, 6, 1), "uint8")
COLOUR = Tensor("image", (-1, 4, 6, 3), "uint8")
SHADES = np.arange(24, dtype=np.uint8).reshape(4, 6)


@pytest.fixture
def folder(tmp_path):
    """Two gray pictures, 6 x 4 pixels, of which the second is the darker one."""
    Image.fromarray(SHADES + 100).save(tmp_path / "a.png")
    (tmp_path / "b").mkdir()
    Image.fromarray(SHADES).save(tmp_path / "b" / "c.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def refusal(data, taken=GRAY, **options):
    with pytest.raises(UsageError) as caught:
        questions.read(data, **options)(taken)
    return str(caught.value)


def test_pictures_become_rows_in_the_order_of_their_names(folder):
    rows = questions.read(folder)(GRAY).rows

    np.testing.assert_array_equal(rows[..., 0], [SHADES + 100, SHADES])


def test_gray_pictures_are_given_to_a_model_of_colours_in_all_three(folder):
    rows = questions.read(folder)(COLOUR).rows

    assert rows.shape == (2, 4, 6, 3)
    np.testing.assert_array_equal(rows[1], np.repeat(SHADES[..., np.newaxis], 3, axis=2))


def test_a_model_of_floats_gets_the_same_numbers(folder):
    rows = questions.read(folder)(Tensor("x", (-1, 4, 6, 1), "float32")).rows

    assert rows.dtype == np.float32
    assert rows.max() == 123


def test_pictures_of_another_size_are_made_to_fit_only_where_that_was_asked_for(folder):
    Image.new("L", (9, 9)).save(folder / "z.jpg")

    assert "z.jpg is 9 x 9, the reference takes 6 x 4; add --resize" in refusal(folder)
    assert questions.read(folder, resize=True)(GRAY).rows.shape == (3, 4, 6, 1)


def test_a_model_of_any_size_takes_pictures_as_they_are(folder):
    assert questions.read(folder)(Tensor("x", (-1, -1, -1, 1), "uint8")).rows.shape == (2, 4, 6, 1)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture_is_named(folder, content):
    (folder / "broken.png").write_bytes(content)

    assert "broken.png is not a PNG or JPEG picture" in refusal(folder)


def test_a_folder_without_pictures_says_what_was_expected(tmp_path):
    assert "has no PNG or JPEG file" in refusal(tmp_path)


@pytest.mark.parametrize("shape", [(-1, 24), (-1, 4, 6, 2)])
def test_a_model_that_takes_no_pictures_is_not_given_any(folder, shape):
    assert "expected images with one channel or three" in refusal(
        folder, Tensor("x", shape, "uint8")
    )


def test_gray_rows_may_lack_their_channel(tmp_path):
    np.save(tmp_path / "rows.npy", SHADES[np.newaxis])

    assert questions.read(tmp_path / "rows.npy")(GRAY).rows.shape == (1, 4, 6, 1)


def test_labels_are_one_whole_number_a_row(tmp_path):
    np.savez(tmp_path / "rows.npz", images=SHADES[np.newaxis], labels=[0.5])

    assert "expected 1 whole numbers" in refusal(tmp_path / "rows.npz")
