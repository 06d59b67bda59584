import csv
import json
import time

import pytest
from typer.testing import CliRunner

from pipeline import files, sweep
from pipeline.__main__ import app
from pipeline.commands import sweeping

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def again(tmp_path):
    """Return a function that gives a sweep again that is done: nothing of it is trained."""
    runs = tmp_path / "runs"
    layers: list[dict[str, object]] = [{"runs": str(runs)}]
    jobs = sweep.jobs(sweep.combinations("line", layers, ["training.seed=1,2"]))
    for job, loss in zip(jobs, (0.5, 0.25), strict=True):
        figures = {
            "validation_loss": loss,
            "test_accuracy": 0.75,
            "best_epoch": 3,
            "epochs": 4,
            "seconds": 2.0,
        }
        outcome = {"values": job.values, "folder": str(job.folder), **figures}
        (job.folder / sweep.RESULT).write_text(json.dumps({"key": job.key, "outcome": outcome}))
    words = ("sweep", "--preset", "line", "--runs", str(runs), "--grid", "training.seed=1,2")
    return lambda *more: runner.invoke(app, [*words, *map(str, more)])


def test_the_table_has_the_lowest_validation_loss_first(again, tmp_path):
    done = again("--output", tmp_path / "out.csv")

    assert done.exit_code == 0, done.output
    assert "2 combinations, 2 of them done before" in done.output
    lines = [line.split() for line in done.stdout.splitlines() if "of 4" in line]
    assert lines == [
        ["2", "0.2500", "75.00%", "3", "of", "4", "2"],
        ["1", "0.5000", "75.00%", "3", "of", "4", "2"],
    ]
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["training.seed"] for row in rows] == ["2", "1"]


def test_the_table_is_written_and_printed_as_json(again, tmp_path):
    done = again("--json", "--output", tmp_path / "out.json")

    found = json.loads(done.stdout)
    assert [row["training.seed"] for row in found] == [2, 1]
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_an_output_of_another_kind_is_status_2_before_anything_is_done(again, tmp_path):
    refused = again("--output", tmp_path / "out.txt")

    assert refused.exit_code == 2
    assert "expected a name in .csv or .json" in refused.output


def test_a_network_of_no_module_is_refused_before_anything_is_trained(again):
    refused = again("--grid", "training.architecture=nowhere:build,linear")

    assert refused.exit_code == 2
    assert "nowhere" in refused.output


@pytest.mark.parametrize("grid", ["training.seed", "export.serve=best", "training.nothing=1"])
def test_a_grid_that_means_nothing_is_status_2(again, grid):
    assert again("--grid", grid).exit_code == 2


def test_how_many_are_done_and_the_time_left_is_logged_once_each(tmp_path, caplog):
    layers: list[dict[str, object]] = [{"runs": str(tmp_path / "runs")}]
    jobs = sweep.jobs(sweep.combinations("line", layers, ["training.seed=1,2,3"]))
    caplog.set_level("INFO", logger="pipeline")

    with sweeping.counted(jobs, every_s=0.01):
        for job in jobs[:2]:
            outcome = {"values": job.values, "folder": str(job.folder)}
            result = json.dumps({"key": job.key, "outcome": outcome})
            files.write_whole(job.folder / sweep.RESULT, result.encode())
            said = f"{jobs.index(job) + 1} of 3 combinations are done, about 1 min left"
            while said not in caplog.text:
                time.sleep(0.01)

    assert len(caplog.records) == 2
