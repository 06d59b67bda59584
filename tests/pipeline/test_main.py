import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipeline import __main__ as command
from pipeline import config

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def test_without_a_command_the_help_is_shown():
    shown = runner.invoke(command.app)

    assert "run" in shown.output


def test_help_names_every_preset_and_where_data_are_looked_for():
    shown = runner.invoke(command.app, ["run", "--help"])

    assert shown.exit_code == 0
    assert all(preset in shown.output for preset in config.PRESETS)
    assert "TRAIN_EXPORT_DATA" in shown.output


def test_help_is_there_before_tensorflow_is():
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.__main__ import app\n"
        "CliRunner().invoke(app, ['run', '--help'])\n"
        "print(sorted({'tensorflow', 'keras', 'prefect'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "huge"], "preset is 'huge', expected one of smoke, quick"),
        (["--epochs", "0"], "epochs is 0, expected 1 or more"),
        (["--seed", "-1"], "seed is -1, expected 0 or more"),
    ],
)
def test_a_value_that_cannot_work_is_one_sentence_and_status_1(words, sentence):
    shown = runner.invoke(command.app, ["run", *words])

    assert shown.exit_code == 1
    assert shown.output.strip() == f"error: {sentence}"


def test_data_that_are_not_the_data_are_one_sentence_before_anything_is_started(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not images")

    shown = runner.invoke(command.app, ["run", "--data", str(tmp_path)])

    assert shown.exit_code == 1
    assert "train-images-idx3-ubyte has 10 bytes with sha256" in shown.output
    assert len(shown.output.strip().splitlines()) == 1


def test_an_unknown_option_is_status_2():
    assert runner.invoke(command.app, ["run", "--epoch", "3"]).exit_code == 2
