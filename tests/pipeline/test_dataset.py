import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline import dataset, fashion_mnist, idx
from pipeline.config import DataConfig
from pipeline.errors import DatasetError

RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (20, 6, 5), np.uint8)
Y = np.arange(20) % 2


def files(folder):
    return {path.name for path in folder.iterdir() if "idx" in path.name}


def refusal(config, cache):
    with pytest.raises(DatasetError) as caught:
        dataset.prepare(config, cache)
    return str(caught.value)


def test_all_seventy_thousand_images_are_there():
    whole = dataset.prepare(DataConfig())

    assert (whole.train_rows, whole.validation_rows, whole.test_rows) == (48_000, 12_000, 10_000)


def test_the_digest_is_of_the_four_files_one_after_the_other(data):
    content = b"".join((data.folder / name).read_bytes() for name in fashion_mnist.SHA256)

    assert data.sha256 == hashlib.sha256(content).hexdigest()


def test_images_are_whole_pixels_with_one_channel(data):
    splits = dataset.load(data)

    assert splits.train.inputs.shape == (6_000, 28, 28, 1)
    assert splits.test.inputs.dtype == splits.test.targets.dtype == np.uint8
    assert (splits.test.inputs.min(), splits.test.inputs.max()) == (0, 255)
    assert list(splits.test.targets[:4]) == [9, 2, 1, 1]  # ankle boot, pullover, two trousers


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=X, y_train=Y, x_test=X[:5], y_test=Y[:5])
    return tmp_path / "some.npz"


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    for part, array in zip(idx.PARTS, (X, Y.astype("u1"), X[:5], Y[:5].astype("u1")), strict=True):
        (folder / idx.name(part, array)).write_bytes(idx.encode(array))
    return folder


@pytest.fixture
def picture_folder(tmp_path):
    for number, (image, label) in enumerate(zip(X, Y, strict=True)):
        path = tmp_path / "animals" / ("cat", "dog")[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "animals"


def test_an_npz_is_kept_as_four_files_and_read_back(npz, tmp_path):
    prepared = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")

    splits = dataset.load(prepared)

    assert (prepared.name, prepared.labels, prepared.license) == ("some", ("0", "1"), "")
    assert (prepared.train_rows, prepared.validation_rows, prepared.test_rows) == (16, 4, 5)
    assert np.array_equal(splits.test.inputs[..., 0], X[:5])
    assert splits.train.inputs.shape == (16, 6, 5, 1)
    content = b"".join(idx.find(prepared.folder, part).read_bytes() for part in idx.PARTS)
    assert prepared.sha256 == hashlib.sha256(content).hexdigest()


def test_idx_files_are_taken_as_they_are_and_named_by_a_file_of_labels(idx_folder, tmp_path):
    (idx_folder / "labels.txt").write_text("even\nodd\n")

    prepared = dataset.prepare(DataConfig(kind="idx", source=idx_folder), tmp_path / "cache")

    assert (prepared.name, prepared.labels) == ("digits", ("even", "odd"))
    assert np.array_equal(dataset.load(prepared).test.targets, Y[:5])


def test_idx_files_that_are_not_fashion_mnist_are_refused_with_the_way_out(idx_folder, tmp_path):
    assert "is damaged or not a file of fashion-mnist; for other IDX files set data.kind=idx" in (
        refusal(DataConfig(source=idx_folder), tmp_path / "cache")
    )


def test_pictures_are_told_from_other_folders(picture_folder, tmp_path):
    prepared = dataset.prepare(DataConfig(source=picture_folder), tmp_path / "cache")

    assert prepared.labels == ("cat", "dog")
    assert (prepared.train_rows, prepared.validation_rows, prepared.test_rows) == (12, 4, 4)
    assert files(prepared.folder) == {
        "train-images-idx4-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx4-ubyte", "t10k-labels-idx1-ubyte",
    }  # fmt: skip


def test_the_line_is_six_points_that_are_also_validated_on(tmp_path):
    prepared = dataset.prepare(DataConfig(kind="line"), tmp_path)

    splits = dataset.load(prepared)

    assert not prepared.classifies
    assert splits.train.inputs.ravel().tolist() == [-1, 0, 1, 2, 3, 4]
    assert splits.train.targets.ravel().tolist() == [-3, -1, 1, 3, 5, 7]
    assert np.array_equal(splits.validation.inputs, splits.train.inputs)
    assert splits.test.inputs.shape == splits.test.targets.shape == (201, 1)
    assert (splits.test.inputs.min(), splits.test.inputs.max()) == (-10, 10)
    assert {part.dtype for part in (splits.test.inputs, splits.test.targets)} == {np.dtype("f4")}
    assert prepared.findings[0].startswith("the training rows are also the validation rows")
    assert prepared.findings[1].startswith("6 of 201 test rows are training rows too")


def test_what_has_not_changed_is_not_read_again(npz, tmp_path, caplog):
    caplog.set_level("INFO")
    first = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")
    caplog.clear()

    assert dataset.prepare(DataConfig(source=npz), tmp_path / "cache") == first
    assert not caplog.text


def test_what_has_changed_goes_into_a_folder_of_its_own(npz, tmp_path):
    first = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")
    np.savez(npz, x_train=255 - X, y_train=Y, x_test=X[:5], y_test=Y[:5])

    second = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")

    assert first.folder != second.folder
    assert dataset.load(first).train.inputs.sum() != dataset.load(second).train.inputs.sum()


def test_other_settings_for_pictures_make_another_folder(picture_folder, tmp_path):
    configs = (DataConfig(source=picture_folder), DataConfig(source=picture_folder, size=(4, 4)))

    first, second = (dataset.prepare(one, tmp_path / "cache") for one in configs)

    assert first.folder != second.folder
    assert dataset.load(second).train.inputs.shape[1:] == (4, 4, 1)


@pytest.mark.parametrize("damage", ["dataset.json", "t10k-images-idx3-ubyte", "no labels"])
def test_a_damaged_folder_in_the_cache_is_made_again(npz, tmp_path, caplog, damage):
    first = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")
    if damage == "no labels":
        (first.folder / "dataset.json").write_text(json.dumps({"sha256": first.sha256}))
    else:
        (first.folder / damage).write_bytes(b"{")

    assert dataset.prepare(DataConfig(source=npz), tmp_path / "cache") == first
    assert "is damaged; it is made again" in caplog.text


def test_runs_that_keep_the_same_at_once_leave_it_whole(npz, tmp_path):
    def run(_):
        return dataset.prepare(DataConfig(source=npz), tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(run, range(8))

    assert all(one == first for one in others)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {first.folder.name}


def test_nothing_is_left_of_what_was_refused(npz, tmp_path):
    np.savez(npz, x_train=X, y_train=Y * 0, x_test=X, y_test=Y * 0)

    assert "of one class" in refusal(DataConfig(source=npz), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_name_cannot_lead_out_of_the_cache(npz, tmp_path):
    prepared = dataset.prepare(DataConfig(source=npz, name="../../x y"), tmp_path / "cache")

    assert prepared.name == "../../x y"
    assert prepared.folder.parent == tmp_path / "cache"
    assert prepared.folder.name.startswith("x-y-")


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("npz", None, "data.kind is npz, expected data.source as well"),
        ("npz", "missing.npz", "missing.npz is not there; expected a folder of pictures, one"),
        ("auto", "sume.npz", "sume.npz is not there; did you mean"),
        ("fashion-mnist", "sume.npz", "some.npz?"),
        ("auto", "zoo/x", "x is not there; expected a folder"),
        ("auto", "a.zip", "a.zip is a file of another kind; expected a folder of pictures, one"),
        ("npz", ".", "cannot be npz data, expected a file"),
        ("pictures", "some.npz", "cannot be pictures data, expected a folder"),
        ("idx", ".", "has no file called train-images-idx"),
        ("pictures", ".", "has no PNG or JPEG file in any subfolder"),
    ],
)
def test_a_source_that_is_not_what_it_should_be_is_refused(npz, tmp_path, kind, source, said):
    (tmp_path / "a.zip").touch()
    config = DataConfig(kind=kind, source=tmp_path / source if source else None)

    assert said in refusal(config, tmp_path / "cache")
    with pytest.raises(DatasetError, match=re.escape(said)):
        dataset.verify(config)


def test_a_source_that_is_not_asked_for_need_not_be_there(tmp_path):
    dataset.verify(DataConfig(kind="line", source=tmp_path / "nowhere"))


def test_what_was_noticed_is_logged_a_line_each(npz, tmp_path, caplog):
    prepared = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")

    assert dataset.told(prepared) is prepared

    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warnings == [f"noticed in some: {one}" for one in prepared.findings]
    assert any("5 of 5 test rows are training rows too" in one for one in warnings)


def test_a_source_can_be_looked_at_before_anything_else(npz, idx_folder, tmp_path):
    dataset.verify(DataConfig())
    dataset.verify(DataConfig(source=npz))

    for config in (DataConfig(source=idx_folder), DataConfig(source=tmp_path / "no.npz")):
        with pytest.raises(DatasetError):
            dataset.verify(config)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_share_that_leaves_no_validation_rows_is_refused(npz, tmp_path, share):
    config = DataConfig(source=npz, validation_share=share)

    if share < 0.05:
        assert "leaves no validation row of 20; raise it" in refusal(config, tmp_path / "cache")
    else:
        assert dataset.prepare(config, tmp_path / "cache").validation_rows == 4


def test_arrays_are_a_data_set(tmp_path):
    prepared = dataset.from_arrays(
        (X, Y),
        (X[:5], Y[:5]),
        labels=["even", "odd"],
        name="mine",
        config=DataConfig(validation_share=0.0),
        cache=tmp_path,
    )

    assert (prepared.name, prepared.labels, prepared.test_rows) == ("mine", ("even", "odd"), 5)
    assert prepared.findings[1].startswith("5 of 5 test rows are training rows too: test row 0 and")


def test_arrays_without_test_rows_are_divided(tmp_path):
    config = DataConfig(test_share=0.5, validation_share=0.0)

    prepared = dataset.from_arrays((X, Y), config=config, cache=tmp_path)

    assert (prepared.train_rows, prepared.validation_rows, prepared.test_rows) == (10, 10, 10)


def test_numbers_to_come_close_to_need_no_shape_but_their_rows(tmp_path):
    inputs = RANDOM.normal(size=(30, 7, 2))

    prepared = dataset.from_arrays((inputs, inputs[:, 0]), cache=tmp_path)
    splits = dataset.load(prepared)

    assert prepared.labels == ()
    assert splits.train.inputs.shape == (19, 7, 2)
    assert splits.train.targets.shape == (19, 2)
    assert splits.train.targets.dtype == np.float32


def test_the_same_arrays_under_other_names_of_classes_are_another_data_set(tmp_path):
    first, second = (
        dataset.from_arrays((X, Y), (X, Y), labels=labels, cache=tmp_path)
        for labels in (["a", "b"], ["c", "d"])
    )

    assert first.folder != second.folder
    assert first.sha256 == second.sha256


def test_findings_are_kept_beside_the_files_for_their_own_split(tmp_path):
    prepared = dataset.from_arrays((X, Y), (X[:5], Y[:5]), cache=tmp_path)
    (kept,) = prepared.folder.glob("findings-*.json")
    kept.write_text(json.dumps(["kept"]))

    again = dataset.from_arrays((X, Y), (X[:5], Y[:5]), cache=tmp_path)
    other = dataset.from_arrays(
        (X, Y), (X[:5], Y[:5]), cache=tmp_path, config=DataConfig(split_seed=1)
    )

    assert again.findings == ("kept",)
    assert other.findings != ("kept",)


def test_rows_that_change_during_a_run_are_noticed(npz, tmp_path):
    prepared = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")
    idx.find(prepared.folder, "t10k-images").write_bytes(b"other")

    with pytest.raises(DatasetError, match="changed during the run"):
        dataset.load(prepared)
    shutil.rmtree(prepared.folder)
    with pytest.raises(DatasetError, match="changed during the run"):
        dataset.load(prepared)


def test_there_is_a_picture_of_every_class_to_ask_about(data, tmp_path):
    folder = dataset.write_examples(data, tmp_path / "examples")

    names = sorted(path.stem for path in folder.iterdir())
    trouser = np.asarray(Image.open(folder / "trouser.png"))

    assert len(names) == 10
    assert {"t-shirt-top", "ankle-boot", "trouser"} < set(names)
    assert np.array_equal(trouser, dataset.load(data).test.inputs[2, ..., 0])


def test_there_are_pictures_of_at_most_twenty_classes_in_their_own_colours(tmp_path):
    images = RANDOM.integers(0, 256, (50, 4, 4, 3), np.uint8)
    labels = ["a/b", "a b", "猫", "!", *map(str, range(4, 25))]
    prepared = dataset.from_arrays(
        (images, np.arange(50) % 25), (images, np.arange(50) % 25), labels=labels,
        config=DataConfig(validation_share=0.0), cache=tmp_path / "cache",
    )  # fmt: skip

    folder = dataset.write_examples(prepared, tmp_path / "examples")

    names = {path.stem for path in folder.iterdir()}
    assert names == {"a-b", "a-b-1", "猫", "3", *map(str, range(4, 20))}
    assert np.array_equal(np.asarray(Image.open(folder / "3.png")), images[3])


def test_there_are_no_pictures_of_what_is_none(tmp_path):
    prepared = dataset.prepare(DataConfig(kind="line"), tmp_path)

    assert not list(dataset.write_examples(prepared, tmp_path / "examples").iterdir())


@pytest.mark.slow
def test_fashion_mnist_has_no_exact_and_twenty_near_copies_of_training_rows_in_its_test_rows():
    whole = dataset.prepare(DataConfig(validation_share=0.0))

    leaks = [one for one in whole.findings if "test rows" in one]

    assert len(leaks) == 1
    assert leaks[0].startswith("20 of 10,000 test rows are nearly a training row")
    assert "test row 436 and training row 24633" in leaks[0]


def test_a_source_whose_name_is_not_utf8_has_one_that_is(npz, tmp_path):
    strange = npz.rename(tmp_path / "q\udcff.npz")

    assert dataset.prepare(DataConfig(source=strange), tmp_path / "cache").name == "q\\udcff"


def test_names_of_classes_that_are_not_utf8_are_refused_and_not_kept(npz, tmp_path):
    np.savez(npz, images=X, labels=Y, class_names=["a", "\ud800"])

    assert "not UTF-8: \\ud800" in refusal(DataConfig(source=npz), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_names_that_an_earlier_version_has_kept_are_refused_as_well(npz, tmp_path):
    about = dataset.prepare(DataConfig(source=npz), tmp_path / "cache").folder / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_bytes()) | {"labels": ["a", "\ud800"]}))

    assert "not UTF-8: \\ud800" in refusal(DataConfig(source=npz), tmp_path / "cache")


def test_long_names_of_classes_and_data_make_no_long_names_of_files(npz, tmp_path):
    long = "猫" * 100_000
    np.savez(npz, images=X, labels=Y, class_names=[f"{long}a", f"{long}b"])
    config = DataConfig(source=npz, name="n" * 1000)

    prepared = dataset.prepare(config, tmp_path / "cache")
    folder = dataset.write_examples(prepared, tmp_path / "examples")

    assert {path.stem for path in folder.iterdir()} == {"猫" * 60, f"{'猫' * 60}-1"}


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_file_in_the_place_of_the_cache_is_refused_and_kept(npz, tmp_path, place):
    where = tmp_path / "cache"
    if place == "folder":
        where = dataset.prepare(DataConfig(source=npz), where).folder
        shutil.rmtree(where)
    where.write_text("mine")

    said = refusal(DataConfig(source=npz), tmp_path / "cache")

    assert str(where) in said
    assert said.endswith("move it away")
    assert where.read_text() == "mine"


@pytest.mark.parametrize("kept", ['{"a": 1}', '[1, "a"]', "["])
def test_findings_that_are_no_list_of_sentences_are_made_again(npz, tmp_path, kept):
    first = dataset.prepare(DataConfig(source=npz), tmp_path / "cache")
    (path,) = first.folder.glob("findings-*.json")
    path.write_text(kept)

    assert dataset.prepare(DataConfig(source=npz), tmp_path / "cache") == first
    assert json.loads(path.read_bytes()) == list(first.findings)


def test_a_mark_of_byte_order_is_no_part_of_the_first_class(idx_folder, tmp_path):
    (idx_folder / "labels.txt").write_bytes("even\nodd\n".encode("utf-8-sig"))

    prepared = dataset.prepare(DataConfig(kind="idx", source=idx_folder), tmp_path / "cache")

    assert prepared.labels == ("even", "odd")


def test_an_npz_is_one_in_capital_letters_too(npz, tmp_path):
    source = npz.rename(tmp_path / "SOME.NPZ")

    assert dataset.prepare(DataConfig(source=source), tmp_path / "cache").test_rows == 5
