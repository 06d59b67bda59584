"""Be the process of a trial: load and check one bundle, and say in one line why not.

Is told of the bundle by a line on standard input, once everything it needs is imported. Gives way
to everyone else, prints nothing of what native code prints, and ends with its parent.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from service import model_config, version
from service.errors import ServiceError
from service.model_config import ModelOptions
from service.settings import Settings
from service.trial import MAX_SENTENCE_BYTES, REFUSED

NICENESS = 10  # a candidate is checked with what serving leaves over
OOM_SCORE = Path("/proc/self/oom_score_adj")
FIRST_TO_END = "1000"  # when the host has no memory left
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def main(arguments: Sequence[str]) -> int:
    """Wait for a bundle's name, load and check it; return the exit status."""
    _confine(int(arguments[0]))
    with os.fdopen(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    if not line:
        return 0  # nobody has a bundle for us
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    path, threads, max_batch_rows, providers = json.loads(line)
    try:
        with _silence():
            version.load(
                Path(path),
                options(threads=threads, max_batch_rows=max_batch_rows, providers=providers),
            )
    except ServiceError as error:
        sentence = " ".join(str(error).split())
        os.write(1, sentence.encode(errors="replace")[:MAX_SENTENCE_BYTES])
        return REFUSED
    return 0


def options(*, threads: int, max_batch_rows: int, providers: Sequence[str]) -> ModelOptions:
    """Return the options that a check depends on, with the usual ones for queues."""
    usual = model_config.of_server(Settings(repository=Path()), cores=threads)
    return replace(
        usual, threads=threads, max_batch_rows=max_batch_rows, providers=tuple(providers)
    )


def _confine(parent: int) -> None:
    """Give way to everyone else, and end with the parent."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        OOM_SCORE.write_text(FIRST_TO_END)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that asked for a trial has ended")


@contextmanager
def _silence() -> Iterator[None]:
    """Let native code print into nothing: what it prints is the model's choice."""
    with Path(os.devnull).open("wb") as nothing:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in kept:
            os.dup2(nothing.fileno(), number)
        try:
            yield
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
