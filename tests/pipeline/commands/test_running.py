import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline import config
from pipeline.__main__ import app

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def refused(*words):
    """Return the sentence that `run` ends with before anything is started."""
    shown = runner.invoke(app, ["run", *map(str, words)])
    assert shown.exit_code == 2, shown.output
    lines = shown.output.strip().splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_help_names_every_preset_and_where_data_are_looked_for():
    shown = runner.invoke(app, ["run", "--help"])

    assert all(preset in shown.output for preset in config.PRESETS)
    assert "TRAIN_EXPORT_DATA" in shown.output


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--preset", "huge"], "preset is 'huge', expected one of smoke, quick"),
        (["--epochs", "0"], "training.epochs is 0: "),
        (["--seed", "-1"], "training.seed is -1: "),
        (["--engine", "keras"], "training.engine is 'keras': "),
        (["--learning-rate", "0"], "training.learning_rate is 0.0: "),
        (["--batch-rows", "0"], "training.batch_rows is 0: "),
        (["--kind", "csv"], "data.kind is 'csv': "),
        (["--name", "../models"], "publishing.name is '../models': "),
        (["--set", "training.epoch=3"], "there is no setting training.epoch; "),
        (["--set", "training.epochs"], "'training.epochs' has no =, "),
        (["--config", "/nowhere.toml"], "/nowhere.toml cannot be read as TOML: "),
        (["--data", "/nowhere"], "/nowhere is not there; "),
        (["--endpoint", "8001"], "the server is '8001', expected HOST:PORT"),
        (["--endpoint", "h:1", "--tls-ca", "/nowhere.pem"], "/nowhere.pem cannot be read: "),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence_before_anything_is_started(words, start):
    assert refused(*words).startswith(start)


def test_a_file_and_single_settings_are_checked_together(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nepochs = 3\nmomentum = 2.0\n")

    assert refused("--config", file).startswith("training.momentum is 2.0: ")
    # What comes later wins: --set over the file, an option over both.
    assert refused("--config", file, "--set", "training.momentum=3.0").startswith(
        "training.momentum is 3.0: "
    )
    assert refused(
        "--config", file, "--set", "training.momentum=0.5", "--set", "training.epochs=4",
        "--epochs", "-5",
    ).startswith("training.epochs is -5: ")  # fmt: skip


def test_data_that_are_not_the_data_are_one_sentence_before_anything_is_started(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not images")

    assert "train-images-idx3-ubyte has 10 bytes with sha256" in refused("--data", tmp_path)


def test_pictures_and_modules_that_cannot_work_are_one_sentence_before_anything_is_started(
    tmp_path,
):
    for number, side in enumerate((4, 5)):
        path = tmp_path / str(number) / "one.png"
        path.parent.mkdir()
        Image.new("L", (side, side)).save(path)

    assert "set data.size" in refused("--data", tmp_path)
    assert refused("--network", "nowhere:make").startswith("there is no module nowhere in ")


def test_where_json_was_asked_for_a_refusal_leaves_standard_output_empty():
    shown = runner.invoke(app, ["run", "--preset", "huge", "--json"])

    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: preset is 'huge', ")


@pytest.mark.slow
def test_deploying_the_flow_does_not_import_tensorflow():
    code = (
        "import sys, pipeline.flow, pipeline.deployment\n"
        "print(sorted({'tensorflow', 'keras', 'onnx'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
