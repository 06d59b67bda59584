"""Score shards on the cores of this machine, a process a core.

One session with a thread a core would leave most of the work, decoding pictures, to one core.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from pipeline.errors import ScoringError
from pipeline.scoring import part
from pipeline.scoring.listing import Shard
from pipeline.scoring.part import Done, Job


def run(job: Job, shards: Sequence[Shard], workers: int) -> Generator[Done, None, None]:
    """Score all shards; give what came of each as it is done.

    Args:
        job: what they have in common.
        shards: which.
        workers: processes; with one it is this one.

    Raises:
        ScoringError: a process was ended from outside.
        ServiceError: as `part.score`.
    """
    workers = min(workers, len(shards))
    if workers <= 1:
        yield from (part.score(job, shard) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _begin) as pool:
        waiting = [pool.submit(part.score, job, shard) for shard in shards]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise ScoringError(
                "a process that scores was ended from outside, perhaps for want of memory; the "
                "same command goes on, with fewer --workers if need be"
            ) from error
        finally:  # whoever stops here does not wait for shards: what is not whole has no name
            if not all(future.done() for future in waiting):
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()


def _begin() -> None:
    """Leave Ctrl-C to the process that has started us, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
