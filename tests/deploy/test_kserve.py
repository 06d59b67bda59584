"""KServe's objects are what KServe's own models are, and run our image as it is."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).parents[2]
HOME = ROOT / "deploy/kserve"
ENVIRONMENT = ROOT / ".venv-kserve"
MOUNT = "/mnt/models"  # where KServe puts, or mounts, what storageUri names

Object = dict[str, Any]


@pytest.fixture
def runtime() -> Object:
    return yaml.safe_load((HOME / "servingruntime.yaml").read_text())


@pytest.fixture
def service() -> Object:
    return yaml.safe_load((HOME / "inferenceservice.yaml").read_text())


def troubles(*objects: Object) -> list[str]:
    """Return what KServe's models find wrong."""
    if not (ENVIRONMENT / ".installed").exists():
        pytest.skip(
            "NO .venv-kserve, KServe's objects were NOT checked; run: tests/deploy/setup.sh"
        )
    done = subprocess.run(
        [ENVIRONMENT / "bin/python", "-I", "tests/deploy/kserve_models.py"],
        input=json.dumps(objects),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kserves_own_models_take_both_objects(runtime, service):
    assert troubles(runtime, service) == []


@pytest.mark.slow
def test_what_kserve_does_not_know_or_take_is_found(runtime, service):
    service["spec"]["predictor"]["model"]["storageURI"] = "pvc://models/"
    service["spec"]["predictor"]["minReplicas"] = "2"
    del runtime["spec"]["containers"]

    found = "\n".join(troubles(runtime, service))

    assert "storageURI is no field of V1beta1ModelSpec" in found
    assert "minReplicas is '2', expected int" in found
    assert "`containers`, must not be `None`" in found


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_the_runtimes_pod_is_one_that_kubernetes_knows(runtime, version):
    spec = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}

    kubernetes_validate.validate(pod, version, strict=True)


def test_knative_finds_one_port_that_speaks_grpc(runtime):
    (container,) = runtime["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}

    (port,) = container["ports"]
    assert port["name"] == "h2c"
    assert container["readinessProbe"]["grpc"]["port"] == port["containerPort"]
    assert env["SERVE_EXPORT_ADDRESS"] == f"0.0.0.0:{port['containerPort']}"
    told = runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    assert env["SERVE_EXPORT_METRICS_ADDRESS"] == f"0.0.0.0:{told}"


def test_the_runtime_serves_what_kserve_mounts(runtime, service):
    (container,) = runtime["spec"]["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    options = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower()
        for name in env
        if name.startswith(ENVIRONMENT_PREFIX)
    }

    assert container["name"] == "kserve-container"  # the one that KServe mounts into
    assert env["SERVE_EXPORT_REPOSITORY"] == MOUNT
    assert options <= set(Settings.__dataclass_fields__)
    # The whole repository: a path to one version would be without NAME/VERSION.
    assert re.fullmatch(r"pvc://[a-z-]+/", service["spec"]["predictor"]["model"]["storageUri"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert container["image"] == f"train-export/service:{project['version']}"


def test_the_service_chooses_the_runtime(runtime, service):
    model = service["spec"]["predictor"]["model"]

    (known,) = runtime["spec"]["supportedModelFormats"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] == {name: known[name] for name in ("name", "version")}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_pods_have_the_time_to_drain(runtime, service):
    env = {one["name"]: one["value"] for one in runtime["spec"]["containers"][0]["env"]}

    grace_s = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace_s > float(env["SERVE_EXPORT_PRE_DRAIN_S"]) + float(env["SERVE_EXPORT_DRAIN_S"])
