"""A Prefect server of our own, and the command line as a user runs it."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import dataset
from pipeline.config import DataConfig

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 180


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a user with an empty home, but for the images."""
    images = dataset.prepare(DataConfig()).folder
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return kept | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "PREFECT_HOME": str(home / ".prefect"),
        "TRAIN_EXPORT_DATA": str(images),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PWD": str(ROOT),
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }


@pytest.fixture(scope="session")
def prefect_server(environment, tmp_path_factory) -> Iterator[dict[str, str]]:
    """Give the environment of a client of a real Prefect server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    log = tmp_path_factory.mktemp("prefect") / "server.log"
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        ) as server,
    ):
        until = time.monotonic() + START_S
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield environment | {"PREFECT_API_URL": url}
        server.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
