import json

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from service import aliases

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("words", [["promote", "../tiny", "1", "--endpoint", "h:1"],
                                   ["rollback", "../m/tiny"], ["rollback", ""]])  # fmt: skip
def test_a_path_in_the_place_of_a_name_is_refused(tmp_path, words):
    shown = runner.invoke(app, [*words, "--models", str(tmp_path)])

    assert shown.exit_code == 2
    assert "cannot be a model, expected a name of letters" in shown.output


@pytest.mark.parametrize("endpoint", ["http://foo", "127.0.0.1:99999"])
def test_an_endpoint_that_is_none_is_refused_before_anything_is_read(tmp_path, endpoint):
    shown = runner.invoke(app, ["promote", "tiny", "1", "--endpoint", endpoint])

    assert shown.exit_code == 2
    assert "expected HOST:PORT with a port from 1 to 65535" in shown.output


def test_a_version_that_is_not_there_is_status_2_before_anything_is_asked(
    make_bundle, monkeypatch, tmp_path
):
    monkeypatch.chdir(make_bundle(tmp_path / "elsewhere", version=7).parents[1])
    words = ["promote", "tiny", "7", "--endpoint", "h:1", "--models", str(tmp_path)]

    shown = runner.invoke(app, words)

    assert shown.exit_code == 2
    assert "there is no version 7 of tiny in" in shown.stderr


def test_rollback_as_json_says_what_the_champion_is_and_was(make_bundle):
    home = [make_bundle(version=number).parent for number in (1, 2)][-1]
    aliases.write(home, {"champion": 2, "previous": 1})

    shown = runner.invoke(app, ["rollback", "tiny", "--models", str(home.parent), "--json"])

    assert json.loads(shown.stdout) == {"model": "tiny", "champion": 1, "before": 2}
