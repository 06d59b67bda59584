import json
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.commands import scoring

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def score(make_bundle, tmp_path):
    """Return a function that scores two pictures, of which one is none."""
    bundle, source = make_bundle(), tmp_path / "pictures"
    source.mkdir()
    Image.fromarray(np.full((2, 2), 255, np.uint8)).save(source / "a.png")
    (source / "b.png").touch()
    words = ("score", "--bundle", bundle, "--input", source, "--output", tmp_path / "out")
    return lambda *more: runner.invoke(app, [*map(str, words), *more])


def test_rows_in_and_out_errors_and_parts_are_said(score, tmp_path):
    done = score("--workers", "1")

    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"scored by tiny version 1: {tmp_path}/out",
        "parts:  1, of which 0 were there",
        "rows:   2 in, 2 out",
        "errors: 1, see the column error",
    ]
    rows = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["light", None]


def test_what_was_done_is_printed_as_json(score, tmp_path):
    score("--part-rows", "1")

    again = json.loads(score("--part-rows", "1", "--json").stdout)

    assert again == {
        "output": f"{tmp_path}/out",
        "model": "tiny",
        "version": 1,
        "rows": 2,
        "unread": 1,
        "parts": 2,
        "kept": 2,
    }


def test_an_engine_that_there_is_not_is_status_2(score, monkeypatch):
    assert score("--engine", "spark").exit_code == 2
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    refused = score("--engine", "ray")
    assert refused.exit_code == 2
    assert "install the extra ray, on all nodes" in refused.output


def test_a_refusal_is_one_sentence_and_status_1(score):
    refused = score("--column", "pixels")

    assert refused.exit_code == 1
    assert "which have no column 'pixels'" in refused.output
    assert "Traceback" not in refused.output


def test_a_bundle_or_an_input_that_is_not_there_is_status_2(score):
    for words, said in (
        (("--bundle", "tiny/7"), "there is no bundle tiny/7"),
        (("--input", "nowhere"), "nowhere is not there; --input is a folder"),
    ):
        refused = score(*words)

        assert refused.exit_code == 2
        assert said in refused.output


def test_ctrl_c_keeps_the_parts_that_are_whole_and_the_same_command_goes_on(make_bundle, tmp_path):
    source, output = tmp_path / "pictures", tmp_path / "out"
    source.mkdir()
    for number in range(400):
        Image.fromarray(np.full((2, 2), number % 256, np.uint8)).save(source / f"{number:04}.png")
    words = [
        "score", "--bundle", str(make_bundle()), "--input", str(source), "--output", str(output),
        "--part-rows", "1", "--workers", "1", "--json",
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words], stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        while not list(output.glob("part-*.parquet")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    kept = list(output.glob("part-*.parquet"))

    assert (process.returncode, said) == (130, "")
    assert errors.splitlines()[-1].startswith("error: stopped; parts that are whole are kept")
    assert "Traceback" not in errors
    assert all(pq.read_table(path).num_rows == 1 for path in kept)
    done = json.loads(runner.invoke(app, words).stdout)
    assert done["kept"] >= len(kept) > 0
    assert done["rows"] == 400
