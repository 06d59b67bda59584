"""What the server adds to the model: images a second in process, and over gRPC.

    python benchmarks/serving.py --repository models

Three ways of asking the same bundle, in turn, round after round: the model in this process (the
limit), batches of 128 over gRPC, single images over gRPC. The client is Python too and shares the
cores, so that its cost is in the figures; compare the ratios, not the figures. Prints medians and
writes them, with the machine and the versions, to benchmarks/results/serving.json.
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from protos import inference_pb2, inference_pb2_grpc
from service import bundle, model_config
from service.host import cores, processor
from service.repository import scan
from service.session import Session
from service.settings import Settings

RESULTS = Path(__file__).parent / "results" / "serving.json"
BATCH_ROWS = 128
CASES = (
    # name, images in a request, requests in flight, requests a round
    ("over gRPC, batches of 128, 4 in flight", BATCH_ROWS, 4, 120),
    ("over gRPC, single images, 64 in flight", 1, 64, 3_000),
)
CALLS = 300  # of the model alone, in a round
IN_PROCESS = "in process, batches of 128"


def main(
    repository: Annotated[Path, typer.Option(help="Folder of bundles.")] = Path("models"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are of these.")] = 7,
) -> None:
    """Measure, print and write."""
    found = scan(repository)
    if not any(found.values()):
        raise SystemExit(f"error: {repository} holds no bundle; make one with: make run")
    versions = next(versions for versions in found.values() if versions)
    content = bundle.read(versions[max(versions)])
    images = np.resize(content.golden.inputs, (BATCH_ROWS, *content.golden.inputs.shape[1:]))
    measured: dict[str, list[float]] = {IN_PROCESS: [], **{case[0]: [] for case in CASES}}
    with _server(repository) as server:
        assert server.stdout is not None
        address = server.stdout.readline().removeprefix("serving on ").strip()
        for _ in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
            measured[IN_PROCESS].append(_in_process(content, images))
            for name, rows, in_flight, requests in CASES:
                ask = _over_grpc(address, content, images[:rows], in_flight, requests)
                measured[name].append(asyncio.run(ask))
        server.terminate()
    _report({name: figures[1:] for name, figures in measured.items()})  # the first round warms up


def _server(repository: Path) -> subprocess.Popen[str]:
    command = ["--repository", str(repository), "--address", "127.0.0.1:0", "--stop-with-stdin"]
    return subprocess.Popen(
        [sys.executable, "-m", "service", "serve", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _in_process(content: bundle.Bundle, images: NDArray[np.generic]) -> float:
    """Return images a second of the model alone, with as many callers as the server has."""
    options = model_config.of_server(Settings(repository=Path()), cores())
    session = Session(content.model, content.manifest.session, threads=options.threads)
    session.warm_up(BATCH_ROWS, images[0])
    calls = CALLS // options.instances
    with ThreadPoolExecutor(options.instances) as callers:
        started_s = time.monotonic()
        for done in [
            callers.submit(_call, session, images, calls) for _ in range(options.instances)
        ]:
            done.result()
        seconds = time.monotonic() - started_s
    return options.instances * calls * BATCH_ROWS / seconds


def _call(session: Session, images: NDArray[np.generic], times: int) -> None:
    for _ in range(times):
        session.run(images)


async def _over_grpc(
    address: str,
    content: bundle.Bundle,
    images: NDArray[np.generic],
    in_flight: int,
    requests: int,
) -> float:
    """Return images a second with so many requests of these images always in flight."""
    request = inference_pb2.ModelInferRequest(
        model_name=content.manifest.name, raw_input_contents=[images.tobytes()]
    )
    spec = content.manifest.input
    request.inputs.add(name=spec.name, datatype=spec.datatype, shape=images.shape)
    left = iter(range(requests))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def ask() -> None:
            for _ in left:
                await stub.ModelInfer(request)

        await stub.ModelInfer(request)
        started_s = time.monotonic()
        await asyncio.gather(*(ask() for _ in range(in_flight)))
        return requests * len(images) / (time.monotonic() - started_s)


def _report(measured: dict[str, list[float]]) -> None:
    limit = statistics.median(measured[IN_PROCESS])
    table = Table(box=box.SIMPLE_HEAD, title="images a second, median (min to max)")
    for column in ("asked", "images/s", "of the limit"):
        table.add_column(column, justify="left" if column == "asked" else "right")
    for name, figures in measured.items():
        median = statistics.median(figures)
        spread = f"{median:,.0f} ({min(figures):,.0f} to {max(figures):,.0f})"
        table.add_row(name, spread, f"{median / limit:.2f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    about = {
        "cpu": processor().name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("onnxruntime", "grpcio", "train-export")},
        "images_per_second": measured,
    }
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    typer.run(main)
