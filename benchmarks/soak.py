"""Whether the server's memory grows with the requests it has answered.

    python benchmarks/soak.py --requests 1000000

Asks a server process for batches of mixed sizes, unary and on streams, as fast as some client
processes can, among them malformed requests, requests that are cancelled and deadlines that are
too short. Samples the server's resident memory and fits a line through it, the first tenth left
out: until then every thread takes the memory it will keep. Exit status 1 if the slope may, at
95 % confidence, be 1 MiB per 100,000 requests, or if a request got an answer it should not have.
Writes benchmarks/results/soak.json.
"""

import asyncio
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import bundles, measured
from protos import inference_pb2

SERVICE = "/inference.GRPCInferenceService"
LIMIT_MIB = 1.0  # per 100,000 requests
PER = 100_000
SAMPLES = 200
SHOWN = 8  # every eighth of them is written
WARM_UP = 0.1  # of the requests
CONFIDENCE = 0.95
TICK_S = 0.02
MAX_ROWS = 256  # what the server joins at most, by default
PAYLOADS = 256
IN_FLIGHT = 24  # unary requests of one client
STREAMED = 500  # requests on one stream
MALFORMED = b"\x0a\xff"  # a name that is longer than the message
HURRIED_S = 0.002
AHEAD = 16  # requests of a stream that wait for their answers
STREAMS = 0.001  # of the times a worker chooses what to do next
WEIGHTS = (1, 1, 1, 97)  # malformed, cancelled, hurried, plain
TOO_LATE = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class _Payload:
    """A serialised request, and how long the answer to it is at least."""

    content: bytes
    answer_bytes: int


@dataclass(frozen=True, slots=True)
class Slope:
    """MiB per 100,000 requests, with its confidence interval."""

    value: float
    low: float
    high: float


def main(
    requests: Annotated[int, typer.Option(min=1000, help="How many to ask.")] = 1_000_000,
    clients: Annotated[int, typer.Option(min=1, help="Processes that ask.")] = 2,
) -> None:
    """Ask, sample, judge and write."""
    with tempfile.TemporaryDirectory() as root:
        bundles.write(Path(root), bundles.small())
        with measured.server(Path(root)) as server:
            started_s = time.monotonic()
            samples, wrong = _soak(server, requests, clients)
            seconds = time.monotonic() - started_s
    slope = fit(samples[int(len(samples) * WARM_UP) :])
    print(
        f"{requests:,} requests in {seconds:,.0f} s, {requests / seconds:,.0f} a "
        f"second; resident memory {samples[0][1]:.1f} MiB at first, {samples[-1][1]:.1f} at last; "
        f"slope {slope.value:+.3f} MiB per 100,000 requests, "
        f"95 % interval {slope.low:+.3f} to {slope.high:+.3f}"
    )
    figures = {
        "requests": requests,
        "requests_per_second": round(requests / seconds),
        "slope_mib_per_100000_requests": round(slope.value, 4),
        "slope_95_low": round(slope.low, 4),
        "slope_95_high": round(slope.high, 4),
        "rss_mib_by_requests": {asked: round(mib, 1) for asked, mib in samples[::SHOWN]},
    }
    measured.write("soak", figures)
    if wrong:
        raise SystemExit(f"error: {wrong} requests did not end as they should have")
    if not slope.high < LIMIT_MIB:
        raise SystemExit(f"error: memory may grow by {slope.high:.2f} MiB per 100,000 requests")


def fit(samples: Sequence[tuple[int, float]]) -> Slope:
    """Fit a line through (requests, MiB) samples.

    Memory at one moment is much like that of the moment before: samples count for as many
    independent ones as the residuals' correlation leaves of them.
    """
    asked = [count / PER for count, _ in samples]
    mib = [value for _, value in samples]
    line = statistics.linear_regression(asked, mib)
    residuals = [y - line.intercept - line.slope * x for x, y in zip(asked, mib, strict=True)]
    spread = sum((x - statistics.fmean(asked)) ** 2 for x in asked)
    total = sum(residual**2 for residual in residuals)
    together = sum(a * b for a, b in pairwise(residuals))
    correlation = min(0.99, max(0.0, together / total)) if total else 0.0
    independent = max(3.0, len(samples) * (1 - correlation) / (1 + correlation))
    error = (total / (independent - 2) / (spread * independent / len(samples))) ** 0.5
    half = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    return Slope(line.slope, line.slope - half, line.slope + half)


def _soak(
    server: measured.Server, requests: int, clients: int
) -> tuple[list[tuple[int, float]], int]:
    """Return (requests ended, mean MiB resident until then), and how many ended wrongly."""
    context = multiprocessing.get_context("spawn")
    counts = [context.Array("Q", 2) for _ in range(clients)]
    share = requests // clients
    processes = [
        context.Process(target=_client, args=(server.address, number, share, counts[number]))
        for number in range(clients)
    ]
    for process in processes:
        process.start()
    samples: list[tuple[int, float]] = []
    readings: list[float] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=share * clients)
        while any(process.is_alive() for process in processes):
            ended = sum(count[0] for count in counts)
            readings.append(server.rss_mib())
            if ended >= len(samples) * share * clients / SAMPLES:
                samples.append((ended, statistics.fmean(readings)))
                readings.clear()
            progress.update(task, completed=ended)
            time.sleep(TICK_S)
    lost = share * clients - sum(count[0] for count in counts)
    return samples, sum(count[1] for count in counts) + lost


def _client(address: str, number: int, requests: int, counts: "SynchronizedArray[int]") -> None:
    asyncio.run(_Client(address, random.Random(number), requests, counts).run())


class _Client:
    """Asks as fast as one event loop can; counts what has ended, and what ended wrongly."""

    def __init__(
        self, address: str, rng: random.Random, requests: int, counts: "SynchronizedArray[int]"
    ) -> None:
        self._address = address
        self._rng = rng
        self._left = requests
        self._counts = counts
        self._payloads = _payloads(rng)

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            self._unary: Any = channel.unary_unary(f"{SERVICE}/ModelInfer")
            self._streaming: Any = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
            await asyncio.gather(*(self._work() for _ in range(IN_FLIGHT)))

    async def _work(self) -> None:
        ways = (self._malformed, self._cancelled, self._hurried, self._plain)
        while self._left > 0:
            if self._rng.random() < STREAMS:
                await self._stream()
                continue
            (way,) = self._rng.choices(ways, WEIGHTS)
            self._left -= 1
            self._end(well=await way())

    def _end(self, *, well: bool) -> None:
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += not well

    async def _plain(self) -> bool:
        payload = self._rng.choice(self._payloads)
        return len(await self._unary(payload.content)) >= payload.answer_bytes

    async def _malformed(self) -> bool:
        try:
            await self._unary(MALFORMED)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.INVALID_ARGUMENT
        return False

    async def _cancelled(self) -> bool:
        call = self._unary(self._rng.choice(self._payloads).content)
        await asyncio.sleep(self._rng.random() * HURRIED_S)
        call.cancel()
        return True

    async def _hurried(self) -> bool:
        try:
            await self._unary(self._rng.choice(self._payloads).content, timeout=HURRIED_S)
        except grpc.aio.AioRpcError as error:
            return error.code() in TOO_LATE
        return True

    async def _stream(self) -> None:
        call = self._streaming()
        sent: deque[_Payload] = deque()
        for _ in range(STREAMED):
            if self._left <= 0:
                break
            self._left -= 1
            sent.append(self._rng.choice(self._payloads))
            await call.write(sent[-1].content)
            if len(sent) == AHEAD:
                self._end(well=len(await call.read()) >= sent.popleft().answer_bytes)
        await call.done_writing()
        while sent:
            self._end(well=len(await call.read()) >= sent.popleft().answer_bytes)


def _payloads(rng: random.Random) -> list[_Payload]:
    """Return serialised requests of mixed sizes, most of them small."""
    payloads = []
    for _ in range(PAYLOADS):
        rows = int(MAX_ROWS ** (rng.random() ** 3))
        pixels = rng.randbytes(rows * bundles.SIDE**2)
        request = inference_pb2.ModelInferRequest(
            model_name=bundles.NAME, raw_input_contents=[pixels]
        )
        shape = (rows, bundles.SIDE, bundles.SIDE, 1)
        request.inputs.add(name="image", datatype="UINT8", shape=shape)
        payloads.append(_Payload(request.SerializeToString(), rows * bundles.CLASSES * 4))
    return payloads


if __name__ == "__main__":
    typer.run(main)
