"""A real engine, and one project on it for the whole folder."""

import os
import subprocess
import warnings

import pytest

from tests.compose.load import MODEL
from tests.compose.system import FIRST_S, System, until, up

REQUIRED = "REQUIRE_DOCKER"


def engine() -> str:
    """Return why there is no engine with Compose; empty if there is."""
    for words in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it fails"
    return ""


@pytest.fixture(scope="session")
def docker():
    """Skip loudly where no engine answers, or fail if one is required."""
    missing = engine()
    if missing and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set and no Docker engine answers: {missing}")
    if missing:
        pytest.skip(f"NO DOCKER ENGINE, compose was NOT tested: {missing}")


@pytest.fixture(scope="session")
def system(docker):
    """The project, from nothing until the first model is served."""
    with warnings.catch_warnings(), up(System(f"train-export-test-{os.getpid()}")) as found:
        until(lambda: is_served(found), FIRST_S, "the first model is served")
        yield found


def is_served(system):
    """Say whether a picture is answered."""
    from service.client import Client
    from service.errors import ServerError

    with Client(system.address, timeout_s=5) as client:
        try:
            return any(one.name == MODEL and one.state == "READY" for one in client.models())
        except ServerError:
            return False
