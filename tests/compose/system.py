"""The compose project as a user brings it up, under a name and on ports of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIRST_S, RECOVER_S = 1200, 300
PORTS = (
    "SERVE_EXPORT_PORT", "PREFECT_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "PLAYGROUND_PORT",
)  # fmt: skip
PROFILES = "--profile", "scale", "--profile", "playground"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Wait for something to be true; errors count as not yet."""
    end_s = time.monotonic() + within_s
    said: object = "nothing"
    while time.monotonic() < end_s:
        try:
            if found := condition():
                return found
        except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            said = error
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {within_s:g} s; last: {said}")


@dataclass
class System:
    """One project of docker-compose.yml."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ports = {name: str(free_port()) for name in PORTS}
        api = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api"
        self.environment = {
            "FIRST_PRESET": "smoke",
            "SAMPLE_RATE": "0.2",
            "PREFECT_UI_API_URL": api,
            "PREFECT_API_URL": api,
            **ports,
            **self.environment,
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.environment['SERVE_EXPORT_PORT']}"

    def run(self, *words: str, timeout_s: float = 600) -> str:
        """Run a command on the host, in the project's folder; return what it prints."""
        ours = Path(sys.executable).with_name(words[0])
        command = [str(ours) if ours.is_file() else words[0], *words[1:]]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        said = f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert done.returncode == 0, said
        return done.stdout

    def compose(self, *words: str, timeout_s: float = 600) -> str:
        project = "docker", "compose", "--project-name", self.name
        return self.run(*project, *words, timeout_s=timeout_s)

    def within(self, service: str, program: str) -> str:
        """Run a Python program in a container; return what it prints."""
        return self.compose("exec", "-T", service, "python", "-c", program)

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """Return what the engine knows of each container, one of a service or all."""
        names = self.compose("ps", "--all", "--quiet", *([service] if service else [])).split()
        if not names:
            return []
        found: list[dict[str, Any]] = json.loads(self.run("docker", "inspect", *names))
        return found

    def wait_healthy(self, *services: str) -> None:
        """Wait until every container of some services is healthy."""
        for service in services:
            until(partial(self.is_healthy, service), RECOVER_S, f"{service} is healthy")

    def kill(self, service: str) -> None:
        """End the first process of a service's first container, as a crash would."""
        one = self.containers(service)[0]
        os.kill(one["State"]["Pid"], signal.SIGKILL)

    def is_healthy(self, service: str) -> bool:
        found = self.containers(service)
        return bool(found) and all(
            one["State"].get("Health", {}).get("Status") == "healthy" for one in found
        )

    def get(self, port: str, path: str, question: object = None) -> Any:
        """Ask one of the published HTTP servers."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.environment[port]}{path}",
            data=None if question is None else json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def runs(self) -> list[dict[str, Any]]:
        """Return every flow run, the newest last."""
        found: list[dict[str, Any]] = self.get(
            "PREFECT_PORT", "/api/flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"}
        )
        return found

    def versions(self) -> list[int]:
        """Return what is published."""
        said = self.compose("exec", "-T", "inference", "ls", "/models/fashion-mnist-smoke")
        return sorted(int(one) for one in said.split() if one.isdigit())


@contextmanager
def up(system: System) -> Iterator[System]:
    """Bring a project up, and take it down with its volumes."""
    try:
        system.compose("up", "--detach", "--build", "--quiet-pull", timeout_s=FIRST_S)
        yield system
    finally:
        folder = os.environ.get("COMPOSE_LOGS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{system.name}.log").write_text(system.compose("logs", "--no-color"))
        system.compose(
            "--profile", "scale", "down", "--volumes", "--remove-orphans", "--timeout", "10"
        )
