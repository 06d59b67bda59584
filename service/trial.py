"""Have a version loaded and checked by another process, before it comes near the one that serves.

onnxruntime can be made to crash, hang or eat memory by the file it loads. Here that ends a child
and becomes a refusal. What the child does, `service.candidate` says: the server's own check,
nothing less. Imports nothing slow, so that a child may get ready while its parent does.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self, cast

from service.errors import BundleError

REFUSED = 3  # exit status of the child; 1 and 2 are Python's own
MAX_SENTENCE_BYTES = 8 << 10  # as much as a pipe surely takes while nobody reads
# What the child needs to find its libraries and devices; no token is among it.
ENVIRONMENT = re.compile(
    r"HOME|PATH|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH|(CUDA|CUDNN|NVIDIA|ORT)_.*"
    r"|COVERAGE_.*"  # so that what it runs is counted where this is tested
)


class Trials:
    """Runs trials, the first of them in a process that has been waiting for it. Thread-safe."""

    def __init__(self) -> None:
        """Store that nobody waits; `prepare` starts a process."""
        self._lock = threading.Lock()
        self._waiting: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Start the process for the next trial, which imports what it needs meanwhile.

        It ends with the thread that calls this.
        """
        self._waiting = _start()

    def run(
        self,
        path: Path,
        *,
        threads: int,
        max_batch_rows: int,
        providers: Sequence[str],
        timeout_s: float,
    ) -> None:
        """Load and check one bundle in a process that may die of it; blocks until that has ended.

        It never outlives the thread that has started it.

        Args:
            path: folder of the bundle.
            threads: in one model call.
            max_batch_rows: most rows of one model call.
            providers: onnxruntime's names, best first.
            timeout_s: longest wait in seconds, the start of the process included.

        Raises:
            BundleError: the bundle was refused, or its process crashed or did not end in time.
        """
        from service import bundle  # noqa: PLC0415  numpy, which `prepare` need not wait for

        shown = bundle.shown(path)
        job = json.dumps([str(path), threads, max_batch_rows, list(providers)]).encode()
        with self._take() or _start() as child:
            try:
                with suppress(BrokenPipeError):  # it has ended, and its status says how
                    cast("IO[bytes]", child.stdin).write(job + b"\n")
                sentence = _until_its_end(child, timeout_s)
                status = child.wait()
            except TimeoutError as error:
                raise BundleError(
                    f"{shown} was not loaded and checked within {timeout_s:g} s; "
                    "its model does not come to an end, or this host is too busy"
                ) from error
            finally:
                child.kill()
        if status:
            raise BundleError(sentence if status == REFUSED else _ended(shown, status))

    def close(self) -> None:
        """End the process that waits."""
        child = self._take()
        if child is not None:
            with child:
                child.kill()

    def _take(self) -> subprocess.Popen[bytes] | None:
        """Return the process that waits, if there is one that lives; it waits for nobody else."""
        with self._lock:
            child, self._waiting = self._waiting, None
        if child is not None and child.poll() is not None:
            with child:
                return None
        return child


def _start() -> subprocess.Popen[bytes]:
    # -P: nothing is imported from where we stand.
    return subprocess.Popen(  # noqa: S603  our own module, and no shell
        (
            sys.executable,
            "-P",
            "-m",
            "service.candidate",
            str(os.getpid()),
        ),  # -P: nothing from here
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)},
        start_new_session=True,  # an interrupt from the terminal is for the server
    )


def _until_its_end(child: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return what a child has said once it has ended, which closes what it says it on.

    Raises:
        TimeoutError: it did not end in time.
    """
    said = cast("IO[bytes]", child.stdout)
    until_s = time.monotonic() + timeout_s
    content = b""
    poll = select.poll()  # not Popen.wait, which looks every 50 ms
    poll.register(said, select.POLLIN)
    while poll.poll(max(0.0, until_s - time.monotonic()) * 1000):
        read = said.read(MAX_SENTENCE_BYTES)
        if not read:
            return content[:MAX_SENTENCE_BYTES].decode(errors="replace")
        content = content[:MAX_SENTENCE_BYTES] + read
    raise TimeoutError


def _ended(shown: str, status: int) -> str:
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        return (
            f"{shown} crashed onnxruntime while it was loaded and checked "
            f"({names.get(-status, -status)}); publish a model that does not"
        )
    return (
        f"{shown} could not be loaded and checked: the process for it ended with "
        f"status {status}; the server's log has its last words"
    )
