"""Serve `service.rpc` with HTTP/2 outside the interpreter: pygrpc-native's front, in Rust.

Calls come off its queue several at a time. The thread that takes them also runs what they ask of a
model, so that a request is handed to no other thread and no event loop. Everything that is not a
unary call of ours goes on to a grpcio front behind it: streams, health, reflection.

It hands over whole messages, of any size, and inflates them first. What of that can be bounded is,
by `service.front.guard`; where it is not to be used, `service.front.choice` knows.
"""

import asyncio
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from service import host
from service.access import CONTROL, Access
from service.batcher import Expect
from service.call import DRAINING, Call, CallError, Status, refusal
from service.errors import ServiceError
from service.front import sockets
from service.front.address import UNIX, resolve, unusable
from service.front.grpcio import SHUTDOWN_S, GrpcioFront, Transport
from service.front.guard import Guard
from service.front.nearby import Nearby
from service.front.turns import Turn, Turns
from service.front.unread import LOOK_S, Unread
from service.rpc import INFER, INFERENCE, Rpc

if TYPE_CHECKING:
    from pygrpc_native._native import CallDetails, DetailedEvent

log = logging.getLogger(__name__)
MAX_FOLDER_BYTES = 70  # a socket's path has at most 107 on Linux, 103 elsewhere
# Taken at once; more wait for the next thread. The fewer, the sooner the front has answers to send
# while others are computed; below 16 what a batch costs shows.
MAX_CALLS = 32
MAX_CALLS_OF_GPU = 64  # where a call of the model costs the same for few and for many
MAX_METADATA_BYTES = 16 << 10  # as gRPC's core
WAIT_MS = 200  # for calls; when the front is closed, only one of the threads that wait is told
# Expected seconds of a call of the model that may run on a thread that takes calls. While all of
# them run, nothing new is read or refused; to hand a batch to another thread costs some 0.05 ms.
SHORT_S = 0.005
STOP_S = 5.0  # for the threads to finish what they took
MAX_STREAMS = 256  # calls in flight on one connection; each may hold a message
RESERVED = "grpc-"  # trailers that it keeps for itself, though one of them is for servers to set


class NativeFront:
    """A gRPC server on one address. Call its methods from one event loop, in their order."""

    def __init__(  # noqa: PLR0913  the parts it is put together from
        self,
        rpc: Rpc,
        transport: Transport,
        *,
        access: Access,
        observe: Callable[[Call], None] | None = None,
        threads: int = 2,
        limit_bytes: int | None = None,
        io_threads: int = 1,
        io_cpus: Collection[int] = (),
        gpu: bool = False,
    ) -> None:
        """Store the parts; `start` listens.

        Args:
            rpc: what is answered.
            transport: where, and how.
            access: who may call.
            observe: told of every call before it is begun.
            threads: that take calls, and run models for as long as `rpc.run` does.
            limit_bytes: of the process's memory, from which on all connections are ended; None:
                they never are.
            io_threads: that read and write. One carries some 50,000 calls a second, and each answer
                is a write of its own: tokio runs a connection at once after each of its calls that
                has an answer. Of two, one writes while the other passes answers on, which then
                leave together; but each wakes the other for nothing as well.
            io_cpus: that those threads keep to; none: any. Two on one processor never run at a
                time: the one that writes waits while the other passes on all there is. Whoever
                takes a lone client's calls for inference keeps to them as well.
            gpu: whether models run on one.
        """
        self._rpc = rpc
        self._transport = transport
        self._access = access
        self._observe = observe
        self._guarded = frozenset(rpc.paths if access.wants_tokens else CONTROL)
        self._number = threads
        self._io_threads, self._io_cpus = io_threads, io_cpus
        self._paths = tuple(rpc.paths)
        self._folder = tempfile.TemporaryDirectory(
            prefix="serve-export-", ignore_cleanup_errors=True, dir=_socket_folder()
        )
        self._socket = Path(self._folder.name) / "grpcio"
        self._behind = GrpcioFront(
            rpc,
            replace(transport, address=f"{UNIX}{self._socket}", shared_port=False),
            access=access,
            observe=observe,
        )
        self._guard = None if limit_bytes is None else Guard(limit_bytes)
        self._front: NativeGrpcFront | None = None
        self._threads: list[threading.Thread] = []
        self._max_calls = MAX_CALLS_OF_GPU if gpu else MAX_CALLS
        self._turns = Turns()
        self._calls: dict[int, _NativeCall] = {}  # that are not over
        self._unread = Unread()
        self._address = transport.address
        self._stopping = False
        self._begun = 0

    @property
    def begun(self) -> int:
        """Calls so far."""
        return self._begun + self._behind.begun

    async def start(self) -> str:
        """Listen and answer, though not yet as healthy.

        Returns:
            The address with the port that was taken.

        Raises:
            AddressError: it cannot be listened on.
            SettingsError: its threads cannot keep to the processors.
        """
        await self._behind.start()
        transport = self._transport
        if not transport.address.startswith(UNIX):
            resolve(transport.address, "--address")
        said = logging.getLogger("pygrpc_native")
        level = said.level
        said.setLevel(logging.ERROR)  # that it cannot listen is said in our sentence
        try:
            self._front = host.started_on(self._io_cpus, self._listening)
        except (OSError, ValueError) as error:
            raise unusable(transport.address, "--address") from error
        finally:
            said.setLevel(level)
        self._front.set_fallback(str(self._socket))
        self._front.start()
        for number in range(self._number):
            thread = threading.Thread(
                target=self._take, args=(self._front,), name=f"native-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        if not self._address.startswith(UNIX):
            self._address = f"{self._address.rpartition(':')[0]}:{self._front.bound_port}"
        sockets.lengthen_backlogs(self._address)
        if self._guard is not None:
            self._guard.start(self._address)
        return self._address

    def _listening(self) -> NativeGrpcFront:
        transport = self._transport
        return NativeGrpcFront(
            transport.address,
            [(path, False) for path in self._paths],
            io_threads=self._io_threads,
            call_details=True,
            max_concurrent_streams=MAX_STREAMS,
            max_metadata_size=MAX_METADATA_BYTES,
            reuse_port=transport.shared_port,
            metrics=True,
        )

    def show_health(self, *, ready: bool, models: dict[str, bool]) -> None:
        """Say over grpc.health.v1 who may be sent requests; as the grpcio front's."""
        self._behind.show_health(ready=ready, models=models)

    def show_stopping(self) -> None:
        """Say that nobody should send anything new, for good."""
        self._behind.show_stopping()

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and let those in flight finish within `grace_s` seconds."""
        self._stopping = True
        until_s = time.monotonic() + grace_s
        await self._behind.stop(grace_s)
        while self._calls and time.monotonic() < until_s:  # noqa: ASYNC110  threads answer them
            await asyncio.sleep(LOOK_S)
        if self._front is not None:
            await self._unread.leave(self._front, self._address, until_s)
        if self._guard is not None:
            await asyncio.to_thread(self._guard.stop)
        if self._front is not None:
            await asyncio.sleep(SHUTDOWN_S)  # for the last refusals to leave
            self._front.close()
            self._front = None
        until_s = time.monotonic() + STOP_S
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, until_s - time.monotonic()))
        self._folder.cleanup()

    def hold(self) -> None:
        """Keep new calls of the front behind waiting for `stop`; ours the Rpc refuses."""
        self._behind.hold()

    def _take(self, front: NativeGrpcFront) -> None:
        """Take calls whenever it is this thread's turn, and answer them, until it is closed."""
        turn = Turn(self._turns)
        nearby = Nearby(self._io_cpus) if self._io_cpus else None

        def expect(seconds: float) -> None:
            if nearby is not None:
                nearby.runs()
            turn.expect(seconds)

        with turn:
            while (events := front.recv_batch_details(self._max_calls, WAIT_MS)) is not None:
                turn.works()
                if nearby is not None and events:
                    nearby.took(self._lone(events))
                self._begin(front, events, expect)  # by a call, after which nothing of them is kept
                events.clear()  # however long it waits for its next turn
                turn.take()

    def _lone(self, events: "list[DetailedEvent]") -> str | None:
        """Return whose one inference was taken while none is in flight; None: it is not so."""
        _, _, method, _, _, details = events[0]
        if len(events) > 1 or self._calls or details is None or self._paths[method] != INFER:
            return None
        return details[1]

    def _begin(self, front: NativeGrpcFront, events: "list[DetailedEvent]", expect: Expect) -> None:
        calls: list[Call] = []
        try:
            for kind, number, method, content, _, details in events:
                if kind == EVENT_CALL:
                    assert content is not None and details is not None  # noqa: S101
                    call = self._call(front, number, self._paths[method], content, details)
                    if self._admits(call):
                        calls.append(call)
                elif (left := self._calls.get(number)) is not None:
                    left.cancel()
            self._rpc.run(calls, SHORT_S, expect)
        except Exception as error:  # noqa: BLE001  whatever it is, the callers get an answer
            told = refusal(INFERENCE, error)
            for _, number, *_ in events:
                begun = self._calls.get(number)
                if begun is None:  # it was not even made, or is over, when this has no effect
                    front.fail(number, told.status, str(told))
                else:
                    begun.refuse(told)

    def _call(
        self, front: NativeGrpcFront, number: int, path: str, content: bytes, details: "CallDetails"
    ) -> "_NativeCall":
        metadata, peer, left_s = details
        call = _NativeCall(
            path,
            content,
            metadata=metadata,
            deadline_s=math.inf if left_s is None else time.monotonic() + left_s,
            peer=peer,
        )
        call.number, call.front = number, front
        call.calls, call.unread = self._calls, self._unread
        call.max_bytes = self._transport.max_message_bytes
        self._calls[number] = call
        self._begun += 1
        return call

    def _admits(self, call: "_NativeCall") -> bool:
        """Refuse what is too large or may not be asked; tell whether it was not."""
        size, limit = len(call.content), self._transport.max_message_bytes
        if call.path in self._guarded:
            try:
                self._access.check(call.path, call.metadata)
            except ServiceError as error:
                call.refuse(refusal(call.path, error))
                return False
        if self._observe is not None:
            self._observe(call)
        if size > limit:
            call.refuse(_too_large("Received", size, limit))
        elif self._stopping and call.path != self._rpc.streamed:  # which it refuses itself by now
            call.refuse(CallError(Status.UNAVAILABLE, DRAINING))
        return not call.over


def _socket_folder() -> str:
    """Return where temporary files go, or /tmp if a socket's path would be too long there."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= MAX_FOLDER_BYTES else "/tmp"  # noqa: S108  made 0700


class _NativeCall(Call):
    """A call that is answered by its number."""

    number: int
    front: NativeGrpcFront
    calls: "dict[int, _NativeCall]"
    unread: Unread
    max_bytes: int

    def _send(self, content: bytes) -> None:
        if len(content) > self.max_bytes:
            self._send_error(_too_large("Sent", len(content), self.max_bytes))
            return
        next(self.unread.given)  # before it is over: a stop waits for the one and then the other
        self.calls.pop(self.number, None)
        if not self.front.respond(self.number, content):
            next(self.unread.late)

    def _send_error(self, error: CallError) -> None:
        trailers = [pair for pair in error.trailers if not pair[0].startswith(RESERVED)]
        try:
            self.front.fail(self.number, error.status, str(error), trailers)
        finally:
            self.calls.pop(self.number, None)

    def cancel(self) -> None:
        """Note that the caller has left."""
        super().cancel()
        self.calls.pop(self.number, None)


def _too_large(done: str, size: int, limit: int) -> CallError:
    """Return what gRPC's own servers answer."""
    return CallError(
        Status.RESOURCE_EXHAUSTED, f"SERVER: {done} message larger than max ({size} vs. {limit})"
    )
