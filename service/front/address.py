"""What an address to listen on means, and why nothing can listen there."""

import errno
import re
import socket
from typing import Any

from service.errors import AddressError, SettingsError

ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):(?P<port>[0-9]{1,5})")
LARGEST_PORT = 65535
UNIX = "unix:"
WHY = {
    errno.EADDRINUSE: "another process listens there already, which you may stop",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "this user may not take ports below 1024",
}
UNKNOWN = "it is in use, or not an address of this machine"


def resolve(address: str, option: str) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Return the family and the socket's address of `HOST:PORT` to listen on.

    Raises:
        SettingsError: it is none; `option` is named.
        AddressError: its host is not known.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None or int(parts["port"]) > LARGEST_PORT:
        raise SettingsError(f"{option} is {address!r}, expected HOST:PORT, such as 127.0.0.1:8001")
    host, port = parts["host"].strip("[]") or None, int(parts["port"])
    # Most names are ASCII, as which they need no codec for international ones: 1 % of a launch.
    name = host.encode() if host and host.isascii() else host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a host's name
        raise AddressError(
            f"{option} is {address!r}, but its host is not known: {error}; name one of this machine"
        ) from error
    return found[0][0], found[0][4]


def unusable(
    address: str, option: str, error: OSError | None = None, *, unknown: str = UNKNOWN
) -> AddressError:
    """Return why nothing can listen on an address, and what to do.

    Args:
        address: HOST:PORT, or unix:PATH.
        option: that it was given with.
        error: what the system said; None: it is asked once more, for who does not hand it on.
        unknown: said where nothing is wrong any more.
    """
    said = error or _tried(address, option)
    why = WHY.get(said.errno or 0, said.strerror) if said else unknown
    return AddressError(
        f"cannot listen on {address}: {why}; choose another with {option} HOST:PORT "
        "(port 0 takes a free one)"
    )


def _tried(address: str, option: str) -> OSError | None:
    if address.startswith(UNIX):
        return None
    family, place = resolve(address, option)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
    except OSError as error:
        return error
    return None
