"""Which front serves: the fast one where those who call are trusted, else the one that limits them.

Decides from the settings and this host, and opens nothing.
"""

import importlib.util
import ipaddress
from typing import NamedTuple

from service import host
from service.errors import SettingsError
from service.front.address import UNIX, resolve
from service.settings import Settings

LIBRARY = "pygrpc_native"
MANY_CORES = 4  # of a worker, from which on a second I/O thread cost answers (docs/serving.md)


class Choice(NamedTuple):
    """A front, `native` or `grpcio`, and why it is this one: the end of a sentence."""

    front: str
    reason: str


def choose(settings: Settings) -> Choice:
    """Return the front for these settings.

    The native front reads a message to its end, and inflates it, before anybody can refuse it. So
    it is chosen only for clients of this host, or behind a proxy that bounds what it passes on.

    Raises:
        SettingsError: the native front is asked for and cannot be had, the address is none, or the
            front's threads are to keep to processors that this process may not use.
        AddressError: its host is not known.
    """
    chosen = _chosen(settings)
    if chosen.front == "native":
        _check_cpus(settings)
    return chosen


def _chosen(settings: Settings) -> Choice:
    missing = _missing(settings)
    if settings.front == "native":
        if missing:
            raise SettingsError(f"front is 'native', but {missing}; choose auto or grpcio")
        return Choice("native", "it was asked for")
    if settings.front == "grpcio":
        return Choice("grpcio", "it was asked for")
    if missing:
        return Choice("grpcio", missing)
    if settings.behind_proxy:
        return Choice("native", "a proxy bounds what clients send")
    if is_local(settings.address):
        return Choice("native", f"only this host reaches {settings.address}")
    return Choice("grpcio", f"others than this host reach {settings.address}")


def io_shown(settings: Settings) -> str:
    """Return what carries bytes of the native front, as the log and `doctor` tell it."""
    number = settings.io_threads
    where = f" on CPU {host.shown(settings.io_cpu_numbers)}" if settings.io_cpus else ""
    return f"{number} I/O thread{'s' if number > 1 else ''}{where}"


def io_advice(settings: Settings, front: str) -> str:
    """Return what speaks against `io_threads` and `io_cpus` as they are; empty: nothing."""
    cpus = settings.io_cpu_numbers
    if front == "grpcio":
        asked = settings.io_threads > 1 or cpus
        return "io_threads and io_cpus are ignored: the grpcio front serves" if asked else ""
    found = []
    if cpus and len(cpus) < settings.workers:
        found.append(
            f"the I/O threads of all {settings.workers} workers share what io_cpus lists: "
            "list as many CPUs as there are workers, or none"
        )
    if settings.io_threads > 1 and host.cores() >= MANY_CORES * settings.workers:
        found.append(f"several io_threads cost answers on {MANY_CORES} cores and more")
    return "; ".join(found)


def is_local(address: str) -> bool:
    """Tell whether only processes of this host reach an address.

    Raises:
        SettingsError: it is none.
        AddressError: its host is not known.
    """
    if address.startswith(UNIX):
        return True
    _, place = resolve(address, "--address")
    return ipaddress.ip_address(place[0]).is_loopback


def _check_cpus(settings: Settings) -> None:
    """Refuse processors that this process may not be put on."""
    allowed, asked = host.cpus(), settings.io_cpu_numbers
    if asked and not allowed:
        raise SettingsError("io_cpus is set, but only Linux keeps threads to CPUs; leave it out")
    if not asked <= allowed:
        raise SettingsError(
            f"io_cpus is {settings.io_cpus!r}, expected some of {host.shown(allowed)}, "
            "the CPUs that this process may use"
        )


def _missing(settings: Settings) -> str:
    """Return what these settings need that the native front has not."""
    if settings.tls_cert is not None:
        return "it has no TLS"
    if settings.max_connection_age_s:
        return "it does not limit a connection's age"
    if importlib.util.find_spec(LIBRARY) is None:
        return f"{LIBRARY} is not installed"
    return ""
