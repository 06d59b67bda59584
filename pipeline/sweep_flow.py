"""The flow `train-export-sweep`: a task for each combination, on this machine or on a Ray cluster.

A task starts a process and waits for it; nothing of TensorFlow is in the process of the flow.
"""

import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipeline import sweep

log = logging.getLogger(__name__)


@task(name="sweep.run", cache_policy=NO_CACHE)
def train_one(folder: str) -> dict[str, Any]:
    """Train one combination and score it."""
    return asdict(sweep.run(Path(folder)))


@flow(name="train-export-sweep")
def train_export_sweep(
    folders: list[str], resources: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Train every combination; publish nothing.

    Args:
        folders: What `sweep.jobs` has made, a combination each.
        resources: Of each, as Ray calls them; none where they are trained here.

    Returns:
        A `sweep.Outcome` for each, as tables.
    """
    reserved: Any = nullcontext()
    if resources is not None:
        from prefect_ray.context import remote_options  # noqa: PLC0415  only where Ray is

        reserved = remote_options(**resources)
    with reserved:
        futures = [
            train_one.with_options(task_run_name=Path(one).name).submit(one) for one in folders
        ]
    try:
        return [_came(future, folder) for future, folder in zip(futures, folders, strict=True)]
    except BaseException:  # SIGTERM: what trains here saves its state, else we would wait for it
        for process in tuple(sweep.running):
            process.terminate()
        raise


def local() -> TaskRunner[Any]:
    """Return what trains one combination after the other: TensorFlow takes all cores for each."""
    return ThreadPoolTaskRunner(max_workers=1)


def on_ray() -> TaskRunner[Any]:
    """Return what trains on the Ray cluster that this process is connected to."""
    from prefect_ray import RayTaskRunner  # noqa: PLC0415  only where Ray is

    runner: TaskRunner[Any] = RayTaskRunner()
    return runner


def _came(future: PrefectFuture[Any], folder: str) -> dict[str, Any]:
    """Return an outcome, also of a task that was lost with its host."""
    found = future.result(raise_on_failure=False)
    if isinstance(found, dict):
        return found
    log.warning("%s was lost: %s", folder, found)
    return asdict(sweep.lost(Path(folder), str(found)))
