"""Compose the server: repository, rpc and front; start, wait for a signal, drain, stop."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

from service.front.grpcio import GrpcioFront
from service.repository import Repository
from service.rpc import Rpc
from service.session import cores
from service.settings import Settings

log = logging.getLogger(__name__)


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    The address is taken before the models are loaded, so that a clash shows at once and a probe
    finds a live server that is not ready yet.

    Args:
        settings: how.
        announce: told the address once every model is loaded.

    Raises:
        AddressError: the address cannot be listened on.
        RepositoryError: there is nothing to serve.
    """
    threads = settings.threads or cores()
    repository = Repository(
        settings.repository, threads=threads, max_batch_rows=settings.max_batch_rows
    )
    front = GrpcioFront(Rpc(repository), model_threads=threads)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings.stop_with_stdin:
        threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()
    address = await front.start(settings.address)
    loading: Future[None] = Future()
    # A daemon, so that a stop need not wait for the version at hand.
    threading.Thread(target=_load, args=(repository, stop, loading), daemon=True).start()
    try:
        await _finished(loading, stop)
        if not stop.is_set():
            await front.set_serving()
            announce(address)
        await stop.wait()
        log.info("stopping: no new calls, up to %.0f s for those in flight", settings.drain_s)
    finally:
        await front.stop(settings.drain_s)
    log.info("stopped")
    if not loading.done():
        logging.shutdown()
        os._exit(0)  # native code that loads a model cannot be told to stop


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop once standard input ends; a thread, because files and terminals cannot be polled."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: its lock would outlive us
        pass
    loop.call_soon_threadsafe(stop.set)


def _load(repository: Repository, stop: asyncio.Event, loading: Future[None]) -> None:
    try:
        repository.load(until=stop.is_set)
    except Exception as error:  # noqa: BLE001  raised again by who waits
        loading.set_exception(error)
    else:
        loading.set_result(None)


async def _finished(loading: Future[None], stop: asyncio.Event) -> None:
    """Wait until everything is loaded, or the server is to stop.

    Raises:
        RepositoryError: there is nothing to serve.
    """
    loaded = asyncio.wrap_future(loading)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((loaded, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loaded.done():
        loaded.result()
