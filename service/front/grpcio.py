"""Serve `service.rpc` with grpcio's asyncio server.

Carries bytes, metadata and statuses, and decides nothing about them: what a call means is the
Rpc's affair, who may call `service.access`'s. Reflection is grpcio's own.
"""

import asyncio
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from service.access import CONTROL, Access
from service.call import DRAINING, Call, CallError, Status, refusal, texts
from service.errors import AddressError, ServiceError, SettingsError
from service.front import idle
from service.front.address import UNIX, UNKNOWN, resolve, unusable
from service.front.health import Health
from service.rpc import INFERENCE, SERVICES, STREAM, Rpc, stream_answer, stream_refusal

log = logging.getLogger(__name__)
MAX_PENDING_CALLS = 1 << 14  # each may hold its message, though its caller left long ago
MAX_SERVICE_CHARACTERS = 256
SHUTDOWN_S = 0.02  # for gRPC's core to tell clients to go elsewhere
MAX_SETTLED = 8  # outcomes at a time; each takes the event loop about 0.2 ms
MAX_TOGETHER = 32  # calls that are begun at once; more would keep too many clients waiting
# Expected seconds of a call of the model that the event loop makes itself: a few times what it
# costs to hand a batch to another thread, and its answers back.
SHORT_S = 0.0005
RETRY_S, RETRIES = 0.02, 500  # to listen again, until the port is let go
ENDING_S = 0.5  # for a stream that is answered on and on to end, unless its client does not read
LOOK_S = 0.01
MAX_STREAMED = 64  # requests of one stream that may wait for their answers
# gRPC's own five minutes end connections that are kept alive. Clients ping every 10 s; what a
# network does to two pings may bring them closer together.
MIN_PING_INTERVAL_MS = 5_000
CODES = {code.value[0]: code for code in grpc.StatusCode}
IN_BAND = "triton_grpc_error"  # metadata that asks for real statuses on a stream
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
SERVING = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
    None: health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
}
Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes] | None"
Outcome: TypeAlias = bytes | CallError
Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """How a front listens.

    Raises:
        SettingsError: a file cannot be read.
    """

    address: str  # HOST:PORT, port 0 for a free one; or unix:PATH
    max_message_bytes: int
    max_connection_age_s: float = 0.0  # 0: no limit
    shared_port: bool = False  # with other processes
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def options(self) -> list[tuple[str, int]]:
        """Return grpcio's channel arguments."""
        options = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # Beyond its own limit, gRPC's core answers calls it has not handed over with
            # CANCELLED, which clients take for their own doing; 1,500 at once were enough.
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.keepalive_permit_without_calls", 1),  # or two hours hold for idle clients
            # By default a second server would share the port without a word.
            ("grpc.so_reuseport", int(self.shared_port)),
        ]
        if self.max_connection_age_s:
            age_ms = round(self.max_connection_age_s * 1000)
            options.append(("grpc.max_connection_age_ms", age_ms))
            options.append(("grpc.max_connection_age_grace_ms", age_ms))
        return options

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what TLS needs; None without it."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        authority = _read(self.tls_client_ca) if self.tls_client_ca else None
        return grpc.ssl_server_credentials(
            [(_read(self.tls_key), _read(self.tls_cert))],
            root_certificates=authority,
            require_client_auth=authority is not None,
        )


class GrpcioFront:
    """A gRPC server on one address. Call its methods from one event loop, in their order."""

    def __init__(
        self,
        rpc: Rpc,
        transport: Transport,
        *,
        access: Access,
        observe: Callable[[Call], None] | None = None,
    ) -> None:
        """Store the parts; `start` listens.

        Args:
            rpc: what is answered.
            transport: where, and how.
            access: who may call.
            observe: told of every call before it is begun.
        """
        self._rpc = rpc
        self._transport = transport
        self._access = access
        self._observe = observe
        self._server: grpc.aio.Server | None = None
        self._health = Health()
        self._keeper: asyncio.Task[None] | None = None
        self._readers: set[asyncio.Task[None]] = set()  # one a stream
        self._came: list[Call] = []  # and wait for others, or for the event loop to have time
        self._crowded = False  # whether it was several that were begun last
        self._answering = 0  # calls whose answers are waited for when stopping
        self._streaming = 0  # calls that are answered for as long as they last
        self._holding = False
        self._released = asyncio.Event()
        self._closed = asyncio.Event()
        self._closing: asyncio.Task[bool] | None = None  # waits for it
        self.begun = 0  # calls so far

    async def start(self) -> str:
        """Listen and answer, though not yet as healthy.

        Returns:
            The address with the port that was taken.

        Raises:
            AddressError: it cannot be listened on.
            SettingsError: TLS's files cannot be read or used.
        """
        self._loop = idle.running_loop()
        self._mailbox = _Mailbox(self._loop)
        self.show_health(ready=False, models={})
        self._server, address = await self._serve(self._transport.address)
        self._closing = asyncio.create_task(self._closed.wait())
        self._keeper = asyncio.create_task(self._keep(address))
        return address

    async def _serve(self, address: str) -> tuple[grpc.aio.Server, str]:
        """Return a server that listens, and its address with the port that was taken."""
        server = grpc.aio.server(
            options=self._transport.options(),
            # It takes an eighth of a call's time.
            interceptors=[_Guard(self._access)] if self._access.wants_tokens else [],
        )
        for service in SERVICES:
            server.add_generic_rpc_handlers((self._handlers(service),))
        server.add_generic_rpc_handlers((_health_handlers(self._health),))
        named = (*SERVICES, HEALTH, REFLECTION)
        server.add_generic_rpc_handlers((_reflection_handlers(named, self._closed),))
        taken = self._listen(server, address)
        await server.start()
        return server, taken

    async def _keep(self, address: str) -> None:
        """Serve anew whenever gRPC's server has ended by itself.

        It does where a client sends a path that is no UTF-8, and would leave a process that lives
        and answers nobody.
        """
        while (server := self._server) is not None:
            try:
                await server.wait_for_termination()
            except Exception as error:  # noqa: BLE001  whatever a client has done to it
                log.error("gRPC's server has ended (%r); serving anew", error)  # noqa: TRY400
            if self._closed.is_set():
                return
            await server.stop(0)
            for _ in range(RETRIES):
                await asyncio.sleep(RETRY_S)
                if self._closed.is_set():
                    return
                with suppress(AddressError):
                    self._server, _ = await self._serve(address)
                    break
            else:
                log.critical("%s cannot be listened on any more; stopping", address)
                signal.raise_signal(signal.SIGTERM)
                return

    def show_health(self, *, ready: bool, models: dict[str, bool]) -> None:
        """Say over grpc.health.v1 who may be sent requests.

        Args:
            ready: the server and its services.
            models: by their names; one that is no longer among them is not serving.
        """
        overall = dict.fromkeys(("", *SERVICES), ready)
        self._health.show({**models, **overall})  # whatever a model is called

    def show_stopping(self) -> None:
        """Say that nobody should send anything new, for good."""
        self._health.stop()

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and let those in flight finish within `grace_s` seconds.

        Streams end once what they have sent is answered, and those that last, such as watches of
        health, at once: their clients would keep them open. One whose client does not read cannot
        be told so, and is cut off as soon as all others are over.
        """
        self._health.close()
        self._closed.set()
        for reader in self._readers:
            reader.cancel()
        if self._server is not None:
            stopping = asyncio.create_task(self._server.stop(grace_s))
            await asyncio.sleep(SHUTDOWN_S)
            self._released.set()
            if await self._is_held(grace_s):
                await self._server.stop(0)
            await stopping

    async def _is_held(self, grace_s: float) -> bool:
        """Wait for what is answered within the grace; tell whether only idle readers are left."""
        now_s = time.monotonic()
        until_s, ending_s = now_s + grace_s, now_s + min(ENDING_S, grace_s)
        while (self._answering and now_s < until_s) or (self._streaming and now_s < ending_s):
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
        return self._streaming > 0

    def hold(self) -> None:
        """Keep new calls waiting for `stop`, which refuses them.

        What reaches gRPC's core while it shuts down gets CANCELLED, which nobody tries again.
        Clients that ask again as soon as they are refused would always be at it.
        """
        self._holding = True

    def _listen(self, server: grpc.aio.Server, address: str) -> str:
        credentials = self._transport.credentials()
        if not address.startswith(UNIX):
            resolve(address, "--address")
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            pair = ", or the certificate does not fit its key" if credentials else ""
            raise unusable(address, "--address", unknown=f"{UNKNOWN}{pair}") from error
        if address.startswith(UNIX):
            return address
        return f"{address.rpartition(':')[0]}:{port}"

    def _handlers(self, service: str) -> grpc.GenericRpcHandler:
        prefix = f"/{service}/"
        # No (de)serializers: bytes in, bytes out.
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            path.removeprefix(prefix): grpc.unary_unary_rpc_method_handler(self._unary(path))
            for path in self._rpc.paths
            if path.startswith(prefix)
        }
        if STREAM.startswith(prefix):
            handlers[STREAM.removeprefix(prefix)] = grpc.stream_stream_rpc_method_handler(
                self._stream
            )
        for path in self._rpc.streaming:
            if path.startswith(prefix):
                handlers[path.removeprefix(prefix)] = grpc.unary_stream_rpc_method_handler(
                    self._lasting(path)
                )
        return grpc.method_handlers_generic_handler(service, handlers)

    def _unary(self, path: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(content: bytes, context: Context) -> bytes:
            call = self._call(path, content, context)
            if self._holding:
                await self._released.wait()
            if path in CONTROL:
                self._check(call)
            self._begin(call)
            self._answering += 1
            try:
                outcome = await call.outcome
            except asyncio.CancelledError:
                call.cancel()
                raise
            finally:
                self._answering -= 1
            if isinstance(outcome, CallError):
                await _abort(context, outcome)
            return outcome

        return handle

    def _lasting(self, path: str) -> Callable[[bytes, Context], Awaitable[None]]:
        async def handle(content: bytes, context: Context) -> None:
            call = self._call(path, content, context)
            self._streaming += 1
            try:
                end = await self._send_on(call, context)
            except asyncio.CancelledError:
                call.cancel()
                raise
            finally:
                self._streaming -= 1
            call.refuse(end)
            await _abort(context, end)

        return handle

    async def _send_on(self, call: Call, context: Context) -> CallError:
        """Send what a stream has, whenever it is due; return why it has come to its end."""
        try:
            stream = self._rpc.open(call)
        except CallError as error:
            return error
        try:
            due = stream.due()
            while not self._closed.is_set():
                try:
                    content = next(due, None)
                except Exception as error:  # noqa: BLE001  whatever it is, the caller is told
                    return refusal(call.path, error)
                if content is None:
                    await self._pause(stream.pause_s)
                    due = stream.due()
                else:
                    await context.write(content)
        finally:
            stream.close()
        return CallError(Status.UNAVAILABLE, DRAINING)

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the front stops."""
        assert self._closing is not None  # noqa: S101  for the type checker
        await asyncio.wait((self._closing,), timeout=seconds)

    def _begin(self, call: Call) -> None:
        """Begin a call, together with the others that come before the event loop has time."""
        self._came.append(call)
        if len(self._came) == 1:
            self._loop.when_idle(self._begin_all, patient=self._crowded)
        elif len(self._came) == MAX_TOGETHER:
            self._loop.withdraw(self._begin_all)
            self._begin_all()

    def _begin_all(self) -> None:
        came, self._came = self._came, []
        self._crowded = len(came) > 1
        try:
            self._rpc.run([call for call in came if not call.over], SHORT_S)
        except Exception as error:  # noqa: BLE001  whatever it is, the callers get an answer
            told = refusal(INFERENCE, error)
            for call in came:  # of no effect on those that are over
                call.refuse(told)

    def _check(self, call: Call) -> None:
        """Refuse a call that may not be asked; what wants a token of every call did so before."""
        try:
            self._access.check(call.path, call.metadata)
        except ServiceError as error:
            call.refuse(refusal(call.path, error))

    async def _stream(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Answer a stream's requests in their order, though they are run as they come."""
        begun: asyncio.Queue[_AioCall | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_STREAMED)
        reader = asyncio.create_task(self._read(requests, context, begun, room))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        reader.add_done_callback(lambda _: begun.put_nowait(None))
        call: _AioCall | None = None
        self._answering += 1
        try:
            while (call := await begun.get()) is not None:
                outcome = await call.outcome
                if isinstance(outcome, bytes):
                    yield stream_answer(outcome)
                elif call.metadata.get(IN_BAND) == "true":
                    await _abort(context, outcome)
                else:
                    yield stream_refusal(outcome, str(call.notes.get("request_id", "")))
                room.release()
            if reader.cancelled():  # by `stop`
                await _abort(context, CallError(Status.UNAVAILABLE, DRAINING))
        finally:
            self._answering -= 1
            reader.cancel()
            while call is not None:
                call.cancel()
                call = begun.get_nowait() if not begun.empty() else None

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        context: Context,
        begun: "asyncio.Queue[_AioCall | None]",
        room: asyncio.Semaphore,
    ) -> None:
        async for content in requests:
            await room.acquire()
            call = self._call(self._rpc.streamed, content, context)
            begun.put_nowait(call)
            self._rpc.begin(call)

    def _call(self, path: str, content: bytes, context: Context) -> "_AioCall":
        left_s: float | None = context.time_remaining()  # the stubs know no call without one
        call = _AioCall(
            path,
            content,
            metadata=context.invocation_metadata() or (),
            deadline_s=math.inf if left_s is None else time.monotonic() + left_s,
            peer=context.peer(),
        )
        call.mailbox = self._mailbox
        call.outcome = self._mailbox.loop.create_future()
        self.begun += 1
        if self._observe is not None:
            self._observe(call)
        return call


class _Mailbox:
    """Hands outcomes from other threads to the event loop.

    A few at a time: what comes in meanwhile, and may be refused at once, need not wait until a
    whole batch is answered.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.Future[Outcome], Outcome]] = deque()

    def put(self, future: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
        if threading.get_ident() == self._thread:
            _settle(future, outcome)
            return
        with self._lock:
            self._waiting.append((future, outcome))
            first = len(self._waiting) == 1
        if first:
            try:
                self.loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # the loop is closed: the server was ended by force
                return

    def _empty(self) -> None:
        with self._lock:
            waiting = self._waiting
            now = [waiting.popleft() for _ in range(min(len(waiting), MAX_SETTLED))]
            if waiting:
                self.loop.call_soon(self._empty)
        for future, outcome in now:
            _settle(future, outcome)


class _AioCall(Call):
    """A call whose outcome an asyncio handler waits for."""

    mailbox: _Mailbox
    outcome: "asyncio.Future[Outcome]"

    def _send(self, content: bytes) -> None:
        self.mailbox.put(self.outcome, content)

    def _send_error(self, error: CallError) -> None:
        self.mailbox.put(self.outcome, error)


class _Guard(grpc.aio.ServerInterceptor):
    """Lets `Access` see every call of every service, known or not, before anything else does."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(  # type: ignore[override] # bytes are all that is handled
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        details = handler_call_details
        try:
            self._access.check(details.method, texts(details.invocation_metadata or ()))
        except ServiceError as error:
            return _refusing(refusal(details.method, error))
        return await continuation(details)


def _health_handlers(health: Health) -> grpc.GenericRpcHandler:
    asked = health_pb2.HealthCheckRequest

    async def check(content: bytes, context: Context) -> bytes:
        service = (await _parsed(asked, content, context)).service
        known = health.services()
        if service not in known:
            unknown = f"'{service[:64]}' is no service or model of this server"
            await _abort(context, CallError(Status.NOT_FOUND, unknown))
        return bytes(_state(known[service]).SerializeToString())

    async def everything(content: bytes, context: Context) -> bytes:
        await _parsed(health_pb2.HealthListRequest, content, context)
        states = {name: _state(serving) for name, serving in health.services().items()}
        return bytes(health_pb2.HealthListResponse(statuses=states).SerializeToString())

    async def watch(content: bytes, context: Context) -> AsyncIterator[bytes]:
        service = (await _parsed(asked, content, context)).service
        if len(service) > MAX_SERVICE_CHARACTERS:  # it is kept as long as the watch lasts
            long = f"a service's name has {len(service)} characters, expected at most "
            await _abort(
                context, CallError(Status.INVALID_ARGUMENT, f"{long}{MAX_SERVICE_CHARACTERS}")
            )
        async for serving in health.watch(service):
            yield _state(serving).SerializeToString()
        await _abort(context, CallError(Status.UNAVAILABLE, DRAINING))

    return grpc.method_handlers_generic_handler(
        HEALTH,
        {
            "Check": grpc.unary_unary_rpc_method_handler(check),
            "List": grpc.unary_unary_rpc_method_handler(everything),
            "Watch": grpc.unary_stream_rpc_method_handler(watch),
        },
    )


def _reflection_handlers(named: tuple[str, ...], closed: asyncio.Event) -> grpc.GenericRpcHandler:
    async def reflect(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        from service.front import reflection  # noqa: PLC0415  only for who asks

        asked = reflection.REQUEST
        before_end = _until(closed, requests)
        parsed = (await _parsed(asked, content, context) async for content in before_end)
        async for response in reflection.servicer(named).ServerReflectionInfo(parsed, context):
            yield response.SerializeToString()

    return grpc.method_handlers_generic_handler(
        REFLECTION,
        {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(reflect)},
    )


async def _until(closed: asyncio.Event, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Give the requests of a stream until it ends or the server stops."""
    closing = asyncio.ensure_future(closed.wait())
    try:
        while not closed.is_set():
            following = asyncio.ensure_future(anext(requests, None))
            try:
                await asyncio.wait((following, closing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                following.cancel()  # of no effect once it is done
            if not following.done() or (content := following.result()) is None:
                return
            yield content
    finally:
        closing.cancel()


async def _parsed(kind: type[Request], content: bytes, context: Context) -> Request:
    try:
        request = kind.FromString(content)
    except DecodeError:
        unread = f"the request is not a {kind.DESCRIPTOR.full_name}"
        await _abort(context, CallError(Status.INVALID_ARGUMENT, unread))
    return request


def _state(serving: bool | None) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=SERVING[serving])


def _refusing(error: CallError) -> Handler:
    """Return a handler that refuses any call, whether it streams or not, and reads nothing."""

    async def refuse(_: AsyncIterator[bytes], context: Context) -> bytes:
        await _abort(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)


def _settle(future: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)


async def _abort(context: Context, error: CallError) -> NoReturn:
    await context.abort(CODES[error.status], str(error), error.trailers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
