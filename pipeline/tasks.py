"""Make Prefect tasks of plain functions: what is kept of them, and what is tried again.

A result is kept as JSON under `runs/results`, and taken again if `results` finds that it holds.
"""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.assets import materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.serializers import JSONSerializer

from pipeline import results

log = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
RETRY_AFTER_S = (5.0, 30.0)
# What may be gone in a minute: a network, or a disk behind one. A full disk stays full.
TRANSIENT = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
        errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT,
    }
)  # fmt: skip
PROGRESS_EVERY_S = 2.0
SERIALIZER = JSONSerializer(
    object_encoder="pipeline.results.encode", object_decoder="pipeline.results.decode"
)


@dataclass(frozen=True, slots=True)
class Stages:
    """Tasks of one run."""

    storage: Path  # of results that are kept; one folder for all runs
    device: str  # what TensorFlow computes on

    def once(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return a task that is run every time."""
        return task(
            name=results.name_of(function), cache_policy=NO_CACHE, **_retries()
        )(function)  # fmt: skip

    def kept(
        self,
        function: Callable[Arguments, Result],
        *,
        places: Sequence[str] = ("folder",),
        apart: Sequence[str] = (),
        anew: bool = False,
    ) -> Callable[Arguments, Result]:
        """Return a task whose result, a record, is taken from an earlier run where it still holds.

        Inside a transaction the result is kept only once that is committed.

        Args:
            function: the stage.
            places: its arguments that say where to write.
            apart: its arguments that the result does not follow from.
            anew: run it even where a result is kept, and replace that.
        """
        name = results.name_of(function)

        def key(_: object, given: dict[str, Any]) -> str:
            follows_from = {one: value for one, value in given.items() if one not in apart}
            wanted = results.key(
                function, follows_from, device=self.device, places=frozenset(places)
            )
            if why := results.why_anew(self.storage, wanted):
                log.info("%s: %s", name, why)
            return wanted

        made: Task[Arguments, Result] = task(
            name=name,
            cache_key_fn=key,
            persist_result=True,
            result_storage=self.storage,
            result_serializer=SERIALIZER,
            cache_result_in_memory=False,  # else nothing would look at the files again
            refresh_cache=anew,
            **_retries(),
        )(function)

        @wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            state: State[Result] = made(*args, return_state=True, **kwargs)
            if state.name == "Cached":
                log.info(
                    "%s: nothing to do, data, settings, code, packages and hardware as of %s",
                    name, self._when(state),
                )  # fmt: skip
            result: Result = state.result()
            return result

        return run

    def _when(self, state: State[Any]) -> str:
        """Return when a kept result was written."""
        kept = getattr(state.data, "metadata", state.data)
        record = self.storage / str(kept.storage_key)
        with suppress(OSError):
            return f"{datetime.fromtimestamp(record.stat().st_mtime).astimezone():%Y-%m-%d %H:%M}"
        return "an earlier run"


def is_transient(error: BaseException | None) -> bool:
    """Say whether an error is of the machinery below us, and may be gone in a minute."""
    return isinstance(error, OSError) and (
        isinstance(error, ConnectionError | TimeoutError) or error.errno in TRANSIENT
    )


class Progress:
    """Tell Prefect which share of the training is done; never what ends it."""

    def __init__(
        self,
        create: Callable[..., Any] = create_progress_artifact,
        update: Callable[..., Any] = update_progress_artifact,
    ) -> None:
        self._create = create
        self._update = update
        self._artifact: UUID | None = None
        self._told_s = 0.0
        self._silent = False

    def __call__(self, share: float) -> None:
        """Tell it, now and then.

        Args:
            share: 0 to 1.
        """
        now_s = time.monotonic()
        if self._silent or (now_s - self._told_s < PROGRESS_EVERY_S and share < 1):
            return
        self._told_s = now_s
        try:
            self._tell(100 * share)
        except Exception as error:  # noqa: BLE001  a server that is gone is no reason to stop training
            log.warning("Prefect is no longer told of the progress: %s", error)
            self._silent = True

    def _tell(self, percent: float) -> None:
        if self._artifact is None:
            self._artifact = self._create(
                percent, key="training", description="share of the training that is done"
            )
        else:
            self._update(self._artifact, percent)


def record_lineage(steps: Sequence[tuple[Path, str]]) -> None:
    """Tell Prefect what was made from what, as assets.

    Args:
        steps: what there was first, then what was made of it, and so on; each with how it is
            called. A path that Prefect takes for no asset's key is left out, and logged.
    """
    before: list[str] = []
    for path, name in steps:
        uri = path.absolute().as_uri()
        try:
            made = materialize(
                uri, name=f"lineage.{name}", asset_deps=[*before], cache_policy=NO_CACHE
            )(_nothing)
        except ValueError as error:
            log.info("%s is not among Prefect's assets: %s", path, error)
            continue
        made()
        before = [uri]


def _nothing() -> None:
    """Stand for work that has been done."""


def _retries() -> dict[str, Any]:
    return {
        "retries": len(RETRY_AFTER_S),
        "retry_delay_seconds": [*RETRY_AFTER_S],
        "retry_condition_fn": _retry,
    }


def _retry(_: Task[Any, Any], __: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return is_transient(error if isinstance(error, BaseException) else None)
