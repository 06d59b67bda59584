"""Answer Prometheus over HTTP: `/metrics`, and nothing else.

What is told is `service.metrics`'s; here is only the wire.
"""

import contextlib
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeAlias

from service.front.address import resolve, unusable

log = logging.getLogger(__name__)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format
MAX_CONNECTIONS = 64  # a few Prometheus ask; more are no scrapers
MAX_CONNECTION_S = 10.0  # as long as Prometheus waits by default
POLL_S = 0.1  # how often a stop, and clients that are too slow, are looked for
Connection: TypeAlias = Any  # a socket; typeshed's union has datagrams too


class MetricsServer:
    """An HTTP server of `/metrics` and nothing else, in threads of its own."""

    def __init__(self, address: str, text: Callable[[], bytes]) -> None:
        """Store what is needed to start.

        Args:
            address: `HOST:PORT`; port 0 takes a free one; empty: there is to be no server.
            text: makes the answer, in Prometheus' text format; called from several threads.
        """
        self._address, self._text = address, text
        self._server: _Server | None = None

    def start(self) -> str:
        """Listen and answer; return the address with the port that was taken, empty if none is.

        Raises:
            AddressError: it cannot be listened on.
        """
        if not self._address:
            return ""
        family, place = resolve(self._address, "--metrics-address")
        try:
            self._server = _Server(family, place, self._text)
        except OSError as error:
            raise unusable(self._address, "--metrics-address", error) from error
        answer = self._server.serve_forever
        threading.Thread(target=answer, args=(POLL_S,), name="metrics", daemon=True).start()
        return f"{self._address.rpartition(':')[0]}:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop listening; connections that are open end by themselves."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # after a server that has just stopped; never beside one
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self, family: socket.AddressFamily, place: tuple[Any, ...], text: Callable[[], bytes]
    ) -> None:
        self.address_family = family
        self.text = text
        self._since_s: dict[Connection, float] = {}
        super().__init__(place, _Handler)

    def verify_request(self, request: Connection, client_address: object) -> bool:
        return len(self._since_s) < MAX_CONNECTIONS

    def process_request(self, request: Connection, client_address: object) -> None:
        self._since_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Connection) -> None:
        self._since_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off who has taken too long, byte by byte perhaps."""
        until_s = time.monotonic() - MAX_CONNECTION_S
        for request, since_s in list(self._since_s.items()):
            if since_s < until_s:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Connection, client_address: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # that a client is gone is no event
            log.error("a request for metrics failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = MAX_CONNECTION_S
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d\n"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            content = self.server.text()
        except Exception:
            log.exception("the metrics cannot be collected")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "train-export"  # Python's version is nobody's business

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: nobody reads a line every fifteen seconds."""
