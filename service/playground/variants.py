"""The process that answers with the other variants and the original, and what it says.

It is `train-export answer`, started when it is first needed. It ends with us: its standard input is
a pipe that nobody else holds.
"""

import asyncio
import importlib.util
import itertools
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.playground.errors import PlaygroundError

COMMAND = (sys.executable, "-m", "pipeline", "answer")
NEEDED = ("tensorflow", "ai_edge_litert", "pipeline")  # of `COMMAND`; looked for, never imported
ORIGINAL = "saved-model"  # its name among the variants
LINE_BYTES = 16 << 20  # of an answer; a thousand logits take 20 KB
START_S = 60.0
STOP_S = 2.0
MAX_PROCESSES = 2  # each has TensorFlow in it
MAX_ASKING = 8  # questions to a process that are not answered yet; others wait here
LAST_LINES = 20


def missing() -> str:
    """Return why no variant can answer here; nothing if they can."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not lacking:
        return ""
    return (
        f"the package {lacking[0]} is not installed beside the playground, so only the server "
        "answers; install train-export[pipeline] to see the other variants and the original"
    )


@dataclass(frozen=True, slots=True)
class Said:
    """What one variant answered to one row."""

    variant: str
    outputs: tuple[float, ...] = ()  # of the output that parity is measured on
    seconds: float = 0.0  # in its own runtime, in this process's own time
    error: str = ""


class Variants:
    """Answers of every variant of a bundle; the last few bundles keep a process each."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """Store how to start the process; it is given `--bundle PATH`."""
        self._command = command
        self._running: dict[Path, _Running] = {}
        self._starting = asyncio.Lock()

    async def ask(
        self, bundle: Path, row: NDArray[np.generic]
    ) -> AsyncGenerator[tuple[str, ...] | Said, None]:
        """Give the names of all variants, then what each answers to a row, as it comes.

        Raises:
            PlaygroundError: the process cannot be started, or ended meanwhile.
        """
        running = await self._of(bundle)
        yield running.names
        answers = running.ask(row)
        async for said in answers:
            yield said

    async def close(self) -> None:
        """End every process, also one that somebody has just given up to start."""
        async with self._starting:
            for running in self._running.values():
                await running.close()
            self._running.clear()

    async def _of(self, bundle: Path) -> "_Running":
        async with self._starting:
            running = self._running.pop(bundle, None)
            if running is None or running.ended:
                running = await _start(self._command, bundle)
            self._running[bundle] = running  # the last is the one used last
            while len(self._running) > MAX_PROCESSES:
                await self._running.pop(next(iter(self._running))).close()
            return running


async def _start(command: Sequence[str], bundle: Path) -> "_Running":
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--bundle",
            str(bundle),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )
    except OSError as error:
        raise PlaygroundError(f"the variants cannot answer: {error}") from error
    running = _Running(process)
    try:
        await running.begin()
    except BaseException:
        await running.close()
        raise
    return running


class _Running:
    """A process that answers for one bundle."""

    def __init__(self, process: Process) -> None:
        self.names: tuple[str, ...] = ()
        self._process = process
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Queue[Said | None]] = {}
        self._room = asyncio.Semaphore(MAX_ASKING)
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._listener = asyncio.create_task(self._listen())
        self._begun: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self.ended = False

    async def begin(self) -> None:
        """Wait for the names of the variants."""
        try:
            async with asyncio.timeout(START_S):
                self.names = await asyncio.shield(self._begun)
        except TimeoutError as error:
            raise PlaygroundError(
                f"the process of the variants did not start within {START_S:g} s"
            ) from error

    async def ask(self, row: NDArray[np.generic]) -> AsyncGenerator[Said, None]:
        async with self._room:
            number, queue = next(self._ids), asyncio.Queue[Said | None]()
            self._waiting[number] = queue
            try:
                self._write({"id": number, "rows": row[np.newaxis].tolist()})
                for _ in self.names:
                    said = await queue.get()
                    if said is None:
                        raise self._crash()
                    yield said
            finally:
                self._waiting.pop(number, None)

    async def close(self) -> None:
        self._listener.cancel()
        with suppress(asyncio.CancelledError):
            await self._listener
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _write(self, question: dict[str, Any]) -> None:
        if self.ended or self._process.stdin is None:
            raise self._crash()
        self._process.stdin.write(json.dumps(question).encode() + b"\n")

    async def _listen(self) -> None:
        errors = asyncio.create_task(self._note_errors())
        try:
            assert self._process.stdout is not None  # noqa: S101  it is a pipe
            async for line in self._process.stdout:
                self._take(json.loads(line))
            await errors
            await self._process.wait()
        except ValueError:
            self._lines.append("it wrote what is no answer")
        finally:
            errors.cancel()
            self.ended = True
            if not self._begun.done():
                self._begun.set_exception(self._crash())
                self._begun.exception()  # whoever waits gets it as well
            for queue in self._waiting.values():
                queue.put_nowait(None)

    async def _note_errors(self) -> None:
        assert self._process.stderr is not None  # noqa: S101  it is a pipe
        async for line in self._process.stderr:
            self._lines.append(line.decode("utf-8", "replace").strip())

    def _take(self, message: dict[str, Any]) -> None:
        if "variants" in message:
            if not self._begun.done():
                self._begun.set_result(tuple(message["variants"]))
            return
        queue = self._waiting.get(message.get("id", -1))
        if queue is not None:  # else nobody waits for it any more
            queue.put_nowait(_said(message))

    def _crash(self) -> PlaygroundError:
        status = self._process.returncode
        last = next((line for line in reversed(self._lines) if line), "it gave no reason")
        return PlaygroundError(
            f"the process of the variants ended with status {status}: "
            f"{last.removeprefix('error: ')}; the next image starts it again"
        )


def _said(message: dict[str, Any]) -> Said:
    if "error" in message:
        return Said(message["variant"], error=message["error"])
    return Said(message["variant"], tuple(message["outputs"][0]), message["seconds"])
