import gzip
import shutil

import numpy as np
import pytest

from pipeline import fashion_mnist
from pipeline.errors import DatasetError

IMAGES = "t10k-images-idx3-ubyte"


@pytest.fixture
def folder(data, tmp_path):
    """A folder of its own with the four real files."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in fashion_mnist.SHA256:
        shutil.copy(data.folder / name, folder)
    return folder


def test_a_folder_of_packed_files_is_taken(folder, data, tmp_path):
    for name in fashion_mnist.SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), 1))
        (folder / name).unlink()

    fashion_mnist.keep(folder, tmp_path / "cache")

    for name in fashion_mnist.SHA256:
        assert (tmp_path / "cache" / name).read_bytes() == (data.folder / name).read_bytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_cut_file_is_refused_by_name_and_nothing_of_it_stays(folder, tmp_path, suffix):
    content = (folder / IMAGES).read_bytes()
    (folder / IMAGES).unlink()
    packed = gzip.compress(content, 1) if suffix else content
    (folder / f"{IMAGES}{suffix}").write_bytes(packed[:-1000])

    with pytest.raises(DatasetError, match=f"{IMAGES}{suffix}.*damaged"):
        fashion_mnist.keep(folder, tmp_path / "cache")

    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [name for name in kept if IMAGES in name]


def test_another_data_set_of_the_same_form_is_refused_by_name(folder, tmp_path):
    content = bytearray((folder / IMAGES).read_bytes())
    content[5_000] ^= 1
    (folder / IMAGES).write_bytes(content)

    with pytest.raises(DatasetError, match=f"{IMAGES} has 7840016 bytes with sha256"):
        fashion_mnist.keep(folder, tmp_path / "cache")


def test_a_packed_file_that_never_ends_is_refused_without_unpacking_it_all(folder, tmp_path):
    (folder / IMAGES).unlink()
    with gzip.open(folder / f"{IMAGES}.gz", "wb", 1) as file:
        file.write(bytes(fashion_mnist.MAX_FILE_BYTES * 3))

    with pytest.raises(DatasetError, match=f"has {fashion_mnist.MAX_FILE_BYTES + 1} bytes"):
        fashion_mnist.keep(folder, tmp_path / "cache")


def test_a_folder_without_the_files_is_refused_by_the_first_that_is_missing(tmp_path):
    with pytest.raises(DatasetError, match="has neither train-images-idx3-ubyte nor"):
        fashion_mnist.keep(tmp_path, tmp_path / "cache")


def test_a_damaged_file_in_the_cache_is_named_and_removed(folder, caplog):
    (folder / IMAGES).write_bytes(b"half")

    assert not fashion_mnist.is_cached(folder)
    assert IMAGES in caplog.text
    assert not (folder / IMAGES).exists()


def test_a_whole_cache_is_enough(folder, tmp_path):
    fashion_mnist.keep(folder, tmp_path / "cache")
    shutil.rmtree(folder)
    fashion_mnist.keep(None, tmp_path / "cache")

    assert fashion_mnist.is_cached(tmp_path / "cache")


@pytest.fixture
def arrays(data):
    """The four files as arrays, as Keras' download gives them."""
    contents = [(data.folder / name).read_bytes() for name in fashion_mnist.SHA256]
    images = [np.frombuffer(contents[i], np.uint8, offset=16).reshape(-1, 28, 28) for i in (0, 2)]
    labels = [np.frombuffer(contents[i], np.uint8, offset=8) for i in (1, 3)]
    return [images[0], labels[0], images[1], labels[1]]


def test_arrays_become_the_very_files_they_were_read_from(arrays, data):
    for name, content in fashion_mnist.as_idx(arrays):
        assert content == (data.folder / name).read_bytes()


def test_a_download_with_one_wrong_pixel_is_refused(arrays):
    arrays[0] = arrays[0].copy()
    arrays[0][17, 3, 4] ^= 1

    with pytest.raises(DatasetError, match="train-images-idx3-ubyte"):
        list(fashion_mnist.as_idx(arrays))


def test_apt_is_only_asked_where_it_can_be(tmp_path):
    with pytest.raises(DatasetError, match="it needs root on Debian or Ubuntu"):
        list(fashion_mnist.install_with_apt(user=1000))


def test_every_place_that_was_tried_is_named_when_none_has_the_data(tmp_path):
    def offline():
        raise DatasetError("it failed (no network)")
        yield

    with pytest.raises(DatasetError) as refused:
        fashion_mnist.find(tmp_path, (("a folder", lambda: fashion_mnist.read_folder(tmp_path)),
                                ("a download", offline)))  # fmt: skip

    assert "a folder: " in str(refused.value)
    assert "a download: it failed (no network)" in str(refused.value)
    assert "--data DIR" in str(refused.value)


def test_the_first_place_that_has_the_data_is_the_last_that_is_asked(folder, data, tmp_path):
    def untouched():
        raise AssertionError
        yield

    fashion_mnist.find(
        tmp_path / "cache",
        (("nothing", lambda: fashion_mnist.read_folder(tmp_path / "nothing")),
         ("files", lambda: fashion_mnist.read_folder(folder)),
         ("more", untouched)),
    )  # fmt: skip

    assert fashion_mnist.is_cached(tmp_path / "cache")
