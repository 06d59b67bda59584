"""What a request costs on its way through the balancer of docker-compose.yml, and in a replica.

    docker compose up --detach --build
    python benchmarks/balancer.py --model fashion-mnist

Envoy, and one replica without it, are asked by h2load in turn, round after round, for one image a
request. The processor time is that of Envoy's container, and of the replicas'. Prints medians;
writes them to benchmarks/results/balancer.json.
"""

import json
import statistics
import subprocess
from dataclasses import asdict, replace
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import contenders, load, measured
from benchmarks.load import Load, Outcome, Request
from service.client import Client

LOADS = {"1 in flight": Load(1), "64 in flight over 8 connections": Load(8, 8)}
HEADERS = (("content-type", "application/grpc"), ("te", "trailers"))
PREFIX_BYTES = 5  # before a message of gRPC


def main(
    model: Annotated[str, typer.Option(help="A published classifier of 28 x 28 gray images.")],
    project: Annotated[str, typer.Option(help="Of docker compose.")] = "train-export",
    address: Annotated[str, typer.Option(help="Of the balancer.")] = "127.0.0.1:8001",
    times: Annotated[int, typer.Option("--rounds", min=5)] = 5,
    seconds: Annotated[float, typer.Option(help="Of one load.")] = 3.0,
) -> None:
    """Measure, print and write."""
    load.check_installed()
    envoy = containers(project, "balancer")[0]
    replicas = containers(project, "inference")
    pids = [one["State"]["Pid"] for one in replicas]
    direct = f"{replicas[0]['NetworkSettings']['Networks'][f'{project}_serving']['IPAddress']}:8001"
    ways = {
        "through the balancer": (address, [envoy["State"]["Pid"]], pids),
        "one replica": (direct, [], pids[:1]),
    }
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, asked in LOADS.items():
        found[name] = {way: [] for way in ways}
        for _ in track(range(times), description=name, transient=True):
            for way, (target, proxies, servers) in ways.items():
                found[name][way].append(outcome(target, model, asked, seconds, proxies, servers))
    show(found, len(replicas))
    measured.write("balancer", {"replicas": len(replicas), "rounds": times, "found": found})


def containers(project: str, service: str) -> list[dict[str, Any]]:
    """Return what the engine knows of a service's containers."""
    command = ("docker", "compose", "--project-name", project, "ps", "--quiet", service)
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    if not names:
        raise SystemExit(f"error: {project} has no {service}; docker compose up --detach --build")
    inspect = subprocess.run(
        ("docker", "inspect", *names), check=True, capture_output=True, text=True
    )
    known: list[dict[str, Any]] = json.loads(inspect.stdout)
    return known


def outcome(
    address: str, model: str, asked: Load, seconds: float, proxies: list[int], servers: list[int]
) -> dict[str, float]:
    """Ask for a while; return the figures, with the processor time of both."""
    request = question(address, model)
    requests = load.requests_for(request, asked, seconds)
    total = requests + asked.logged(requests)
    before = [sum(map(load.cpu_seconds, pids)) for pids in (proxies, servers)]
    found: Outcome = load.run(request, asked, requests, servers[0])
    after = [sum(map(load.cpu_seconds, pids)) for pids in (proxies, servers)]
    proxy_ms, server_ms = ((b - a) / total * 1e3 for a, b in zip(before, after, strict=True))
    return asdict(replace(found, server_cpu_ms=server_ms)) | {"proxy_cpu_ms": proxy_ms}


def question(address: str, model: str) -> Request:
    """Return one image's request, and how long its answer is."""
    image = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), np.uint8)
    body = contenders.message(image, model)
    with Client(address) as client:
        client.predict(image, model=model)  # or say what is wrong
    url = f"http://{address}/inference.GRPCInferenceService/ModelInfer"
    plain = Request(url, HEADERS, body, 0, http2=True)
    return replace(plain, answer_bytes=answer_bytes(plain))


def answer_bytes(request: Request) -> int:
    """Return the length of an answer, by asking once."""
    import grpc

    target = request.url.split("/")[2]
    method = "/" + request.url.split("/", 3)[3]
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(method)
        answer: bytes = call(request.body[PREFIX_BYTES:], timeout=10)
    return len(answer) + PREFIX_BYTES


def show(found: dict[str, dict[str, list[dict[str, float]]]], replicas: int) -> None:
    """Print medians."""
    table = Table(box=box.SIMPLE_HEAD, title=f"one image a request, {replicas} replicas, medians")
    for column in (
        "load",
        "way",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "Envoy CPU ms",
        "server CPU ms",
    ):
        table.add_column(column, justify="left" if column in {"load", "way"} else "right")
    for name, ways in found.items():
        for way, outcomes in ways.items():
            median = {key: statistics.median(one[key] for one in outcomes) for key in outcomes[0]}
            table.add_row(
                name, way, f"{median['requests_per_second']:,.0f}", f"{median['p50_ms']:.2f}",
                f"{median['p99_ms']:.2f}", f"{median['proxy_cpu_ms']:.3f}",
                f"{median['server_cpu_ms']:.3f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
