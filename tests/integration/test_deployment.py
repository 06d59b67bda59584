"""`prefect deployment run train-export`, literally, against a real server and worker."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from service import bundle

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STOP_S = 60
END_S = 420
UNDER_WAY = {"SCHEDULED", "PENDING", "RUNNING"}


def prefect(environment, *words):
    """Run a Prefect command."""
    done = subprocess.run(
        ["prefect", *words],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployed(prefect_server):
    """The environment of a client of a server that was set up, twice."""
    for made in ("created", "as it was"):
        done = subprocess.run(
            ["script", "-qec", "train-export deploy", "/dev/null"],
            cwd=ROOT, env=prefect_server, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert f"work pool train-export: {made}" in done.stdout
    return prefect_server


def ask(environment, path, question=None):
    """Ask the server's API."""
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/{path}",
        data=None if question is None else json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def runs(environment):
    """Return every flow run of the deployment."""
    question = {"deployments": {"name": {"any_": ["train-export"]}}, "sort": "START_TIME_ASC"}
    return ask(environment, "flow_runs/filter", question)


def children(process):
    """Return the processes that one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(stat.parent.name))
    return found


def test_setting_a_server_up_twice_leaves_one_of_each(deployed):
    deployment = ask(deployed, "deployments/name/train-export/train-export")
    automations = ask(deployed, "automations/filter", {})

    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert [one["name"] for one in automations] == [
        "train-export: runs without a heartbeat have crashed"
    ]
    assert automations[0]["actions"][0]["state"] == "CRASHED"


def test_every_parameter_of_the_deployment_has_a_type_and_a_description(deployed):
    deployment = ask(deployed, "deployments/name/train-export/train-export")
    schema = deployment["parameter_openapi_schema"]["properties"]

    assert set(deployment["parameters"]) <= set(schema)
    for name, one in schema.items():
        assert one.get("type") or one.get("anyOf"), name
        assert one.get("description"), name


@pytest.mark.timeout(1500)
def test_of_two_runs_at_once_one_waits_and_one_stopped_by_sigterm_goes_on(deployed, tmp_path):
    parameters = (
        "preset=smoke", "epochs=6", f"models={tmp_path / 'models'}", f"runs={tmp_path / 'runs'}",
    )  # fmt: skip
    words = [word for parameter in parameters for word in ("--param", parameter)]
    for name in ("train-export", "train-export/train-export"):  # both of its names
        status, output = prefect(deployed, "deployment", "run", name, *words)
        assert status == 0, output

    log = tmp_path / "worker.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["prefect", "worker", "start", "--pool", "train-export"],
            cwd=ROOT, env=deployed, stdout=output, stderr=subprocess.STDOUT,
        ) as worker,
    ):  # fmt: skip
        until = time.monotonic() + END_S
        stopped = False
        while {run["state_type"] for run in runs(deployed)} & UNDER_WAY:
            assert time.monotonic() < until, log.read_text()
            if not stopped and "epoch 1 of 6" in log.read_text():
                (flow,) = children(worker)
                os.kill(flow, signal.SIGTERM)
                stopped = True
            time.sleep(0.2)
        worker.terminate()
        try:
            worker.wait(STOP_S)
        except subprocess.TimeoutExpired:  # Prefect's, while the last run's process ends
            worker.kill()

    said = log.read_text()
    assert {run["state_type"] for run in runs(deployed)} == {"COMPLETED"}, said
    assert "scheduled again: training goes on where it was stopped" in said
    assert "resuming from" in said
    assert "train.fit: nothing to do" in said  # of the second run
    for number in (1, 2):
        read = bundle.read(tmp_path / "models" / "fashion-mnist-smoke" / str(number))
        assert read.manifest.served.passed


def test_a_name_that_is_not_deployed_is_one_sentence(deployed):
    status, output = prefect(deployed, "deployment", "run", "nosuch")

    assert status == 1
    assert "Deployment 'nosuch' not found!" in output
    assert "Traceback" not in output
