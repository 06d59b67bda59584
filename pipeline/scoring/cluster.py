"""Score shards on a Ray cluster, a task a shard: a node that is lost costs the shards it had.

Plain tasks, not Ray Data: what keeps a run is the part that is renamed when it is whole, and what
Ray Data would add to it (blocks, its own names of files and lists of finished rows) would be a
second account of the same.
"""

import logging
import os
import socket
from collections.abc import Generator, Sequence
from itertools import islice

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its maker about clusters

import ray
from ray.exceptions import RayError

from pipeline.errors import PipelineError, ScoringError
from pipeline.scoring import part
from pipeline.scoring.listing import Shard
from pipeline.scoring.part import Done, Job
from service.errors import ServiceError

RETRIES = 8  # of a shard, when its node or process is lost; a model that crashes it comes to an end
CLIENT = "ray://"
REACH_S = 10.0
WINDOW = 1000  # shards that Ray knows of at a time


def connect(address: str) -> None:
    """Connect to a cluster, unless this process is connected already.

    Args:
        address: auto: the one that was started on this host; HOST:PORT; ray://HOST:PORT; local:
            a cluster of this process alone.

    Raises:
        ScoringError: there is none.
    """
    if ray.is_initialized():
        return
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ScoringError(
            f"no Ray cluster answers at {address!r}: {said}; start one with ray start --head, or "
            "name it with --address"
        ) from error


def _reach(address: str) -> None:
    """See that somebody listens there: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix(CLIENT).rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), REACH_S).close()


def run(job: Job, shards: Sequence[Shard]) -> Generator[Done, None, None]:
    """Score all shards, one a core; give what came of each as it is done.

    Raises:
        ScoringError: a shard was lost over and over.
        ServiceError: as `part.score`.
    """
    score = ray.remote(num_cpus=1, max_retries=RETRIES)(part.score)
    waiting: list[ray.ObjectRef[Done]] = []
    left = iter(shards)
    while True:
        more = islice(left, WINDOW - len(waiting))
        waiting += [score.remote(job, shard) for shard in more]
        if not waiting:
            return
        ready, waiting = ray.wait(waiting, num_returns=1)
        yield from (_result(one) for one in ready)


def _result(done: "ray.ObjectRef[Done]") -> Done:
    try:
        found: Done = ray.get(done)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PipelineError | ServiceError | OSError):
            raise cause from error
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ScoringError(
            f"Ray gave a shard up: {said}; the same command goes on with the others"
        ) from error
    return found
