import json
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from protos import bundle_pb2, inference_pb2
from service.__main__ import app
from service.rpc import SERVICES, Rpc
from service.settings import ENVIRONMENT_PREFIX, Settings

NOBODY = "127.0.0.1:1"


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def address(listen, rpc):
    return listen(rpc)


@pytest.fixture
def picture(tmp_path):
    """Return a function that writes a 2 x 2 picture of one shade."""

    def picture(shade, name="picture.png"):
        Image.fromarray(np.full((2, 2), shade, np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return picture


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def sentence(result):
    """Return the one sentence of a command that was refused."""
    assert result.exit_code == 1
    assert result.stdout == ""
    return plain(result.stderr).removeprefix("error: ").rstrip("\n")


def test_help_names_every_setting_with_its_variable_and_default(run):
    shown = " ".join(plain(run("serve", "--help").stdout).split())

    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert f"{ENVIRONMENT_PREFIX}{field.name.upper()}" in shown
    assert "127.0.0.1:8001" in shown


def test_no_command_shows_the_help(run):
    result = run()

    assert result.exit_code == 2
    assert all(name in result.output for name in ("serve", "predict", "parity"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "--repository", "x", "--threads", "many"),
        ("serve", "--repository", "x", "--nonsense"),
        ("predict",),
        ("predict", "a.png", "--top", "0"),
        ("nonsense",),
    ],
)
def test_wrong_options_end_with_status_2(run, arguments):
    assert run(*arguments).exit_code == 2


def test_number_out_of_its_range_is_said_to_be_so(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # which the command would set for good

    result = run("serve", "--repository", tmp_path, "--max-batch-rows", "0")

    assert sentence(result) == "max_batch_rows is 0, expected 1 to 1048576"


def test_labels_come_with_the_likeliest_first(run, address, picture):
    result = run("predict", picture(250), "--address", address)

    assert result.exit_code == 0
    lines = [line.strip(" │┃") for line in result.stdout.splitlines()]
    assert "tiny version 1" in result.stdout
    order = [
        next(i for i, line in enumerate(lines) if label in line) for label in ("light", "striped")
    ]
    assert order == sorted(order)
    assert "100.00%" in result.stdout
    assert "add --invert" in result.stdout


def test_top_limits_the_labels(run, address, picture):
    shown = run("predict", picture(250), "--address", address, "--top", 1).stdout

    assert "light" in shown.split("light border")[0]
    assert "striped" not in shown


def test_dark_or_inverted_picture_brings_no_advice(run, address, picture):
    dark = run("predict", picture(5), "--address", address)
    inverted = run("predict", picture(250), "--address", address, "--invert")

    assert "dark" in dark.stdout
    assert "--invert" not in dark.stdout + inverted.stdout


def test_prediction_as_json_has_every_label_of_every_picture(run, address, picture):
    paths = [picture(250, "a.png"), picture(5, "b.png")]

    result = run("predict", *paths, "--address", address, "--json", "--model", "tiny")

    answers = json.loads(result.stdout)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    assert [(answer["model"], answer["version"]) for answer in answers] == [("tiny", "1")] * 2
    assert [next(iter(answer["probabilities"])) for answer in answers] == ["light", "dark"]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_invert_is_what_the_model_sees(run, address, picture):
    result = run("predict", picture(250), "--address", address, "--json", "--invert")

    assert next(iter(json.loads(result.stdout)[0]["probabilities"])) == "dark"


def test_named_version_answers(run, make_bundle, load, listen, picture):
    make_bundle(version=2)
    address = listen(Rpc(load(make_bundle())))

    for options, version in (((), "2"), (("--version", "1"), "1")):
        result = run("predict", picture(5), "--address", address, "--json", *options)
        assert json.loads(result.stdout)[0]["version"] == version


def test_one_of_several_models_must_be_chosen(run, make_bundle, load, listen, picture):
    make_bundle(name="other")
    address = listen(Rpc(load(make_bundle())))

    assert sentence(run("predict", picture(5), "--address", address)) == (
        "the server has the models other, tiny; choose one with --model"
    )
    assert run("predict", picture(5), "--address", address, "--model", "other").exit_code == 0


class Fake:
    """An Rpc with canned answers."""

    def __init__(self, **answers):
        self._answers = {f"/{SERVICES[0]}/{name}": answer for name, answer in answers.items()}
        self.methods = {path: SimpleNamespace(computes=False) for path in self._answers}

    def call(self, path, content):
        return self._answers[path].SerializeToString()


def test_server_without_a_model_is_said_to_have_none(run, listen, picture):
    address = listen(Fake(RepositoryIndex=inference_pb2.RepositoryIndexResponse()))

    assert sentence(run("predict", picture(5), "--address", address)) == (
        "the server has the models none; choose one with --model"
    )


def test_model_that_takes_no_pictures_is_said_to_be_so(run, listen, picture):
    about = inference_pb2.ModelMetadataResponse(name="flat")
    about.inputs.add(name="x", datatype="FP32", shape=[-1, 7])
    address = listen(Fake(ModelMetadata=about))

    result = run("predict", picture(5), "--address", address, "--model", "flat")

    assert sentence(result) == "flat takes tensors of shape (7,), not pictures"


def test_file_that_is_no_picture_is_said_to_be_so(run, address, tmp_path):
    (tmp_path / "a[b].png").write_text("hello")

    assert sentence(run("predict", tmp_path / "a[b].png", "--address", address)) == (
        f"{tmp_path}/a[b].png is not a PNG or JPEG picture"
    )


@pytest.mark.parametrize("command", [("predict", "a.png"), ("parity",)])
def test_server_that_is_not_there_is_said_to_be_so(run, command):
    assert sentence(run(*command, "--address", NOBODY)) == (
        f"no server answers at {NOBODY}; start one with: serve-export serve --repository models"
    )


def test_address_is_taken_from_the_environment_and_the_option_wins(run, address, monkeypatch):
    monkeypatch.setenv("SERVE_EXPORT_ADDRESS", NOBODY)

    assert NOBODY in sentence(run("parity"))
    assert run("parity", "--address", address).exit_code == 0


def test_parity_shows_every_report_and_the_hosts_self_check(run, make_bundle, load, listen):
    def edit(manifest):
        manifest.served.CopyFrom(manifest.parity[0])
        manifest.served.variant = "served"
        failed = bundle_pb2.ParityReport(variant="tflite-int8", failure="it is far off")
        manifest.parity.append(failed)

    address = listen(Rpc(load(make_bundle(edit=edit))))

    shown = run("parity", "--address", address).stdout

    assert "tiny version 1: parity with the original" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert {"onnx-float32", "tflite-int8", "served", "self-check"} <= set(rows)
    assert "passed" in rows["onnx-float32"]
    assert "failed: it is far off" in rows["tflite-int8"]
    assert "self-check on " in shown


def test_parity_as_json_is_the_message(run, address):
    answer = json.loads(run("parity", "--address", address, "--json").stdout)

    (one,) = answer["versions"]
    assert (one["model"], one["version"]) == ("tiny", "1")
    assert one["self_check"]["report"]["passed"] is True


def test_parity_of_an_unknown_model_is_refused(run, address):
    assert sentence(run("parity", "--address", address, "--model", "none")) == (
        "Request for unknown model: 'none' is not found"
    )


def test_help_imports_neither_grpc_nor_onnxruntime():
    code = (
        "import sys; from service.__main__ import app; app(['--help'], standalone_mode=False); "
        "assert not {'grpc', 'onnxruntime', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "service", "parity", "--address", NOBODY],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "no server answers" in done.stderr
    assert "Traceback" not in done.stderr
