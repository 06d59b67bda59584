"""One call as it comes off the wire, and which status an error becomes.

Knows no transport: a front subclasses `Call` to carry the answer back.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Protocol, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from service import errors

Request = TypeVar("Request", bound=Message)
Metadata: TypeAlias = "Mapping[str, str] | Iterable[tuple[str, str | bytes]]"
log = logging.getLogger(__name__)
# A message repeats what the client sent. gRPC's clients refuse trailers over 8 KiB, and would show
# RESOURCE_EXHAUSTED instead of our status; percent-encoded, a character takes up to 12 bytes.
MAX_MESSAGE_CHARACTERS = 600
PUSHBACK = "grpc-retry-pushback-ms"  # gRFC A6: when a client that retries may
DRAINING = "GRPC server is shutting down and has stopped accepting new requests."  # as Triton


class Status(IntEnum):
    """The status codes of gRPC that this server answers with, by their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


STATUS: dict[type[errors.ServiceError], Status] = {
    errors.InvalidRequestError: Status.INVALID_ARGUMENT,
    errors.PictureError: Status.INVALID_ARGUMENT,
    errors.ModelNotFoundError: Status.NOT_FOUND,
    errors.ModelNotReadyError: Status.UNAVAILABLE,
    errors.OverloadedError: Status.UNAVAILABLE,
    errors.QueueTimeoutError: Status.UNAVAILABLE,
    errors.DrainingError: Status.UNAVAILABLE,
    errors.ControlError: Status.UNAVAILABLE,
    errors.PreconditionError: Status.FAILED_PRECONDITION,
    errors.LimitError: Status.RESOURCE_EXHAUSTED,
    errors.DeadlineError: Status.DEADLINE_EXCEEDED,
    errors.CancelledError: Status.CANCELLED,
    errors.UnimplementedError: Status.UNIMPLEMENTED,
    errors.UnauthenticatedError: Status.UNAUTHENTICATED,
    errors.PermissionDeniedError: Status.PERMISSION_DENIED,
    errors.LoadError: Status.INTERNAL,
}


class CallError(Exception):
    """A call that is answered with a status instead of a response.

    Attributes:
        status: its code.
        trailers: metadata that goes with it.
    """

    def __init__(
        self, status: Status, message: str, trailers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        cut = len(message) > MAX_MESSAGE_CHARACTERS
        super().__init__(message[: MAX_MESSAGE_CHARACTERS - 1] + "…" if cut else message)
        self.status = status
        self.trailers = trailers


class Stream(Protocol):
    """Responses that a front sends as they fall due, until the caller leaves or the server stops.

    A front asks for them now and then, writes each before it asks for the next, and closes the
    stream in the end. So what a caller does not read is made only when there is room for it.
    """

    pause_s: float  # between two times of asking

    def due(self) -> Iterator[bytes]:
        """Give what is due now, serialised; raises ServiceError to end the call."""

    def close(self) -> None:
        """Keep nothing for the caller any more."""


def texts(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """Return the metadata that have text values, by their names."""
    return {key: value for key, value in metadata if isinstance(value, str)}


def parsed(call: "Call", parse: Callable[[bytes], Request]) -> Request:
    """Return the message of a call.

    Raises:
        CallError: it is none, or not of the kind its RPC takes.
    """
    try:
        return parse(call.content)
    except DecodeError as error:
        raise CallError(
            Status.INVALID_ARGUMENT, f"the request is not a message of {call.path}"
        ) from error


def refusal(path: str, error: Exception) -> CallError:
    """Return the status that an error becomes.

    What went wrong inside is logged with a token; the client gets the token and nothing else.
    """
    if isinstance(error, CallError):
        return error
    status = STATUS.get(type(error))  # type: ignore[arg-type] # others have none
    if status is None:
        token = secrets.token_hex(4)
        log.error("call failed: %s, request %s", path, token, exc_info=error)
        return CallError(Status.INTERNAL, f"internal error, request {token}")
    trailers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.OverloadedError):
        trailers = ((PUSHBACK, str(math.ceil(error.retry_after_s * 1000))),)
    return CallError(status, str(error), trailers)


class Call:
    """One call. A front implements `_send` and `_send_error`, and calls `cancel`.

    Exactly one of `answer` and `refuse` has an effect, the first, from whichever thread.
    """

    def __init__(
        self,
        path: str,
        content: bytes,
        *,
        metadata: Metadata,
        deadline_s: float = math.inf,
        peer: str = "",
    ) -> None:
        """Store what came off the wire.

        Args:
            path: full path of the RPC.
            content: the serialised request.
            metadata: by lower-case names.
            deadline_s: when the caller stops listening, on the monotonic clock.
            peer: who called, as the transport names it.
        """
        self.path = path
        self.content = content
        self._metadata = metadata
        self.deadline_s = deadline_s
        self.peer = peer
        self.started_s = time.monotonic()
        # What is learnt on the way, for the access log and for traces.
        self.notes: dict[str, str | int | float] = {}
        self.watcher: Callable[[Call, Status], None] | None = None
        self._lock = threading.Lock()
        self._over = False
        self._cancelled = False
        self._on_cancel: Callable[[], None] | None = None

    def answer(self, content: bytes) -> None:
        """Send the serialised response."""
        if self._end(Status.OK):
            self._send(content)

    def refuse(self, error: CallError) -> None:
        """Send a status instead."""
        if self._end(error.status):
            self._send_error(error)

    def cancel(self) -> None:
        """Note that the caller has left."""
        with self._lock:
            self._cancelled = True
            callback = None if self._over else self._on_cancel
        if callback is not None:
            callback()
        self._end(Status.CANCELLED)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What came with the call, by lower-case names; text values only."""
        if not isinstance(self._metadata, Mapping):  # few calls are asked for it
            self._metadata = texts(self._metadata)
        return self._metadata

    @property
    def over(self) -> bool:
        """Whether the outcome is known: nobody waits for another."""
        return self._over

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call back when the caller leaves; at once if it has left already."""
        with self._lock:
            self._on_cancel = callback
            cancelled = self._cancelled
        if cancelled:
            callback()

    def _end(self, status: Status) -> bool:
        with self._lock:
            if self._over:
                return False
            self._over = True
            # A stream keeps its calls until their answers are read; what was asked is not needed.
            self.content = b""
            self._on_cancel = None
        if self.watcher is not None:
            self.watcher(self, status)
        return True

    def _send(self, content: bytes) -> None:
        raise NotImplementedError

    def _send_error(self, error: CallError) -> None:
        raise NotImplementedError
