import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper, numpy_helper

from protos import inference_pb2, inference_pb2_grpc
from service.client import Client
from service.rpc import Rpc

BIG = ("--max-batch-rows", "100000", "--max-queue-rows", "1000000")
FREE = ("--address", "127.0.0.1:0")
SHORT = (*FREE, "--max-batch-rows", "8", "--threads", "1", "--instances", "1")
QUICK = ("--poll-s", "0.2")
WAIT_S = 60
FRONTS = ("grpcio", "native")
TOKEN = "an-admin-s-token-of-length"
DRAINING = "GRPC server is shutting down and has stopped accepting new requests."


def repository(bundle):
    return ("--repository", str(bundle.parents[1]))


def until(condition):
    """Wait for what another process does."""
    end_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.005)
    return value


def error(process):
    """Return the last line of a process that could not start."""
    assert process.wait() == 1
    return process.log.read_text().splitlines()[-1]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def stub(channel):
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def health(channel, service=""):
    answer = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=30, wait_for_ready=True
    )
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def version(channel, infer, tiny, **fields):
    """Return which version answers."""
    answer = stub(channel).ModelInfer(infer(tiny.images(1), **fields), timeout=30)
    return answer.model_version


def publish(make_bundle, root, **fields):
    """Make a bundle in a hidden folder and rename it into place, as the pipeline does."""
    staged = make_bundle(root / ".staging", **fields)
    home = root / staged.parent.name
    home.mkdir(exist_ok=True)
    staged.rename(home / staged.name)
    return home / staged.name


def endless(tiny):
    """Let the tiny model's logits go round a loop that takes centuries."""
    model = onnx.load_from_string(tiny.model())
    row: list[str | int | None] = ["batch", len(tiny.labels)]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["value"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, row),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("same", TensorProto.FLOAT, row),
        ],
    )
    model.graph.node[2].output[0] = "before"
    loop = helper.make_node("Loop", ["rounds", "yes", "before"], ["logits"], body=body)
    model.graph.node.insert(3, loop)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(2**62), "rounds"),
            numpy_helper.from_array(np.array(True), "yes"),
        ]
    )
    return model.SerializeToString()


def children(pid):
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, file.read_text().split())
    return found


class Watch:
    """What grpc.health.v1 tells of a service, as it tells it."""

    def __init__(self, channel, service=""):
        self._call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
        )
        self.seen = []
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for answer in self._call:
                self.seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        except grpc.RpcError:
            pass
        self.ended.set()


# Start


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


@pytest.mark.slow
def test_several_models_of_both_kinds_are_served(
    make_bundle, make_generic_bundle, start_server, tiny
):
    make_generic_bundle()
    server = start_server(*repository(make_bundle()), *SHORT)

    x = np.full((2, 5), 3, np.float32)
    request = inference_pb2.ModelInferRequest(model_name="line", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    with grpc.insecure_channel(server.address()) as channel:
        until(lambda: health(channel) == "SERVING")
        answer = stub(channel).ModelInfer(request)
        assert health(channel, "line") == health(channel, "tiny") == "SERVING"
    np.testing.assert_array_equal(
        np.frombuffer(answer.raw_output_contents[0], "<f4"), np.full(10, 5)
    )


@pytest.mark.slow
def test_server_that_is_set_up_by_its_environment_lists_what_it_refused(make_bundle, start_server):
    (make_bundle(version=2) / "model.onnx").unlink()
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


def test_port_that_is_in_use_is_said_to_be_so(make_bundle, listen, rpc, start_server):
    address = listen(rpc)

    server = start_server(*repository(make_bundle(name="x")), "--address", address, COLUMNS="400")

    assert error(server) == (
        f"error: cannot listen on {address}: another process listens there already, which you "
        "may stop; choose another with --address HOST:PORT (port 0 takes a free one)"
    )


@pytest.mark.slow
def test_port_of_the_metrics_that_is_in_use_is_said_to_be_so(make_bundle, start_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = start_server(
            *repository(make_bundle()), *FREE, "--metrics-address", address, COLUMNS="400"
        )

        assert error(server) == (
            f"error: cannot listen on {address}: another process listens there already, which you "
            "may stop; choose another with --metrics-address HOST:PORT (port 0 takes a free one)"
        )


def test_repository_that_is_absent_is_said_to_be_so(start_server, tmp_path):
    absent = start_server("--repository", str(tmp_path / "absent"), *SHORT)

    assert error(absent) == (
        f"error: repository {tmp_path}/absent cannot be read: No such file or directory; "
        "publish into it with: train-export run, or name another with --repository"
    )


@pytest.mark.slow
def test_server_that_is_not_to_watch_its_repository_needs_something_in_it(
    make_bundle, start_server, tmp_path
):
    (tmp_path / "empty").mkdir()
    path = make_bundle()
    (path / "model.onnx").unlink()
    (make_bundle(version=2) / "model.onnx").unlink()
    once = (*SHORT, "--model-control", "none", "--version-policy", "all")

    empty = start_server("--repository", str(tmp_path / "empty"), *once)
    bad = start_server(*repository(path), *once)

    assert error(empty) == (
        f"error: {tmp_path}/empty holds no bundle (NAME/VERSION/manifest.json); "
        "publish one with: train-export run"
    )
    assert error(bad) == (
        f"error: nothing in {path.parents[1]} can be served: "
        "tiny/1/model.onnx is missing, or not a plain file; publish it again; "
        "tiny/2/model.onnx is missing, or not a plain file; publish it again"
    )


@pytest.mark.slow
def test_server_on_a_unix_socket_answers(make_bundle, start_server, infer, tiny, tmp_path):
    server = start_server(*repository(make_bundle()), "--address", f"unix:{tmp_path}/socket")

    with grpc.insecure_channel(server.address()) as channel:
        assert version(channel, infer, tiny) == "1"


@pytest.mark.slow
def test_as_many_threads_read_and_write_as_were_asked_for_where_they_were(
    make_bundle, start_server, infer, tiny
):
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("threads that keep to the only CPU show nothing")
    process = start_server(
        *(*repository(make_bundle()), *FREE, "--front", "native"),
        *("--io-threads", "3", "--io-cpus", str(min(cpus))),
    )

    with grpc.insecure_channel(process.address()) as channel:
        assert version(channel, infer, tiny) == "1"

    found: dict[str, list[set[int]]] = {}
    for path in Path(f"/proc/{process.popen.pid}/task").iterdir():
        with suppress(OSError):  # one that ends
            name = path.joinpath("comm").read_text().strip()
            found.setdefault(name, []).append(os.sched_getaffinity(int(path.name)))
    assert found.pop("grpc-native-io") == [{min(cpus)}] * 3
    assert all(one == cpus for several in found.values() for one in several)


@pytest.mark.slow
def test_front_that_has_its_own_threads_says_that_it_ignores_others(make_bundle, start_server):
    process = start_server(
        *repository(make_bundle()), *FREE, "--front", "grpcio", "--io-threads", "2"
    )

    process.address()

    log = process.log.read_text()
    assert "io_threads and io_cpus are ignored: the grpcio front serves" in log


@pytest.mark.slow
def test_launch_imports_nothing_that_takes_longer_than_it_is_worth(make_bundle, tmp_path):
    options = (*repository(make_bundle()), *FREE, "--front", "native", "--stop-with-stdin")
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "service", "serve", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout
        assert process.stdout.readline().startswith("serving on ")
        process.communicate(timeout=WAIT_S)

    imported = set(re.findall(r"^import time:.*\| +(\S+)$", log.read_text(), re.MULTILINE))
    assert {"numpy", "onnxruntime", "grpc", "service.front.native"} <= imported
    assert not {"numpy.ma", "encodings.idna", "typer", "tensorflow"} & imported


# Models come and go


def test_empty_repository_is_waited_on_and_served_once_a_bundle_is_renamed_into_place(
    make_bundle, start_server, infer, tiny, tmp_path
):
    root = tmp_path / "models"
    root.mkdir()
    address = f"127.0.0.1:{free_port()}"
    server = start_server("--repository", str(root), "--address", address)

    with grpc.insecure_channel(address) as channel:
        assert health(channel) == health(channel, "inference.GRPCInferenceService")
        assert health(channel) == "NOT_SERVING"
        assert stub(channel).ServerLive(inference_pb2.ServerLiveRequest()).live
        assert not stub(channel).ServerReady(inference_pb2.ServerReadyRequest()).ready
        until(lambda: f"nothing to serve yet; {root} is watched" in server.log.read_text())
        publish(make_bundle, root)
        assert server.address() == address
        assert version(channel, infer, tiny) == "1"
        until(lambda: health(channel) == "SERVING")
        assert health(channel, "tiny") == "SERVING"


@pytest.mark.slow
def test_new_versions_and_aliases_are_followed_and_bad_ones_refused_with_their_reason(
    make_bundle, start_server, infer, tiny
):
    path = make_bundle()
    root = path.parents[1]
    server = start_server(*repository(path), *SHORT)

    def alias(*words):
        command = [sys.executable, "-m", "service", "alias", *words, "--repository", str(root)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with grpc.insecure_channel(server.address()) as channel:
        publish(make_bundle, root, version=2)
        until(lambda: version(channel, infer, tiny) == "2")
        wrong = tiny.model(np.array([127, -127, 0.1], np.float32))
        publish(make_bundle, root, version=3, model=wrong)
        request = inference_pb2.RepositoryIndexRequest()

        def refused():
            index = stub(channel).RepositoryIndex(request).models
            return [one.version for one in index if "fails its self-check" in one.reason]

        assert until(refused) == ["3"]
        assert alias("tiny", "champion", "1") == "tiny champion: version 1 (was not set)\n"
        until(lambda: version(channel, infer, tiny) == "1")
        assert version(channel, infer, tiny, model_version="2") == "2"
        assert version(channel, infer, tiny, model_version="champion") == "1"
        assert alias("tiny", "champion", "2") == "tiny champion: version 2 (was version 1)\n"
        until(lambda: version(channel, infer, tiny) == "2")
        assert health(channel) == "SERVING"


@pytest.mark.slow
def test_server_that_does_not_watch_serves_what_it_found_first(
    make_bundle, start_server, infer, tiny
):
    path = make_bundle()
    watching = start_server(*repository(path), *SHORT)
    once = start_server(*repository(path), *SHORT, "--model-control", "none", *QUICK)
    with (
        grpc.insecure_channel(watching.address()) as followed,
        grpc.insecure_channel(once.address()) as kept,
    ):
        publish(make_bundle, path.parents[1], version=2)

        until(lambda: version(followed, infer, tiny) == "2")
        assert version(kept, infer, tiny) == "1"


@pytest.mark.slow
def test_crash_of_a_candidate_harms_nobody(make_bundle, start_server, infer, tiny):
    """A model that crashes onnxruntime: the smallest int32 by -1, while constants are folded."""
    graph = helper.make_graph(
        [helper.make_node("Div", ["smallest", "minus_one"], ["y"])],
        "crashing",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1])],
        [
            numpy_helper.from_array(np.array([-(2**31)], np.int32), "smallest"),
            numpy_helper.from_array(np.array([-1], np.int32), "minus_one"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    path = make_bundle()
    server = start_server(*repository(path), *SHORT)

    with grpc.insecure_channel(server.address()) as channel:
        publish(make_bundle, path.parents[1], version=2, model=model)
        until(lambda: "version refused: tiny/2" in server.log.read_text())
        assert version(channel, infer, tiny) == "1"


def test_explicit_control_serves_at_once_and_loads_by_order_of_an_admin(
    make_bundle, start_server, infer, tiny
):
    options = (*SHORT, "--model-control", "explicit")
    path = make_bundle()
    server = start_server(*repository(path), *options, SERVE_EXPORT_ADMIN_TOKEN=TOKEN)
    load = inference_pb2.RepositoryModelLoadRequest(model_name="tiny")
    unload = inference_pb2.RepositoryModelUnloadRequest(model_name="tiny")
    admin = (("authorization", f"Bearer {TOKEN}"),)

    with grpc.insecure_channel(server.address()) as channel:
        assert stub(channel).ServerReady(inference_pb2.ServerReadyRequest()).ready
        with pytest.raises(grpc.RpcError) as caught:
            version(channel, infer, tiny)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel).RepositoryModelLoad(load)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stub(channel).RepositoryModelLoad(load, metadata=admin)
        assert version(channel, infer, tiny) == "1"
        assert health(channel, "tiny") == "SERVING"
        publish(make_bundle, path.parents[1], version=2)
        stub(channel).RepositoryModelLoad(load, metadata=admin)
        assert version(channel, infer, tiny) == "2"
        stub(channel).RepositoryModelUnload(unload, metadata=admin)
        with pytest.raises(grpc.RpcError):
            version(channel, infer, tiny)
        until(lambda: health(channel, "tiny") == "NOT_SERVING")


@pytest.mark.slow
def test_killed_server_that_is_started_again_is_ready_by_itself(
    make_bundle, start_server, infer, tiny
):
    options = (*repository(make_bundle()), "--address", f"127.0.0.1:{free_port()}")
    first = start_server(*options)
    with grpc.insecure_channel(first.address()) as channel:
        assert version(channel, infer, tiny) == "1"
        first.popen.kill()
        first.wait()

        second = start_server(*options)

        assert second.address() == options[-1]
        until(lambda: health(channel) == "SERVING")
        assert version(channel, infer, tiny) == "1"


# The end


@pytest.mark.slow
def test_server_stops_when_its_standard_input_is_closed_and_not_before(make_bundle, start_server):
    server = start_server(*repository(make_bundle()), *SHORT, "--stop-with-stdin")
    address = server.address()
    server.popen.stdin.write("this is not the end\n")
    server.popen.stdin.flush()
    with Client(address) as client:
        assert client.models()

    server.popen.stdin.close()

    assert server.wait() == 0


def ask_on_and_on(address, request, codes):
    """Ask until nobody listens any more, and note how each call ended."""
    with grpc.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while True:
            try:
                ask(request, timeout=30)
            except grpc.RpcError as error:
                codes.append(error.code())
                if "failed to connect" in str(error.details()).lower():
                    return
            else:
                codes.append(grpc.StatusCode.OK)


@pytest.mark.slow
def test_clients_that_ask_on_and_on_are_refused_by_a_stop_and_never_cancelled(
    make_bundle, start_server, infer, tiny
):
    path = make_bundle()
    request = infer(tiny.images(1)).SerializeToString()
    for _ in range(3):
        server = start_server(*repository(path), *SHORT)
        codes: list[grpc.StatusCode] = []
        asked = (server.address(), request, codes)
        askers = [threading.Thread(target=ask_on_and_on, args=asked) for _ in range(16)]
        for asker in askers:
            asker.start()
        until(lambda codes=codes: len(codes) > 500)

        server.popen.terminate()

        assert server.wait() == 0
        for asker in askers:
            asker.join(60)
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.slow
def test_a_stop_that_comes_while_it_loads_does_not_wait_for_the_rest(make_bundle, start_server):
    first = make_bundle()
    for number in range(2, 200):
        make_bundle(version=number)
    server = start_server(*repository(first), *SHORT, "--version-policy", "all")
    until(lambda: "version ready" in server.log.read_text() or server.popen.poll() is not None)

    server.popen.send_signal(signal.SIGTERM)

    assert server.wait() == 0
    assert server.log.read_text().count("version ready") < 199


@pytest.mark.slow
@pytest.mark.parametrize("control", ["poll", "explicit"])
def test_a_stop_does_not_wait_for_a_candidate_that_never_comes_to_an_end(
    make_bundle, start_server, tiny, control, request
):
    path = make_bundle()
    make_bundle(name="endless", model=endless(tiny))
    server = start_server(
        *repository(path), *SHORT, "--model-control", control, "--drain-s", "0.1",
        SERVE_EXPORT_ADMIN_TOKEN=TOKEN,
    )  # fmt: skip
    if control == "explicit":
        load = inference_pb2.RepositoryModelLoadRequest(model_name="endless")
        admin = (("authorization", f"Bearer {TOKEN}"),)
        channel = grpc.insecure_channel(server.address())
        request.addfinalizer(channel.close)
        call = stub(channel).RepositoryModelLoad.future(load, metadata=admin)
        request.addfinalizer(call.cancel)
    (trial,) = until(lambda: children(server.popen.pid))
    until(lambda: "front: " in server.log.read_text())  # by now it listens to signals

    server.popen.terminate()

    assert server.wait() == 0
    until(lambda: not Path(f"/proc/{trial}").exists())


def test_a_server_that_has_not_loaded_is_live_but_neither_healthy_nor_ready(
    make_bundle, open_repository, listen
):
    address = listen(Rpc(open_repository(make_bundle().parents[1], look=False)), ready=False)

    with grpc.insecure_channel(address) as channel:
        assert health(channel) == "NOT_SERVING"
        assert stub(channel).ServerLive(inference_pb2.ServerLiveRequest()).live
        assert not stub(channel).ServerReady(inference_pb2.ServerReadyRequest()).ready


@pytest.mark.slow
def test_calls_in_flight_are_answered_when_the_server_is_stopped(
    make_bundle, start_server, infer, tiny
):
    rows = 100_000  # so many that the later calls wait for the only thread of the model
    server = start_server(
        *repository(make_bundle()), *FREE, "--threads", "1", "--instances", "1", *BIG,
        "--metrics-address", "127.0.0.1:0",
    )  # fmt: skip
    request = infer(tiny.images(rows))

    def arrived() -> float:
        """Return how many requests were answered or wait; the one that runs is none of them."""
        found = re.search(r"metrics on (http://\S+)", server.log.read_text())
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=30) as response:
            text = response.read().decode()
        counts = re.findall(
            r"^nv_inference_(?:request_success|pending_request_count)\{.* (\S+)$", text, re.M
        )
        return sum(map(float, counts))

    with grpc.insecure_channel(server.address()) as channel:
        calls = [stub(channel).ModelInfer.future(request, timeout=60) for _ in range(8)]
        until(lambda: arrived() >= 7)
        server.popen.terminate()
        for call in calls:
            assert call.result().outputs[0].shape[0] == rows

    assert server.wait() == 0


@pytest.mark.parametrize("pre_drain_s", ["0", "0.5"])
def test_no_accepted_call_is_lost_when_the_server_is_stopped_under_load(
    make_bundle, start_server, infer, tiny, pre_drain_s
):
    server = start_server(*repository(make_bundle()), *SHORT, "--pre-drain-s", pre_drain_s)
    address = server.address()
    running = threading.Barrier(5)

    def ask(worker):
        """Ask until the server refuses; return how."""
        with grpc.insecure_channel(address) as channel:
            for number in range(100_000):
                images = tiny.images(1 + number % 8, number)
                try:
                    answer = stub(channel).ModelInfer(infer(images), timeout=30)
                except grpc.RpcError as refused:
                    return refused.code(), refused.details()
                logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
                np.testing.assert_array_equal(logits, tiny.logits(images))
                if number == 50:
                    running.wait(30)
        return None

    with ThreadPoolExecutor(4) as threads:
        refusals = [threads.submit(ask, worker) for worker in range(4)]
        running.wait(30)
        server.popen.terminate()
        for code, details in {refusal.result() for refusal in refusals}:
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details == f"[request id: <id_unknown>] {DRAINING}" or (
                "failed to connect" in details.lower()  # too late to be accepted by anybody
            )
    assert server.wait() == 0


def test_stop_is_shown_first_then_calls_are_answered_until_balancers_have_noticed(
    make_bundle, start_server, infer, tiny
):
    server = start_server(*repository(make_bundle()), *SHORT, "--pre-drain-s", "6")

    with grpc.insecure_channel(server.address()) as channel:
        watches = [Watch(channel, service) for service in ("", "tiny")]
        until(lambda: all(watch.seen[-1:] == ["SERVING"] for watch in watches))
        server.popen.terminate()
        until(lambda: all(watch.seen[-2:] == ["SERVING", "NOT_SERVING"] for watch in watches))
        assert health(channel) == health(channel, "tiny") == "NOT_SERVING"
        assert not stub(channel).ServerReady(inference_pb2.ServerReadyRequest()).ready
        ready = stub(channel).ModelReady(inference_pb2.ModelReadyRequest(name="tiny"))
        assert not ready.ready
        assert version(channel, infer, tiny) == "1"  # a balancer may not have noticed yet
        assert server.wait() == 0
        assert all(watch.ended.wait(WAIT_S) for watch in watches)
        assert all(watch.seen[-2:] == ["SERVING", "NOT_SERVING"] for watch in watches)


@pytest.mark.slow
def test_watches_and_idle_streams_do_not_hold_up_the_end(make_bundle, start_server, infer, tiny):
    server = start_server(*repository(make_bundle()), *SHORT, "--drain-s", "600")
    open_end = threading.Event()

    def requests():
        yield infer(tiny.images(1))
        open_end.wait(WAIT_S)

    with grpc.insecure_channel(server.address()) as channel:
        watch = Watch(channel)
        stream = stub(channel).ModelStreamInfer(requests())
        assert next(stream).infer_response.model_version == "1"
        until(lambda: watch.seen)

        server.popen.terminate()

        assert server.wait() == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        open_end.set()


@pytest.mark.slow
@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_server_at_once(make_bundle, start_server, again):
    server = start_server(*repository(make_bundle()), *SHORT, "--pre-drain-s", "3600")

    with grpc.insecure_channel(server.address()) as channel:
        server.popen.terminate()
        until(lambda: health(channel) == "NOT_SERVING")
        server.popen.send_signal(again)

        assert server.wait() == 128 + again
    assert "ended by a second signal; calls in flight are lost" in server.log.read_text()


@pytest.mark.slow
def test_drain_ends_when_its_time_is_over(make_bundle, start_server, tiny, infer):
    """Whatever a client still sends: the server is gone in time, and cleanly."""
    server = start_server(*repository(make_bundle()), *SHORT, "--drain-s", "0")

    with grpc.insecure_channel(server.address()) as channel:
        calls = [stub(channel).ModelInfer.future(infer(tiny.images(8))) for _ in range(500)]
        server.popen.terminate()
        assert server.wait() == 0
        assert {call.code().name for call in calls} <= {"OK", "UNAVAILABLE", "CANCELLED"}


# Operation


def test_metrics_are_told_over_http_and_count_every_call(make_bundle, start_server, infer, tiny):
    server = start_server(*repository(make_bundle()), *SHORT, "--metrics-address", "127.0.0.1:0")
    with grpc.insecure_channel(server.address()) as channel:
        for _ in range(3):
            stub(channel).ModelInfer(infer(tiny.images(2)))

    found = re.search(r"metrics on (http://127\.0\.0\.1:\d+/metrics)", server.log.read_text())
    assert found
    with urllib.request.urlopen(found[1], timeout=30) as answer:
        text = answer.read().decode()

    assert 'nv_inference_request_success{model="tiny",version="1"} 3.0\n' in text
    assert 'nv_inference_count{model="tiny",version="1"} 6.0\n' in text
    assert 'serve_export_version_ready{model="tiny",version="1"} 1.0\n' in text


@pytest.mark.slow
def test_access_log_has_a_line_for_every_call_and_json_an_object_for_every_line(
    make_bundle, start_server, infer, tiny
):
    server = start_server(
        *repository(make_bundle()), *SHORT, "--access-log", "--log-format", "json"
    )
    with grpc.insecure_channel(server.address()) as channel:
        stub(channel).ModelInfer(infer(tiny.images(2), id="seven"))
        with pytest.raises(grpc.RpcError):
            stub(channel).ModelInfer(infer(tiny.images(9), id="too many\n"))
    server.popen.terminate()
    server.wait()

    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    calls = [line for line in lines if line["logger"] == "service.access"]
    assert [(call["code"], call["request_id"], call["rows"]) for call in calls] == [
        ("OK", "seven", 2),
        ("INVALID_ARGUMENT", "too many\\n", 0),
    ]
    assert calls[0]["method"] == "/inference.GRPCInferenceService/ModelInfer"
    assert (calls[0]["model"], calls[0]["version"]) == ("tiny", "1")
    assert calls[0]["seconds"] > 0
    assert calls[0]["peer"].startswith("ipv4:127.0.0.1:")
    events = {line["message"].partition(":")[0] for line in lines if line not in calls}
    assert {"version ready", "stopped"} <= events


@pytest.mark.slow
def test_without_an_access_log_calls_are_not_logged(make_bundle, start_server, infer, tiny):
    server = start_server(*repository(make_bundle()), *SHORT)
    with grpc.insecure_channel(server.address()) as channel:
        assert version(channel, infer, tiny, id="seven") == "1"
    server.popen.terminate()
    server.wait()

    assert "seven" not in server.log.read_text()


@pytest.mark.slow
def test_collector_of_traces_that_does_not_answer_does_no_harm(
    make_bundle, start_server, infer, tiny
):
    server = start_server(
        *repository(make_bundle()), *SHORT, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1"
    )
    with grpc.insecure_channel(server.address()) as channel:
        for _ in range(20):
            assert version(channel, infer, tiny) == "1"

    server.popen.terminate()

    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_tokens_come_from_the_environment_and_stand_in_no_log(
    make_bundle, start_server, infer, tiny
):
    server = start_server(
        *repository(make_bundle()), *SHORT, "--access-log", SERVE_EXPORT_TOKEN=TOKEN
    )
    with grpc.insecure_channel(server.address()) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            version(channel, infer, tiny)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        bearer = (("authorization", f"Bearer {TOKEN}"),)
        stub(channel).ModelInfer(infer(tiny.images(1)), metadata=bearer)
    server.popen.terminate()
    assert server.wait() == 0
    assert TOKEN not in server.log.read_text()


IMPORTS = """
import asyncio, json, os, signal, sys, threading
from pathlib import Path

import numpy as np
from service import server
from service.client import Client
from service.front import idle
from service.settings import Settings


def ask(address):
    with Client(address) as client:
        client.predict(np.zeros((3, 2, 2, 1), np.uint8), model="tiny")
        client.parity()
    os.kill(os.getpid(), signal.SIGTERM)


def announce(address):
    threading.Thread(target=ask, args=(address,)).start()


idle.run(server.serve(Settings(repository=Path(sys.argv[1]), address="127.0.0.1:0"), announce))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.slow
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
        "opentelemetry",  # nobody asked for it
    }


@pytest.mark.slow
def test_more_calls_at_once_than_grpcs_core_would_hold_are_all_answered(
    make_bundle, start_server, infer, tiny
):
    server = start_server(*repository(make_bundle()), *SHORT, "--max-queue-rows", "100000")
    request = infer(tiny.images(8))

    with grpc.insecure_channel(server.address()) as channel:
        calls = [stub(channel).ModelInfer.future(request) for _ in range(6_000)]

        assert {call.code().name for call in calls} == {"OK"}


@pytest.mark.slow
def test_server_leaves_no_file_and_no_process_behind(make_bundle, start_server, tmp_path):
    root = make_bundle().parents[1]
    (tmp_path / "temporary").mkdir()
    before = sorted(root.rglob("*"))
    server = start_server(*repository(root / "tiny/1"), *SHORT, TMPDIR=str(tmp_path / "temporary"))
    server.address()
    assert children(server.popen.pid) == []  # the trial has ended
    server.popen.terminate()

    assert server.wait() == 0
    assert sorted(root.rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []
