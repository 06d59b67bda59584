import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc
from service.client import Client
from service.repository import Repository
from service.rpc import Rpc

BIG = ("--max-batch-rows", "100000")
SHORT = ("--address", "127.0.0.1:0", "--max-batch-rows", "8", "--threads", "1")


def repository(bundle):
    return ("--repository", str(bundle.parents[1]))


def error(process):
    """Return the last line of a process that could not start, without its colours."""
    assert process.wait() == 1
    return process.log.read_text().splitlines()[-1]


def health(channel):
    answer = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True
    )
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_server_answers_after_it_said_where_and_stops_cleanly_when_told_to(
    make_bundle, start_server, tiny
):
    server = start_server(*repository(make_bundle()), *SHORT)
    server.popen.stdin.close()  # which means nothing without --stop-with-stdin

    with Client(server.address()) as client:
        answer = client.predict(tiny.images(20), model="tiny")
        np.testing.assert_array_equal(answer.logits, tiny.logits(tiny.images(20)))
        assert client.metadata("tiny").properties["max_batch_rows"] == "8"
    server.popen.terminate()
    assert server.wait() == 0
    log = server.log.read_text()
    assert "version ready: tiny 1" in log
    assert "Traceback" not in log
    assert log.rstrip().endswith("service.server: stopped")


def test_server_stops_when_its_standard_input_is_closed_and_not_before(make_bundle, start_server):
    server = start_server(*repository(make_bundle()), *SHORT, "--stop-with-stdin")
    address = server.address()
    server.popen.stdin.write("this is not the end\n")
    server.popen.stdin.flush()
    with Client(address) as client:
        assert client.models()

    server.popen.stdin.close()

    assert server.wait() == 0


def test_port_that_is_in_use_is_said_to_be_so(make_bundle, listen, rpc, start_server, tmp_path):
    address = listen(rpc)

    server = start_server(
        "--repository", str(tmp_path / "models"), "--address", address, COLUMNS="400"
    )

    assert error(server) == (
        f"error: cannot listen on {address}: it is in use, or not an address of this machine; "
        "choose another with --address HOST:PORT (port 0 takes a free one)"
    )


def test_repository_that_is_empty_or_absent_is_said_to_be_so(start_server, tmp_path):
    (tmp_path / "empty").mkdir()

    empty = start_server("--repository", str(tmp_path / "empty"), *SHORT)
    absent = start_server("--repository", str(tmp_path / "absent"), *SHORT)

    assert error(empty) == (
        f"error: {tmp_path}/empty holds no bundle (NAME/VERSION/manifest.json); "
        "publish one with: train-export run"
    )
    assert error(absent) == (
        f"error: repository {tmp_path}/absent cannot be read: No such file or directory; "
        "publish into it with: train-export run, or name another with --repository"
    )


def test_refused_version_is_listed_and_does_not_stop_a_server_set_up_by_its_environment(
    make_bundle, start_server
):
    make_bundle(version=2).joinpath("model.onnx").unlink()
    server = start_server(
        SERVE_EXPORT_REPOSITORY=str(make_bundle().parents[1]),
        SERVE_EXPORT_ADDRESS="127.0.0.1:0",
        SERVE_EXPORT_MAX_BATCH_ROWS="3",
    )

    with Client(server.address()) as client:
        states = {model.version: (model.state, model.reason) for model in client.models()}
        assert client.metadata("tiny").properties["max_batch_rows"] == "3"
    assert states == {
        "1": ("READY", ""),
        "2": (
            "UNAVAILABLE",
            "tiny/2/model.onnx is missing, or not a plain file; publish it again",
        ),
    }
    server.popen.send_signal(signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_stop_that_comes_while_it_loads_does_not_wait_for_the_rest(make_bundle, start_server):
    first = make_bundle()
    for version in range(2, 200):
        make_bundle(version=version)
    server = start_server(*repository(first), *SHORT[2:], "--address", "127.0.0.1:0")
    while "version ready" not in server.log.read_text():
        assert server.popen.poll() is None

    server.popen.send_signal(signal.SIGTERM)

    assert server.wait() == 0
    assert server.log.read_text().count("version ready") < 199


def test_a_server_that_has_not_loaded_is_live_but_neither_healthy_nor_ready(make_bundle, listen):
    unloaded = Repository(make_bundle().parents[1], threads=1, max_batch_rows=8)
    address = listen(Rpc(unloaded), serving=False)

    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        assert health(channel) == "NOT_SERVING"
        assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
        assert not stub.ServerReady(inference_pb2.ServerReadyRequest()).ready


def test_calls_in_flight_are_answered_when_the_server_is_stopped(
    make_bundle, start_server, infer, tiny
):
    rows = 100_000  # so many that the later calls wait for the only thread of the model
    server = start_server(*repository(make_bundle()), *SHORT[:2], "--threads", "1", *BIG)
    request = infer(tiny.images(rows))

    with grpc.insecure_channel(server.address()) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(request, timeout=60) for _ in range(8)]
        calls[0].result()
        server.popen.terminate()
        for call in calls:
            assert call.result().outputs[0].shape[0] == rows

    assert server.wait() == 0


def test_no_answered_call_is_lost_when_the_server_is_stopped_under_load(
    make_bundle, start_server, infer, tiny
):
    server = start_server(*repository(make_bundle()), *SHORT)
    address = server.address()
    running = threading.Barrier(5)

    def ask(worker):
        """Ask until the server refuses; return the codes of what was not answered."""
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            for number in range(100_000):
                images = tiny.images(1 + number % 8, number)
                try:
                    answer = stub.ModelInfer(infer(images), timeout=30)
                except grpc.RpcError as refused:
                    return refused.code()
                logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
                np.testing.assert_array_equal(logits, tiny.logits(images))
                if number == 50:
                    running.wait(30)
        return None

    with ThreadPoolExecutor(4) as threads:
        codes = [threads.submit(ask, worker) for worker in range(4)]
        running.wait(30)
        server.popen.terminate()
        # gRPC's core cancels what arrives in the very moment of the stop.
        assert {code.result() for code in codes} <= {
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        }
    assert server.wait() == 0


IMPORTS = """
import asyncio, json, os, signal, sys, threading
from pathlib import Path

import numpy as np
from service import server
from service.client import Client
from service.settings import Settings


def ask(address):
    with Client(address) as client:
        client.predict(np.zeros((3, 2, 2, 1), np.uint8), model="tiny")
        client.parity()
    os.kill(os.getpid(), signal.SIGTERM)


def announce(address):
    threading.Thread(target=ask, args=(address,)).start()


asyncio.run(server.serve(Settings(repository=Path(sys.argv[1]), address="127.0.0.1:0"), announce))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_process_that_has_served_a_request_never_saw_training_software(make_bundle):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, make_bundle().parents[1]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"onnxruntime", "grpc", "service"} <= loaded
    assert not loaded & {
        *("tensorflow", "keras", "tf2onnx", "onnx", "prefect", "ai_edge_litert", "pipeline"),
    }


def test_more_calls_at_once_than_grpcs_core_would_hold_are_all_answered(
    make_bundle, start_server, infer, tiny
):
    server = start_server(*repository(make_bundle()), *SHORT)
    request = infer(tiny.images(8))

    with grpc.insecure_channel(server.address()) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(request) for _ in range(6_000)]

        assert {call.code().name for call in calls} == {"OK"}
