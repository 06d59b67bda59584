"""`docker compose up` for real: from nothing to answers, and through every container's death."""

import json
import subprocess
import time

import pytest

from tests.compose.load import MODEL, Load
from tests.compose.system import RECOVER_S, ROOT, until
from tests.deploy.observability import ENVOY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ALWAYS = {
    "postgres", "prefect-server", "worker", "inference", "balancer", "shadow", "prometheus",
}  # fmt: skip
ONCE = {"volumes", "bootstrap"}
SECRETS = ("PASSWORD", "TOKEN", "SECRET", "KEY")


def service(container):
    return container["Config"]["Labels"]["com.docker.compose.service"]


def deploy_run(system):
    """Start a run from the host, as the README says, and return its id."""
    before = {run["id"] for run in system.runs()}
    system.run("prefect", "deployment", "run", "train-export", "--param", "preset=smoke")
    return next(run["id"] for run in system.runs() if run["id"] not in before)


def state(system, run):
    return system.get("PREFECT_PORT", f"/api/flow_runs/{run}")["state"]


def finish(system, run):
    """Wait for a run to end well."""

    def is_over():
        now = state(system, run)
        assert now["type"] not in {"FAILED", "CRASHED", "CANCELLED"}, now
        return now["type"] == "COMPLETED"

    until(is_over, 900, f"run {run} completed")


def test_everything_is_up_and_healthy_and_the_first_model_is_served(system):
    system.wait_healthy(*ALWAYS)
    ended = {service(one): one["State"] for one in system.containers() if service(one) in ONCE}
    assert {name: one["ExitCode"] for name, one in ended.items()} == dict.fromkeys(ONCE, 0)
    assert system.versions() == [1]

    picture = ROOT / "tests/compose/trouser.png"
    asked = "serve-export", "predict", str(picture), "--address", system.address, "--json"
    said = system.run(*asked)
    assert json.loads(said)[0]["model"] == MODEL
    said = system.run("serve-export", "parity", "--address", system.address, "--json")
    assert "selfCheck" in said or "self_check" in said


def test_no_container_may_more_than_it_must(system):
    for one in system.containers():
        name, host, config = service(one), one["HostConfig"], one["Config"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert config["User"] not in {"", "0", "root"}, name
        assert host["Memory"], name
        if name not in ONCE:
            assert host["PidsLimit"], name
            assert config["Healthcheck"]["Test"], name
            assert host["RestartPolicy"]["Name"] == "unless-stopped", name
        for bindings in (host["PortBindings"] or {}).values():
            assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}, name
        told = [text.partition("=") for text in config["Env"]]
        assert not [key for key, _, value in told if value and key.endswith(SECRETS)], name


def test_no_image_has_a_secret_or_tensorflow_where_it_serves(system):
    for target in ("service", "pipeline"):
        said = system.run("docker", "history", "--no-trunc", f"train-export/{target}:local")
        assert not any(word in said.upper() for word in ("PASSWORD=", "TOKEN="))
    said = system.run(
        "docker", "run", "--rm", "--entrypoint", "python", "train-export/service:local", "-c",
        "import importlib.util as u, json;"
        "print(u.find_spec('tensorflow'), u.find_spec('pipeline'),"
        " json.load(open('/opt/venv/sbom.json'))['bomFormat'])",
    )  # fmt: skip
    assert said.split() == ["None", "None", "CycloneDX"]


def test_requests_of_one_connection_are_spread_over_replicas(system):
    system.compose("up", "--detach", "--no-recreate", "--scale", "inference=3", "inference")
    try:
        until(lambda: len(system.containers("inference")) == 3, 60, "three replicas")
        system.wait_healthy("inference")

        def spread():
            with Load(system.address) as load:
                time.sleep(3)
            assert not load.failures
            found = system.get(
                "PROMETHEUS_PORT",
                "/api/v1/query?query=sum%20by%20(instance)"
                "(increase(nv_inference_request_success[1m]))%20%3E%200",
            )
            return len(found["data"]["result"]) == 3

        until(spread, 120, "all three answer")
    finally:
        system.compose("up", "--detach", "--no-recreate", "--scale", "inference=2", "inference")


def test_prometheus_scrapes_every_replica(system):
    def scraped():
        targets = system.get("PROMETHEUS_PORT", "/api/v1/targets")["data"]["activeTargets"]
        ours = [one for one in targets if ":8002/" in one["scrapeUrl"]]
        return len(ours) == 2 and {one["health"] for one in targets} == {"up"}

    until(scraped, 120, "both replicas are scraped")
    rules = system.get("PROMETHEUS_PORT", "/api/v1/rules")["data"]["groups"]
    assert any(rule["type"] == "alerting" for group in rules for rule in group["rules"])
    assert all(rule["health"] == "ok" for group in rules for rule in group["rules"])
    for name in sorted(ENVOY):
        found = system.get("PROMETHEUS_PORT", f"/api/v1/query?query={name}")
        assert found["data"]["result"], f"Envoy has no {name}"


def test_a_run_from_the_host_is_swapped_in_under_load_without_a_failed_request(system):
    newest = max(system.versions())
    with Load(system.address) as load:
        run = deploy_run(system)
        finish(system, run)
        until(lambda: load.answers[str(newest + 1)], 120, "the new version answers")
    assert not load.failures
    assert load.answers[str(newest)]


@pytest.mark.parametrize(
    "name",
    ["inference", "balancer", "worker", "shadow", "prometheus", "prefect-server", "postgres"],
)
def test_a_killed_container_comes_back_and_no_request_is_lost(system, name):
    before = system.versions()
    with Load(system.address) as load:
        time.sleep(1)
        system.kill(name)
        until(lambda: load.answers.total() > 50, RECOVER_S, "requests are answered")
        time.sleep(2)
        system.wait_healthy(name, *ALWAYS)
        answered = load.answers.total()
        until(lambda: load.answers.total() > answered + 50, 60, "requests are answered after it")
    assert not load.failures
    assert system.versions() == before
    assert system.containers(name)[0]["RestartCount"] >= 1


def test_a_run_whose_worker_is_killed_loses_no_bundle_and_can_be_run_again(system):
    before = system.versions()
    run = deploy_run(system)
    until(lambda: state(system, run)["type"] == "RUNNING", 300, "it runs")
    time.sleep(20)
    system.kill("worker")
    system.wait_healthy("worker")
    until(
        lambda: state(system, run)["type"] in {"CRASHED", "COMPLETED", "FAILED"},
        600, "the run is over",
    )  # fmt: skip
    assert set(before) <= set(system.versions())

    again = deploy_run(system)
    finish(system, again)
    assert max(system.versions()) > max(before)


def test_down_and_up_again_keeps_models_and_history(system):
    versions, runs = system.versions(), {run["id"] for run in system.runs()}

    system.compose("down", "--timeout", "60")
    system.compose("up", "--detach")
    system.wait_healthy("prefect-server", "inference")

    with Load(system.address) as load:
        until(lambda: load.answers[str(max(versions))], RECOVER_S, "the newest version answers")
    assert system.versions() == versions
    assert runs <= {run["id"] for run in system.runs()}


@pytest.mark.parametrize(
    ("mount", "word"),
    [
        ("--tmpfs=/models:size=1m,uid=10001", "No space left on device"),
        ("--volume={name}_models:/models:ro", "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_volume_that_is_full_or_read_only_is_one_clear_error(system, mount, word):
    done = subprocess.run(
        ["docker", "run", "--rm", "--read-only", "--tmpfs=/tmp:mode=1777",
         "--tmpfs=/runs:uid=10001", "--tmpfs=/cache:uid=10001", mount.format(name=system.name),
         "train-export/pipeline:local",
         "train-export", "run", "--preset", "smoke", "--models", "/models", "--runs", "/runs"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip

    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr[-3000:]
    assert word in last
    assert "[(" not in last
    assert "Traceback" not in done.stderr
