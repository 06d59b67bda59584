"""Which small requests that come at once leave as one, and who gets which rows of its answer.

Sends nothing and waits for nothing: a client does, and says what has left and what has landed.
"""

import itertools
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from protos import inference_pb2 as pb
from service import messages
from service.errors import ServerError
from service.messages import Reply


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One caller's request, which may be joined with others."""

    request: pb.ModelInferRequest
    max_rows: int  # of what it is joined to
    until_s: float  # when its caller stops waiting, by time.monotonic
    future: Any  # concurrent's or asyncio's, of a Reply; None: it must be sent alone

    @property
    def key(self) -> tuple[object, ...]:
        """What requests must have in common to be joined."""
        tensor = self.request.inputs[0]
        model = self.request.model_name, self.request.model_version
        return (*model, tensor.name, tensor.datatype, self.max_rows, *tensor.shape[1:])


class JoinQueue:
    """Who waits, and who leaves together: all who came while enough requests were in flight.

    Bookkeeping only; whoever is told that tickets leave sends them. Safe to call from threads.
    """

    def __init__(self, *, in_flight: int, max_bytes: int) -> None:
        self._in_flight = in_flight
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: defaultdict[tuple[object, ...], deque[Ticket]] = defaultdict(deque)
        self._flying: Counter[tuple[object, ...]] = Counter()

    def put(self, ticket: Ticket) -> list[Ticket]:
        """Let a ticket wait; return those that leave now."""
        with self._lock:
            self._waiting[ticket.key].append(ticket)
            return self._leave(ticket.key)

    def landed(self, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Return those that leave now that these are answered."""
        with self._lock:
            self._flying[tickets[0].key] -= 1
            return self._leave(tickets[0].key)

    def _leave(self, key: tuple[object, ...]) -> list[Ticket]:
        if self._flying[key] >= self._in_flight:
            return []
        waiting, together = self._waiting[key], list[Ticket]()
        rows, size = 0, messages.FRAMING_BYTES
        while waiting:
            first = waiting[0]
            if not first.future.done():  # or else its caller is gone
                rows += messages.rows_in(first.request)
                size += len(first.request.raw_input_contents[0])
                if together and (rows > first.max_rows or size > self._max_bytes):
                    break
                together.append(first)
            waiting.popleft()
        if together:
            self._flying[key] += 1
        elif not self._flying[key]:
            del self._waiting[key], self._flying[key]
        return together


def joined(tickets: Sequence[Ticket]) -> pb.ModelInferRequest:
    """Return one request with the rows of all, in their order."""
    requests = [ticket.request for ticket in tickets]
    if len(requests) == 1:
        return requests[0]
    raw = b"".join(request.raw_input_contents[0] for request in requests)
    return messages.like(requests[0], sum(map(messages.rows_in, requests)), raw)


def settle(tickets: Sequence[Ticket], response: pb.ModelInferResponse) -> None:
    """Give each ticket its own rows of the response to all, or raise ServerError."""
    ends = list(itertools.accumulate(messages.rows_in(ticket.request) for ticket in tickets))
    reply = messages.read(response, ends[-1])
    for ticket, (start, end) in zip(tickets, itertools.pairwise([0, *ends]), strict=True):
        own = {name: array[start:end] for name, array in reply.outputs.items()}
        _finish(ticket, Reply(reply.version, own))


def refuse(tickets: Sequence[Ticket], error: ServerError) -> None:
    """Pass an error on; where one of several may be to blame, have each sent alone."""
    several = len(tickets) > 1 and error.code == "INVALID_ARGUMENT"
    for ticket in tickets:  # an error of its own to each, as threads raise them at once
        _finish(ticket, None if several else ServerError(str(error), code=error.code))


def _finish(ticket: Ticket, outcome: Reply | ServerError | None) -> None:
    with suppress(futures.InvalidStateError):  # its caller may stop waiting at this very moment
        if ticket.future.done():
            return
        if isinstance(outcome, ServerError):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)
