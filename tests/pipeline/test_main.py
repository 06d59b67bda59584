import subprocess
import sys

from typer.testing import CliRunner

from pipeline import __main__ as command

runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
COMMANDS = (
    "run", "sweep", "status", "promote", "rollback", "push", "score", "check", "explain", "shadow",
    "models", "doctor", "clean", "deploy",
)  # fmt: skip


def test_without_a_command_the_help_names_every_command():
    shown = runner.invoke(command.app)

    assert all(f" {name} " in shown.output for name in COMMANDS)


def test_the_help_of_every_command_has_an_example():
    for name in COMMANDS:
        shown = runner.invoke(command.app, [name, "--help"])

        assert shown.exit_code == 0
        assert f"Example: train-export {name}" in " ".join(shown.output.split())


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
