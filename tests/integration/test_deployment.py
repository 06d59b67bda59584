"""`prefect deployment run train-export`, literally, against a real server and worker."""

import json
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


def prefect(environment, *words, terminal=False):
    """Run a Prefect command; on a terminal it asks questions, and there is nobody to answer."""
    command = ["prefect", *words]
    done = subprocess.run(
        ["script", "-qec", " ".join(command), "/dev/null"] if terminal else command,
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployed(prefect_server):
    """The environment of a client of a server that has the deployment of prefect.yaml."""
    for words in (
        ("work-pool", "create", "train-export", "--type", "process"),
        ("deploy", "--all"),
    ):
        status, output = prefect(prefect_server, *words, terminal=True)
        assert status == 0, output
    return prefect_server


def states(environment):
    """Return the state of every flow run of the deployment, by its name."""
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/flow_runs/filter",
        data=json.dumps({"deployments": {"name": {"any_": ["train-export"]}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return {run["name"]: run["state_type"] for run in json.load(response)}


@pytest.mark.timeout(900)
def test_both_names_of_the_deployment_start_a_run_that_a_worker_finishes(deployed, tmp_path):
    parameters = ("preset=smoke", f"models={tmp_path / 'models'}", f"runs={tmp_path / 'runs'}")
    words = [word for parameter in parameters for word in ("--param", parameter)]
    for name in ("train-export", "train-export/train-export"):
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
        while set(states(deployed).values()) & {"SCHEDULED", "PENDING", "RUNNING"}:
            assert time.monotonic() < until, log.read_text()
            time.sleep(1)
        worker.terminate()
        try:
            worker.wait(STOP_S)
        except subprocess.TimeoutExpired:  # Prefect's, while the last run's process ends
            worker.kill()

    assert set(states(deployed).values()) == {"COMPLETED"}, log.read_text()
    for number in (1, 2):
        read = bundle.read(tmp_path / "models" / "fashion-mnist-smoke" / str(number))
        assert read.manifest.served.passed


def test_a_name_that_is_not_deployed_is_one_sentence(deployed):
    status, output = prefect(deployed, "deployment", "run", "nosuch")

    assert status == 1
    assert "Deployment 'nosuch' not found!" in output
    assert "Traceback" not in output
