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
    token_file: Path | None = None  # None: the variable SERVE_EXPORT_TOKEN, if it is set

    def connect(self) -> Client:
        """Return a client.

        Raises:
            OSError: the token's file cannot be read.
            ValueError: the address or a certificate cannot be used.
        """
        written = self.token_file.read_text() if self.token_file else os.environ.get(TOKEN, "")
        token = next(iter(written.split()), None)  # one a line; ours is the first
        tls = Tls(ca=self.tls_ca) if self.tls or self.tls_ca else None
        return Client(self.address, tls=tls, token=token, channels=CHANNELS)
