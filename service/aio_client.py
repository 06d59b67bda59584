"""Ask a server from an event loop, as `service.client` does from a thread.

Here is how a task waits for the answers; what is sent, and again, `service.asking` decides.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from protos import inference_pb2 as pb
from service.asking import Asker, Response, Result
from service.connection import Connection, Tls, methods
from service.errors import ServerError
from service.joining import JoinQueue, Ticket, joined, refuse, settle
from service.messages import Reply


class AsyncClient(Asker):
    """A client of one server, for the event loop that it is first used in."""

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
        """Store where the server is; the options are Client's. Connects with the first call."""
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
        self._awaiting = _Awaiting(connection)
        super().__init__(connection, self._awaiting)

    async def close(self) -> None:
        """Close the connections; what is in flight is cancelled."""
        await self._awaiting.close()

    async def __aenter__(self) -> Self:
        """Return the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.close()


class _Awaiting:
    """A wire whose every wait lets the event loop go on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._credentials = None if connection.tls is None else connection.tls.credentials()
        self._queue = JoinQueue(
            in_flight=connection.channels, max_bytes=connection.max_message_bytes
        )
        self._tasks: set[asyncio.Task[None]] = set()  # a loop alone would let go of them
        self._channels: list[grpc.aio.Channel] = []
        self._methods: Iterator[dict[str, Any]] = iter(())

    async def call(self, request: Message, response: type[Response], timeout_s: float) -> Response:
        answer: Response = await self.start(request, timeout_s).response()
        return answer

    def start(self, request: Message, timeout_s: float) -> "_Started":
        call = self._begun(type(request).__name__, request, timeout_s)
        return _Started(call, self._connection)

    async def stream(
        self, method: str, request: Message, response: type[Response]
    ) -> AsyncGenerator[Response, None]:
        call = self._begun(f"{method}Request", request, None)
        try:
            while (answer := await _Started(call.read(), self._connection).response()) is not (
                grpc.aio.EOF
            ):
                yield answer
        finally:
            call.cancel()

    async def join(
        self, request: pb.ModelInferRequest, max_rows: int, timeout_s: float
    ) -> Reply | None:
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(request, max_rows, time.monotonic() + timeout_s, future)
        if tickets := self._queue.put(ticket):
            task = asyncio.create_task(self._send(tickets))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise self._connection.late() from error

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def aside(self, work: Callable[[], Result]) -> Result:
        return await asyncio.to_thread(work)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
        await asyncio.gather(*self._tasks)

    def _begun(self, method: str, request: Message, timeout_s: float | None) -> Any:  # noqa: ANN401
        if not self._channels:  # made in the loop that they belong to
            self._channels = [self._channel() for _ in range(self._connection.channels)]
            self._methods = itertools.cycle([methods(channel) for channel in self._channels])
        try:
            return next(self._methods)[method](
                request, timeout=timeout_s, metadata=self._connection.metadata
            )
        except grpc.aio.UsageError as error:
            raise ValueError("this client is closed") from error

    def _channel(self) -> grpc.aio.Channel:
        address, options = self._connection.address, self._connection.options
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, self._credentials, options)

    async def _send(self, tickets: list[Ticket]) -> None:
        """Send them, and then what has gathered meanwhile, until nothing has."""
        while tickets:
            left_s = max(ticket.until_s for ticket in tickets) - time.monotonic()
            try:
                settle(tickets, await self.start(joined(tickets), max(0.0, left_s)).response())
            except ServerError as error:
                refuse(tickets, error)
            except ValueError as error:
                refuse(tickets, ServerError(str(error), code="CANCELLED"))
            tickets = self._queue.landed(tickets)


@dataclass(frozen=True, slots=True)
class _Started:
    call: Any
    connection: Connection

    def cancel(self) -> None:
        self.call.cancel()

    async def response(self) -> Any:  # noqa: ANN401  of the method that was called
        try:
            return await self.call
        except grpc.RpcError as error:
            raise self.connection.refusal(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ServerError("the client was closed meanwhile", code="CANCELLED") from error
