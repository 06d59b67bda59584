"""Whether a server answers, and takes requests: one call of grpc.health.v1.

Containers ask every few seconds, so that this imports neither numpy nor the client, and needs no
token: health is open to everybody.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from service.connection import Connection, Tls
from service.errors import ServerError
from service.settings import Settings

CHECK = "/grpc.health.v1.Health/Check"
EVERYWHERE = re.compile(r"(0\.0\.0\.0|\[::\])?(:[0-9]+)")
HERE = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  not listened on


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of whom; as the options of `serve-export health`."""

    address: str = str(Settings.__dataclass_fields__["address"].default)
    ready: bool = False
    service: str = ""
    timeout_s: float = 3.0
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str = ""


def ask(question: Question) -> str:
    """Return "ready" where a server takes requests, and "live" where it only answers.

    Raises:
        ServerError: it does not answer; it was to be ready, and is not; or it has no such service.
        ValueError: a value cannot work, or a file of TLS cannot be read.
    """
    pems = (question.tls_ca, question.tls_cert, question.tls_key)
    secured = Tls(ca=question.tls_ca, certificate=question.tls_cert, key=question.tls_key)
    connection = Connection(
        address=dialled(question.address),
        timeout_s=question.timeout_s,
        wait_for_ready=False,
        channels=1,
        coalesce_rows=0,
        max_message_mib=1,
        tls=secured if question.tls or question.tls_name or any(pems) else None,
        token=None,
    )
    if _serving(connection, question):
        return "ready"
    if question.ready or question.service:
        name = question.service or connection.address
        raise ServerError(f"{name} is live, and takes no requests now", code="UNAVAILABLE")
    return "live"


def dialled(address: str) -> str:
    """Return where a server that listens on an address answers on its own host."""
    everywhere = EVERYWHERE.fullmatch(address)
    return f"{HERE[everywhere[1]]}{everywhere[2]}" if everywhere else address


def _serving(connection: Connection, question: Question) -> bool:
    with _channel(connection, question.tls_name) as channel:
        check = channel.unary_unary(
            CHECK,
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        asked = health_pb2.HealthCheckRequest(service=question.service)
        try:
            answer = check(asked, timeout=connection.timeout_s)
        except grpc.RpcError as error:
            raise connection.refusal(error) from error
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _channel(connection: Connection, tls_name: str) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.address, connection.options)
    expected = [("grpc.ssl_target_name_override", tls_name)] if tls_name else []
    credentials = connection.tls.credentials()
    return grpc.secure_channel(connection.address, credentials, [*connection.options, *expected])
