"""Each command of README.md is run here, or it is known which test runs it."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.docs import blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
COMMAND = re.compile(r"(?:make|train-export|serve-export|prefect|docker|pip|python|curl|git) ")
SHOWN = ("network  ", "fashion-mnist version 1: parity", "dataset ─▶")
ENDED_S = 60

# Answered by the tiny model, in seconds; what serves or watches runs until it is stopped.
HERE = {
    "serve-export serve --repository models",
    "serve-export predict shirt.png",
    "serve-export parity",
    "serve-export serve --repository models --sample-rate 0.01",
    "serve-export parity --watch",
    "serve-export playground --models models",
}
STAYS = {  # and what it says once it works
    "serve-export serve --repository models": "serving on",
    "serve-export serve --repository models --sample-rate 0.01": "serving on",
    "serve-export parity --watch": "self-check",
    "serve-export playground --models models": "playground on",
}
PORTS = {"serve-export playground --models models": ("--listen", "127.0.0.1:0")}  # not README's
# What takes minutes, a container engine, or a bundle of the pipeline: a test that runs it, and what
# stands in that test.
ELSEWHERE = {
    "make run": ("tests/integration/test_run.py", '"train-export", "run", "--preset", "smoke"'),
    "make test": (".ci/run", "make test"),
    "train-export explain onnx-int8 --bundle models/fashion-mnist/1": (
        "tests/pipeline/explain/test_explain.py",
        "onnx-int8",
    ),
    "train-export check --bundle models/fashion-mnist/1": (
        ".ci/run",
        "train-export check --bundle",
    ),
    "train-export promote fashion-mnist 1 --endpoint 127.0.0.1:8001": (
        "docs/tutorial.md",  # as the last stage of a run
        "--endpoint 127.0.0.1:8001",
    ),
    "train-export shadow --endpoint 127.0.0.1:8001": (
        "tests/integration/test_shadow.py",
        '"shadow", "--endpoint"',
    ),
    "docker compose up --build --detach": (
        "tests/compose/system.py",
        '"up", "--detach", "--build"',
    ),
    "prefect server start": (
        "tests/integration/conftest.py",
        '"prefect", "server", "start"',
    ),
    "train-export deploy": ("tests/integration/test_deployment.py", "train-export deploy"),
    "prefect worker start --pool train-export": (
        "tests/integration/test_deployment.py",
        '"prefect", "worker", "start", "--pool", "train-export"',
    ),
    "prefect deployment run train-export --param preset=smoke": (
        "tests/integration/test_deployment.py",
        '"deployment", "run", name',
    ),
}


def plain() -> list[str]:
    """Return the text of README's blocks that are not Python."""
    return [one.text.strip() for one in blocks.read(README) if one.language != "python"]


def commands() -> list[str]:
    """Return each line of the blocks that begin with a command, without the remark after it."""
    texts = [text.replace("\\\n", " ") for text in plain() if COMMAND.match(text)]
    lines = [line for text in texts for line in text.splitlines() if line]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def test_every_command_of_the_readme_is_run_here_or_by_a_test_that_is_named():
    assert set(commands()) == HERE | set(ELSEWHERE)


def test_every_other_block_of_the_readme_shows_what_is_put_out_or_a_picture():
    others = [text for text in plain() if not COMMAND.match(text)]

    assert [text for text in others if not text.startswith(SHOWN)] == []


@pytest.mark.parametrize("command", ELSEWHERE)
def test_the_file_that_is_named_runs_the_command(command):
    path, words = ELSEWHERE[command]

    assert words in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_has_the_readme_s_targets_in_a_fresh_clone(clone, reader, target):
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=clone, env=reader, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert {"run": ".venv/bin/train-export run", "test": "pytest"}[target] in done.stdout


@pytest.fixture
def folder(clone, make_bundle, tiny, tmp_path) -> Path:
    """Give a folder with a model named as README's, and its picture."""
    make_bundle(tmp_path / "models", name="fashion-mnist")
    shutil.copy(ROOT / "tests" / "compose" / "trouser.png", tmp_path / "shirt.png")
    np.save(tmp_path / "images.npy", tiny.images(3))
    return tmp_path


@contextlib.contextmanager
def running(command, folder, environment) -> Iterator[str]:
    """Run what stays, until it says what it should; then press Ctrl-C, and it must end well."""
    log = folder / f"{command.replace(' ', '-')}.log"
    words = [*command.split(), *PORTS.get(command, ())]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            until = time.monotonic() + ENDED_S
            while STAYS[command] not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield log.read_text()
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(ENDED_S)
    assert status in {0, 128 + signal.SIGINT}, log.read_text()


@pytest.fixture
def environment(reader, free_ports) -> dict[str, str]:
    return reader | {"SERVE_EXPORT_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}"}


def ended(words, folder, environment) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=ENDED_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_server_started_as_the_readme_says_answers_all_that_it_says_to_ask(folder, environment):
    serve, page = (
        "serve-export serve --repository models",
        "serve-export playground --models models",
    )
    predict, parity = "serve-export predict shirt.png", "serve-export parity"
    with running(serve, folder, environment), running(page, folder, environment):
        assert "fashion-mnist version 1" in ended(predict.split(), folder, environment)
        assert "self-check" in ended(parity.split(), folder, environment)
        (python,) = (block.text for block in blocks.read(README) if block.language == "python")
        code = "import numpy\nimages = numpy.load('images.npy')\n" + python.replace(
            "127.0.0.1:8001", environment["SERVE_EXPORT_ADDRESS"]
        )
        assert "striped" in ended([sys.executable, "-c", code], folder, environment)


@pytest.mark.slow
def test_a_server_that_lets_shadows_read_is_watched_as_the_readme_says(folder, environment):
    with (
        running("serve-export serve --repository models --sample-rate 0.01", folder, environment),
        running("serve-export parity --watch", folder, environment) as shown,
    ):
        assert "fashion-mnist version 1" in shown
