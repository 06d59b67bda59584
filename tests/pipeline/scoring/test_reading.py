import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.errors import ScoringError
from pipeline.scoring import reading
from pipeline.scoring.listing import Piece
from pipeline.scoring.reading import Reader
from protos import bundle_pb2

SHAPE = (2, 2, 1)


def rows_of(path, start, stop, column="pixels", shape=SHAPE, batch_rows=2):
    reader = Reader(path.parent, column, shape)
    return [row for rows in reader.read(Piece(path.name, start, stop), batch_rows) for row in rows]


def values(rows):
    return np.array([row.value for row in rows])


def lists(images, kind):
    flat = list(images.reshape(len(images), -1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 4)
    return pa.array(flat, {"list": pa.list_, "large": pa.large_list}[kind](pa.uint8()))


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 1), (2, 4), (3, 6), (4, 10), (9, 10)])
def test_rows_are_read_from_any_place_in_and_across_row_groups(parquet, tiny, kind, start, stop):
    images = tiny.images(10)

    rows = rows_of(parquet(pixels=lists(images, kind)), start, stop)

    assert [row.number for row in rows] == list(range(start, stop))
    assert np.array_equal(values(rows), images[start:stop])


@pytest.mark.parametrize("group_rows", [1, 3, 7, 100])
def test_pieces_read_one_after_the_other_are_the_same_as_each_read_alone(parquet, tiny, group_rows):
    images = tiny.images(50)
    path = parquet(pixels=lists(images, "fixed"), group_rows=group_rows)
    reader = Reader(path.parent, "pixels", SHAPE)

    for start, stop in [(0, 4), (4, 5), (9, 12), (12, 30), (29, 31), (0, 2), (40, 50), (2, 3)]:
        read = [row for rows in reader.read(Piece(path.name, start, stop), 4) for row in rows]
        assert [row.number for row in read] == list(range(start, stop))
        assert np.array_equal(values(read), images[start:stop])


def test_a_file_that_was_replaced_between_two_pieces_is_read_anew(parquet, tiny):
    first, second = tiny.images(8), tiny.images(8, 1)
    path = parquet(pixels=lists(first, "list"))
    reader = Reader(path.parent, "pixels", SHAPE)
    list(reader.read(Piece(path.name, 0, 4), 4))

    path.unlink()
    parquet(pixels=lists(second, "list"))
    read = [row for rows in reader.read(Piece(path.name, 4, 8), 4) for row in rows]

    assert np.array_equal(values(read), second[4:])


def test_missing_and_misfitting_rows_have_their_reason_and_the_others_their_values(parquet):
    cells = [[1, 2, 3, 4], None, [1, 2, 3], [], [1, None, 3, 4], [5, 6, 7, 8]]

    rows = rows_of(parquet(pixels=pa.array(cells, pa.list_(pa.uint8()))), 0, 6)

    assert [row.value is None for row in rows] == [False, True, True, True, True, False]
    assert rows[1].error == rows[4].error == "there is no value, or one of its numbers is missing"
    assert rows[2].error == "it has 3 numbers, the model takes [2, 2, 1]"
    assert list(rows[5].value.reshape(-1)) == [5, 6, 7, 8]


def test_lists_of_fixed_length_with_missing_rows_are_not_shifted(parquet):
    column = pa.array([[1, 2], None, [5, 6]], pa.list_(pa.float32(), 2))

    rows = rows_of(parquet(x=column, group_rows=2), 1, 3, column="x", shape=(-1,))

    assert rows[0].value is None
    assert list(rows[1].value) == [5, 6]


def test_numbers_without_a_list_are_rows_of_one(parquet):
    rows = rows_of(parquet(x=pa.array([1.5, None], pa.float32())), 0, 2, column="x", shape=(1,))

    assert [row.value if row.value is None else list(row.value) for row in rows] == [[1.5], None]


def test_pictures_are_read_from_bytes_also_in_a_struct(parquet, tiny, encode):
    images = tiny.images(5)
    cells = [{"bytes": encode(one), "path": None} for one in images]
    path = parquet(image=pa.array([*cells, None]))

    rows = rows_of(path, 0, 6, column="image.bytes")

    assert np.array_equal(values(rows[:5]), images)
    assert rows[5].error


def test_hostile_pictures_are_a_reason_each(tmp_path, encode, tiny):
    whole = encode(tiny.images(1)[0])
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    contents = {
        "empty.png": b"",
        "text.png": b"no picture",
        "cut.png": whole[: len(whole) // 2],
        "bomb.png": bomb.getvalue(),
        "other.png": b"GIF89a" + bytes(40),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = [*contents, "gone.png"]
    reader = Reader(tmp_path, "", SHAPE)

    rows = [next(reader.read(Piece(name, 0, 1), 2))[0] for name in names]

    assert all(row.value is None for row in rows)
    said = {row.path: row.error for row in rows}
    assert said["text.png"] == "it is not a PNG or JPEG picture"
    assert "81000000 pixels" in said["bomb.png"]
    assert said["gone.png"] == "it cannot be read: No such file or directory"
    assert all("picture 0" not in error for error in said.values())


def test_a_file_that_is_larger_than_any_picture_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(reading.MAX_FILE_BYTES + 1)

    ((row,),) = Reader(tmp_path, "", SHAPE).read(Piece("huge.png", 0, 1), 2)

    assert "has over" in row.error


def test_a_file_that_breaks_or_shrinks_after_it_was_listed_has_a_reason_for_every_row_left(
    parquet, pixels
):
    path = parquet(pixels=pixels(9))

    shrunk = rows_of(path, 6, 12)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(bytes(content))
    broken = rows_of(path, 0, 9)
    path.write_bytes(b"")
    emptied = rows_of(path, 0, 9)

    assert [row.number for row in shrunk] == list(range(6, 12))
    assert [bool(row.error) for row in shrunk] == [False] * 3 + [True] * 3
    assert len(broken) == len(emptied) == 9
    assert broken[0].error.startswith("the file cannot be read here")
    assert all(row.error for row in emptied)


def spec(datatype, *shape):
    return bundle_pb2.TensorSpec(name="x", datatype=datatype, shape=(-1, *shape))


@pytest.mark.parametrize(
    ("taken", "given", "said"),
    [
        (spec("FP32", 2, 2, 1), pa.binary(), "pictures are made UINT8"),
        (spec("UINT8", 4), pa.binary(), "pictures are made UINT8"),
        (spec("UINT8", -1, -1, 3), pa.binary(), "pictures are made UINT8"),
        (spec("UINT8", 2, 2, 1), pa.list_(pa.float64()), "the model takes uint8 of [2, 2, 1]"),
        (spec("FP32", 1), pa.float64(), "the model takes float32"),
        (spec("FP32", -1, -1), pa.list_(pa.float32()), "how long each axis is"),
    ],
)
def test_a_column_that_no_model_input_can_be_is_refused(taken, given, said):
    with pytest.raises(ScoringError) as caught:
        reading.check(taken, "x", given)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        (spec("UINT8", 28, 28, 1), pa.binary()),
        (spec("UINT8", 28, 28, 3), pa.large_binary()),
        (spec("UINT8", 2, 2, 1), pa.list_(pa.uint8(), 4)),
        (spec("FP32", -1), pa.list_(pa.float32())),
        (spec("FP32", 1), pa.float32()),
    ],
)
def test_what_fits_is_taken(taken, given):
    reading.check(taken, "x", given)
