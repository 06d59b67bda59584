import contextlib
import json
import os
import pty
import signal
import subprocess
import sys

from typer.testing import CliRunner

from pipeline.__main__ import app


def invoke(*words, url=""):
    runner = CliRunner(
        env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PREFECT_API_URL": url or None}
    )
    return runner.invoke(app, words)


def test_doctor_finds_this_machine_sound():
    shown = invoke("doctor")

    assert shown.exit_code == 0, shown.output
    assert "/device:CPU:0" in shown.output
    assert "broken" not in shown.output


def test_doctor_ends_with_1_and_one_sentence_when_something_is_broken():
    shown = invoke("doctor", "--json", url="http://127.0.0.1:9/api")

    assert shown.exit_code == 1
    assert [one["name"] for one in json.loads(shown.stdout) if one["wrong"]] == ["Prefect"]
    assert shown.stderr.startswith("error: the Prefect server http://127.0.0.1:9/api does not")


def test_models_lists_every_network_with_its_parameters():
    found = json.loads(invoke("models", "--json").stdout)
    shown = invoke("models")

    assert {"name", "parameters", "multiply_adds"} <= set(found[0])
    assert all(f"{one['parameters']:,}" in shown.output for one in found)


def test_a_place_that_is_no_folder_is_one_sentence():
    shown = invoke("doctor", "--models", "/dev/null")

    assert shown.exit_code == 1
    assert shown.stderr == "error: /dev/null is no folder; name another place\n"


def test_ctrl_c_while_tensorflow_starts_is_one_line_and_130():
    terminal, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", "doctor"],
        stdout=subprocess.PIPE,
        stderr=side,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"},
    ) as process:
        os.close(side)
        said = b""
        while b"starting TensorFlow" not in said:
            said += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux' word for an end that nobody writes to
            while piece := os.read(terminal, 4096):
                said += piece
        out = process.stdout.read()
    os.close(terminal)

    assert (process.returncode, out) == (130, b"")
    assert said.endswith(b"error: stopped\r\n")
    assert b"Traceback" not in said
