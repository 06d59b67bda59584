import json

import pytest
from typer.testing import CliRunner

from pipeline import __main__ as command
from pipeline.commands import options

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def models(make_bundle, tmp_path, monkeypatch):
    make_bundle()
    make_bundle(version=2, striped=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def report(*words):
    return runner.invoke(command.app, ["report", *map(str, words)])


def test_a_bundle_is_found_by_its_name_or_by_its_path(models, tmp_path):
    for words in (("tiny/1",), ("tiny/1", "--models", models), (models / "tiny/1",)):
        (tmp_path / "tiny-1.html").unlink(missing_ok=True)

        done = report(*words)

        assert (done.exit_code, done.stdout) == (0, "page: tiny-1.html\n")
        assert "tiny" in (tmp_path / "tiny-1.html").read_text()


def test_the_page_goes_where_it_is_told(models, tmp_path):
    assert report("tiny/1", "--output", tmp_path / "mine.html").exit_code == 0
    assert (tmp_path / "mine.html").is_file()


def test_two_bundles_are_compared_in_a_sentence_and_on_a_page(models, tmp_path):
    done = report("tiny/1", "tiny/2")

    assert done.exit_code == 0
    assert done.stdout.endswith(".\npage: tiny-1-and-tiny-2.html\n")
    assert "Two models compared" in (tmp_path / "tiny-1-and-tiny-2.html").read_text()


def test_scripts_get_the_figures_as_json(models):
    one, two = (
        json.loads(report(*words, "--json").stdout) for words in (("tiny/1",), ("tiny/1", "tiny/2"))
    )

    assert one == {"page": "tiny-1.html"}
    assert (two["first"], two["second"], two["paired"]) == ("tiny 1", "tiny 2", None)


def test_a_bundle_that_is_not_there_is_refused_in_one_sentence(models, tmp_path):
    done = report("tiny/7")

    assert done.exit_code == 2
    assert "there is no bundle tiny/7, neither a path nor in models" in done.stderr
    assert not list(tmp_path.glob("*.html"))


def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(models):
    (models / "tiny/1/golden.npz").write_bytes(b"damaged")

    done = report("tiny/1")

    assert done.exit_code == 1
    assert "tiny/1/golden.npz has 7 bytes" in done.stderr


def test_a_folder_that_cannot_be_written_to_is_said(models, tmp_path):
    done = report("tiny/1", "--output", tmp_path / "missing" / "page.html")

    assert done.exit_code == 2
    assert f"there is no folder {tmp_path / 'missing'} to write page.html into" in done.stderr
    assert "partial" not in done.stderr


def test_a_folder_in_the_pages_place_is_said_and_nothing_is_left(models, tmp_path):
    before = sorted(tmp_path.iterdir())

    done = report("tiny/1", "--output", models)

    assert done.exit_code == 2
    assert f"{models} is a folder; name a file with --output" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_system_refuses_is_said_of_the_page_itself(models, tmp_path):
    done = report("tiny/1", "--output", tmp_path / ("a" * 250))

    assert done.exit_code == 2
    assert f"{'a' * 250} cannot be written: File name too long" in done.stderr
    assert "partial" not in done.stderr


def test_an_empty_name_is_refused_in_one_sentence(models):
    done = report("")

    assert done.exit_code == 2
    assert "the bundle's name is empty, expected NAME/VERSION or a path" in done.stderr


def test_name_and_version_are_looked_for_where_the_models_are_before_here(
    make_bundle, monkeypatch, tmp_path
):
    there, here = make_bundle(tmp_path / "models"), make_bundle(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    assert options.folder_of("tiny/1", tmp_path / "models") == there
    assert options.folder_of("./tiny/1", tmp_path / "models") == here
    assert options.folder_of("tiny/1", tmp_path / "none") == here
