"""The command as a process: which of its two ways it takes, and that both end alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAIT_S = 60


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )


def test_a_setting_that_cannot_work_is_one_sentence_and_status_2(tmp_path):
    done = command("serve", "--repository", tmp_path, "--max-batch-rows", "0")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: max_batch_rows is 0, expected 1 to 1048576\n"


def test_a_repository_that_is_not_there_is_one_sentence_and_status_1(tmp_path):
    done = command("serve", "--repository", tmp_path / "none", "--address", "127.0.0.1:0")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: repository {tmp_path / 'none'} ")


def test_server_whose_files_cannot_be_read_says_why_and_leaves_no_process(tmp_path):
    done = command("serve", "--repository", tmp_path, "--token-file", tmp_path / "none")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: token file {tmp_path / 'none'} cannot be read: ")


@pytest.mark.parametrize(
    "arguments",
    [(), ("serve",), ("serve", "--nonsense"), ("nonsense",), ("worker", "--index=0")],
)
def test_wrong_options_are_explained_with_status_2(arguments):
    done = command(*arguments)

    assert done.returncode == 2
    assert "Usage: " in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["serve", "predict", "parity", "health", "alias", "doctor"])
def test_every_command_has_its_help(name):
    done = command(name, "--help")

    assert done.returncode == 0
    assert f"Usage: python -m service {name} [OPTIONS]" in done.stdout


HEALTH = """
import sys
from service.__main__ import main
sys.argv = ["serve-export", "health", "--address", "127.0.0.1:1"]
try:
    main()
except SystemExit as end:
    print(end.code, sorted({"typer", "rich", "pydantic", "numpy"} & set(sys.modules)))
"""


def test_health_is_asked_without_what_explains_its_options_and_colours_its_refusal():
    done = subprocess.run([sys.executable, "-c", HEALTH], capture_output=True, text=True)

    assert done.stdout == "1 []\n"
    assert done.stderr.startswith("error: no server answers at 127.0.0.1:1")


@pytest.mark.parametrize("wrong", [("--timeout-s", "-1"), ("--tls-ca", "/nowhere.pem")])
def test_values_of_health_that_cannot_work_are_status_2(wrong):
    done = command("health", *wrong)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("odd", [("--nonsense",), ("--timeout-s", "soon"), ("--ready=1",)])
def test_odd_options_of_health_are_explained(odd):
    done = command("health", *odd)

    assert done.returncode == 2
    assert "─ Error ─" in done.stderr


def mapped(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def test_server_does_not_load_what_explains_its_options(make_bundle, start_server):
    root = make_bundle().parents[1]
    quick = start_server("--repository", str(root), "--address", "127.0.0.1:0")
    variables = start_server(SERVE_EXPORT_REPOSITORY=str(root), SERVE_EXPORT_ADDRESS="127.0.0.1:0")

    for server in (quick, variables):
        assert server.address()
        assert "pydantic_core" not in mapped(server.popen.pid)
        assert "PIL/_imaging" not in mapped(server.popen.pid)
        assert "onnxruntime" in mapped(server.popen.pid)
