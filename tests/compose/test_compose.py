"""`docker compose up` for real: from nothing to answers, and through every container's death."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc
from tests.compose.load import MODEL, Load
from tests.compose.system import FIRST_S, RECOVER_S, ROOT, until
from tests.deploy.observability import ENVOY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ALWAYS = {
    "postgres", "prefect-server", "worker", "inference", "balancer", "shadow", "prometheus",
}  # fmt: skip
ONCE = {"volumes", "bootstrap"}
SECRETS = ("PASSWORD", "TOKEN", "SECRET", "KEY")


def service(container):
    return container["Config"]["Labels"]["com.docker.compose.service"]


def children(pid):
    """Return the processes that a container's first one has started."""
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


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


def test_building_again_what_has_not_changed_starts_nothing_again(system):
    before = {one["Id"] for one in system.containers() if service(one) not in ONCE}

    system.compose("up", "--detach", "--build", timeout_s=FIRST_S)

    assert {one["Id"] for one in system.containers() if service(one) not in ONCE} == before


def test_another_password_than_the_databases_is_refused_in_one_sentence(system):
    with pytest.raises(AssertionError, match="error: POSTGRES_PASSWORD is not the password that"):
        system.compose("run", "--rm", "-e", "POSTGRES_PASSWORD=other", "volumes")


@pytest.mark.parametrize(
    ("service", "file", "sees"),
    [("inference", "token", True), ("inference", "password", False), ("worker", "token", False)],
)
def test_a_secret_is_seen_only_by_who_needs_it(system, service, file, sees):
    said = system.within(service, f"import os; print(os.access('/keys/{file}', os.R_OK))")
    assert said.strip() == str(sees)


ASKED = """
import urllib.request as u
for port, path in ((9901, "/ready"), (9902, "/stats/prometheus"), (9902, "/quitquitquit")):
    try:
        print(u.urlopen(f"http://balancer:{port}{path}", timeout=5).status)
    except OSError as error:
        print(getattr(error, "code", "refused"))
"""


def test_the_balancers_admin_is_reached_by_nobody_else(system):
    assert system.within("inference", ASKED).split() == ["refused", "200", "404"]


@pytest.mark.parametrize(
    ("rows", "compression", "code", "sentence"),
    [
        (1, grpc.Compression.Gzip, "UNIMPLEMENTED", "takes no compressed messages"),
        (90_000, None, "RESOURCE_EXHAUSTED", "ask about fewer images at a time"),
    ],
)
def test_what_the_balancer_refuses_has_a_code_and_a_sentence(
    system, rows, compression, code, sentence
):
    request = inference_pb2.ModelInferRequest(
        model_name=MODEL, raw_input_contents=[bytes(rows * 28 * 28)]
    )
    request.inputs.add(name="image", datatype="UINT8", shape=[rows, 28, 28, 1])
    with grpc.insecure_channel(
        system.address, [("grpc.max_send_message_length", -1)], compression=compression
    ) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=60)
    assert (caught.value.code().name, sentence in str(caught.value.details())) == (code, True)


def test_the_playground_shows_what_every_variant_answers(system):
    system.compose("--profile", "playground", "up", "--detach", "--no-recreate", "playground")
    try:
        system.wait_healthy("playground")
        asked = f"/api/answer?model={MODEL}&row=0"
        url = f"http://127.0.0.1:{system.environment['PLAYGROUND_PORT']}{asked}"
        with urllib.request.urlopen(urllib.request.Request(url, b""), timeout=120) as answer:
            said = [json.loads(line) for line in answer]
    finally:
        system.compose("--profile", "playground", "rm", "--stop", "--force", "playground")
    assert "error" not in said[-1] and "missing" not in said[-1], said[-1]
    rows = {row["variant"]: row for row in said[-1]["variants"]}
    assert {"saved-model", "served", "onnx-float32", "tflite-float32"} <= rows.keys()
    assert not any(row["error"] for row in rows.values())


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


def test_a_replica_that_hangs_is_started_again_and_no_request_is_lost(system):
    one = system.containers("inference")[0]
    with Load(system.address) as load:
        for child in children(one["State"]["Pid"]):
            os.kill(child, signal.SIGSTOP)
        until(
            lambda: json.loads(system.run("docker", "inspect", one["Id"]))[0]["RestartCount"]
            > one["RestartCount"],
            RECOVER_S, "it is started again",
        )  # fmt: skip
        system.wait_healthy("inference")
    assert not load.failures


def test_clients_that_wait_are_answered_when_every_replica_was_away(system):
    replicas = system.compose("ps", "--quiet", "inference").split()
    with Load(system.address) as load:
        system.run("docker", "stop", *replicas)
        time.sleep(10)
        answered = load.answers.total()
        system.run("docker", "start", *replicas)
        until(lambda: load.answers.total() > answered + 50, RECOVER_S, "they are answered")
    assert not load.failures


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


def test_several_prefect_servers_on_redis_finish_a_run(system):
    system.compose("--env-file", "deploy/scale.env", "up", "--detach", timeout_s=FIRST_S)
    system.wait_healthy("redis", "prefect-services", "prefect-server", "worker")

    newest = max(system.versions())
    finish(system, deploy_run(system))

    assert max(system.versions()) == newest + 1


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
