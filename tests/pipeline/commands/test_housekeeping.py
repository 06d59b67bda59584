import json

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from service import aliases
from tests.pipeline.test_status import add_run, served

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def places(make_bundle, tmp_path):
    """Options that name folders with three versions and two runs."""
    for number in (1, 2, 3):
        make_bundle(version=number, edit=served)
    aliases.write(tmp_path / "models" / "tiny", {"champion": 1})
    for name in ("quick-1", "quick-2"):
        add_run(tmp_path / "runs", name, epochs=2, settings={"training": {"epochs": 3}})
    return ["--models", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]


def test_status_shows_versions_aliases_and_epochs(places):
    shown = runner.invoke(app, ["status", *places])

    assert shown.exit_code == 0
    assert "champion" in shown.output
    assert "91.25%" in shown.output
    assert " KiB" in shown.output
    assert "2 of 3" in shown.output


def test_status_as_json_is_the_same(places):
    found = json.loads(runner.invoke(app, ["status", "--json", *places]).stdout)

    assert [one["number"] for one in found["versions"]] == [3, 2, 1]
    assert {one["epochs_done"] for one in found["runs"]} == {2}


def test_where_nothing_is_status_says_so(tmp_path):
    places = ["--models", str(tmp_path / "m"), "--runs", str(tmp_path / "r")]

    shown = runner.invoke(app, ["status", *places])

    assert shown.exit_code == 0
    assert "nothing is published" in shown.output


def test_clean_prints_what_goes_and_a_dry_run_leaves_it(places, tmp_path):
    shown = runner.invoke(app, ["clean", "--keep", "1", "--dry-run", *places])

    assert shown.exit_code == 0
    assert "would remove 2, " in shown.output
    assert (tmp_path / "models/tiny/2").is_dir()

    shown = runner.invoke(app, ["clean", "--keep", "1", "--json", *places])

    assert str(tmp_path / "models/tiny/2") in [one["path"] for one in json.loads(shown.stdout)]
    assert sorted(path.name for path in (tmp_path / "models/tiny").iterdir() if path.is_dir()) == [
        "1", "3",
    ]  # fmt: skip


def test_to_keep_nothing_cannot_be_asked_for(places):
    assert runner.invoke(app, ["clean", "--keep", "0", *places]).exit_code == 2
