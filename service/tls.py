"""Whether certificate and key files will do, found by a handshake with ourselves.

Nothing is sent: both ends are in memory.
"""

import ssl
from contextlib import suppress
from pathlib import Path

from service.errors import SettingsError

ROUNDS = 4  # in which each end speaks; a handshake takes two


def certificate_ends_s(cert: Path, key: Path) -> float:
    """Return when a server's certificate ends, in seconds since 1970.

    Args:
        cert: certificate chain, PEM.
        key: its private key, PEM, not encrypted.

    Raises:
        SettingsError: a file cannot be read, they do not belong together, or a client that trusts
            the certificate would refuse it: it has ended, has not begun, or is not for servers.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # by which name clients call is not known here
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever signed it
    try:
        server.load_cert_chain(cert, key, password="")  # or it would ask for one
        client.load_verify_locations(cafile=cert)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"certificate {cert} and key {key} cannot be used: {_reason(error)}; "
            "give the PEM files of one certificate, its own first, and of its key, not encrypted"
        ) from error
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for end in ends * ROUNDS:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLError as error:
        raise SettingsError(
            f"certificate {cert} would be refused by clients: {_reason(error)}; get a new one"
        ) from error
    about = ends[0].getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(about["notAfter"])))


def authorities_end_s(path: Path) -> float:
    """Return when the first of the authorities in a PEM file ends, in seconds since 1970.

    Raises:
        SettingsError: it cannot be read, or has no authority in it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be used: {_reason(error)}; give the PEM file of an authority"
        ) from error
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs()]
    if not ends:
        raise SettingsError(f"{path} has no authority's certificate; give the one that signs")
    return float(min(ends))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
