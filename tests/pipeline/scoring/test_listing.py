import json
import os

import pyarrow as pa
import pytest

from pipeline.errors import ScoringError
from pipeline.scoring import listing
from pipeline.scoring.listing import Piece


def listed(source, tmp_path, column="", shard_rows=4):
    to = tmp_path / "listing"
    found = listing.write(source, to, column=column, shard_rows=shard_rows)
    return found, [list(listing.pieces(to, shard)) for shard in found.shards]


def refusal(*arguments, **options):
    with pytest.raises(ScoringError) as caught:
        listed(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_pictures_of_all_depths_are_cut_into_shards_in_the_order_of_their_names(
    folder, tmp_path, rows, sizes
):
    found, pieces = listed(folder(rows), tmp_path)

    assert found.rows == rows
    assert [shard.rows for shard in found.shards] == sizes
    names = [piece.path for shard in pieces for piece in shard]
    assert names == [f"{place // 4:03d}/{place:04d}.png" for place in range(rows)]


@pytest.mark.parametrize("shard_rows", [1, 2, 3, 5, 7, 20, 50])
def test_a_shard_may_begin_and_end_anywhere_in_parquet_files(parquet, pixels, tmp_path, shard_rows):
    counts = {"a": 5, "b": 0, "c": 11, "d": 1}
    for name, rows in counts.items():
        parquet(f"in/{name}.parquet", pixels=pixels(rows))

    found, pieces = listed(tmp_path / "in", tmp_path, shard_rows=shard_rows)

    cut = [
        [(piece.path, row) for piece in shard for row in range(piece.start, piece.stop)]
        for shard in pieces
    ]
    assert [len(one) for one in cut] == [shard.rows for shard in found.shards]
    assert [row for one in cut for row in one] == [
        (f"{name}.parquet", row) for name, count in counts.items() for row in range(count)
    ]


def test_what_is_hidden_or_no_data_is_left_out_and_links_lead_to_files_only(folder, tmp_path):
    root = folder(2)
    (root / ".hidden.png").touch()
    (root / "notes.txt").touch()
    (root / "link.png").symlink_to(root / "000" / "0000.png")
    (root / "circle").symlink_to(root)

    _, ((*pieces,),) = listed(root, tmp_path)

    assert pieces == [Piece(f"{name}.png", 0, 1) for name in ("000/0000", "000/0001", "link")]


def test_another_time_size_or_name_of_a_file_is_another_input(folder, tmp_path):
    root = folder(2)
    path = root / "000" / "0000.png"
    before = listed(root, tmp_path)[0].sha256

    os.utime(path, (0, 0))
    touched = listed(root, tmp_path)[0].sha256
    path.rename(root / "other.png")
    renamed = listed(root, tmp_path)[0].sha256

    assert listed(root, tmp_path)[0].sha256 == renamed
    assert len({before, touched, renamed}) == 3


def test_names_that_are_no_text_and_have_line_breaks_are_listed(folder, tmp_path):
    root = folder(1)
    name = os.fsdecode(b"a\n\xff.png")
    (root / "000" / "0000.png").rename(root / name)

    _, ((piece,),) = listed(root, tmp_path)

    assert piece.path == name
    assert len((tmp_path / "listing").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "listing").read_text())[0] == name


def test_a_column_of_pictures_is_found_in_a_struct_and_beside_others(parquet, tmp_path):
    image = pa.array([{"bytes": b"1", "path": "x"}])
    path = parquet(image=image, label=pa.array([1]))

    assert listed(path, tmp_path)[0].column == "image.bytes"


def test_nothing_to_score_is_refused_with_the_place(parquet, pixels, tmp_path):
    (tmp_path / "empty").mkdir()

    assert "has no PNG, JPEG or .parquet file" in refusal(tmp_path / "empty", tmp_path)
    assert "is not there" in refusal(tmp_path / "missing", tmp_path)
    assert "has no rows" in refusal(parquet(pixels=pixels(0)), tmp_path)
    (tmp_path / "one.png").touch()
    assert "is a file, expected" in refusal(tmp_path / "one.png", tmp_path)


def test_pictures_beside_parquet_are_refused(folder, parquet, pixels, tmp_path):
    root = folder(2)
    parquet("pictures/z.parquet", pixels=pixels(2))

    assert "z.parquet is of another kind" in refusal(root, tmp_path)


def test_a_column_that_is_not_there_or_cannot_be_meant_is_refused_by_name(
    folder, parquet, pixels, tmp_path
):
    path = parquet(pixels=pixels(2), name=pa.array(["a", "b"]), also=pixels(2))

    assert "2 columns with pictures or lists" in refusal(path, tmp_path)
    assert "'pixel' of" in refusal(path, tmp_path, "pixel")
    assert "has string, expected the bytes of pictures" in refusal(path, tmp_path, "name")
    assert "no column 'pixels'" in refusal(folder(1), tmp_path, "pixels")


def test_files_with_other_columns_than_the_first_are_refused(parquet, pixels, tmp_path):
    parquet("in/a.parquet", pixels=pixels(2))
    parquet("in/b.parquet", pixels=pa.array([[1.0]]))

    assert "b.parquet has list<" in refusal(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("left", [0, 3, 100, -1])
def test_a_parquet_file_that_is_cut_is_refused(parquet, pixels, tmp_path, left):
    path = parquet(pixels=pixels(50))
    path.write_bytes(path.read_bytes()[:left])

    assert "rows.parquet cannot be read as parquet" in refusal(path, tmp_path)
