"""What the page shows of the server while it serves: its models, their parity, the load.

Asked once a second for every page that is open; a server that is away is asked on, and what is said
then is one sentence.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from protos import bundle_pb2, inference_pb2, parity_pb2
from service import agreement
from service.aio_client import AsyncClient
from service.errors import ServerError

PAUSE_S = 1.0
ASK_S = 3.0
NS_PER_S = 1e9
INTEGERS = "int8"
VERDICT = {parity_pb2.LIVE_VERDICT_PASSED: "passed", parity_pb2.LIVE_VERDICT_FAILED: "failed"}
Counted = dict[tuple[str, str], inference_pb2.ModelStatistics]


async def states(
    client: AsyncClient, *, stopped: asyncio.Event, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[dict[str, Any], None]:
    """Give what the server says now, again and again, until `stopped`.

    Args:
        client: of the server.
        stopped: set when no more is wanted.
        clock: in seconds.
    """
    counted: Counted = {}
    counted_s = clock()
    while not stopped.is_set():
        try:
            models = await client.models(timeout_s=ASK_S)
            found = await client.statistics(timeout_s=ASK_S)
            parity = await client.parity(timeout_s=ASK_S)
        except ServerError as error:
            counted = {}
            yield {"up": False, "reason": str(error)}
        else:
            now_s, before = clock(), counted
            counted = {(one.name, one.version): one for one in found}
            yield {
                "up": True,
                "models": _models(models),
                "load": _load(before, counted, now_s - counted_s),
                "parity": [parity_of(one) for one in parity.versions],
            }
            counted_s = now_s
        try:
            async with asyncio.timeout(PAUSE_S):
                await stopped.wait()
        except TimeoutError:
            continue


def _models(
    found: list[inference_pb2.RepositoryIndexResponse.ModelIndex],
) -> list[dict[str, Any]]:
    """Return every model with its versions, the highest first."""
    models: dict[str, list[dict[str, str]]] = {}
    for one in found:
        version = {"version": one.version, "state": one.state, "reason": one.reason}
        models.setdefault(one.name, []).append(version)
    for versions in models.values():
        versions.sort(key=lambda one: -int(one["version"] or 0))
    return [{"name": name, "versions": versions} for name, versions in sorted(models.items())]


def _load(before: Counted, now: Counted, seconds: float) -> list[dict[str, Any]]:
    """Return what happened to each version in some seconds; no rates for what is new."""
    return [
        {
            "model": name,
            "version": version,
            "rows": one.inference_count,
            "requests": one.inference_stats.success.count,
            "refused": one.inference_stats.fail.count,
            **_rates(before.get((name, version)), one, seconds),
        }
        for (name, version), one in now.items()
    ]


def _rates(
    before: inference_pb2.ModelStatistics | None,
    now: inference_pb2.ModelStatistics,
    seconds: float,
) -> dict[str, float]:
    if before is None or seconds <= 0 or now.inference_count < before.inference_count:
        return {}  # it was loaded, or counts anew, since
    requests = _count(now, "success") - _count(before, "success")
    queue_s, compute_s = (
        (_seconds(now, *names) - _seconds(before, *names))
        for names in (("queue",), ("compute_input", "compute_infer", "compute_output"))
    )
    executions = now.execution_count - before.execution_count
    rows = now.inference_count - before.inference_count
    rates = {
        "rows_per_s": rows / seconds,
        "requests_per_s": requests / seconds,
        "refused_per_s": (_count(now, "fail") - _count(before, "fail")) / seconds,
        "waiting": max(0.0, queue_s) / seconds,  # requests, on average (Little's law)
    }
    if requests > 0:
        rates["queue_ms"] = 1000 * max(0.0, queue_s) / requests
        rates["compute_ms"] = 1000 * max(0.0, compute_s) / requests
    if executions > 0:
        rates["batch_rows"] = rows / executions
    return rates


def _count(one: inference_pb2.ModelStatistics, name: str) -> int:
    return int(getattr(one.inference_stats, name).count)


def _seconds(one: inference_pb2.ModelStatistics, *names: str) -> float:
    return float(sum(getattr(one.inference_stats, name).ns for name in names) / NS_PER_S)


def parity_of(one: parity_pb2.VersionParity) -> dict[str, Any]:
    """Return what a server says about the parity of a version, as the page shows it."""
    served = [one.served] if one.HasField("served") else []
    reports = [*one.variants, *served, one.self_check.report]
    check = one.self_check
    shown: dict[str, Any] = {
        "model": one.model,
        "version": one.version,
        "reports": [_report(report) for report in reports],
        "check": {
            "passed": check.report.passed,
            "failure": check.report.failure,
            "cpu": check.cpu,
            "runtime": check.report.runtime,
            "checked": check.checked,
            "ms": check.seconds * 1000,
        },
    }
    if one.HasField("live"):
        shown["live"] = _live(one.live)
    return shown


def _report(report: bundle_pb2.ParityReport) -> dict[str, Any]:
    return {
        "variant": report.variant,
        "rows": report.accuracy.rows,
        "accuracy": report.accuracy.value,
        "agreement": report.agreement,
        "apart": agreement.judged(report),
        "allowed": report.budget.max_logit,
        "explained": report.flips_explained,
        "unexplained": report.flips_unexplained,
        "passed": report.passed,
        "failure": report.failure,
    }


def _live(live: parity_pb2.LiveParity) -> dict[str, Any]:
    window = live.window
    return {
        "verdict": VERDICT.get(live.verdict, "unknown"),
        "failure": live.failure,
        "rows": window.rows,
        "window_s": live.window_s,
        "total": live.total.rows,
        "agreement": window.agreed / window.rows if window.rows else None,
        "apart": window.max_logit if window.rows else None,
        "allowed": live.budget.max_logit,
        "integers": live.budget.precision == INTEGERS,  # judged by other figures than `apart`
        "explained": window.flips_explained,
        "unexplained": window.flips_unexplained,
    }
