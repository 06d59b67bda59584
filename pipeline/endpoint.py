"""Reach a server that somebody else has started."""

import os
from dataclasses import dataclass
from pathlib import Path

from service.client import Client, Tls

TOKEN = "SERVE_EXPORT_TOKEN"  # as serve-export's own commands  # noqa: S105
CHANNELS = 4  # behind a balancer of connections, several servers are asked


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server or balancer, and what it asks for; the token itself is never among these."""

    address: str  # HOST:PORT
    tls: bool = False
    tls_ca: Path | None = None  # who may have signed its certificate; None: who the system trusts
    tls_cert: Path | None = None  # our own, with its key, for a server that asks for one
    tls_key: Path | None = None
    token_file: Path | None = None  # None: the variable SERVE_EXPORT_TOKEN, if it is set

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
