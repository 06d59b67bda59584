import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline import idx
from pipeline.errors import DatasetError

DTYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]
IMAGES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


def anything():
    shapes = arrays.array_shapes(min_dims=1, max_dims=5, max_side=4)
    return st.sampled_from(DTYPES).flatmap(lambda one: arrays.arrays(one, shapes))


@given(anything())
def test_what_is_decoded_is_what_was_encoded(array):
    again = idx.decode(idx.encode(array), "x")

    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()


@given(st.binary(max_size=64))
def test_no_bytes_do_anything_but_decode_or_be_refused(content):
    try:
        array = idx.decode(content, "x")
    except DatasetError as refused:
        assert "x" in str(refused)
    else:
        assert idx.encode(array) == content or array.dtype.kind == "f"  # several NaNs are one


@given(anything(), st.data())
def test_a_file_that_was_cut_or_continued_is_refused(array, data):
    content = idx.encode(array)
    cut = data.draw(st.integers(0, len(content) - 1))

    with pytest.raises(DatasetError):
        idx.decode(content[:cut], "x")
    with pytest.raises(DatasetError, match="goes on after"):
        idx.decode(content + b"\0", "x")


def test_values_are_big_endian_as_the_format_has_them():
    assert idx.encode(np.array([258], np.int16)) == bytes([0, 0, 0x0B, 1, 0, 0, 0, 1, 1, 2])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_claim_of_terabytes_costs_nothing(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    content = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**20, 2**10) + bytes(100)
    path.write_bytes(gzip.compress(content) if suffix else content)

    with pytest.raises(DatasetError, match=r"GB of values, at most .* GB can be learnt from"):
        idx.read(path)


def test_a_packed_file_with_more_than_it_says_is_not_unpacked_to_its_end(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx.encode(IMAGES) + bytes(50 << 20), 1))

    with pytest.raises(DatasetError, match="goes on after the 12 bytes"):
        idx.read(path)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(idx.encode(IMAGES))[:-9]], ids=["other", "short"]
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)

    with pytest.raises(DatasetError, match=r"x\.gz cannot be read: .*damaged"):
        idx.read(tmp_path / "x.gz")


@pytest.mark.parametrize("array", [np.zeros(2, np.int64), np.zeros((0, 3)), np.zeros(())])
def test_what_idx_has_no_place_for_is_refused(array):
    with pytest.raises(DatasetError, match="IDX"):
        idx.encode(array)


def test_names_say_rank_and_dtype_as_those_of_mnist_do():
    assert idx.name("train-images", IMAGES) == "train-images-idx3-ubyte"
    assert idx.name("t10k-labels", np.zeros((2, 1), np.float32)) == "t10k-labels-idx2-float"


def test_either_spelling_is_found_packed_or_not(tmp_path):
    (tmp_path / "train-labels.idx1-ubyte.gz").touch()
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    (tmp_path / "train-images-idx3-ubyte").touch()

    assert idx.find(tmp_path, "train-labels").name == "train-labels.idx1-ubyte.gz"
    assert idx.find(tmp_path, "train-images").name == "train-images-idx3-ubyte"


def test_one_part_in_two_files_is_refused(tmp_path):
    for name in ("t10k-images-idx3-ubyte", "t10k-images-idx4-float"):
        (tmp_path / name).touch()

    with pytest.raises(DatasetError, match="idx3-ubyte and t10k-images-idx4-float, expected one"):
        idx.find(tmp_path, "t10k-images")
    with pytest.raises(DatasetError, match="no file called t10k-labels-idx"):
        idx.find(tmp_path, "t10k-labels")
