"""Compose one server process: repository, rpc, front; start, wait for a signal, drain, stop."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service import host, model_config, version
from service.access import Access
from service.errors import RepositoryError
from service.front import choice
from service.live import LiveStore
from service.model_config import ModelOptions
from service.repository import Repository
from service.sampling import MAX_RING_BYTES, Sampling
from service.settings import Settings
from service.statistics import Store
from service.trial import Trials
from service.version import Version
from service.watch import looks, when_stdin_ends

if TYPE_CHECKING:
    from service.edge import Edge

log = logging.getLogger(__name__)
TRIAL_S = 600.0  # longest time a candidate may take to load and to answer the golden set
# Looks without a new call, before a server that drains stops listening; many, because on a busy
# host a single pause may pass before the event loop has seen what came in it.
QUIET_TICKS = 15
MAX_QUIET_S = 1.0  # clients that go on calling are not waited for any longer
TICK_S = 0.01
TIDY_S = 15.0
MESSAGE_SLACK_BYTES = 4096  # of a message, for what goes with its rows
LOADING_S = 30.0  # as good as any model is loaded by then
KEEPER_S = 1.0  # for who watches the folder to notice that it is over
KILLED = 128  # and the signal's number: what a shell calls a process that a signal ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What one process has of its own; with several workers they differ.

    Who may call is not among the settings, which are shown and handed on.
    """

    trials: Trials = field(default_factory=Trials)
    access: Access = field(default_factory=lambda: Access((), ()))
    statistics: Path | None = None  # folder shared with other workers
    worker: int = 0


async def serve(
    settings: Settings, announce: Callable[[str], None], process: Process | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; the second of them ends it at once.

    The address is taken while the first model is on trial and loaded, so that a clash shows at once
    and a probe finds a live server that is not ready yet.

    Args:
        settings: how.
        announce: told the address once the first model is ready, or may be loaded by request.
        process: what is this process's own.

    Raises:
        AddressError: an address cannot be listened on.
        RepositoryError: there is no repository; or, if it is not watched, nothing to serve.
        SettingsError: a file that the settings name cannot be used.
    """
    server = _Server(settings, process or Process(), announce)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.on_signal, number)
    if settings.stop_with_stdin:
        when_stdin_ends(lambda: loop.call_soon_threadsafe(server.stop))
    await server.run()


class _Server:
    def __init__(
        self, settings: Settings, process: Process, announce: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._announce: Callable[[str], None] | None = announce
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._over = threading.Event()  # the same, for threads
        self._shared = process.statistics is not None
        self._access = process.access
        self._chosen = choice.choose(settings)
        store = Store(process.statistics, process.worker)
        self._late = store.is_successors()
        self._defaults = model_config.of_server(settings, host.cores())
        trials = None if settings.model_control == "none" else process.trials
        self._repository = Repository(
            settings.folder,
            defaults=self._defaults,
            load=partial(_load, trials=trials),
            statistics=store,
            sampling=_sampling(settings, process),
        )

    async def run(self) -> None:
        """Listen, load, serve, drain and stop."""
        keeping: Future[None] = Future()
        # A daemon, so that a stop need not wait for the version at hand.
        keeper = threading.Thread(target=self._keep, args=(keeping,), daemon=True)
        # What is first found is on trial in another process while this one imports the rest.
        early = self._settings.model_control == "poll" and not self._late
        if early:
            keeper.start()
        async with self._let_loading_end():
            self._edge = self._made_edge()
        _keep_what_is_imported()
        if self._late:
            await self._load_first()
        try:
            address = await self._listen()
            if early:
                self._show(address)  # that everything was refused, perhaps
            else:
                keeper.start()
            tidying = asyncio.create_task(self._tidy())
            await self._ended(keeping)
            tidying.cancel()
            await self._drain()
        finally:
            await self._stop()
        log.info("stopped")
        await asyncio.wait((asyncio.wrap_future(keeping),), timeout=KEEPER_S)
        if not keeping.done() or self._repository.is_changing():
            logging.shutdown()
            os._exit(0)  # native code that loads a model cannot be told to stop

    async def _listen(self) -> str:
        """Take the addresses; return the one of gRPC."""
        async with self._let_loading_end():
            address = await self._edge.front.start()
            metrics = self._edge.metrics and self._edge.metrics.start()
        if metrics:
            log.info("metrics on http://%s/metrics", metrics)
        self._repository.watch(lambda: self._show_health(address))
        return address

    @asynccontextmanager
    async def _let_loading_end(self) -> AsyncIterator[None]:
        """Where this fails, wait: the process must not end while its native code loads a model."""
        try:
            yield
        except Exception:
            self._over.set()
            until_s = time.monotonic() + LOADING_S
            while self._repository.is_changing() and time.monotonic() < until_s:  # noqa: ASYNC110
                await asyncio.sleep(TICK_S)
            raise

    async def _stop(self) -> None:
        """End everything that was started, whether or not it was."""
        self._over.set()
        await self._edge.front.stop(0)
        self._edge.rpc.close()
        self._repository.close()
        if self._edge.metrics is not None:
            self._edge.metrics.stop()
        self._edge.tracer.stop()

    def _made_edge(self) -> "Edge":
        from service.edge import Edge  # noqa: PLC0415  while the first version is on trial

        return Edge(
            self._settings,
            self._repository,
            self._access,
            self._chosen,
            threads=self._defaults.instances,
            shared=self._shared,
        )

    def stop(self) -> None:
        """Begin to drain."""
        self._over.set()
        self._stopping.set()

    def on_signal(self, number: int) -> None:
        """Begin to drain; the second time, end."""
        if self._stopping.is_set():
            log.warning("ended by a second signal; calls in flight are lost")
            logging.shutdown()
            os._exit(KILLED + number)
        self.stop()

    async def _load_first(self) -> None:
        """Load what there is before listening: meanwhile the other workers answer every call."""
        looked = asyncio.Event()

        def look() -> None:
            _look(self._repository, self._over)
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(looked.set)

        threading.Thread(target=look, daemon=True).start()
        waits = [asyncio.create_task(one.wait()) for one in (looked, self._stopping)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _keep(self, done: "Future[None]") -> None:
        """Load what there is and, where it is watched, what comes; in a thread of its own."""
        settings, repository = self._settings, self._repository
        try:
            if settings.model_control == "explicit":
                repository.wait_for_orders()
                return
            repository.reconcile(self._over.is_set)
            if settings.model_control == "none":
                _check_served(settings.folder, repository)
                return
            if not repository.versions():
                log.warning("nothing to serve yet; %s is watched", settings.folder)
            for _ in looks(settings.folder, settings.poll_s, self._over):
                _look(repository, self._over)
        except Exception as error:  # noqa: BLE001  raised again by who waits
            done.set_exception(error)
        finally:
            if not done.done():
                done.set_result(None)

    async def _ended(self, keeping: "Future[None]") -> None:
        """Wait until the server is to stop, or what keeps its models has failed."""
        keeper = asyncio.wrap_future(keeping)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((keeper, stopping), return_when=asyncio.FIRST_COMPLETED)
        if keeper.done():
            try:
                keeper.result()
            except BaseException:
                stopping.cancel()
                raise
        await stopping

    async def _tidy(self) -> None:
        """Give back what memory the last requests left, now and then and off the event loop."""
        begun = 0
        while True:
            await asyncio.sleep(TIDY_S)
            if begun != self._edge.front.begun:
                begun = self._edge.front.begun
                await asyncio.to_thread(host.give_back_memory)

    async def _drain(self) -> None:
        """Say it is over, wait for balancers to notice, answer what was accepted, stop."""
        settings = self._settings
        self._edge.front.show_stopping()
        self._edge.rpc.show_stopping()
        if settings.pre_drain_s:
            log.info("stopping: not ready, calls are refused in %g s", settings.pre_drain_s)
            await asyncio.sleep(settings.pre_drain_s)
        self._edge.rpc.drain()
        log.info("stopping: no new calls, up to %g s for those in flight", settings.drain_s)
        until_s = time.monotonic() + settings.drain_s
        while not self._edge.rpc.is_idle() and time.monotonic() < until_s:  # noqa: ASYNC110  threads
            await asyncio.sleep(TICK_S)
        # What has reached the host by now gets its refusal, and not a broken connection.
        self._edge.front.hold()
        quiet_until_s = min(until_s, time.monotonic() + MAX_QUIET_S)
        quiet = 0
        while quiet < QUIET_TICKS and time.monotonic() < quiet_until_s:
            begun = self._edge.front.begun
            await asyncio.sleep(TICK_S)
            quiet = quiet + 1 if begun == self._edge.front.begun else 0
        await self._edge.front.stop(max(0.0, until_s - time.monotonic()))

    def _show_health(self, address: str) -> None:
        """Tell the front what is ready; called from any thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._show, address)

    def _show(self, address: str) -> None:
        models = self._repository.answering()
        self._edge.front.show_health(ready=self._repository.is_ready(), models=models)
        open_to_orders = self._settings.model_control == "explicit"
        if self._announce is not None and (any(models.values()) or open_to_orders):
            self._announce(address)
            self._announce = None


def _sampling(settings: Settings, process: Process) -> Sampling:
    """Return who samples; a message of sampled rows has to fit into what may be sent."""
    live = LiveStore(process.statistics, process.worker, window_s=settings.live_window_s)
    return Sampling(
        live,
        rate=settings.sample_rate,
        max_rows=settings.sample_rows,
        max_bytes=min(MAX_RING_BYTES, (settings.max_message_mib << 20) - MESSAGE_SLACK_BYTES),
    )


def _keep_what_is_imported() -> None:
    """Look through it no more: again and again, that would stop every thread for 0.1 s.

    There is little garbage in it; `launch` has switched collection off while all of it is imported.
    """
    gc.freeze()
    gc.enable()


def _load(path: Path, options: ModelOptions, *, trials: Trials | None) -> Version:
    """Load a version; first in a process that may crash of it, where others could suffer."""
    if trials is not None:
        trials.run(
            path,
            threads=options.threads,
            max_batch_rows=options.max_batch_rows,
            providers=options.providers,
            timeout_s=TRIAL_S,
        )
    return version.load(path, options)


def _look(repository: Repository, over: threading.Event) -> None:
    try:
        repository.reconcile(over.is_set)
    except RepositoryError as error:
        log.warning("%s; what is loaded is still served", error)
    except Exception:
        log.exception("the repository could not be looked at; what is loaded is still served")


def _check_served(root: Path, repository: Repository) -> None:
    """Refuse to go on with nothing, where nothing more will come."""
    if repository.versions():
        return
    reasons = "; ".join(repository.refused().values())
    if reasons:
        raise RepositoryError(f"nothing in {root} can be served: {reasons}")
    raise RepositoryError(
        f"{root} holds no bundle (NAME/VERSION/manifest.json); publish one with: train-export run"
    )
