"""Prometheus takes its files, finds what they ask for on real servers, and its alerts fire."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from protos import inference_pb2, inference_pb2_grpc
from service import agreement
from service.client import Client
from tests.deploy import observability
from tests.deploy.observability import ENVOY, GRAFANA, OF_PROMETHEUS, PROMETHEUS, ROOT

REQUIRED = "REQUIRE_PROMTOOL"
WAIT_S = 60.0
ROWS = 1_000  # enough for drift to be told
BIG = 20_000  # rows of requests that take a while


# Debian's Prometheus, where there is no other


def fetched(folder: Path) -> Path | None:
    """Unpack Debian's package, without installing it: that would start a service."""
    kept = folder / "unpacked/usr/bin"
    if (kept / "promtool").exists():
        return kept
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return None
    download = ["apt-get", "--option", "APT::Sandbox::User=root", "download", "prometheus"]
    if run(download, folder).returncode:
        run(["apt-get", "update"], folder)  # on a bare machine there is no list of packages
        if run(download, folder).returncode:
            return None
    (package,) = folder.glob("prometheus_*.deb")
    fresh = folder / f"unpacked-{os.getpid()}"
    assert run(["dpkg", "--extract", package, fresh], folder).returncode == 0
    package.unlink()
    fresh.rename(folder / "unpacked")
    return kept


def run(words: list[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="session")
def programs(pytestconfig) -> Path:
    """Give the folder with `prometheus` and `promtool`; skip loudly where there is none."""
    installed = shutil.which("promtool")
    found = Path(installed).parent if installed else fetched(pytestconfig.cache.mkdir("prometheus"))
    if found is None and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set and there is no promtool; install Prometheus")
    if found is None:
        pytest.skip("NO PROMTOOL, Prometheus' files were NOT tested; install Prometheus")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules.test.yml"),
    ],
)
def test_promtool_finds_nothing_wrong(programs, words):
    done = run([programs / "promtool", *words], PROMETHEUS)

    assert done.returncode == 0, done.stdout + done.stderr


# The files


def test_names_of_metrics_are_read_out_of_queries():
    query = (
        'histogram_quantile(0.99, sum by (model, le) (rate(a_bucket{b="c", d=~"e f"}[1m]))) > 2e8 '
        'or time() - g offset 5m unless on (h) (job:i:rate1m == 1) and "j" * group_left () k'
    )

    assert observability.metrics(query) == {"a_bucket", "g", "job:i:rate1m", "k", "m"} - {"m"}


def test_recorded_names_are_recorded_and_every_one_is_asked_for():
    recorded = {rule["record"] for rule in observability.rules() if "record" in rule}

    assert {name for name in observability.asked() if ":" in name} == recorded


def test_list_of_envoys_metrics_is_what_is_asked_of_it():
    assert {name for name in observability.asked() if name.startswith("envoy_")} == ENVOY


def test_every_alert_says_what_to_do_and_is_tested_firing_and_silent():
    alerts = {rule["alert"]: rule for rule in observability.rules() if "alert" in rule}
    tested: dict[str, set[bool]] = {}
    for one in yaml.safe_load((PROMETHEUS / "rules.test.yml").read_text())["tests"]:
        for asked in one["promql_expr_test"]:
            name = re.search(r'alertname="(\w+)"', asked["expr"])
            if name is not None:
                tested.setdefault(name[1], set()).add(bool(asked["exp_samples"]))

    assert tested == {name: {True, False} for name in alerts}
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert set(rule["annotations"]) == {"summary", "description"}, name


def test_what_is_scraped_is_what_compose_runs():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    envoy = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    jobs = scrape_configs()

    (replicas,) = jobs["inference"]["dns_sd_configs"]
    (name,) = replicas["names"]
    listens = compose[name]["environment"]["SERVE_EXPORT_METRICS_ADDRESS"]
    assert replicas["port"] == int(listens.rpartition(":")[2])
    (balancer,) = jobs["balancer"]["static_configs"]
    listeners = {one["name"]: one for one in envoy["static_resources"]["listeners"]}
    port = listeners["status"]["address"]["socket_address"]["port_value"]
    assert balancer["targets"] == [f"balancer:{port}"]
    assert "balancer" in compose
    assert envoy["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    used = set(re.findall(r'job="(\w+)"', (PROMETHEUS / "rules.yml").read_text()))
    used |= set(re.findall(r'job="(\w+)"', " ".join(observability.dashboard_queries())))
    assert used <= set(jobs)


def scrape_configs() -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    return {one["job_name"]: one for one in config["scrape_configs"]}


def test_grafana_is_given_the_source_and_the_folder_that_its_dashboard_needs():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = dict(text.split(":")[:2] for text in compose["volumes"] if "./" in text)
    provisioned = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioned / "dashboards/train-export.yaml").read_text())[
        "providers"
    ]

    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    expected = {"type": source["type"], "uid": source["uid"]}
    for one in observability.panels():
        assert all(asked["datasource"] == expected for asked in (one, *one["targets"]))
    for variable in observability.dashboard()["templating"]["list"]:
        assert variable["datasource"] == expected


def test_every_panel_has_a_unit_a_text_and_a_legend_and_covers_no_other():
    panels = observability.panels()
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"], panel["title"]
    everything = observability.dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for one, other in combinations(everything, 2):
        assert apart(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def apart(one: dict[str, int], other: dict[str, int]) -> bool:
    return any(
        first[at] + first[size] <= second[at]
        for first, second in ((one, other), (other, one))
        for at, size in (("x", "w"), ("y", "h"))
    )


# Real servers


@dataclass(frozen=True)
class Server:
    """A server process, where it answers, and where it tells its metrics."""

    popen: subprocess.Popen[str]
    address: str
    metrics_address: str

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def count(self, name: str, label: str = "") -> float:
        """Add up a metric's samples with a label."""
        lines = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", self.metrics(), re.M)
        return sum(float(value) for labels, value in lines if label in labels)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[Path], Server]]:
    started: list[subprocess.Popen[str]] = []

    def start(models: Path) -> Server:
        log = tmp_path / f"server-{len(started)}.log"
        options = {
            "--repository": str(models),
            "--address": "127.0.0.1:0",
            "--metrics-address": "127.0.0.1:0",
            "--version-policy": "latest:2",
            "--sample-rate": "1",
            "--instances": "1",
            "--max-batch-rows": str(BIG),
            "--max-queue-rows": str(BIG),
        }
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", *chain(*options.items())],
                stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
            )  # fmt: skip
        started.append(popen)
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line.startswith("serving on "), log.read_text()
        told = re.search(r"metrics on http://(\S+)/metrics", log.read_text())
        assert told is not None, log.read_text()
        return Server(popen, line.removeprefix("serving on ").strip(), told[1])

    yield start
    for popen in started:
        popen.kill()
        popen.wait(30)
        assert popen.stdout is not None
        popen.stdout.close()


@pytest.fixture
def models(make_bundle, tiny) -> Path:
    """A repository whose version 1 is served and whose version 2 is refused."""
    images = tiny.images(ROWS)

    def edit(manifest):
        manifest.test_distribution.CopyFrom(agreement.distribution(tiny.logits(images), images))

    make_bundle(version=2, model=tiny.model(np.array([0, 0, 1], np.float32)))
    folder: Path = make_bundle(edit=edit).parents[1]
    return folder


def until(holds: Callable[[], bool], what: str) -> None:
    until_none(lambda: [] if holds() else [what])


def until_none(missing: Callable[[], Any]) -> None:
    """Wait until nothing is missing."""
    end_s = time.monotonic() + WAIT_S
    while found := missing():
        assert time.monotonic() < end_s, f"not within {WAIT_S:.0f} s: {found}"
        time.sleep(0.2)


def ask(stub: Any, images: Any) -> str:
    """Ask the tiny model, once; return the status' name."""
    request = inference_pb2.ModelInferRequest(
        model_name="tiny", raw_input_contents=[images.tobytes()]
    )
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    try:
        stub.ModelInfer(request, timeout=WAIT_S)
    except grpc.RpcError as refused:
        return refused.code().name
    return "OK"


def exercise(server: Server, tiny: Any) -> None:
    """Have a server answer, batch, refuse, and be shadowed by an original that is as it is."""
    images = tiny.images(BIG)
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(16) as pool:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        until(
            lambda: "UNAVAILABLE" in pool.map(partial(ask, stub), [images] * 16),
            "a request is refused",
        )
        list(pool.map(partial(ask, stub), [images[:100]] * 64))
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        shadow = pool.submit(judge, client, tiny)
        until(lambda: bool(client.predict(images[:100], model="tiny")) and shadow.done(), "shadow")
        shadow.result()


def judge(client: Client, tiny: Any) -> None:
    """Report that rows are answered as the original does, until there are enough for drift."""
    allowed = agreement.budget("float32", tiny.logits(tiny.images(12)))
    judged = 0
    for rows in client.sample():
        logits = tiny.logits(rows.inputs)
        figures = agreement.figures(logits, rows.outputs, rows.inputs, allowed=allowed)
        client.report(
            figures, model=rows.model, version=rows.version, parent_sha256=rows.parent_sha256
        )
        judged += len(logits)
        if judged > ROWS:
            return


def test_every_metric_that_is_asked_for_is_on_a_live_server(start_server, models, tiny):
    server = start_server(models)
    exercise(server, tiny)

    names = set(re.findall(r"^\w+", server.metrics(), re.M))
    recorded = {rule["record"] for rule in observability.rules() if "record" in rule}
    assert observability.asked() - recorded - ENVOY - OF_PROMETHEUS <= names
    assert server.count("nv_inference_request_failure", 'reason="REJECTED"') > 0
    for name in ("nv_inference_request_success", "serve_export_sampled_rows",
                 "serve_export_live_rows", "serve_export_versions_refused",
                 "serve_export_live_passed"):  # fmt: skip
        assert server.count(name) > 0, name


# A real Prometheus


@dataclass(frozen=True)
class Asked:
    """A Prometheus that runs."""

    address: str

    def get(self, path: str, **words: str) -> Any:
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{words}: {error.read().decode()}")

    def query(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/api/v1/query", query=query)["result"]
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def start_prometheus(programs, tmp_path: Path) -> Iterator[Callable[[list[str]], Asked]]:
    """Return a function that runs Prometheus on our file, with targets in place of the name."""
    started: list[subprocess.Popen[bytes]] = []

    def start(targets: list[str]) -> Asked:
        address = f"127.0.0.1:{free_port()}"
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), "1s")
        config["rule_files"] = [str(PROMETHEUS / "rules.yml")]
        jobs = {one["job_name"]: one for one in config["scrape_configs"]}
        del jobs["inference"]["dns_sd_configs"]
        jobs["inference"]["static_configs"] = [{"targets": targets}]
        jobs["prometheus"]["static_configs"] = [{"targets": [address]}]
        config["scrape_configs"] = [jobs["inference"], jobs["prometheus"]]
        file = tmp_path / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        with (tmp_path / "prometheus.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [programs / "prometheus", f"--config.file={file}",
                     f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}"],
                    stdout=log, stderr=log,
                )
            )  # fmt: skip
        until(lambda: listens(address), (tmp_path / "prometheus.log").read_text())
        return Asked(address)

    yield start
    for popen in started:
        popen.terminate()
        popen.wait(30)


def listens(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
            ready: bool = answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
    return ready


@pytest.mark.slow
def test_prometheus_answers_the_dashboard_from_two_servers_and_tells_of_one_that_dies(
    start_server, start_prometheus, models, tiny
):
    servers = [start_server(models) for _ in range(2)]
    exercise(servers[0], tiny)
    prometheus = start_prometheus([server.metrics_address for server in servers])
    queries = {
        query for query in observability.dashboard_queries()
        if not observability.metrics(query) & ENVOY
    }  # fmt: skip
    clients = [Client(server.address) for server in servers]

    def unanswered() -> set[str]:
        for client in clients:
            client.predict(tiny.images(8), model="tiny")
        return {query for query in queries if not prometheus.query(query)}

    until_none(unanswered)
    up = 'count(up{job="inference"} == 1)'
    until(lambda: [one["value"][1] for one in prometheus.query(up)] == ["2"], "both are up")
    requests = "instance_model_version:nv_inference_request_success:rate1m > 0"
    until_none(lambda: unanswered() or {requests} if len(prometheus.query(requests)) < 2 else ())
    found = prometheus.get("/api/v1/rules")["groups"]
    assert {rule["health"] for group in found for rule in group["rules"]} == {"ok"}

    for client in clients:
        client.close()
    servers[1].popen.kill()
    gone = f'ALERTS{{alertname="ReplicaDown", instance="{servers[1].metrics_address}"}}'
    until(lambda: bool(prometheus.query(gone)), "ReplicaDown is pending")
    alerts = {one["labels"]["alertname"] for one in prometheus.get("/api/v1/alerts")["alerts"]}
    # On a busy machine a single slow request makes RequestsSlow pending.
    assert alerts - {"RequestsSlow"} == {"ReplicaDown", "VersionRefused", "BalancerDown"}
