"""NVIDIA's load generator, unmodified, against the real server."""

import csv
import re

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc

FRONTS = ("grpcio", "native")
pytestmark = pytest.mark.slow

# Windows that need not agree: with --request-count it waits for ever where the first requests are
# answered before it counts, as nothing is asked after the last.
WINDOWS = ("--measurement-mode", "count_windows", "--measurement-request-count", "100", "-s", "999")


def statistics(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = inference_pb2.ModelStatisticsRequest(name="tiny")
        (model,) = stub.ModelStatistics(request, timeout=30).model_stats
    return model


def measure(server, perf_analyzer, tmp_path, *options):
    """Return the lines of the report, by concurrency, and what was printed."""
    report = tmp_path / "report.csv"
    printed = perf_analyzer(server, *options, "-f", str(report))
    with report.open() as file:
        return {line["Concurrency"]: line for line in csv.DictReader(file)}, printed


def check(server, lines, printed, concurrencies, rows):
    """Require that every level was measured, on both sides, and that both agree."""
    assert sorted(lines) == concurrencies, printed
    for line in lines.values():
        assert float(line["Inferences/Second"]) > 0
        assert float(line["Server Compute Infer"]) > 0
        assert float(line["Server Queue"]) >= 0
    requests = [int(count) for count in re.findall(r"Successful request count: (\d+)", printed)]
    inferred = [int(count) for count in re.findall(r"Inference count: (\d+)", printed)]
    assert len(requests) == len(concurrencies), printed
    assert min(requests) > 0, printed
    assert inferred == [rows * count for count in requests]
    told = statistics(server)
    assert told.inference_stats.success.count >= sum(requests)
    assert told.inference_count >= sum(inferred)
    assert told.execution_count <= told.inference_stats.success.count


@pytest.mark.parametrize(
    ("options", "concurrencies", "rows"),
    [
        (("--concurrency-range", "1:8:7", *WINDOWS), ["1", "8"], 1),
        (("--concurrency-range", "8", "-b", "4", *WINDOWS), ["8"], 4),
        (("--concurrency-range", "8", "-b", "4", "--streaming", *WINDOWS), ["8"], 4),
        (("--concurrency-range", "8", "--grpc-compression-algorithm", "gzip", *WINDOWS), ["8"], 1),
    ],
    ids=["windows", "batches", "streams", "compressed"],
)
def test_perf_analyzer_measures_with_the_server_s_own_statistics(
    serve, perf_analyzer, tmp_path, options, concurrencies, rows
):
    server = serve()
    lines, printed = measure(server, perf_analyzer, tmp_path, *options)

    check(server, lines, printed, concurrencies, rows)


def test_perf_analyzer_finds_the_statistics_of_all_workers_in_one(serve, perf_analyzer, tmp_path):
    server = serve("--workers", "2")
    options = ("--concurrency-range", "16", *WINDOWS)
    lines, printed = measure(server, perf_analyzer, tmp_path, *options)

    check(server, lines, printed, ["16"], 1)
