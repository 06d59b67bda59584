"""Load and check a version in a process of its own, before it comes near the one that serves.

onnxruntime can be made to crash, hang or eat memory by the file it loads. Here that ends a child
and becomes a refusal. What the child does is the server's own check, nothing less.
"""

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from service import bundle, model_config, version
from service.errors import BundleError, ServiceError
from service.model_config import ModelOptions
from service.settings import Settings

REFUSED = 3  # exit status of the child; 1 and 2 are Python's own
NICENESS = 10  # a candidate is checked with what serving leaves over
MAX_SENTENCE_BYTES = 8 << 10  # as much as a pipe surely takes while nobody reads
OOM_SCORE = Path("/proc/self/oom_score_adj")
FIRST_TO_END = "1000"  # when the host has no memory left
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
# What the child needs to find its libraries and devices; no token is among it.
ENVIRONMENT = re.compile(
    r"HOME|PATH|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH|(CUDA|CUDNN|NVIDIA|ORT)_.*"
    r"|COVERAGE_.*"  # so that what it runs is counted where this is tested
)


def run(
    path: Path, *, threads: int, max_batch_rows: int, providers: Sequence[str], timeout_s: float
) -> None:
    """Load and check one bundle in a process that may die of it; blocks until that has ended.

    It never outlives the thread that calls this.

    Args:
        path: folder of the bundle.
        threads: in one model call.
        max_batch_rows: most rows of one model call.
        providers: onnxruntime's names, best first.
        timeout_s: longest wait in seconds, the start of the process included.

    Raises:
        BundleError: the bundle was refused, or its process crashed or did not end in time.
    """
    command = (sys.executable, "-P", "-m", "service.trial")  # -P: nothing from where we stand
    arguments = (
        str(os.getpid()),
        str(path),
        str(threads),
        str(max_batch_rows),
        ",".join(providers),
    )
    with subprocess.Popen(  # noqa: S603  our own module, and no shell
        (*command, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)},
        start_new_session=True,  # an interrupt from the terminal is for the server
    ) as child:
        try:
            status = child.wait(timeout_s)
            sentence = _sentence(child) if status == REFUSED else ""
        except subprocess.TimeoutExpired as error:
            raise BundleError(
                f"{bundle.shown(path)} was not loaded and checked within {timeout_s:g} s; "
                "its model does not come to an end, or this host is too busy"
            ) from error
        finally:
            child.kill()
    if status:
        raise BundleError(sentence or _ended(path, status))


def main(arguments: Sequence[str]) -> int:
    """Be the child: load and check, and say in one line why not; return the exit status."""
    parent, path, threads, max_batch_rows, providers = arguments
    _confine(int(parent))
    try:
        with _silence():
            version.load(
                Path(path),
                options(
                    threads=int(threads),
                    max_batch_rows=int(max_batch_rows),
                    providers=providers.split(","),
                ),
            )
    except ServiceError as error:
        sentence = " ".join(str(error).split())
        os.write(sys.stdout.fileno(), sentence.encode(errors="replace")[:MAX_SENTENCE_BYTES])
        return REFUSED
    return 0


def options(*, threads: int, max_batch_rows: int, providers: Sequence[str]) -> ModelOptions:
    """Return the options that a check depends on, with the usual ones for queues."""
    usual = model_config.of_server(Settings(repository=Path()), cores=threads)
    return replace(
        usual, threads=threads, max_batch_rows=max_batch_rows, providers=tuple(providers)
    )


def _sentence(child: subprocess.Popen[bytes]) -> str:
    """Return what an ended child has said, without waiting for more."""
    said = cast("IO[bytes]", child.stdout)
    os.set_blocking(said.fileno(), False)
    return (said.read(MAX_SENTENCE_BYTES) or b"").decode(errors="replace")


def _ended(path: Path, status: int) -> str:
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        return (
            f"{bundle.shown(path)} crashed onnxruntime while it was loaded and checked "
            f"({names.get(-status, -status)}); publish a model that does not"
        )
    return (
        f"{bundle.shown(path)} could not be loaded and checked: the process for it ended with "
        f"status {status}; the server's log has its last words"
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
