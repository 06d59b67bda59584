import csv
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from pipeline import config, results, sweep
from pipeline.errors import ConfigError, PipelineError, SweepError
from pipeline.sweep import Outcome

LINE = ["training.learning_rate=0.05,0.01"]
FEW = {"training": {"epochs": 3}}


def combine(grids, tmp_path, preset="line", **training):
    layers: list[config.Tables] = [
        FEW,
        {"training": training, "runs": str(tmp_path / "runs")},
    ]
    return sweep.combinations(preset, layers, grids)


def refusal(*grids, tmp_path, error=SweepError, preset="line"):
    with pytest.raises(error) as caught:
        combine(grids, tmp_path, preset)
    return str(caught.value)


def test_every_combination_is_made_and_the_last_grid_changes_fastest(tmp_path):
    found = combine(
        ["training.engine=fit,tape", "training.seed=1,2,3", "data.split_seed=7"], tmp_path
    )

    assert [tuple(one.values.values()) for one in found] == [
        (engine, seed, 7) for engine in ("fit", "tape") for seed in (1, 2, 3)
    ]
    assert [one.config.training.engine for one in found] == ["fit"] * 3 + ["tape"] * 3
    assert {one.config.training.epochs for one in found} == {3}
    assert {one.config.data.split_seed for one in found} == {7}


def test_values_with_commas_in_them_are_read_as_toml_has_them(tmp_path):
    grid = "training.architecture_settings={dropout = 0.1},{dropout = 0.5}"

    found = combine([grid, "data.size=[28, 28],[32, 32]"], tmp_path)

    assert [one.config.training.architecture_settings for one in found[::2]] == [
        {"dropout": 0.1},
        {"dropout": 0.5},
    ]
    assert [one.config.data.size for one in found[:2]] == [(28, 28), (32, 32)]


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ([], "there is no --grid"),
        (["training.seed"], "'training.seed' has no ="),
        (["training.seed=1", "training.seed=2"], "names training.seed twice"),
        (["training.seed=1,1"], "training.seed has the value 1 twice"),
        (["training.seed="], "has an empty value"),
        (["training.engine=fit,,tape"], "has an empty value"),
        (["seed=1,2"], "names seed, expected a setting of data or training"),
        (["export.serve=best,onnx-int8"], "names export.serve, expected"),
        (["training.keep=1,2"], "names training.keep, which changes no result"),
        (["training.fresh=true"], "names training.fresh, which changes no result"),
    ],
)
def test_a_grid_that_means_nothing_is_refused_by_name(grids, said, tmp_path):
    assert said in refusal(*grids, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (["training.rate=1,2"], "training.rate"),
        (["training.seed=1,-1"], "training.seed is -1"),
        (["training.engine=fit,tap"], "training.engine is 'tap'"),
        (["data.validation_share=0.1,1"], "data.validation_share is 1"),
    ],
)
def test_a_setting_that_there_is_not_or_cannot_be_is_refused_by_name(grids, said, tmp_path):
    assert said in refusal(*grids, tmp_path=tmp_path, error=ConfigError)
    assert "preset is 'none'" in refusal(*LINE, tmp_path=tmp_path, error=ConfigError, preset="none")


def test_a_bad_grid_is_refused_before_tensorflow_and_prefect_are_there(tmp_path):
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.__main__ import app\n"
        "done = CliRunner().invoke(app, ['sweep', '--preset', 'line', '--runs', sys.argv[1],\n"
        "    '--grid', 'training.seed=1,x'])\n"
        "print(done.exit_code, sorted({'tensorflow', 'prefect', 'ray'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "2 []"
    assert not list(tmp_path.iterdir())


def test_the_folder_is_that_of_data_and_training_and_the_key_also_of_the_code(
    tmp_path, monkeypatch
):
    first = sweep.jobs(combine(LINE, tmp_path))
    again = sweep.jobs(combine(LINE, tmp_path, tensorboard=True))
    others = sweep.jobs(combine(LINE, tmp_path, epochs=4))
    monkeypatch.setattr(results, "code_sha256", lambda module: "changed")
    changed = sweep.jobs(combine(LINE, tmp_path))

    assert first == again
    assert len({job.folder for job in first + others}) == 4
    assert [job.folder for job in changed] == [job.folder for job in first]
    assert {job.key for job in changed}.isdisjoint(job.key for job in first)


def test_a_result_is_kept_only_for_what_it_came_of(tmp_path):
    job, other = sweep.jobs(combine(LINE, tmp_path))
    outcome = Outcome(job.values, validation_loss=1.0)
    content = {"key": job.key, "outcome": {"values": job.values, "validation_loss": 1.0}}

    assert sweep.kept(job) is None
    (job.folder / sweep.RESULT).write_text(json.dumps(content))
    assert sweep.kept(job) == outcome
    assert sweep.kept(replace(job, key=other.key)) is None
    (job.folder / sweep.RESULT).write_text("{")
    assert sweep.kept(job) is None


def test_outcomes_are_ranked_by_validation_loss_and_failures_come_last(tmp_path):
    outcomes = [
        Outcome({"training.seed": 1}, failure="it, failed", folder="a"),
        Outcome({"training.seed": 2}, validation_loss=0.5),
        Outcome({"training.seed": 3}, validation_loss=0.25, test_accuracy=0.9),
    ]

    ranked = sweep.ranked(outcomes)

    assert [one.values["training.seed"] for one in ranked] == [3, 2, 1]
    rows = list(csv.DictReader(sweep.as_csv(ranked).splitlines()))
    assert list(rows[0])[:2] == ["training.seed", "validation_loss"]
    assert [row["validation_loss"] for row in rows] == ["0.25", "0.5", ""]
    assert rows[2]["failure"] == "it, failed"


def test_each_network_and_source_of_data_is_verified_once(tmp_path):
    found = combine(["training.architecture=linear,dense", "training.seed=1,2"], tmp_path)

    assert [one.training.architecture for one in sweep.differing(found)] == ["linear", "dense"]


@pytest.mark.slow
def test_a_combination_whose_parent_is_killed_saves_its_state_and_goes_on_there(tmp_path, capfd):
    (job,) = sweep.jobs(combine(["training.seed=5"], tmp_path, epochs=100))
    code = "import sys, pathlib, pipeline.sweep as s; s.run(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, str(job.folder)]) as process:
        until = time.monotonic() + 120
        while not list(job.folder.glob("*/checkpoints/state-0003-*")):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()

    outcome = sweep.run(job.folder)  # waits until the other has saved its state

    assert outcome.epochs == 100
    assert sweep.kept(job) == outcome
    said = capfd.readouterr().err
    assert "stopping after this step, to save it" in said
    assert "resuming from" in said
    assert "Traceback" not in said


def test_what_a_process_dies_of_is_the_outcome(tmp_path, monkeypatch):
    (job,) = sweep.jobs(combine(["training.seed=5"], tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")

    outcome = sweep.run(job.folder)

    assert outcome.failure == f"{sweep.ENDED} 1"
    assert outcome.values == {"training.seed": 5}


def test_a_refusal_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise PipelineError("the loss is\n inf")

    monkeypatch.setattr(sweep, "_train", refuse)
    monkeypatch.setattr(sweep, "_end_with_parent", lambda: None)

    assert sweep.main(tmp_path) == 1
    assert capsys.readouterr().out == "the loss is inf\n"
