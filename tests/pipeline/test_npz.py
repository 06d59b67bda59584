import io
import zipfile

import numpy as np
import pytest

from pipeline import npz
from pipeline.config import DataConfig
from pipeline.errors import DatasetError

X = np.random.default_rng(0).integers(0, 256, (10, 4, 5), np.uint8)
Y = np.arange(10) % 2


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.npz"


def refusal(path):
    with pytest.raises(DatasetError) as caught:
        npz.read(path, DataConfig())
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_as_keras_has_them_is_read(path, save):
    save(path, x_train=X, y_train=Y, x_test=X[:4], y_test=Y[:4], class_names=["cat", "dog"])

    found = npz.read(path, DataConfig())

    assert np.array_equal(found.train.inputs[..., 0], X)
    assert found.test.targets.tolist() == [0, 1, 0, 1]
    assert found.labels == ("cat", "dog")


def test_images_and_labels_are_divided(path):
    np.savez(path, images=X, labels=Y)

    found = npz.read(path, DataConfig(test_share=0.4))

    assert (len(found.train.inputs), len(found.test.inputs)) == (6, 4)
    assert found.test.targets.tolist().count(0) == 2


def test_floats_as_targets_are_numbers_to_come_close_to(path):
    np.savez(path, x_train=X, y_train=Y / 2, x_test=X, y_test=Y / 2)

    found = npz.read(path, DataConfig())

    assert found.labels == ()
    assert found.train.inputs.dtype == np.float32
    assert found.train.targets.shape == (10, 1)


def test_other_arrays_are_named(path):
    np.savez(path, x=X, images=X)

    assert "has the arrays images; expected x_train, y_train, x_test, y_test, or" in refusal(path)


def test_names_that_are_no_strings_are_refused(path):
    np.savez(path, images=X, labels=Y, class_names=[1, 2])

    assert "expected one string for each class" in refusal(path)


def test_objects_are_never_loaded(path):
    np.savez(path, images=np.array([{}]), labels=Y)

    assert "images in" in refusal(path)
    assert "Python objects, which are not loaded" in refusal(path)


def header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def test_a_claim_of_terabytes_costs_nothing(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header((2**40, 3, 3)) + bytes(9))

    assert "has 9 bytes for [1099511627776, 3, 3] uint8; it is damaged" in refusal(path)


def test_a_bomb_is_refused_by_the_size_it_unpacks_to(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header((1000,)) + bytes(1000))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # the size in the list at the archive's end
    content[at : at + 4] = b"\xfe\xff\xff\xff"
    path.write_bytes(content)

    said = refusal(path)

    assert "GB of values" in said or "it is damaged" in said  # by how much memory there is


@pytest.mark.parametrize("cut", [0, 10, 200, -30])
def test_a_cut_file_is_refused(path, cut):
    np.savez(path, images=X, labels=Y)
    path.write_bytes(path.read_bytes()[:cut])

    assert "cannot be read as .npz" in refusal(path)


def test_a_flipped_byte_is_noticed(path):
    np.savez(path, images=X, labels=Y)
    content = bytearray(path.read_bytes())
    content[content.index(X[:1].tobytes()) + 3] ^= 1
    path.write_bytes(content)

    assert "cannot be read as .npz: Bad CRC" in refusal(path)


def test_a_name_that_is_not_utf8_is_told_escaped(tmp_path):
    with pytest.raises(DatasetError, match=r"q\\udcff\.npz cannot be read as \.npz"):
        npz.read(tmp_path / "q\udcff.npz", DataConfig())
