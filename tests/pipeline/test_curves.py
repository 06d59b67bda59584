import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline import curves
from pipeline.records import Epoch


def history(epochs, scale=1.0):
    return [
        Epoch(n, scale / n, 1 - 0.5 / n, scale / n + 0.01 * n, 0.9 - 0.4 / n, 1.0)
        for n in range(1, epochs + 1)
    ]


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count(image, colour):
    """Count the pixels near a colour such as #2a6fbb."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(image - wanted).max(axis=2) < 12).sum())


def test_the_picture_is_1200_by_500_and_has_both_curves_and_the_best_epoch(tmp_path):
    path = curves.draw(history(20), tmp_path / "new" / "curves.png", "quick on fashion-mnist")

    image = pixels(path)

    assert image.shape == (500, 1200, 3)
    for half in (image[:, :600], image[:, 600:]):
        assert count(half, curves.TRAINING) > 100
        assert count(half, curves.VALIDATION) > 100
        assert count(half, curves.BEST) > 50


def test_without_accuracies_the_loss_has_the_whole_width(tmp_path):
    none = [replace(one, accuracy=0.0, validation_accuracy=0.0) for one in history(20)]

    image = pixels(curves.draw(none, tmp_path / "curves.png", "linear"))

    frame = np.flatnonzero(image[:, 560:640].max(axis=(1, 2)) < 60)  # an axis runs through
    assert len(frame) > 0
    assert count(image, curves.VALIDATION) > 100


@pytest.mark.parametrize("epochs", [1, 2, 500])
def test_any_number_of_epochs_is_drawn(tmp_path, epochs):
    assert pixels(curves.draw(history(epochs, 1e4), tmp_path / "c.png", "x")).shape[1] == 1200


def test_a_loss_of_nothing_is_drawn(tmp_path):
    nothing = [replace(one, loss=0.0, validation_loss=0.0) for one in history(3)]

    assert curves.draw(nothing, tmp_path / "curves.png", "x").is_file()


def test_a_name_is_shown_as_it_is(tmp_path):
    """What matplotlib would read as a formula is an error where it is none."""
    name = r"\frac$ {x_$ of $\bad$"

    curves.draw(history(2), tmp_path / "one.png", name)
    curves.compare({name: history(2)}, tmp_path / "several.png", name)


def test_several_runs_are_laid_over_each_other_in_their_own_colours(tmp_path):
    runs = {"book-tape": history(20), "book-adam": history(12, 2), "book-dropout": history(20, 3)}

    image = pixels(curves.compare(runs, tmp_path / "curves.png", "three"))

    assert image.shape == (500, 1200, 3)
    assert all(count(image, colour) > 200 for colour in curves.RUNS[:3])
    assert count(image, curves.RUNS[4]) == 0


def test_a_picture_that_is_there_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    curves.draw(history(3), path, "x")

    assert Image.open(io.BytesIO(path.read_bytes())).size == (1200, 500)
    assert [one.name for one in tmp_path.iterdir()] == ["curves.png"]
