"""What clients notice of versions that take each other's place.

    python benchmarks/swaps.py --swaps 100

Some clients ask a server process for single images at a steady pace, far below what it can do.
First nothing else happens; then versions are published one after the other, each as soon as the
one before answers. Prints the time of the requests in both, and writes it to
benchmarks/results/swaps.json. Exit status 1 if a request failed or a version never answered.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import bundles, measured
from protos import inference_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CLIENTS = 4
PACE_S = 0.01  # from one request of a client to its next
QUIET_S = 20.0
WAIT_S = 60.0  # for one version


@dataclass(frozen=True, slots=True)
class Times:
    """How long requests took, in milliseconds."""

    requests: int
    p50_ms: float
    p99_ms: float
    longest_ms: float


@dataclass
class _Asking:
    """Requests so far, and the version that answered the last of them."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    version: int = 0
    over: bool = False

    def times(self) -> Times:
        """Return the times since this was asked last, and begin anew."""
        ms = np.array(self.seconds) * 1000
        self.seconds = []
        p50, p99 = (round(float(np.percentile(ms, share)), 3) for share in (50, 99))
        return Times(len(ms), p50, p99, round(float(ms.max()), 3))


def main(
    swaps: Annotated[int, typer.Option(min=1, help="Versions to publish.")] = 100,
) -> None:
    """Ask, publish, judge and write."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundles.write(root, bundles.small())
        with measured.server(root) as server:
            quiet, swapping, failed = asyncio.run(_measure(server.address, root, swaps))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "requests", "p50 ms", "p99 ms", "longest ms"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in (("nothing else", quiet), (f"{swaps} swaps", swapping)):
        table.add_row(name, *map(str, asdict(times).values()))
    Console().print(table)
    measured.write(
        "swaps",
        {"swaps": swaps, "failed": failed, "quiet": asdict(quiet), "swapping": asdict(swapping)},
    )
    if failed:
        raise SystemExit(f"error: {failed} requests failed, expected none")


async def _measure(address: str, root: Path, swaps: int) -> tuple[Times, Times, int]:
    asking = _Asking()
    async with grpc.aio.insecure_channel(address) as channel:
        ask: Callable[..., Any] = channel.unary_unary(
            METHOD, response_deserializer=inference_pb2.ModelInferResponse.FromString
        )
        clients = [asyncio.create_task(_client(ask, asking)) for _ in range(CLIENTS)]
        await asyncio.sleep(QUIET_S)
        quiet = asking.times()
        for version in track(range(2, swaps + 2), "swaps"):
            await asyncio.to_thread(_publish, root, version)
            await _answered(asking, version)
        swapping = asking.times()
        asking.over = True
        await asyncio.gather(*clients)
    return quiet, swapping, asking.failed


async def _client(ask: Callable[..., Any], asking: _Asking) -> None:
    request = _request()
    while not asking.over:
        started_s = time.perf_counter()
        try:
            answer = await ask(request, timeout=WAIT_S)
        except grpc.aio.AioRpcError:
            asking.failed += 1
        else:
            asking.version = int(answer.model_version)
            asking.seconds.append(time.perf_counter() - started_s)
        await asyncio.sleep(max(0.0, PACE_S - (time.perf_counter() - started_s)))


async def _answered(asking: _Asking, version: int) -> None:
    until_s = time.monotonic() + WAIT_S
    while asking.version != version:
        if time.monotonic() > until_s:
            raise SystemExit(f"error: version {version} does not answer; the log says why")
        await asyncio.sleep(PACE_S)


def _publish(root: Path, version: int) -> None:
    staged = bundles.write(root / ".staging", bundles.small(), version)
    staged.rename(root / bundles.NAME / str(version))


def _request() -> bytes:
    image = np.zeros((1, bundles.SIDE, bundles.SIDE, 1), np.uint8)
    request = inference_pb2.ModelInferRequest(
        model_name=bundles.NAME, raw_input_contents=[image.tobytes()]
    )
    request.inputs.add(name="image", datatype="UINT8", shape=image.shape)
    return request.SerializeToString()


if __name__ == "__main__":
    typer.run(main)
