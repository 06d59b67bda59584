"""What of a server faces the outside: rpc, the front that carries it, metrics, traces, access log.

Puts the parts together and starts none of them. Importing it takes longer than everything else a
server imports; `service.server` does so while the first version is on trial.
"""

import logging
import os
import time
from typing import TYPE_CHECKING

from service import logs, tracing
from service.access import Access
from service.call import Call, Status
from service.front import guard
from service.front.choice import Choice, io_advice, io_shown
from service.front.grpcio import GrpcioFront, Transport
from service.repository import Repository
from service.rpc import Rpc
from service.session import RUNTIME
from service.settings import Settings

if TYPE_CHECKING:
    from service.front.http import MetricsServer
    from service.front.native import NativeFront
    from service.metrics import Metrics

log = logging.getLogger(__name__)
PACKAGE = "train-export"
NS = 1_000_000_000


class Edge:
    """The parts of one server; each has its own methods to start and stop."""

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        access: Access,
        chosen: Choice,
        *,
        threads: int,
        shared: bool,
    ) -> None:
        """Put the parts together.

        Args:
            settings: how.
            repository: what is served.
            access: who may call.
            chosen: which front.
            threads: that take calls, where the front has such.
            shared: whether other processes share the address; their parent tells the metrics.
        """
        self._access_log = settings.access_log
        self._processes = settings.workers
        self._io_threads, self._io_cpus = settings.io_threads, settings.io_cpu_numbers
        self._gpu = settings.providers != "cpu"
        self._repository = repository
        self._figures: Metrics | None = None
        self.tracer = tracing.from_environment(_release)
        self.rpc = Rpc(
            repository,
            server_name=settings.server_name,
            max_image_pixels=settings.max_image_pixels,
            control=settings.model_control == "explicit",
        )
        transport = Transport(
            address=settings.address,
            max_message_bytes=settings.max_message_mib << 20,
            max_connection_age_s=settings.max_connection_age_s,
            shared_port=shared,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            tls_client_ca=settings.tls_client_ca,
        )
        native = chosen.front == "native"
        carried = f"; {io_shown(settings)}" if native else ""
        log.info("front: %s, because %s%s", chosen.front, chosen.reason, carried)
        if advice := io_advice(settings, chosen.front):
            log.warning("%s", advice)
        self.front = self._front(transport, access, native=native, threads=threads)
        self.metrics = self._metrics("" if shared else settings.metrics_address)

    def _front(
        self, transport: Transport, access: Access, *, native: bool, threads: int
    ) -> "GrpcioFront | NativeFront":
        told = self._access_log or isinstance(self.tracer, tracing.OpenTelemetryTracer)
        observe = self._observe if told else None
        if not native:
            return GrpcioFront(self.rpc, transport, access=access, observe=observe)
        from service.front.native import NativeFront  # noqa: PLC0415  where there is a wheel of it

        return NativeFront(
            self.rpc,
            transport,
            access=access,
            observe=observe,
            threads=threads,
            limit_bytes=guard.limit_bytes(self._processes),
            io_threads=self._io_threads,
            io_cpus=self._io_cpus,
            gpu=self._gpu,
        )

    def _metrics(self, address: str) -> "MetricsServer | None":
        if not address:
            return None
        from service.front.http import MetricsServer  # noqa: PLC0415  only where it is asked for

        return MetricsServer(address, self._told)

    def _told(self) -> bytes:
        """Return what Prometheus is told."""
        if self._figures is None:
            from service.metrics import Metrics  # noqa: PLC0415  only for who is asked

            self._figures = Metrics(
                self._repository.statistics.snapshots,
                lambda: [os.getpid()],
                live=self._repository.sampling.live.all,
                version=_release(),
                onnxruntime=RUNTIME.rpartition(" ")[2],
            )
        return self._figures.text()

    def _observe(self, call: Call) -> None:
        """Have the end of a call logged and traced, where that was asked for."""
        span = self.tracer.start(call.path, call.metadata)
        if not span.recording and not self._access_log:
            return

        def watcher(call: Call, status: Status) -> None:
            if span.recording:
                span.end(status.name, call.notes, _phases(call))
            if self._access_log:
                logs.access(_logged(call, status))

        call.watcher = watcher


def _release() -> str:
    """Return which release of this package is installed."""
    from importlib.metadata import version  # noqa: PLC0415  only for who is asked

    return version(PACKAGE)


def _phases(call: Call) -> list[tracing.Phase]:
    """Return when a call waited and when its model ran, counted back from now."""
    infer_ns = int(float(call.notes.get("infer_s", 0.0)) * NS)
    queue_ns = int(float(call.notes.get("queue_s", 0.0)) * NS)
    if not infer_ns:
        return []
    now_ns = time.time_ns()
    run_ns = now_ns - infer_ns
    return [
        tracing.Phase("queue", run_ns - queue_ns, run_ns),
        tracing.Phase("compute", run_ns, now_ns),
    ]


def _logged(call: Call, status: Status) -> logs.Call:
    notes = call.notes
    return logs.Call(
        method=call.path,
        code=status.name,
        seconds=time.monotonic() - call.started_s,
        peer=call.peer,
        request_id=str(notes.get("request_id", "")),
        model=str(notes.get("model", "")),
        version=str(notes.get("version", "")),
        rows=int(notes.get("rows", 0)),
    )
