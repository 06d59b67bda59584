"""What the server does with twice the load it can carry.

    python benchmarks/overload.py

On a model whose every row costs at least 5 ms of one thread, and a server of one instance, round
after round: the capacity, with clients enough that the model is never idle; then requests at
random moments, twice as many a second as the capacity, each with a deadline of a second; then a
quarter of the capacity; then the capacity again, because hosts do not keep their speed. Prints
medians of

    goodput          what was answered in time under twice the load, as a share of the capacity
    refusal_p99_ms   the 99th percentile of the time until a request was refused
    recovery_s       from the fall of the load to the last request that was not answered soon

and writes them to benchmarks/results/overload.json. Exit status 1 if one of them misses its target.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

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
ROW_MS = 7.5  # of a lone row; among others it costs a quarter less
WAITING_CLIENTS = 32
CAPACITY_S, OVERLOAD_S, RECOVERY_S = 2.0, 6.0, 2.0
SETTLING_S = 1.0  # left out of what is counted
CALM = 0.25  # of the capacity
DEADLINE_S = 1.0
SOON_S = DEADLINE_S / 10
MIN_GOODPUT, MAX_REFUSAL_MS, MAX_RECOVERY_S = 0.9, 10.0, 1.0


OK, REFUSED = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it was sent, how long it took, in seconds, and how it ended."""

    sent_s: float
    took_s: float
    code: grpc.StatusCode


Ask: TypeAlias = Callable[[float | None], Coroutine[Any, Any, Asked]]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round found."""

    capacity_per_s: float
    goodput: float
    refused: float  # share of the requests
    late: float  # share of the requests: run for nobody
    refusal_p50_ms: float
    refusal_p99_ms: float
    answer_p99_ms: float
    recovery_s: float


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are of these.")] = 7,
    load: Annotated[float, typer.Option(help="Of the capacity, when overloaded.")] = 2.0,
    instances: Annotated[int, typer.Option(min=1, help="Of the server.")] = 1,
) -> None:
    """Measure, print, judge and write."""
    with tempfile.TemporaryDirectory() as root:
        model = bundles.slow(ROW_MS)
        bundles.write(Path(root), model)
        options = ("--instances", str(instances), "--threads", "1")
        with measured.server(Path(root), *options) as server:
            content = _request(model)
            found = [
                asyncio.run(_round(server.address, content, load, seed))
                for seed in track(range(rounds), "rounds", console=Console(stderr=True))
            ]
    medians = _report(found)
    measured.write(
        "overload",
        {"load": load, "instances": instances, "rounds": [asdict(one) for one in found]},
    )
    if (
        medians["goodput"] < MIN_GOODPUT
        or not medians["refusal_p99_ms"] < MAX_REFUSAL_MS
        or not medians["recovery_s"] < MAX_RECOVERY_S
    ):
        raise SystemExit(
            f"error: expected a goodput of {MIN_GOODPUT}, refusals in {MAX_REFUSAL_MS:g} ms "
            f"and recovery in {MAX_RECOVERY_S:g} s"
        )


async def _round(address: str, content: bytes, load: float, seed: int) -> Round:
    rng = random.Random(seed)
    async with grpc.aio.insecure_channel(address) as channel:
        infer: Any = channel.unary_unary(METHOD)

        async def ask(timeout_s: float | None) -> Asked:
            sent_s = time.monotonic()
            code = await infer(content, timeout=timeout_s).code()
            return Asked(sent_s, time.monotonic() - sent_s, code)

        capacity = await _capacity(ask)
        started_s = time.monotonic()
        overloaded = await _send(ask, load * capacity, OVERLOAD_S, rng)
        fell_s = time.monotonic()
        after = await _send(ask, CALM * capacity, RECOVERY_S, rng)
        counted = [one for one in await asyncio.gather(*overloaded) if _counts(one, started_s)]
        slow_s = [one.sent_s for one in await asyncio.gather(*after) if not _soon(one)]
        capacity = (capacity + await _capacity(ask)) / 2
        return _judged(capacity, counted, max(slow_s, default=fell_s) - fell_s)


async def _capacity(ask: Ask) -> float:
    """Return answers a second with so many clients that the model is never idle."""
    started_s = time.monotonic()
    until_s = started_s + SETTLING_S + CAPACITY_S
    ends_s: list[float] = []

    async def client() -> None:
        while time.monotonic() < until_s:
            one = await ask(None)
            if one.code is not OK:
                raise SystemExit(f"error: a request was refused with {one.code}")
            ends_s.append(one.sent_s + one.took_s)

    await asyncio.gather(*(client() for _ in range(WAITING_CLIENTS)))
    return sum(started_s + SETTLING_S <= end_s < until_s for end_s in ends_s) / CAPACITY_S


async def _send(
    ask: Ask, per_s: float, seconds: float, rng: random.Random
) -> list[asyncio.Task[Asked]]:
    """Send requests at random moments, whatever becomes of those before."""
    tasks = []
    next_s = time.monotonic()
    until_s = next_s + seconds
    while (next_s := next_s + rng.expovariate(per_s)) < until_s:
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        tasks.append(asyncio.create_task(ask(DEADLINE_S)))
    return tasks


def _counts(one: Asked, started_s: float) -> bool:
    return one.sent_s >= started_s + SETTLING_S


def _soon(one: Asked) -> bool:
    return one.code is OK and one.took_s < SOON_S


def _judged(capacity: float, asked: Sequence[Asked], recovery_s: float) -> Round:
    answers_ms = [one.took_s * 1000 for one in asked if one.code is OK]
    refusals_ms = [one.took_s * 1000 for one in asked if one.code is REFUSED]
    if not refusals_ms:
        raise SystemExit("error: nothing was refused; the load was not one")
    return Round(
        capacity_per_s=capacity,
        goodput=len(answers_ms) / (OVERLOAD_S - SETTLING_S) / capacity,
        refused=len(refusals_ms) / len(asked),
        late=1 - (len(answers_ms) + len(refusals_ms)) / len(asked),
        answer_p99_ms=_percentile(answers_ms, 99),
        refusal_p50_ms=_percentile(refusals_ms, 50),
        refusal_p99_ms=_percentile(refusals_ms, 99),
        recovery_s=recovery_s,
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def _request(model: bundles.Model) -> bytes:
    row = model.rows[:1]
    request = inference_pb2.ModelInferRequest(
        model_name=bundles.NAME, raw_input_contents=[row.tobytes()]
    )
    request.inputs.add(name=model.input.name, datatype=model.input.datatype, shape=row.shape)
    return request.SerializeToString()


def _report(found: Sequence[Round]) -> dict[str, float]:
    """Print every figure; return its median."""
    medians = {}
    table = Table(box=box.SIMPLE_HEAD, title="under overload, median (min to max)")
    table.add_column("figure")
    table.add_column("found", justify="right")
    for name in Round.__dataclass_fields__:
        figures = [getattr(one, name) for one in found]
        medians[name] = statistics.median(figures)
        table.add_row(name, f"{medians[name]:.3f} ({min(figures):.3f} to {max(figures):.3f})")
    Console().print(table)
    return medians


if __name__ == "__main__":
    typer.run(main)
