"""A fresh clone of the working tree, and the environment of who follows the documentation in it."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """Clone the repository, and lay over it what is not committed yet."""
    folder: Path = tmp_path_factory.mktemp("reader") / "train-export"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    command = ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).unlink()
    return folder


@pytest.fixture(scope="session")
def reader(clone, tmp_path_factory) -> dict[str, str]:
    """Give the environment of a user with an empty home, who has typed `make setup`.

    Installing takes minutes and is tests/integration/test_install.py's; here the environment of
    this test stands for it, with the clone's own code.
    """
    home = tmp_path_factory.mktemp("home")
    ours = ("PREFECT", "COVERAGE", "SERVE_EXPORT", "TRAIN_EXPORT", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "PREFECT_HOME": str(home / ".prefect"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "PWD": str(clone),
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "COLUMNS": "150",  # no line is folded
    }


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """Return a function that finds ports nobody listens on."""

    def find(count: int) -> list[int]:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return ports

    return find
