"""Listen, and serve the page until SIGTERM or Ctrl-C."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from service.aio_client import AsyncClient
from service.errors import SettingsError
from service.front.address import unusable
from service.playground.bundles import Bundles
from service.playground.page import Parts, application

STOP_S = 3  # for answers that are on their way
BACKLOG = 64


def run(
    client: AsyncClient,
    address: str,
    bundles: Bundles,
    *,
    listen: str,
    announce: Callable[[str], None],
) -> None:
    """Serve the page until the process is told to stop.

    Args:
        client: of the server, not used before.
        address: of the server, as the page shows it.
        bundles: for test images and variants.
        listen: HOST:PORT; port 0 picks a free one.
        announce: told the page's address once a browser may open it.

    Raises:
        AddressError: nothing can listen there.
    """
    host, port = parsed(listen)
    with _bound(host, port) as bound:
        name = f"[{host}]" if ":" in host else host
        said = f"playground on http://{name}:{bound.getsockname()[1]}"
        asyncio.run(
            _serve(Parts(client, address, bundles, is_loopback(host)), bound, announce, said)
        )


async def _serve(
    parts: Parts, bound: socket.socket, announce: Callable[[str], None], said: str
) -> None:
    stopped = asyncio.Event()
    config = uvicorn.Config(
        application(parts, stopped),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_S,
    )
    server = _Server(config, stopped)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again once it has stopped
    announce(said)
    await server.serve(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends what is streamed as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, stopped: asyncio.Event) -> None:
        super().__init__(config)
        self._stopped, self._loop = stopped, asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._stopped.set)


def parsed(listen: str) -> tuple[str, int]:
    """Return host and port; raises SettingsError for what is no HOST:PORT."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004  of TCP
        raise SettingsError(f"--listen is {listen!r}, expected HOST:PORT, such as 127.0.0.1:7860")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this host can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except OSError as error:
        raise unusable(f"{host}:{port}", "--listen", error) from error
