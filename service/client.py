"""Ask a server: numpy images or picture files in, labels and arrays out.

Here is how a thread waits for them; what is sent, and again, `service.asking` decides.
"""

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent import futures
from dataclasses import dataclass
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self

import grpc
from google.protobuf.message import Message

from protos import inference_pb2 as pb
from service.asking import Asker, Response, Result, SampledRows
from service.connection import Connection, Tls, methods
from service.errors import ServerError
from service.joining import JoinQueue, Ticket, joined, refuse, settle
from service.messages import Answer, Reply

__all__ = ["Answer", "Client", "SampledRows", "Tls"]

Arguments = ParamSpec("Arguments")


def _now(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that never waits, because all that it awaits blocks instead."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    raise RuntimeError("what was to block has waited")


def _blocking(
    method: Callable[Concatenate[Asker, Arguments], Coroutine[Any, Any, Result]],
) -> "Callable[Concatenate[Client, Arguments], Result]":
    """Return an Asker's method as one of Client's."""

    @wraps(method)
    def call(client: "Client", /, *values: Arguments.args, **options: Arguments.kwargs) -> Result:
        return _now(method(client._asker, *values, **options))

    return call


def _blocking_generator(
    method: Callable[Concatenate[Asker, Arguments], AsyncGenerator[Result, None]],
) -> "Callable[Concatenate[Client, Arguments], Generator[Result, None, None]]":
    """Return a generator of Asker's as one of Client's."""

    @wraps(method)
    def call(
        client: "Client", /, *values: Arguments.args, **options: Arguments.kwargs
    ) -> Generator[Result, None, None]:
        answers = method(client._asker, *values, **options)
        try:
            while (answer := _now(_next(answers))) is not None:
                yield answer
        finally:
            _now(_closed(answers))

    return call


async def _next(answers: AsyncGenerator[Result, None]) -> Result | None:
    return await anext(answers, None)


async def _closed(answers: AsyncGenerator[Any, None]) -> None:
    await answers.aclose()


class Client:
    """A client whose methods block, and may be called from several threads.

    They are `Asker`'s, where each is described.
    """

    def __init__(  # noqa: PLR0913  one parameter an option
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        channels: int = 1,
        coalesce_rows: int = 0,
        max_message_mib: int = 64,
        wait_for_ready: bool = False,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        """Store where the server is; connects with the first call.

        Args:
            address: `HOST:PORT`, or what else gRPC resolves; a name's addresses are all used.
            timeout_s: longest wait for one request, with all its attempts.
            channels: connections to take in turn, for a server of several processes.
            coalesce_rows: most rows to join into one request, of calls that come from other
                threads while as many requests as there are channels are in flight; 0: none.
            max_message_mib: largest request and answer, in MiB; the server has its own limit.
            wait_for_ready: wait up to `timeout_s` for a server that cannot be reached, or is
                UNAVAILABLE, as while it or its balancer restarts, instead of saying so at once.
            tls: None: plain text.
            token: goes with every call.

        Raises:
            ValueError: a value cannot work, or a file of `tls` cannot be read.
        """
        connection = Connection(
            address=address,
            timeout_s=timeout_s,
            channels=channels,
            coalesce_rows=coalesce_rows,
            max_message_mib=max_message_mib,
            wait_for_ready=wait_for_ready,
            tls=tls,
            token=token,
        )
        self._wire = _Blocking(connection)
        self._asker = Asker(connection, self._wire)

    wait_ready = _blocking(Asker.wait_ready)
    models = _blocking(Asker.models)
    metadata = _blocking(Asker.metadata)
    config = _blocking(Asker.config)
    statistics = _blocking(Asker.statistics)
    parity = _blocking(Asker.parity)
    watch_parity = _blocking_generator(Asker.watch_parity)
    sample = _blocking_generator(Asker.sample)
    report = _blocking(Asker.report)
    load = _blocking(Asker.load)
    unload = _blocking(Asker.unload)
    predict = _blocking(Asker.predict)
    predict_pictures = _blocking(Asker.predict_pictures)

    def close(self) -> None:
        """Close the connections; what is in flight is cancelled."""
        self._wire.close()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()


class _Blocking:
    """A wire whose every wait blocks the thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue = JoinQueue(
            in_flight=connection.channels, max_bytes=connection.max_message_bytes
        )
        self._channels = [_channel(connection) for _ in range(connection.channels)]
        self._methods = itertools.cycle([methods(channel) for channel in self._channels])

    async def call(self, request: Message, response: type[Response], timeout_s: float) -> Response:
        method = next(self._methods)[type(request).__name__]
        try:
            answer: Response = method(
                request, timeout=timeout_s, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            raise self._connection.refusal(error) from error
        return answer

    def start(self, request: pb.ModelInferRequest, timeout_s: float) -> "_Started":
        method = next(self._methods)[type(request).__name__]
        call = method.future(request, timeout=timeout_s, metadata=self._connection.metadata)
        return _Started(call, self._connection)

    async def stream(
        self, method: str, request: Message, response: type[Response]
    ) -> AsyncGenerator[Response, None]:
        call = next(self._methods)[f"{method}Request"](request, metadata=self._connection.metadata)
        try:
            for answer in call:
                yield answer
        except grpc.RpcError as error:
            raise self._connection.refusal(error) from error
        finally:
            call.cancel()

    async def join(
        self, request: pb.ModelInferRequest, max_rows: int, timeout_s: float
    ) -> Reply | None:
        future: futures.Future[Reply | None] = futures.Future()
        until_s = time.monotonic() + timeout_s
        self._send(self._queue.put(Ticket(request, max_rows, until_s, future)))
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise self._connection.late() from error

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  this wire blocks

    async def aside(self, work: Callable[[], Result]) -> Result:
        return work()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _send(self, tickets: list[Ticket]) -> None:
        """Send them from this thread: a caller's, or gRPC's own, to which answers come."""
        while tickets:
            left_s = max(ticket.until_s for ticket in tickets) - time.monotonic()
            try:
                started = self.start(joined(tickets), max(0.0, left_s))
            except ValueError:
                refuse(tickets, ServerError("this client is closed", code="CANCELLED"))
                tickets = self._queue.landed(tickets)
            else:
                started.call.add_done_callback(partial(self._land, tickets, started))
                return

    def _land(self, tickets: list[Ticket], started: "_Started", _: object) -> None:
        try:
            settle(tickets, _now(started.response()))
        except ServerError as error:
            refuse(tickets, error)
        finally:
            self._send(self._queue.landed(tickets))


@dataclass(frozen=True, slots=True)
class _Started:
    call: Any
    connection: Connection

    def cancel(self) -> None:
        self.call.cancel()

    async def response(self) -> pb.ModelInferResponse:
        try:
            answer: pb.ModelInferResponse = self.call.result()
        except grpc.RpcError as error:
            raise self.connection.refusal(error) from error
        return answer


def _channel(connection: Connection) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.address, connection.options)
    credentials = connection.tls.credentials()
    return grpc.secure_channel(connection.address, credentials, connection.options)
