"""Serve `service.rpc` with grpcio's asyncio server.

Carries bytes and statuses and decides nothing about them. Calls that run a model go to a small
pool of threads, so that the event loop answers health checks meanwhile.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.errors import AddressError
from service.rpc import SERVICES, CallError, Rpc

# gRPC's own 4 MiB stops a batch of 1,400 colour images of 32 x 32 in float32.
MAX_MESSAGE_BYTES = 64 << 20
MAX_PENDING_CALLS = 1 << 20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Beyond its own limit, gRPC's core answers calls it has not handed over with CANCELLED, which
    # clients take for their own doing; 1,500 at once were enough.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.so_reuseport", 0),  # otherwise a second server shares the port without a word
)
CODES = {code.value[0]: code for code in grpc.StatusCode}
Context = grpc.aio.ServicerContext[bytes, bytes]
Handler = Callable[[bytes, Context], Awaitable[bytes]]


class GrpcioFront:
    """A gRPC server on one address. Call its methods from one event loop, in their order."""

    def __init__(self, rpc: Rpc, *, model_threads: int) -> None:
        self._rpc = rpc
        self._models = ThreadPoolExecutor(model_threads, thread_name_prefix="model")
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self, address: str) -> str:
        """Listen and answer, though not yet as healthy.

        Args:
            address: `HOST:PORT`; port 0 takes a free one.

        Returns:
            The address with the port that was taken.

        Raises:
            AddressError: it cannot be listened on.
        """
        self._server = grpc.aio.server(options=OPTIONS)
        for service in SERVICES:
            self._server.add_generic_rpc_handlers((self._handlers(service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        host, _, _ = address.rpartition(":")
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressError(
                f"cannot listen on {address}: it is in use, or not an address of this machine; "
                "choose another with --address HOST:PORT (port 0 takes a free one)"
            ) from error
        await self._server.start()
        return f"{host}:{port}"

    async def set_serving(self) -> None:
        """Say over grpc.health.v1 that this server may be sent requests."""
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say so, take no new calls, and let those in flight finish within `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)
        self._models.shutdown(wait=False, cancel_futures=True)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)

    def _handlers(self, service: str) -> grpc.GenericRpcHandler:
        prefix = f"/{service}/"
        return grpc.method_handlers_generic_handler(
            service,
            {
                # No (de)serializers: bytes in, bytes out.
                path.removeprefix(prefix): grpc.unary_unary_rpc_method_handler(self._handler(path))
                for path in self._rpc.methods
                if path.startswith(prefix)
            },
        )

    def _handler(self, path: str) -> Handler:
        computes = self._rpc.methods[path].computes

        async def handle(content: bytes, context: Context) -> bytes:
            try:
                if not computes:
                    return self._rpc.call(path, content)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._models, self._rpc.call, path, content)
            except CallError as error:
                await context.abort(CODES[error.status], str(error))
                raise  # abort has raised already; this tells the type checker so

        return handle
