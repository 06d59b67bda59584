import json
import os
import re
import subprocess
import sys

from pydantic import TypeAdapter
from typer.testing import CliRunner

from pipeline import __main__ as command
from pipeline import config
from pipeline.commands import options
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
    manifest = {"parity": [{"variant": "onnx-int8"}, {"variant": "tflite-int8"}]}
    (tmp_path / "models" / "shirts" / "12" / "manifest.json").write_text(json.dumps(manifest))
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
            ["train-export", "check", "--bundle", "s"],
            ["train-export", "report", "shirts/12", "s"],
            ["train-export", "explain", "onnx"],
            ["train-export", "explain", "--bundle", "shirts/12", ""],
            ["train-export", "run", "--serve", "b"],
        ],
        tmp_path,
    )

    assert found[:5] == ["smoke", "conv64 conv64x2", "shirts", "12", ""]
    assert found[5:7] == ["shirts/12"] * 2
    assert found[7:] == [
        "onnx-float32 onnx-float16 onnx-int8", "onnx-int8 tflite-int8", "best",
    ]  # fmt: skip


def test_completion_imports_nothing_that_is_slow(tmp_path):
    code = (
        "import sys; sys.argv = ['train-export']; from pipeline.__main__ import app\n"
        "try:\n    app(prog_name='train-export')\nexcept SystemExit:\n    pass\n"
        "print(sorted({'tensorflow', 'keras', 'prefect', 'numpy', 'grpc'} & set(sys.modules)))"
    )
    asked = {
        "_TRAIN_EXPORT_COMPLETE": "complete_bash",
        "COMP_WORDS": "train-export explain ",
        "COMP_CWORD": "2",
    }

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | asked,
    )

    assert done.stdout.split() == [*options.VARIANTS, "[]"]


def test_every_variant_that_is_completed_is_one():
    variant = TypeAdapter(config.VariantName)

    assert [variant.validate_python(one) for one in options.VARIANTS] == list(options.VARIANTS)


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
