import json

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def push(make_bundle, tmp_path):
    """Return a function that pushes a version into a folder behind a URL, which is returned too."""
    models, url = make_bundle().parents[1], f"file://{tmp_path}/store"
    words = ("push", "tiny", "1", "--models", str(models), "--to", url)
    return lambda *more: runner.invoke(app, [*words, *more]), url


def test_what_was_pushed_and_what_the_alias_was_is_said(push):
    push, url = push

    first, second = push(), push("--alias", "champion")

    assert first.stdout.startswith(f"pushed: {url}/tiny/1\nfiles: ")
    assert first.stdout.splitlines()[1].endswith(" KiB")
    assert second.stdout.splitlines()[0] == f"already there: {url}/tiny/1"
    assert second.stdout.splitlines()[2] == "champion: tiny 1 (was not set)"


def test_what_was_pushed_is_printed_as_json(push):
    push, url = push

    found = json.loads(push("--alias", "champion", "--json").stdout)

    assert found["url"] == f"{url}/tiny/1"
    assert (found["model"], found["version"], found["already"]) == ("tiny", 1, False)
    assert (found["alias"], found["before"]) == ("champion", None)
    assert found["files"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "ftp://host/models"), "is not an address of bundles"),
        (("--alias", "A b"), "'A b' is not an alias"),
        (("--models", "nowhere"), "there is no version 1 of tiny in nowhere"),
    ],
)
def test_a_mistake_in_what_was_typed_is_one_sentence_and_status_2_and_nothing_is_pushed(
    push, tmp_path, words, said
):
    refused = push[0](*words)

    assert (refused.exit_code, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert not (tmp_path / "store").exists()
