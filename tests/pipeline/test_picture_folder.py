import os

import numpy as np
import pytest
from PIL import Image

from pipeline import picture_folder
from pipeline.config import DataConfig
from pipeline.errors import DatasetError

SHADES = np.arange(24, dtype=np.uint8).reshape(4, 6)


def save(path, shade=0, size=(6, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(SHADES + shade).resize(size).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures of either class."""
    for number in range(3):
        save(tmp_path / "dark" / f"{number}.png", number)
        save(tmp_path / "light" / f"{number}.png", 200 + number)
    return tmp_path


def refusal(folder, **settings):
    with pytest.raises(DatasetError) as caught:
        picture_folder.read(folder, DataConfig(**settings))
    return str(caught.value)


def test_subfolders_are_classes_in_the_order_of_their_names(folder):
    found = picture_folder.read(folder, DataConfig(test_share=0.34))

    assert found.labels == ("dark", "light")
    assert found.train.inputs.shape == (4, 4, 6, 1)
    assert sorted(found.test.targets) == [0, 1]
    assert found.train.targets.tolist() == [int(one.max() > 100) for one in found.train.inputs]


def test_train_and_test_folders_are_kept_apart(folder, tmp_path):
    (folder / "train").mkdir()
    for label in ("dark", "light"):
        (folder / label).rename(folder / "train" / label)
    save(folder / "test" / "light" / "x.jpg", 200)

    found = picture_folder.read(folder, DataConfig())

    assert found.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.targets.tolist() == [1]
    save(folder / "test" / "striped" / "x.png")
    assert "test has classes that train lacks: striped" in refusal(folder)


def test_pictures_are_gray_only_if_all_of_them_are(folder):
    assert picture_folder.read(folder, DataConfig()).train.inputs.shape[-1] == 1

    save(folder / "light" / "z.png", mode="RGB")

    assert picture_folder.read(folder, DataConfig()).train.inputs.shape[-1] == 3
    assert picture_folder.read(folder, DataConfig(colour="gray")).train.inputs.shape[-1] == 1


def test_the_first_picture_of_another_size_is_named_with_the_way_out(folder):
    save(folder / "light" / "x.png", size=(9, 5))
    save(folder / "light" / "y.png", size=(9, 9))

    said = refusal(folder)

    assert "x.png is 5 x 9 (height x width), those before it are 4 x 6" in said
    assert "set data.size to have all made to fit, such as --set 'data.size=[16,16]'" in said
    assert "y.png" not in said
    assert picture_folder.read(folder, DataConfig(size=(5, 9))).train.inputs.shape[1:] == (5, 9, 1)


@pytest.mark.parametrize(("side", "suggested"), [(2, 16), (45, 48), (64, 64), (300, 128)])
def test_the_size_that_is_suggested_suits_the_pictures(folder, side, suggested):
    for number in range(9):
        save(folder / "light" / f"big{number}.png", size=(side + number % 2, side))

    assert f"data.size=[{suggested},{suggested}]" in refusal(folder)


def test_a_first_look_reads_every_picture_if_they_are_few_and_small(folder):
    for number in range(300):
        save(folder / "light" / f"{number:03}.png")
    (folder / "light" / "211.png").write_bytes(b"no picture")

    with pytest.raises(DatasetError, match=r"211\.png is not a PNG or JPEG picture"):
        picture_folder.verify(folder, DataConfig())


def test_a_look_at_a_few_pictures_finds_another_size_or_a_class_without_any(folder):
    picture_folder.verify(folder, DataConfig())
    for number in range(200):
        save(folder / "light" / f"{number}.png", size=(9, 5))

    with pytest.raises(DatasetError, match="set data"):
        picture_folder.verify(folder, DataConfig())
    picture_folder.verify(folder, DataConfig(size=(5, 9)))
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError, match="no PNG or JPEG file in empty"):
        picture_folder.verify(folder, DataConfig(size=(5, 9)))


def test_ten_of_those_that_cannot_be_read_are_named(folder):
    for number in range(12):
        (folder / "dark" / f"bad{number:02}.png").write_bytes(b"no picture")

    said = refusal(folder)

    assert said.count("is not a PNG or JPEG picture") == 10
    assert "bad09.png" in said
    assert "bad10.png" not in said
    assert said.endswith("2 more cannot be read")


def test_a_class_without_pictures_is_refused(folder):
    (folder / "empty").mkdir()

    assert "has no PNG or JPEG file in empty; expected one subfolder a class" in refusal(folder)


def test_files_that_are_no_pictures_are_left_out_and_said(folder):
    (folder / "dark" / "notes.txt").touch()
    (folder / "dark" / "._0.png").write_bytes(b"another system's")

    found = picture_folder.read(folder, DataConfig())

    assert len(found.train.inputs) + len(found.test.inputs) == 6
    assert found.findings == (
        "files that are no PNG or JPEG of a class were left out: 1, such as dark/notes.txt",
    )


def test_a_folder_is_one_of_pictures_by_what_is_in_its_subfolders(folder, tmp_path):
    (tmp_path / "other" / "sub").mkdir(parents=True)
    (tmp_path / "other" / "a.png").touch()

    assert picture_folder.is_one(folder)
    assert not picture_folder.is_one(tmp_path / "other")


STRANGE = os.fsdecode(b"q\xff")  # of a system with another encoding


def test_names_of_files_that_are_not_utf8_are_told_escaped(folder):
    (folder / "dark" / f"{STRANGE}.txt").touch()

    (said,) = picture_folder.read(folder, DataConfig()).findings

    assert said.endswith("such as dark/q\\udcff.txt")
    save(folder / "light" / f"{STRANGE}.png", size=(9, 5))
    assert "q\\udcff.png is 5 x 9" in refusal(folder)
    (folder / "light" / f"{STRANGE}.png").write_bytes(b"no picture")
    assert "q\\udcff.png" in refusal(folder)


def test_a_class_whose_name_is_not_utf8_is_refused_at_a_look(folder):
    (folder / "dark").rename(folder / STRANGE)

    assert "classes whose names are not UTF-8: q\\udcff; rename these folders" in refusal(folder)
    with pytest.raises(DatasetError, match="not UTF-8"):
        picture_folder.verify(folder, DataConfig())
