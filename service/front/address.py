"""What an address to listen on means."""

import re
import socket
from typing import Any

from service.errors import AddressError

ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):(?P<port>[0-9]{1,5})")
LARGEST_PORT = 65535
UNIX = "unix:"


def resolve(address: str, option: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Return the family and the socket's address of `HOST:PORT` to listen on.

    Raises:
        AddressError: it is none, or its host is not known; `option` is named.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None or int(parts["port"]) > LARGEST_PORT:
        raise AddressError(f"{option} is {address!r}, expected HOST:PORT, such as 127.0.0.1:8001")
    host, port = parts["host"].strip("[]") or None, int(parts["port"])
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a host's name
        raise AddressError(
            f"{option} is {address!r}, but its host is not known: {error}; name one of this machine"
        ) from error
    return found[0][0], found[0][4]
