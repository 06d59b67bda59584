import json
import os

import pytest

from pipeline import cleaning, files, publish, results, sweep
from service import aliases
from tests.pipeline.test_status import add_run


@pytest.fixture
def models(make_bundle, tmp_path):
    """Five versions, of which the second is the champion."""
    for number in range(1, 6):
        make_bundle(version=number)
    aliases.write(tmp_path / "models" / "tiny", {"champion": 2})
    return tmp_path / "models"


@pytest.fixture
def runs(tmp_path):
    """Three runs, the last the newest."""
    for age, name in enumerate(("c", "b", "a")):
        folder = add_run(tmp_path / "runs", name)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (1e9 - age, 1e9 - age))
    return tmp_path / "runs"


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_old_versions_go_and_what_an_alias_names_and_the_newest_stay(models, runs):
    went = cleaning.clean(models, runs, keep=1)

    assert left(models / "tiny") == ["2", "5"]
    assert {one.path.name for one in went if one.path.parent == models / "tiny"} == {"1", "3", "4"}
    assert all(one.size_bytes > 0 for one in went if one.path.parent == models / "tiny")


def test_as_many_as_asked_for_stay(models, runs):
    cleaning.clean(models, runs, keep=2)

    assert left(models / "tiny") == ["2", "4", "5"]
    assert left(runs) == ["b", "c"]


def test_a_dry_run_says_the_same_and_removes_nothing(models, runs):
    would = cleaning.clean(models, runs, keep=1, dry_run=True)

    assert left(models / "tiny") == ["1", "2", "3", "4", "5"]
    assert left(runs) == ["a", "b", "c"]
    assert would == cleaning.clean(models, runs, keep=1)


def test_a_run_that_is_worked_in_stays(models, runs):
    with files.locked(runs / "a" / "lock", wait=False):
        cleaning.clean(models, runs, keep=1)

    assert left(runs) == ["a", "c"]


def test_a_model_that_is_being_promoted_is_left_alone(models, runs, caplog):
    with files.locked(models / "tiny" / ".promoting", wait=False):
        cleaning.clean(models, runs, keep=1)

    assert len(left(models / "tiny")) == 5
    assert "is being promoted" in caplog.text


def test_a_model_whose_aliases_cannot_be_read_is_left_alone(models, runs, caplog):
    (models / "tiny" / "aliases.json").write_text("{")
    cleaning.clean(models, runs, keep=1)

    assert len(left(models / "tiny")) == 5
    assert "nobody knows what it names" in caplog.text


def test_what_a_stopped_command_left_hidden_goes(models, runs):
    (models / "tiny" / ".removing-1").mkdir()
    cleaning.clean(models, runs, keep=9)

    assert not (models / "tiny" / ".removing-1").exists()


def test_results_of_which_a_file_is_gone_go_and_others_stay(models, runs, tmp_path):
    folder = runs / results.FOLDER
    folder.mkdir()
    for name, path in (("here", models), ("gone", tmp_path / "gone")):
        file = next((one for one in path.rglob("*.onnx")), path)
        record = {results.KIND: "Trained", "files": {str(file): "ab"}}
        (folder / name).write_text(json.dumps({"result": json.dumps(record)}))
    cleaning.clean(models, runs, keep=9)

    assert [path.name for path in folder.iterdir()] == ["here"]


def test_the_locks_are_those_that_publishing_and_promoting_hold():
    from pipeline import promote

    assert (publish.LOCK, promote.LOCK) == (cleaning.LOCK, cleaning.PROMOTING)


def test_the_runs_of_one_model_do_not_make_those_of_another_old(models, runs):
    (runs / "a" / "config.json").write_text('{"publishing": {"name": "another"}}')

    cleaning.clean(models, runs, keep=1)

    assert left(runs) == ["a", "c"]


def test_folders_that_are_neither_bundles_nor_runs_stay(tmp_path):
    for number in range(1, 4):
        photo = tmp_path / "photos" / "2019" / str(number) / "a.jpg"
        photo.parent.mkdir(parents=True)
        photo.touch()
        data = tmp_path / "lib" / f"lists-{number}"
        data.mkdir(parents=True)
        (data / "lock").touch()
        (data / "data").touch()

    assert cleaning.clean(tmp_path / "photos", tmp_path / "lib", keep=1) == []
    assert len(list(tmp_path.rglob("a.jpg"))) == len(list(tmp_path.rglob("data"))) == 3


def test_links_stay_and_count_as_nothing(models, runs, tmp_path):
    elsewhere = (models / "tiny" / "1").rename(tmp_path / "elsewhere")
    for link in (models / "tiny" / "1", models / "tiny" / "9"):
        link.symlink_to(elsewhere)
    run = (runs / "a").rename(tmp_path / "run")
    (runs / "a").symlink_to(run)
    (models / "linked").symlink_to(models / "tiny")

    cleaning.clean(models, runs, keep=1)

    assert left(models / "tiny") == ["1", "2", "5", "9"]
    assert left(runs) == ["a", "c"]
    assert (elsewhere / "manifest.json").is_file()
    assert (run / "lock").is_file()


def test_a_link_that_was_hidden_to_be_removed_goes_and_what_it_leads_to_stays(models, runs):
    hidden = models / "tiny" / ".removing-3"
    hidden.symlink_to(models / "tiny" / "5")
    other = models / "tiny" / ".removing-mine"
    other.mkdir()

    went = cleaning.clean(models, runs, keep=9)

    assert [one.path for one in went] == [hidden]
    assert not hidden.is_symlink()
    assert other.is_dir()
    assert (models / "tiny" / "5" / "manifest.json").is_file()


def test_a_dry_run_writes_nothing(models, runs, tmp_path):
    def everything():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = everything()
    cleaning.clean(models, runs, keep=1, dry_run=True)

    assert everything() == before


def test_a_dry_run_leaves_out_what_is_in_use(models, runs):
    with (
        files.locked(models / "tiny" / ".promoting", wait=False),
        files.locked(runs / "a" / "lock", wait=False),
    ):
        would = cleaning.clean(models, runs, keep=1, dry_run=True)

    assert [one.path for one in would] == [runs / "b"]


@pytest.fixture
def sweeps(tmp_path):
    """Three sweeps, the last the newest, one of the settings inside another one's table."""
    grids = ("training.seed=1,2", "training.augmentation.shift=0.0,0.1", "training.epochs=2,3")
    made = []
    for age, grid in enumerate(grids):
        layers: list[dict[str, object]] = [{"runs": str(tmp_path / "runs")}]
        jobs = sweep.jobs(sweep.combinations("line", layers, [grid]))
        made.append([job.folder for job in jobs])
        for folder in made[-1]:
            grow_old(folder, 1e9 + age)
    return made


def grow_old(folder, changed_s):
    for path in (*folder.iterdir(), folder):
        os.utime(path, (changed_s, changed_s))


def test_old_sweeps_go_whole_and_the_newest_stay_whole(sweeps, tmp_path):
    def clean(**options):
        return cleaning.clean(tmp_path / "models", tmp_path / "runs", keep=2, **options)

    would = clean(dry_run=True)

    assert all(folder.is_dir() for one in sweeps for folder in one)
    assert clean() == would
    assert [one.path for one in would] == sorted(sweeps[0])
    assert [folder.is_dir() for one in sweeps for folder in one] == [False] * 2 + [True] * 4


def test_a_sweep_that_is_trained_and_what_is_none_stay(sweeps, tmp_path, caplog):
    mine, link = tmp_path / "runs/sweep/mine", tmp_path / "runs/sweep/line-0123456789ab"
    mine.mkdir()
    link.symlink_to(mine)
    (sweeps[1][0] / sweep.JOB).write_text("{}")

    with files.locked(sweeps[0][1] / sweep.LOCK, wait=False):
        grow_old(sweeps[0][1], 1e9)
        went = cleaning.clean(tmp_path / "models", tmp_path / "runs", keep=1)

    assert [one.path for one in went] == [sweeps[1][1]]
    assert "is left as it is" in caplog.text
    assert link.is_symlink()
    assert mine.is_dir()
