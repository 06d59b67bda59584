"""The manifests are valid, agree with each other, and with the server that they start."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).parents[2]
HOME = ROOT / "deploy/kubernetes"
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()  # the sleep in preStop is of 1.30
FOLDERS = ("base", "worker")
WAIT_S = 60

Object = dict[str, Any]


def objects(folder: str) -> list[Object]:
    """Return the objects of a folder, as they are written there."""
    paths = sorted((HOME / folder).glob("*.yaml"))
    return [yaml.safe_load(one.read_text()) for one in paths if one.name != "kustomization.yaml"]


def named(kind: str, folder: str = "base") -> Object:
    (found,) = (one for one in objects(folder) if one["kind"] == kind)
    return found


def kustomization(folder: str) -> Object:
    return yaml.safe_load((HOME / folder / "kustomization.yaml").read_text())


def pods(among: list[Object]) -> list[Object]:
    """Return the specs of all pods that these objects make."""
    return [
        one["spec"]["template"]["spec"] for one in among if one["kind"] in {"Deployment", "Job"}
    ]


def containers(pod: Object) -> list[Object]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def env(container: Object) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container["env"]}


def validate(one: Object) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(one, version, strict=True)


def hardened(pod: Object) -> bool:
    """Tell whether a pod is what the namespace's policy asks for, and more."""
    shared = pod["securityContext"]
    own = [one["securityContext"] for one in containers(pod)]
    return (
        shared["runAsNonRoot"]
        and shared["runAsUser"] == shared["runAsGroup"] == 10001
        and shared["seccompProfile"] == {"type": "RuntimeDefault"}
        and all(one["readOnlyRootFilesystem"] for one in own)
        and not any(one["allowPrivilegeEscalation"] for one in own)
        and all(one["capabilities"] == {"drop": ["ALL"]} for one in own)
    )


@pytest.fixture(scope="module")
def kubectl() -> str:
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("NO KUBECTL, the kustomizations were NOT built")
    return found


def built(kubectl: str, folder: str) -> list[Object]:
    words = [kubectl, "kustomize", str(HOME / folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_listed_and_there(folder):
    listed = kustomization(folder)["resources"]

    there = {one.name for one in (HOME / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == there


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_is_valid(folder):
    for one in objects(folder):
        validate(one)


def test_a_field_that_kubernetes_does_not_know_is_found():
    deployment = named("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        validate(deployment)


@pytest.mark.parametrize("folder", [*FOLDERS, "overlays/s3"])
def test_every_kustomization_builds_into_valid_objects(kubectl, folder):
    made = built(kubectl, folder)

    for one in made:
        validate(one)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "train-export"
    for pod in pods(made):
        assert hardened(pod)
        volumes = {one["name"] for one in pod["volumes"]}
        for container in containers(pod):
            assert {one["name"] for one in container["volumeMounts"]} <= volumes
            assert container["image"].endswith(f":{version()}")


def test_the_bucket_takes_the_place_of_the_volume(kubectl):
    made = built(kubectl, "overlays/s3")

    (pod,) = pods(made)
    (container,) = containers(pod)
    assert not any(one["kind"] == "PersistentVolumeClaim" for one in made)
    assert not any("persistentVolumeClaim" in one for one in pod["volumes"])
    assert env(container)["SERVE_EXPORT_REPOSITORY"].startswith("s3://")
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    assert not mounts[env(container)["SERVE_EXPORT_CACHE"]].get("readOnly")
    assert settings_of(container) <= fields_of_settings()


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def settings_of(container: Object) -> set[str]:
    prefix = ENVIRONMENT_PREFIX
    return {name.removeprefix(prefix).lower() for name in env(container) if name.startswith(prefix)}


def fields_of_settings() -> set[str]:
    return set(Settings.__dataclass_fields__)


def test_every_image_is_of_this_version():
    for folder in FOLDERS:
        for image in kustomization(folder)["images"]:
            assert image["newTag"] == version(), folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_container_is_hardened_and_bounded(folder):
    for pod in pods(objects(folder)):
        assert hardened(pod)
        for container in containers(pod):
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_probe_asks_a_port_that_there_is(folder):
    for pod in pods(objects(folder)):
        for container in pod["containers"]:
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            probes = [one for name, one in container.items() if name.endswith("Probe")]
            assert probes
            for probe in probes:
                if "httpGet" in probe:
                    assert probe["httpGet"]["port"] in ports
                if "grpc" in probe:
                    assert probe["grpc"]["port"] in ports.values()


def test_servers_listen_where_their_ports_are():
    (container,) = containers(pods([named("Deployment")])[0])
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}

    assert env(container)["SERVE_EXPORT_ADDRESS"] == f"0.0.0.0:{ports['grpc']}"
    assert env(container)["SERVE_EXPORT_METRICS_ADDRESS"] == f"0.0.0.0:{ports['metrics']}"
    annotations = named("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


def test_every_variable_is_an_option_of_the_server():
    (container,) = containers(pods([named("Deployment")])[0])

    assert settings_of(container) > {"repository", "address"}
    assert settings_of(container) <= fields_of_settings()


def test_the_grace_period_is_longer_than_all_that_happens_in_it():
    (pod,) = pods([named("Deployment")])
    (container,) = containers(pod)
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drains_s = [float(env(container)[f"SERVE_EXPORT_{one}DRAIN_S"]) for one in ("PRE_", "")]

    assert pod["terminationGracePeriodSeconds"] >= sleep_s + sum(drains_s) + 5


def test_service_budget_policy_and_scaler_mean_the_servers():
    deployment = named("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = containers(pods([deployment])[0])
    ports = {one["name"] for one in container["ports"]}
    service, policy = named("Service")["spec"], named("NetworkPolicy")["spec"]

    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == labels
    assert service["clusterIP"] == "None"
    assert {one["targetPort"] for one in service["ports"]} <= ports
    assert named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert policy["podSelector"]["matchLabels"] == labels
    assert {one["port"] for rule in policy["ingress"] for one in rule["ports"]} == ports
    assert [one["port"] for rule in policy["egress"] for one in rule["ports"]] == [53, 53]
    scaled = named("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # or each `kubectl apply` would undo the scaler's


def test_only_the_worker_has_a_token_and_a_role():
    for folder in FOLDERS:
        assert not named("ServiceAccount", folder)["automountServiceAccountToken"]
        (pod,) = pods(objects(folder))
        assert pod["automountServiceAccountToken"] == (folder == "worker")
    role, binding = named("Role", "worker"), named("RoleBinding", "worker")
    account = named("ServiceAccount", "worker")["metadata"]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [one["name"] for one in binding["subjects"]] == [account]
    assert {name for rule in role["rules"] for name in rule["resources"]} == {
        "jobs",
        "pods",
        "pods/log",
        "pods/status",
        "events",
    }


def test_the_adapters_rule_in_the_docs_makes_the_metric_that_is_scaled_by():
    text = (ROOT / "docs/kubernetes.md").read_text()
    blocks = [yaml.safe_load(one) for one in re.findall(r"```yaml\n(.+?)```", text, re.DOTALL)]

    (rule,) = next(one["rules"]["custom"] for one in blocks if "rules" in one)
    assert rule["name"]["as"] == scaling_metric()
    assert rule["seriesQuery"].startswith(scaling_metric())


def scaling_metric() -> str:
    (metric,) = named("HorizontalPodAutoscaler")["spec"]["metrics"]
    return metric["pods"]["metric"]["name"]


@dataclass(frozen=True)
class Server:
    """One that runs as the Deployment says."""

    models: Path
    environment: dict[str, str]
    log: Path

    def ready(self) -> bool:
        """Ask what the kubelet asks."""
        with grpc.insecure_channel(self.environment["SERVE_EXPORT_ADDRESS"]) as channel:
            asked = health_pb2.HealthCheckRequest()
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=WAIT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def metrics(self) -> str:
        found = re.search(r"metrics on (http://[\w.:/]+)", self.log.read_text())
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=WAIT_S) as answer:
            return answer.read().decode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with the variables of the Deployment, on a socket and an empty repository."""
    (container,) = containers(pods([named("Deployment")])[0])
    log = tmp_path / "log"
    (tmp_path / "models").mkdir()
    environment = {
        **os.environ,
        **env(container),
        "SERVE_EXPORT_REPOSITORY": str(tmp_path / "models"),
        "SERVE_EXPORT_ADDRESS": f"unix:{tmp_path / 'socket'}",
        "SERVE_EXPORT_METRICS_ADDRESS": "127.0.0.1:0",
        "SERVE_EXPORT_PRE_DRAIN_S": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            ["serve-export", *container["args"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
        )
    try:
        until(lambda: "metrics on " in log.read_text())
        yield Server(tmp_path / "models", environment, log)
    finally:
        popen.terminate()
        assert popen.wait(WAIT_S) == 0, log.read_text()


def until(there: Callable[[], bool]) -> None:
    """Wait until something is so."""
    until_s = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < until_s, "it is still not so"
        time.sleep(0.1)


def test_a_server_without_a_model_is_live_and_not_ready_and_has_the_metric(server, make_bundle):
    container = pods([named("Deployment")])[0]["containers"][0]
    alive = [container[one]["exec"]["command"] for one in ("startupProbe", "livenessProbe")]

    for command in alive:
        subprocess.run(command, env=server.environment, check=True, capture_output=True)
    assert not server.ready()

    make_bundle(server.models)

    until(server.ready)
    assert re.search(rf'^{scaling_metric()}{{model="tiny",version="1"}} 0', server.metrics(), re.M)


@pytest.fixture(scope="module")
def job() -> Object:
    """The Job that Prefect's Kubernetes worker makes of job-template.json for a run."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((HOME / "worker/job-template.json").read_text())
    values = {"env": {"TF_CPP_MIN_LOG_LEVEL": "2"}}  # as prefect.yaml

    async def configuration() -> KubernetesWorkerJobConfiguration:
        nobody = PrefectClient("http://127.0.0.1:1/api")  # the template refers to no block
        return await KubernetesWorkerJobConfiguration.from_template_and_values(
            template, values, client=nobody
        )

    made = asyncio.run(configuration())
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="wise-otter"))
    return made.job_manifest


@pytest.mark.slow
def test_a_run_is_a_valid_job_of_a_hardened_pod(job):
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)  # Prefect wants them there
    validate(job)
    assert hardened(pod)
    assert not pod["automountServiceAccountToken"]
    assert container["image"] == f"train-export/pipeline:{version()}"
    assert job["metadata"]["namespace"] == kustomization("worker")["namespace"]
    assert {"name": "TF_CPP_MIN_LOG_LEVEL", "value": "2"} in container["env"]
    assert container["args"][:2] == ["prefect", "flow-run"]


@pytest.mark.slow
def test_a_run_writes_where_servers_read(job):
    pod = job["spec"]["template"]["spec"]
    claims = {
        one["metadata"]["name"]
        for folder in FOLDERS
        for one in objects(folder)
        if one["kind"] == "PersistentVolumeClaim"
    }

    used = {
        one["name"]: one["persistentVolumeClaim"]["claimName"]
        for one in pod["volumes"]
        if "persistentVolumeClaim" in one
    }
    assert used == {"models": "models", "runs": "runs"}
    assert set(used.values()) == claims
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert (mounts["models"], mounts["runs"]) == ("/models", "/runs")  # as the image's folders
