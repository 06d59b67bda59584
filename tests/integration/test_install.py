"""The service alone, installed as a user or an image installs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The bin folder of an environment with nothing but `pip install '.[service]'`."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", f"{ROOT}[service]"], check=True)
    return folder / "bin"


def test_the_service_is_installed_without_training_software(clean):
    listed = subprocess.run(
        [clean / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )

    names = {line.partition("==")[0].lower() for line in listed.stdout.splitlines()}

    assert {"onnxruntime", "grpcio", "train-export"} <= names
    assert not {"tensorflow", "keras", "prefect", "onnx", "tf2onnx"} & names


def test_the_service_alone_serves_a_bundle(clean, make_bundle, tmp_path):
    repository = make_bundle().parents[1]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [clean / "serve-export", "serve", "--repository", repository, "--address", "127.0.0.1:0"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        address = server.stdout.readline().removeprefix("serving on ").strip()
        asked = subprocess.run(
            [clean / "serve-export", "parity", "--address", address],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.terminate()

    assert asked.returncode == 0, asked.stderr
    assert "self-check" in asked.stdout
    assert server.returncode == 0
