"""Several server processes on one address, and one that keeps them.

The kernel spreads connections over processes that listen on one port (SO_REUSEPORT). Each worker
is a whole server, started anew when it ends; the keeper loads no model and no gRPC. It reserves
the port, tells Prometheus what all of them have counted, and stops them together.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import packages_distributions
from importlib.metadata import version as package_version
from pathlib import Path

from service.errors import SettingsError, WorkerError
from service.front.address import resolve, unusable
from service.front.choice import choose
from service.front.http import MetricsServer
from service.live import READER, LiveStore
from service.metrics import Metrics
from service.settings import Settings
from service.statistics import Store
from service.watch import when_stdin_ends

log = logging.getLogger(__name__)
ANNOUNCEMENT = b"serving on "
PAUSES_S = (0.5, 30.0)  # before a worker that ended is started again: at first, and at most
SETTLED_S = 60.0  # a worker that lived so long has not failed to start
STOP_MARGIN_S = 10.0  # beyond what a worker takes to drain, before it is killed
KILLED = 128  # and the signal's number: what a shell calls a process that a signal ended


async def serve(
    settings: Settings, announce: Callable[[str], None], environment: Mapping[str, str]
) -> None:
    """Keep `settings.workers` servers until SIGTERM or SIGINT; the second ends them at once.

    Args:
        settings: of every worker.
        announce: told the address once every worker serves.
        environment: of the workers, tokens included.

    Raises:
        AddressError: an address cannot be listened on.
        SettingsError: the settings do not go with several workers.
        WorkerError: a worker ended before all of them had served.
    """
    if settings.model_control == "explicit":
        raise SettingsError("explicit model control reaches one process; set --workers 1")
    if settings.address.startswith("unix:"):
        raise SettingsError("processes cannot share a unix socket; set --workers 1")
    choose(settings)  # so that what no worker can serve with is refused once
    with (
        tempfile.TemporaryDirectory(prefix="serve-export-") as folder,
        _reserved(settings.address) as address,
    ):
        own = replace(settings, address=address, stop_with_stdin=True)
        keeper = _Keeper(
            own,
            folder,
            {**environment, **own.environment()},
            stops_with_stdin=settings.stop_with_stdin,
        )
        metrics = Metrics(
            Store(Path(folder)).snapshots,
            keeper.pids,
            live=LiveStore(Path(folder), READER, window_s=settings.live_window_s).all,
            version=package_version("train-export"),
            onnxruntime=_onnxruntime(),
        )
        server = MetricsServer(settings.metrics_address, metrics.text)
        told = server.start()
        if told:
            log.info("metrics on http://%s/metrics", told)
        try:
            await keeper.run(lambda: announce(address))
        finally:
            server.stop()


class _Keeper:
    def __init__(
        self,
        settings: Settings,
        folder: str,
        environment: dict[str, str],
        *,
        stops_with_stdin: bool,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._environment = environment
        self._stops_with_stdin = stops_with_stdin
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._serving: set[int] = set()
        self._announced = False
        self._stopping = asyncio.Event()

    def pids(self) -> list[int]:
        """Return this process and the workers that are alive."""
        alive = [one.pid for one in self._processes.values() if one.returncode is None]
        return [os.getpid(), *alive]

    async def run(self, announce: Callable[[], None]) -> None:
        """Start the workers, keep them, and stop them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._stops_with_stdin:
            when_stdin_ends(lambda: loop.call_soon_threadsafe(self._stopping.set))
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(self._settings.workers):
                    group.create_task(self._keep(index, announce))
        except* WorkerError as errors:
            raise errors.exceptions[0] from None
        finally:
            await self._stop()
        log.info("stopped")

    async def _keep(self, index: int, announce: Callable[[], None]) -> None:
        """Run one worker, and another in its place when it ends, until all are to stop."""
        pause_s = PAUSES_S[0]
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            started_s = loop.time()
            status = await self._run_once(index, announce)
            if self._stopping.is_set():
                return
            if not self._announced:
                self._stopping.set()
                raise WorkerError(
                    f"worker {index} ended with status {status} before it served; the log says why"
                )
            if loop.time() - started_s > SETTLED_S:
                pause_s = PAUSES_S[0]
            log.error("worker %d ended with status %d; starting another", index, status)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(2 * pause_s, PAUSES_S[1])

    async def _run_once(self, index: int, announce: Callable[[], None]) -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "worker"),
            *("--index", str(index), "--statistics", self._folder),
            stdin=asyncio.subprocess.PIPE,  # closed by our death, however sudden
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # an interrupt from the terminal is for the keeper
        )
        self._processes[index] = process
        assert process.stdout is not None  # noqa: S101  for the type checker
        stopping = asyncio.create_task(self._stopping.wait())
        line = asyncio.create_task(process.stdout.readline())
        await asyncio.wait((stopping, line), return_when=asyncio.FIRST_COMPLETED)
        if line.done() and line.result().startswith(ANNOUNCEMENT):
            self._serving.add(index)
            if len(self._serving) == self._settings.workers and not self._announced:
                self._announced = True
                announce()
        ended = asyncio.create_task(process.wait())
        await asyncio.wait((stopping, ended), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        line.cancel()
        if self._stopping.is_set():
            ended.cancel()
            return 0
        self._serving.discard(index)
        return await ended

    async def _stop(self) -> None:
        """Have every worker drain; kill those that take longer than they may."""
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.terminate()
        wait_s = self._settings.pre_drain_s + self._settings.drain_s + STOP_MARGIN_S
        waits = [asyncio.create_task(one.wait()) for one in self._processes.values()]
        if waits:
            await asyncio.wait(waits, timeout=wait_s)
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)
            logging.shutdown()
            os._exit(KILLED + number)
        log.info("stopping %d workers", len(self._processes))
        self._stopping.set()


def _onnxruntime() -> str:
    """Return its version without loading it, from whichever wheel it comes in."""
    wheels = packages_distributions().get("onnxruntime", ())
    return package_version(wheels[0]) if wheels else ""


@contextmanager
def _reserved(address: str) -> Iterator[str]:
    """Take a port that workers will share; yield the address with its number.

    Raises:
        AddressError: it cannot be listened on; a server that shares its port is found as well.
    """
    family, place = resolve(address, "--address")
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(place)
        shared = socket.socket(family, socket.SOCK_STREAM)
        # The address of a server that has just stopped is still in use, but free to listen on.
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(place)
    except OSError as error:
        raise unusable(address, "--address", error) from error
    with shared:
        yield f"{address.rpartition(':')[0]}:{shared.getsockname()[1]}"
