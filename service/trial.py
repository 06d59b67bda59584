"""Have a version loaded and checked by another process, before it comes near the one that serves.

onnxruntime can be made to crash, hang or eat memory by the file it loads. Here that ends a child
and becomes a refusal. What the child does, `service.candidate` says: the server's own check,
nothing less. The first child is a fork of a server that has just imported what both need; later
ones, when there are threads that a fork would cut off, begin anew.
"""

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Self, TypeAlias, cast

from service.errors import BundleError

REFUSED = 3  # exit status of the child; 1 and 2 are Python's own
MAX_SENTENCE_BYTES = 8 << 10  # as much as a pipe surely takes while nobody reads
# What the child needs to find its libraries and devices; no token is among it.
ENVIRONMENT = re.compile(
    r"HOME|PATH|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH|(CUDA|CUDNN|NVIDIA|ORT)_.*"
    r"|COVERAGE_.*"  # so that what it runs is counted where this is tested
)
TASKS = Path("/proc/self/task")
MAX_DESCRIPTORS = 1 << 20  # more than a process may have open


class Fork:
    """A copy of this process that runs one function; as much of `Popen` as is needed of it."""

    def __init__(self, main: Callable[[], int]) -> None:
        """Fork. Only where no other thread runs, which would be missing in the copy.

        Args:
            main: the child's; returns its exit status. It reads and writes on 0 and 1.
        """
        theirs, ours, back, their_back = map(_beyond_standard, (*os.pipe(), *os.pipe()))
        self.pid = os.fork()
        if not self.pid:
            _be_child(main, theirs, their_back)
        os.close(theirs)
        os.close(their_back)
        self.stdin: IO[bytes] = os.fdopen(ours, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(back, "rb", buffering=0)
        self._status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it lives."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Return the exit status, negative for a signal, once it has ended."""
        return cast("int", self._wait(0))

    def kill(self) -> None:
        """End it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, how: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


Child: TypeAlias = subprocess.Popen[bytes] | Fork


class Trials:
    """Runs trials, the first of them in a process that has been waiting for it. Thread-safe."""

    def __init__(self) -> None:
        """Store that nobody waits; `prepare` starts a process."""
        self._lock = threading.Lock()
        self._waiting: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, candidate: Callable[[Sequence[str]], int] | None) -> None:
        """Fork the process for the next trial, if this one has no other thread; else start one.

        It ends with the thread that calls this.

        Args:
            candidate: `service.candidate.main`, imported with all that it needs; None: do not fork.
        """
        parent = str(os.getpid())
        alone = TASKS.is_dir() and len(list(TASKS.iterdir())) == 1
        if candidate is None or not alone:
            self._waiting = _start()
        else:
            self._waiting = Fork(partial(candidate, [parent]))

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
        from service import bundle  # noqa: PLC0415  numpy, which takes a while

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

    def _take(self) -> Child | None:
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


def _beyond_standard(number: int) -> int:
    """Return another number for an open file, none of the first three, and close the given one."""
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(number)
    return moved


def _be_child(main: Callable[[], int], stdin: int, stdout: int) -> None:
    """Be the copy: run a function, and end without anything that the original would still do."""
    status = 1
    try:
        os.setsid()  # an interrupt from the terminal is for the server
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, MAX_DESCRIPTORS)
        for name in list(os.environ):
            if not ENVIRONMENT.fullmatch(name):
                del os.environ[name]
        status = main()
    except BaseException:  # noqa: BLE001  whatever it is, the original's code must not go on here
        traceback.print_exc()
    finally:
        os._exit(status)


def _until_its_end(child: Child, timeout_s: float) -> str:
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
