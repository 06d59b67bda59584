"""Reach a server that somebody else has started."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from service.client import Client, Tls

TOKEN = "SERVE_EXPORT_TOKEN"  # as serve-export's own commands  # noqa: S105
ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+):(?P<port>[0-9]{1,5})")
LARGEST_PORT = 65535
UNIX = "unix:"
LISTENS_S = 1.0  # until nobody is taken to listen
CHANNELS = 4  # behind a balancer of connections, several servers are asked


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server or balancer, and what it asks for; the token itself is never among these.

    Raises:
        ConfigError: the address cannot be one.
    """

    address: str  # HOST:PORT, or unix:PATH
    tls: bool = False
    tls_ca: Path | None = None  # who may have signed its certificate; None: who the system trusts
    tls_cert: Path | None = None  # our own, with its key, for a server that asks for one
    tls_key: Path | None = None
    token_file: Path | None = None  # None: the variable SERVE_EXPORT_TOKEN, if it is set

    def __post_init__(self) -> None:
        """Refuse an address at once that gRPC would look for until time is up."""
        if self.address.startswith(UNIX) and len(self.address) > len(UNIX):
            return
        found = ADDRESS.fullmatch(self.address)
        if found is None or not 0 < int(found["port"]) <= LARGEST_PORT:
            raise ConfigError(
                f"the server is {self.address!r}, expected HOST:PORT with a port from 1 to "
                f"{LARGEST_PORT} and nothing before it, such as 127.0.0.1:8001"
            )

    def listens(self, timeout_s: float = LISTENS_S) -> bool:
        """Tell whether a connection to the address can be opened; nothing is said over it."""
        try:
            if self.address.startswith(UNIX):
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(timeout_s)
                    connection.connect(self.address.removeprefix(UNIX).removeprefix("//"))
            else:
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
        except (OSError, ValueError):  # which a name that cannot be one is
            return False
        return True

    def connect(self, channels: int = CHANNELS) -> Client:
        """Return a client.

        Args:
            channels: connections that its calls take turns on.

        Raises:
            OSError: the token's file cannot be read.
            ValueError: the address or a certificate cannot be used.
        """
        written = self.token_file.read_text() if self.token_file else os.environ.get(TOKEN, "")
        token = next(iter(written.split()), None)  # one a line; ours is the first
        pems = (self.tls_ca, self.tls_cert, self.tls_key)
        secured = self.tls or any(pems)
        tls = Tls(ca=pems[0], certificate=pems[1], key=pems[2]) if secured else None
        return Client(self.address, tls=tls, token=token, channels=channels)
