import json

import pytest

from pipeline import files, status
from pipeline.errors import UsageError
from service import aliases


def add_run(runs, name, epochs=0, steps=0, settings=None):
    folder = runs / name
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    if epochs or steps:
        (folder / "checkpoints" / f"state-{epochs:04}-{steps:06}.json").touch()
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def served(manifest):
    manifest.served.passed = True
    manifest.provenance.created = "2026-01-02T03:04:05Z"
    manifest.evaluation.accuracy.value, manifest.evaluation.accuracy.rows = 0.9125, 10_000


def test_versions_are_listed_newest_first_with_aliases_and_accuracy(make_bundle, tmp_path):
    for number in (1, 2, 10):
        make_bundle(version=number, edit=served)
    aliases.write(tmp_path / "models" / "tiny", {"champion": 2, "previous": 1})

    found = status.versions(tmp_path / "models")

    assert [(one.number, one.aliases) for one in found] == [
        (10, ()), (2, ("champion",)), (1, ("previous",)),
    ]  # fmt: skip
    assert {(one.accuracy, one.parity, one.created) for one in found} == {
        (0.9125, "passed", "2026-01-02T03:04:05Z")
    }
    assert found[0].size_bytes > (tmp_path / "models/tiny/10/model.onnx").stat().st_size


def test_what_was_left_out_or_not_served_is_in_the_verdict(make_bundle, tmp_path):
    def without_int8(manifest):
        served(manifest)
        manifest.parity.add(variant="onnx-int8", failure="over its budget")

    make_bundle(version=1)
    make_bundle(version=2, edit=without_int8)

    assert [one.parity for one in status.versions(tmp_path / "models")] == [
        "passed, without onnx-int8", "failed as served",
    ]  # fmt: skip


def test_a_model_that_does_not_classify_has_no_accuracy(make_generic_bundle, tmp_path):
    make_generic_bundle(edit=served)

    assert status.versions(tmp_path / "models")[0].accuracy is None


def test_a_version_whose_manifest_cannot_be_read_is_listed_with_the_reason(make_bundle, tmp_path):
    (make_bundle() / "manifest.json").write_text("{")

    assert status.versions(tmp_path / "models")[0].parity.startswith("unreadable: ")


def test_hidden_folders_and_empty_models_are_no_versions(make_bundle, tmp_path):
    make_bundle()
    (tmp_path / "models" / ".staging-abc").mkdir()
    (tmp_path / "models" / "empty").mkdir()

    assert [one.model for one in status.versions(tmp_path / "models")] == ["tiny"]
    assert status.versions(tmp_path / "nowhere") == []


def test_a_run_says_how_many_epochs_of_how_many_are_done(tmp_path):
    add_run(tmp_path, "quick-1", epochs=3, steps=20, settings={"training": {"epochs": 10}})
    add_run(tmp_path, "old-2")
    (tmp_path / "examples").mkdir()

    found = {run.folder.name: (run.epochs_done, run.epochs) for run in status.runs(tmp_path)}

    assert found == {"quick-1": (3, 10), "old-2": (0, None)}


def test_a_run_says_what_came_of_it(tmp_path):
    settings = {"training": {"epochs": 3}}
    folder = add_run(tmp_path, "quick-1", epochs=2, settings=settings)

    def state():
        return status.runs(tmp_path)[0].state

    assert state() == "stopped"
    add_run(tmp_path, "quick-1", epochs=3, settings=settings)
    assert state() == "trained, not published"
    (folder / "refused.md").touch()
    assert state() == "refused"
    (folder / "published.json").write_text('{"name": "fashion-mnist", "version": 4}')
    assert state() == "published fashion-mnist 4"
    with files.locked(folder / "lock", wait=False):
        assert state() == "running"


def test_a_folder_without_a_manifest_is_no_version_and_one_with_a_lock_alone_no_run(tmp_path):
    (tmp_path / "photos" / "2019" / "1").mkdir(parents=True)
    (tmp_path / "lib" / "lists").mkdir(parents=True)
    (tmp_path / "lib" / "lists" / "lock").touch()

    assert status.versions(tmp_path / "photos") == []
    assert status.runs(tmp_path / "lib") == []


def test_whether_a_run_is_busy_is_asked_without_writing(tmp_path):
    folder = add_run(tmp_path, "quick-1")
    (folder / "lock").unlink()

    assert not status.is_busy(folder)
    assert not (folder / "lock").exists()


@pytest.mark.parametrize("name", ["", "../tiny", "../m/tiny", "/tiny", ".", "..", "a b", "tiny/"])
def test_a_path_is_no_name_of_a_model(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a model, expected a name"):
        status.home(tmp_path, name)
    assert status.home(tmp_path, "tiny") == tmp_path / "tiny"
