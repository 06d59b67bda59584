"""How a server is reached and tried again, and in which words its refusals are told.

Knows no request and opens nothing: the clients do, one blocking and one awaiting.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from protos import inference_pb2_grpc, parity_pb2_grpc
from service.errors import ServerError

SERVICES = ("inference.GRPCInferenceService", "train_export.v1.ParityService")
# Sent once, whatever happens: they change something, or count.
ONCE = (
    (SERVICES[0], "RepositoryModelLoad"),
    (SERVICES[0], "RepositoryModelUnload"),
    (SERVICES[1], "ReportShadow"),
)
# gRPC's core itself tries again, when the server's grpc-retry-pushback-ms says or else later and
# later. The budget is common to all channels of a process to one server: a call that fails takes a
# token, one that succeeds gives a tenth back, and with half of them gone nothing is sent again.
SERVICE_CONFIG: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],  # over all addresses that a name stands for
    "methodConfig": [
        {
            "name": [{"service": service} for service in SERVICES],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
        {"name": [{"service": service, "method": method} for service, method in ONCE]},
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
# How gRPC's own core words it when there was no server to refuse the call.
UNREACHABLE = (
    "connections to all backends failing",
    "errors resolving",
    "failed to connect",
    "dns resolution failed",
    "connection reset",
    "socket closed",
)
TOO_LARGE = re.compile(r"(CLIENT: )?(Sent|Received) message larger than max \((\d+) vs\. (\d+)\)")
CLIENT_LIMIT = "this client", "max_message_mib of the client"
SERVER_LIMIT = "the server", "--max-message-mib (SERVE_EXPORT_MAX_MESSAGE_MIB) of the server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificates in PEM, as bytes or as files."""

    ca: bytes | Path | None = None  # who may have signed the server's; None: who the system trusts
    certificate: bytes | Path | None = None  # our own chain, for a server that asks for one
    key: bytes | Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse half a pair, with which gRPC's core would abort the whole process."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key need each other; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raises ValueError for one that cannot be."""
        ca, key, certificate = (
            content(value) if isinstance(value, Path) else value
            for value in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How one client reaches one server, and in which words it says that it did not.

    Raises:
        ValueError: a value cannot work.
    """

    address: str
    timeout_s: float
    channels: int
    coalesce_rows: int
    max_message_mib: int
    wait_for_ready: bool
    tls: Tls | None
    token: str | None = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        for name, smallest, largest in (
            ("timeout_s", 0, 1e6),
            ("channels", 1, 1024),
            ("coalesce_rows", 0, 1 << 20),
            ("max_message_mib", 1, 2047),  # gRPC counts the bytes in 32 bits
        ):
            value = getattr(self, name)
            if not smallest <= value <= largest:  # so that nan is refused as well
                raise ValueError(f"{name} is {value}, expected {smallest} to {largest:.0f}")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("token is empty, or has spaces or other than ASCII characters")

    @property
    def max_message_bytes(self) -> int:
        """Largest request and answer."""
        return self.max_message_mib << 20

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """What a channel is made with."""
        limit = self.max_message_bytes
        return [
            ("grpc.service_config", json.dumps(_service_config(wait=self.wait_for_ready))),
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.per_rpc_retry_buffer_size", limit),  # at first 256 KiB; more is not sent again
            ("grpc.use_local_subchannel_pool", 1),  # or else all channels share one connection
            ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted server is found soon
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def repeats(self, request: Message) -> bool:
        """Say whether a request is sent again while no server is available.

        gRPC's core gives up after five tries of a server, or of a balancer that has none.
        """
        name = type(request).__name__.removesuffix("Request")
        return self.wait_for_ready and name not in {method for _, method in ONCE}

    def refusal(self, error: grpc.RpcError) -> ServerError:
        """Return a call's failure as a sentence that says what to mend."""
        code, details = error.code().name, error.details() or ""
        said = details.lower()
        if code == "DEADLINE_EXCEEDED" and said == "deadline exceeded":
            return self.late()
        if code == "UNAVAILABLE" and any(phrase in said for phrase in UNREACHABLE):
            details = self._unreachable(said)
        elif code == "RESOURCE_EXHAUSTED" and (found := TOO_LARGE.search(details)):
            details = _too_large(*found.groups())
        return ServerError(details or code, code=code)

    def late(self) -> ServerError:
        """Return what is said when there was no answer in time."""
        return ServerError(
            f"{self.address} did not answer in time; it may be busy, or need a longer timeout_s",
            code="DEADLINE_EXCEEDED",
        )

    def _unreachable(self, said: str) -> str:
        if "handshake" in said or "verification check failed" in said:
            return f"no TLS connection to {self.address}; compare its certificate with tls"
        if "backends" in said and ("socket closed" in said or "connection reset" in said):
            return (
                f"{self.address} closes every connection at once; if it speaks TLS, give tls, "
                "with certificate and key if it asks for them"
            )
        return (
            f"no server answers at {self.address}; "
            "start one with: serve-export serve --repository models"
        )


def _service_config(*, wait: bool) -> dict[str, Any]:
    """Return what gRPC's core is told of calls; if they wait, nothing but time ends their tries."""
    if not wait:
        return SERVICE_CONFIG
    return SERVICE_CONFIG | {
        "methodConfig": [one | {"waitForReady": True} for one in SERVICE_CONFIG["methodConfig"]],
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
    }


def methods(channel: grpc.Channel | grpc.aio.Channel) -> dict[str, Any]:
    """Return every method of the server, by the name of its request's type."""
    inference = vars(inference_pb2_grpc.GRPCInferenceServiceStub(channel))
    parity = vars(parity_pb2_grpc.ParityServiceStub(channel))
    return {f"{name}Request": method for name, method in {**inference, **parity}.items()}


def content(path: Path) -> bytes:
    """Read a file; raises ValueError if it cannot be."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _too_large(client: str | None, verb: str, size: str, limit: str) -> str:
    """Word gRPC's refusal of a message: which one, whose limit it is, and how to raise that."""
    side, option = CLIENT_LIMIT if client else SERVER_LIMIT
    sends = verb == "Sent"
    message = "request" if sends == bool(client) else "answer"
    return (
        f"the {message} has {int(size):,} bytes, {side} {'sends' if sends else 'takes'} at most "
        f"{int(limit):,}; ask about fewer images at a time, or raise {option}"
    )
