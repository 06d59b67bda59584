import gzip
import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import dataset
from pipeline.config import DataConfig
from pipeline.errors import DatasetError

IMAGES = "t10k-images-idx3-ubyte"


@pytest.fixture
def folder(data, tmp_path):
    """A folder of its own with the four real files."""
    return shutil.copytree(data.folder, tmp_path / "files")


def test_all_seventy_thousand_images_are_there():
    whole = dataset.prepare(DataConfig())

    assert (whole.train_rows, whole.validation_rows, whole.test_rows) == (48_000, 12_000, 10_000)


def test_the_digest_is_of_the_four_files_one_after_the_other(data):
    content = b"".join((data.folder / name).read_bytes() for name in dataset.SHA256)

    assert data.sha256 == hashlib.sha256(content).hexdigest()


def test_images_are_whole_pixels_with_one_channel(data):
    splits = dataset.load(data)

    assert splits.train.inputs.shape == (6_000, 28, 28, 1)
    assert splits.test.inputs.dtype == splits.test.targets.dtype == np.uint8
    assert (splits.test.inputs.min(), splits.test.inputs.max()) == (0, 255)
    assert list(splits.test.targets[:4]) == [9, 2, 1, 1]  # ankle boot, pullover, two trousers


def test_every_class_has_its_share_on_either_side():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 6_000)

    train, validation = dataset.split(labels, DataConfig())

    assert (np.bincount(labels[train]) == 4_800).all()
    assert (np.bincount(labels[validation]) == 1_200).all()


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_no_image_is_on_both_sides_and_none_is_lost(labels, share, seed):
    array = np.array(labels, np.uint8)

    train, validation = dataset.split(array, DataConfig(validation_share=share, split_seed=seed))

    assert sorted([*train, *validation]) == list(range(len(labels)))


def test_the_split_follows_from_the_seed_alone():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 20)

    first, again = (dataset.split(labels, DataConfig()) for _ in range(2))
    other = dataset.split(labels, DataConfig(split_seed=43))

    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_fewer_training_images_leave_the_validation_images_alone():
    labels = np.repeat(np.arange(10, dtype=np.uint8), 100)

    all_train, all_validation = dataset.split(labels, DataConfig())
    few_train, few_validation = dataset.split(labels, DataConfig(max_train_rows=50))

    assert np.array_equal(all_validation, few_validation)
    assert len(few_train) == 50
    assert set(few_train) < set(all_train)


def test_a_folder_of_packed_files_is_taken(folder, data, tmp_path):
    for name in dataset.SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), 1))
        (folder / name).unlink()

    prepared = dataset.prepare(DataConfig(source=folder), tmp_path / "cache")

    assert prepared.sha256 == data.sha256


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_cut_file_is_refused_by_name_and_nothing_of_it_stays(folder, tmp_path, suffix):
    content = (folder / IMAGES).read_bytes()
    (folder / IMAGES).unlink()
    packed = gzip.compress(content, 1) if suffix else content
    (folder / f"{IMAGES}{suffix}").write_bytes(packed[:-1000])

    with pytest.raises(DatasetError, match=f"{IMAGES}{suffix}.*damaged"):
        dataset.prepare(DataConfig(source=folder), tmp_path / "cache")

    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [name for name in kept if IMAGES in name]


def test_another_data_set_of_the_same_form_is_refused_by_name(folder, tmp_path):
    content = bytearray((folder / IMAGES).read_bytes())
    content[5_000] ^= 1
    (folder / IMAGES).write_bytes(content)

    with pytest.raises(DatasetError, match=f"{IMAGES} has 7840016 bytes with sha256"):
        dataset.prepare(DataConfig(source=folder), tmp_path / "cache")


def test_a_packed_file_that_never_ends_is_refused_without_unpacking_it_all(folder, tmp_path):
    (folder / IMAGES).unlink()
    with gzip.open(folder / f"{IMAGES}.gz", "wb", 1) as file:
        file.write(bytes(dataset.MAX_FILE_BYTES * 3))

    with pytest.raises(DatasetError, match=f"has {dataset.MAX_FILE_BYTES + 1} bytes"):
        dataset.prepare(DataConfig(source=folder), tmp_path / "cache")


def test_a_folder_without_the_files_is_refused_by_the_first_that_is_missing(tmp_path):
    with pytest.raises(DatasetError, match="has neither train-images-idx3-ubyte nor"):
        dataset.prepare(DataConfig(source=tmp_path), tmp_path / "cache")


def test_a_damaged_file_in_the_cache_is_named_and_removed(folder, caplog):
    (folder / IMAGES).write_bytes(b"half")

    assert not dataset.is_cached(folder)
    assert IMAGES in caplog.text
    assert not (folder / IMAGES).exists()


def test_a_whole_cache_is_enough(folder, data, tmp_path):
    dataset.prepare(DataConfig(source=folder), tmp_path / "cache")
    shutil.rmtree(folder)

    assert dataset.prepare(DataConfig(), tmp_path / "cache").sha256 == data.sha256


def test_images_that_change_during_a_run_are_noticed(folder, data, tmp_path):
    prepared = dataset.prepare(DataConfig(source=folder), tmp_path / "cache")
    (prepared.folder / IMAGES).write_bytes(b"other")

    with pytest.raises(DatasetError, match="changed during the run"):
        dataset.load(prepared)


@pytest.fixture
def arrays(data):
    """The four files as arrays, as Keras' download gives them."""
    contents = [(data.folder / name).read_bytes() for name in dataset.SHA256]
    images = [np.frombuffer(contents[i], np.uint8, offset=16).reshape(-1, 28, 28) for i in (0, 2)]
    labels = [np.frombuffer(contents[i], np.uint8, offset=8) for i in (1, 3)]
    return [images[0], labels[0], images[1], labels[1]]


def test_arrays_become_the_very_files_they_were_read_from(arrays, data):
    for name, content in dataset.as_idx(arrays):
        assert content == (data.folder / name).read_bytes()


def test_a_download_with_one_wrong_pixel_is_refused(arrays):
    arrays[0] = arrays[0].copy()
    arrays[0][17, 3, 4] ^= 1

    with pytest.raises(DatasetError, match="train-images-idx3-ubyte"):
        list(dataset.as_idx(arrays))


def test_apt_is_only_asked_where_it_can_be(tmp_path):
    with pytest.raises(DatasetError, match="it needs root on Debian or Ubuntu"):
        list(dataset.install_with_apt(user=1000))


def test_every_place_that_was_tried_is_named_when_none_has_the_data(tmp_path):
    def offline():
        raise DatasetError("it failed (no network)")
        yield

    with pytest.raises(DatasetError) as refused:
        dataset.find(tmp_path, (("a folder", lambda: dataset.read_folder(tmp_path)),
                                ("a download", offline)))  # fmt: skip

    assert "a folder: " in str(refused.value)
    assert "a download: it failed (no network)" in str(refused.value)
    assert "--data DIR" in str(refused.value)


def test_the_first_place_that_has_the_data_is_the_last_that_is_asked(folder, data, tmp_path):
    def untouched():
        raise AssertionError
        yield

    dataset.find(
        tmp_path / "cache",
        (("nothing", lambda: dataset.read_folder(tmp_path / "nothing")),
         ("files", lambda: dataset.read_folder(folder)),
         ("more", untouched)),
    )  # fmt: skip

    assert dataset.is_cached(tmp_path / "cache")


def test_there_is_a_picture_of_every_class_to_ask_about(data, tmp_path):
    folder = dataset.write_examples(data, tmp_path / "examples")

    names = sorted(path.stem for path in folder.iterdir())
    trouser = np.asarray(Image.open(folder / "trouser.png"))

    assert len(names) == 10
    assert {"t-shirt-top", "ankle-boot", "trouser"} < set(names)
    assert np.array_equal(trouser, dataset.load(data).test.inputs[2, ..., 0])
