import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from service import tracing
from service.tracing import CODES, ERRORS, NO_SPAN, OpenTelemetryTracer, Phase, Tracer

INFER = "/inference.GRPCInferenceService/ModelInfer"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exported) -> Iterator[Tracer]:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracer = OpenTelemetryTracer(provider)
    yield tracer
    tracer.stop()


def only(exported: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exported.get_finished_spans()
    return span


def numbered(span: ReadableSpan) -> object:
    return dict(span.attributes or {})["rpc.grpc.status_code"]


def test_call_is_a_span_of_a_server_named_by_its_method(tracer, exported):
    span = tracer.start(INFER, {})
    assert span.recording
    span.end("OK", {"model": "tiny", "rows": 4})

    found = only(exported)
    assert found.name == "inference.GRPCInferenceService/ModelInfer"
    assert found.kind is SpanKind.SERVER
    assert found.parent is None
    assert found.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "model": "tiny",
        "rows": 4,
    }


@pytest.mark.parametrize("code", CODES)
def test_status_has_grpcs_number_and_is_an_error_where_the_server_is_to_blame(
    tracer, exported, code
):
    tracer.start(INFER, {}).end(code)

    found = only(exported)
    assert numbered(found) == grpc.StatusCode[code].value[0]
    expected = StatusCode.ERROR if code in ERRORS else StatusCode.UNSET
    assert found.status.status_code is expected


def test_every_status_of_grpc_is_known():
    assert {*CODES} == {code.name for code in grpc.StatusCode}
    assert {*CODES} > ERRORS


def test_status_that_grpc_does_not_have_is_unknown(tracer, exported):
    tracer.start(INFER, {}).end("FINE")

    assert numbered(only(exported)) == 2


def test_long_attribute_is_cut(tracer, exported):
    tracer.start(INFER, {}).end("OK", {"request_id": "x" * 1_000_000, "model": "y" * 128})

    attributes = dict(only(exported).attributes or {})
    assert attributes["request_id"] == "x" * 128
    assert attributes["model"] == "y" * 128


def test_call_is_below_the_span_of_its_caller(tracer, exported):
    tracer.start(INFER, {"user-agent": "x", **SAMPLED}).end("OK")

    found = only(exported)
    assert f"{found.context.trace_id:032x}" == TRACE_ID
    assert f"{found.parent.span_id:016x}" == PARENT_ID
    assert found.parent.is_remote
    assert found.context.trace_state["vendor"] == "1"


def test_call_whose_caller_is_not_traced_is_not_either(tracer, exported):
    span = tracer.start(INFER, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"})
    span.end("OK", {}, [Phase("queue", 1, 2)])

    assert not span.recording
    assert exported.get_finished_spans() == ()


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "x",
        "00-0-0-01",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        "\n" * 99,
    ],
)
def test_traceparent_that_is_none_begins_a_trace_of_its_own(tracer, exported, traceparent):
    tracer.start(INFER, {"traceparent": traceparent, "tracestate": "=,;" * 999}).end("OK")

    assert only(exported).parent is None


def test_phases_are_children_at_their_own_times(tracer, exported):
    span = tracer.start(INFER, SAMPLED)
    span.end("OK", {}, [Phase("queue", 1000, 3000), Phase("compute", 3000, 9000)])

    queue, compute, call = exported.get_finished_spans()
    assert [(one.name, one.start_time, one.end_time) for one in (queue, compute)] == [
        ("queue", 1000, 3000),
        ("compute", 3000, 9000),
    ]
    for child in (queue, compute):
        assert child.parent.span_id == call.context.span_id
        assert child.context.trace_id == call.context.trace_id
        assert child.kind is SpanKind.INTERNAL


def test_calls_at_one_time_do_not_become_each_others_children(tracer, exported):
    first, second = tracer.start(INFER, {}), tracer.start(INFER, {})
    first.end("OK")
    second.end("OK")

    spans = exported.get_finished_spans()
    assert [span.parent for span in spans] == [None, None]
    assert spans[0].context.trace_id != spans[1].context.trace_id


@pytest.mark.parametrize(
    ("variables", "asks"),
    [
        ({}, ""),
        ({"OTEL_SERVICE_NAME": "x"}, ""),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": " None ", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_TRACES_EXPORTER": ""}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:1"},
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        ),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://h:1"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1", "OTEL_SDK_DISABLED": "TRUE"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "no"}, "OTEL_TRACES_EXPORTER"),
    ],
)
def test_traces_are_asked_for_by_the_standard_variables_alone(variables, asks):
    assert tracing.asked_by(variables) == asks


def test_tracer_that_nobody_asked_for_does_nothing_and_loads_nothing():
    code = (
        "import sys; from service import tracing; tracer = tracing.from_environment(lambda: '1');"
        "tracer.start('/a/B', {}).end('OK', {}, []); tracer.stop();"
        "assert type(tracer) is tracing.Tracer;"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert Tracer().start(INFER, SAMPLED) is NO_SPAN
    assert not NO_SPAN.recording


def warned(caplog) -> str:
    """Return the one warning there was, after asking for a tracer and getting none."""
    with caplog.at_level(logging.WARNING, "service.tracing"):
        assert type(tracing.from_environment(lambda: "1.2.3")) is Tracer
    (record,) = caplog.records
    assert record.exc_info is None
    return record.getMessage()


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter.otlp.proto.grpc"])
def test_extra_that_is_not_installed_is_named_where_it_is_asked_for(monkeypatch, caplog, missing):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")

    assert warned(caplog) == (
        "no traces: OTEL_EXPORTER_OTLP_ENDPOINT asks for them, but OpenTelemetry is not installed; "
        "install the extra telemetry: pip install 'train-export[telemetry]'"
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "'zipkin', expected otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "'http/protobuf', expected grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "'http/json', expected grpc"),
    ],
)
def test_way_of_sending_that_is_not_there_is_named(monkeypatch, caplog, name, value, sentence):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv(name, value)

    assert warned(caplog) == f"no traces: {name} is {sentence}"


def test_variable_that_opentelemetry_refuses_does_not_stop_the_server(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")

    assert warned(caplog).startswith("no traces: OpenTelemetry refuses its variables: ")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What every collector does with OTLP, and no more."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()

    def Export(self, request, context):  # noqa: N802  the service's name for it
        self.asked.set()
        self.may_answer.wait(60)
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    collector.may_answer.set()
    server.stop(0).wait()


TRACE = """
from service import tracing
tracing.STOP_S = 60
tracer = tracing.from_environment(lambda: "1.2.3")
span = tracer.start("/inference.GRPCInferenceService/ModelInfer", {"traceparent": "%s"})
span.end("UNAVAILABLE", {"rows": 4}, [tracing.Phase("queue", 1000, 3000)])
tracer.stop()
"""


@pytest.mark.parametrize("named", ["", "shop"])
def test_collector_is_sent_the_spans_of_a_process_with_its_name_and_version(collector, named):
    receiver, endpoint = collector
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": named}
    subprocess.run(
        [sys.executable, "-c", TRACE % SAMPLED["traceparent"]],
        env={**os.environ, **environment},
        check=True,
        timeout=60,
    )

    (request,) = receiver.requests
    (resource,) = request.resource_spans
    about = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (about["service.name"], about["service.version"]) == (named or "train-export", "1.2.3")
    queue, call = resource.scope_spans[0].spans
    assert (queue.name, queue.start_time_unix_nano, queue.end_time_unix_nano) == (
        "queue",
        1000,
        3000,
    )
    assert queue.parent_span_id == call.span_id
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    attributes = {one.key: one.value for one in call.attributes}
    assert attributes["rpc.grpc.status_code"].int_value == 14
    assert attributes["rows"].int_value == 4


def test_stop_does_not_wait_for_a_collector_that_does_not_answer(collector, monkeypatch):
    receiver, endpoint = collector
    receiver.may_answer.clear()
    monkeypatch.setattr(tracing, "STOP_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "3600")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    tracer = tracing.from_environment(lambda: "1.2.3")

    tracer.start(INFER, {}).end("OK")
    assert receiver.asked.wait(60)
    tracer.stop()

    assert receiver.requests == []
