import re
import subprocess
import sys

from typer.testing import CliRunner

from pipeline import __main__ as command
from tests.service.test_command_line import check_help, complete

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
COMMANDS = (
    "run", "sweep", "status", "promote", "rollback", "push", "score", "check", "explain", "shadow",
    "report", "models", "doctor", "clean", "deploy", "completion",
)  # fmt: skip


def test_without_a_command_the_help_names_every_command():
    shown = runner.invoke(command.app)

    assert all(f" {name} " in shown.output for name in COMMANDS)


def test_the_help_of_every_command_is_whole_and_its_examples_can_be_given():
    check_help(command.app, "train-export")


def test_the_help_lists_every_command_once_in_a_group_of_its_kind():
    shown = runner.invoke(command.app, ["--help"]).output

    assert [shown.index(f"─ {group} ─") for group in command.COMMANDS] == sorted(
        shown.index(f"─ {group} ─") for group in command.COMMANDS
    )
    assert all(len(re.findall(rf"^│ {name} ", shown, re.MULTILINE)) == 1 for name in COMMANDS)


def test_bash_completes_presets_networks_models_and_versions(tmp_path):
    (tmp_path / "models" / "shirts" / "12").mkdir(parents=True)
    (tmp_path / "models" / "shirts" / "12" / "manifest.json").touch()
    script = runner.invoke(command.app, ["completion", "bash"], prog_name="train-export").stdout

    _, *found = complete(
        "train-export",
        script,
        [
            ["train-export", "run", "--preset", "s"],
            ["train-export", "run", "--network", "conv64"],
            ["train-export", "promote", ""],
            ["train-export", "promote", "shirts", ""],
            ["train-export", "check", "--bundle", "mod"],
        ],
        tmp_path,
    )

    assert found == ["smoke", "conv64 conv64x2", "shirts", "12", ""]


def test_help_is_there_before_tensorflow_is():
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.__main__ import app\n"
        "CliRunner().invoke(app, ['run', '--help'])\n"
        "print(sorted({'tensorflow', 'keras', 'prefect'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_an_unknown_option_is_status_2():
    assert runner.invoke(command.app, ["run", "--epoch", "3"]).exit_code == 2
