"""Traces of calls for OpenTelemetry: where it is installed, and its standard variables ask for it.

The rest of the service knows `Tracer` and `Span`, which do nothing by themselves; OpenTelemetry is
imported only by who wants it.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

log = logging.getLogger(__name__)
SERVICE_NAME = "train-export"  # unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES names another
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TRACE_CONTEXT = ("traceparent", "tracestate")  # W3C's headers
CODES = (  # gRPC's, by their numbers
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# What OpenTelemetry's conventions call a server's error; the others are the caller's.
ERRORS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
MAX_CHARACTERS = 128  # of an attribute, which a client may have sent
STOP_S = 3.0  # longest wait for a collector that does not answer, when the server stops


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a call, such as its time in the queue; nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int


class Span:
    """A call that nobody traces."""

    recording = False  # if so, what `end` is given is worth preparing

    def end(
        self,
        code: str,
        attributes: Mapping[str, str | int | float] | None = None,
        phases: Sequence[Phase] = (),
    ) -> None:
        """Say that the call is over.

        Args:
            code: gRPC's name of its status.
            attributes: what else is known of it.
            phases: become children of the call's span.
        """


class Tracer:
    """Traces nothing, at no cost. Safe to use from several threads, as its subclass is."""

    def start(self, method: str, metadata: Mapping[str, str]) -> Span:
        """Begin the span of a call, below the caller's own if its metadata name one.

        Args:
            method: the call's full path.
            metadata: the call's, by lower-case keys; only `traceparent` and `tracestate` are read.
        """
        return NO_SPAN

    def stop(self) -> None:
        """Send what was not sent yet, within `STOP_S`; blocks."""


NO_SPAN = Span()


class OpenTelemetryTracer(Tracer):
    """Traces every call that OpenTelemetry's sampler chooses."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Trace with a provider, which `stop` shuts down."""
        # Not at the top: the extra may be missing, and takes a third of a second to load.
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

        self.provider = provider
        self.tracer = provider.get_tracer(__name__)
        self.below = trace.set_span_in_context
        self.error = trace.Status(trace.StatusCode.ERROR)
        self._server = trace.SpanKind.SERVER
        self._propagator = tracecontext.TraceContextTextMapPropagator()

    def start(self, method: str, metadata: Mapping[str, str]) -> Span:
        """Begin the span of a call."""
        service, _, name = method.removeprefix("/").rpartition("/")
        carrier = {key: metadata[key] for key in TRACE_CONTEXT if key in metadata}
        span = self.tracer.start_span(
            f"{service}/{name}",
            self._propagator.extract(carrier),
            self._server,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        return _Recorded(self, span) if span.is_recording() else NO_SPAN

    def stop(self) -> None:
        """Send what was not sent yet; a collector that does not answer is not waited for long."""
        sending = threading.Thread(target=self.provider.shutdown, daemon=True)
        sending.start()
        sending.join(STOP_S)


class _Recorded(Span):
    recording = True

    def __init__(self, tracer: OpenTelemetryTracer, span: "OtelSpan") -> None:
        self._tracer, self._span = tracer, span

    def end(
        self,
        code: str,
        attributes: Mapping[str, str | int | float] | None = None,
        phases: Sequence[Phase] = (),
    ) -> None:
        number = CODES.index(code if code in CODES else "UNKNOWN")
        for name, value in (attributes or {}).items():
            cut = value[:MAX_CHARACTERS] if isinstance(value, str) else value
            self._span.set_attribute(name, cut)
        self._span.set_attribute("rpc.grpc.status_code", number)
        if CODES[number] in ERRORS:
            self._span.set_status(self._tracer.error)
        below = self._tracer.below(self._span)
        for phase in phases:
            child = self._tracer.tracer.start_span(phase.name, below, start_time=phase.start_ns)
            child.end(phase.end_ns)
        self._span.end()


def asked_by(environment: Mapping[str, str]) -> str:
    """Return the standard variable that asks for traces, empty if none does."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return "" if exporter == "none" else "OTEL_TRACES_EXPORTER"
    return next((name for name in ENDPOINTS if environment.get(name, "").strip()), "")


def from_environment(version: Callable[[], str]) -> Tracer:
    """Return a tracer as OpenTelemetry's variables ask for it; what hinders it is only logged.

    Sends over OTLP's gRPC, from a thread of its own: call it after a fork, not before.

    Args:
        version: gives this server's, where traces are asked for.
    """
    variable = asked_by(os.environ)
    if not variable:
        return Tracer()
    try:
        unknown = _unknown(os.environ)
        if not unknown:
            return OpenTelemetryTracer(_provider(version()))
        log.warning("no traces: %s", unknown)
    except ImportError:
        log.warning(
            "no traces: %s asks for them, but OpenTelemetry is not installed; "
            "install the extra telemetry: pip install 'train-export[telemetry]'",
            variable,
        )
    except Exception as error:  # noqa: BLE001  a server that works is worth more than its traces
        log.warning("no traces: OpenTelemetry refuses its variables: %s", error)
    return Tracer()


def _unknown(environment: Mapping[str, str]) -> str:
    """Say which variable asks for something that is not there."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter.lower() != "otlp":
        return f"OTEL_TRACES_EXPORTER is {exporter!r}, expected otlp or none"
    for name in PROTOCOLS:
        protocol = environment.get(name, "").strip()
        if protocol:
            return "" if protocol == "grpc" else f"{name} is {protocol!r}, expected grpc"
    return ""


def _provider(version: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter  # noqa: PLC0415
    from opentelemetry.sdk import resources  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider, export  # noqa: PLC0415

    named = resources.OTELResourceDetector().detect().attributes
    ours = {resources.SERVICE_NAME: SERVICE_NAME, resources.SERVICE_VERSION: version}
    provider = TracerProvider(
        resource=resources.Resource.create({**ours, **named}), shutdown_on_exit=False
    )
    provider.add_span_processor(export.BatchSpanProcessor(trace_exporter.OTLPSpanExporter()))
    return provider
