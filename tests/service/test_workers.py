import os
import re
import signal
import socket
import threading
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc
from service import agreement
from service.client import Client
from service.errors import ServerError
from service.statistics import Figure

SHORT = ("--max-batch-rows", "8", "--threads", "1", "--instances", "1")
FREE = ("--address", "127.0.0.1:0")
TWO = ("--workers", "2")
WAIT_S = 60
FRONTS = ("grpcio", "native")
OWN = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel
DRAINING = "GRPC server is shutting down and has stopped accepting new requests."


def repository(bundle):
    return ("--repository", str(bundle.parents[1]))


def until(condition):
    """Wait for what other processes do."""
    end_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return value


def error(process, status=1):
    """Return the last line of a process that could not start."""
    assert process.wait() == status
    return process.log.read_text().splitlines()[-1]


def children(pid):
    """Return a process's children, which are a server's workers, by their numbers."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found |= set(map(int, file.read_text().split()))
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stub(channel):
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def ask(address, request, times=1):
    """Ask over a connection of its own; return the versions that answered."""
    with grpc.insecure_channel(address, options=OWN) as channel:
        return {stub(channel).ModelInfer(request, timeout=30).model_version for _ in range(times)}


def answered_by_worker(temporary):
    """Return how many requests each worker has answered, from the files they share."""
    counts = {}
    for file in temporary.glob("serve-export-*/*/tiny~1"):
        values = array("d", file.read_bytes())
        counts[int(file.parent.name)] = values[Figure.SUCCESS]
    return counts


def statistics(address):
    with grpc.insecure_channel(address, options=OWN) as channel:
        request = inference_pb2.ModelStatisticsRequest(name="tiny")
        (one,) = stub(channel).ModelStatistics(request, timeout=30).model_stats
    return one


def metric(server, name):
    """Return one figure of `/metrics`, of the only version there is."""
    found = re.search(r"metrics on (http://\S+/metrics)", server.log.read_text())
    assert found
    with urllib.request.urlopen(found[1], timeout=30) as answer:
        text = answer.read().decode()
    value = re.search(rf'^{name}(?:{{model="tiny",version="1"}})? (\S+)$', text, re.MULTILINE)
    assert value, text
    return float(value[1])


@pytest.fixture
def temporary(tmp_path) -> Path:
    """Return the folder that the server puts its temporary files into."""
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def start(make_bundle, start_server, temporary) -> Iterator[Callable[..., Any]]:
    """Return a function that starts two workers on one bundle; those left over are killed."""
    started = []

    def start(*options, bundle=None):
        server = start_server(
            *repository(bundle or make_bundle()), *SHORT, *TWO, *options, TMPDIR=str(temporary)
        )
        started.append(server)
        return server

    yield start
    for server in started:
        for child in children(server.popen.pid):
            os.kill(child, signal.SIGKILL)


def test_both_workers_answer_and_every_request_is_counted_once_for_all_of_them(
    start, temporary, infer, tiny
):
    server = start(*FREE, "--metrics-address", "127.0.0.1:0")
    address = server.address()
    request = infer(tiny.images(2))

    for _ in range(40):  # one after the other: each is counted before the next begins
        ask(address, request)
    with pytest.raises(grpc.RpcError):
        ask(address, infer(tiny.images(9)))

    counts = answered_by_worker(temporary)
    assert set(counts) == {0, 1}
    assert all(counts.values())
    assert sum(counts.values()) == 40
    for _ in range(8):  # whichever worker is asked
        one = statistics(address)
        assert (one.inference_stats.success.count, one.inference_count) == (40, 80)
        assert one.inference_stats.fail.count == 1
        assert one.execution_count == sum(size.compute_infer.count for size in one.batch_stats)
    assert metric(server, "nv_inference_request_success") == 40
    assert metric(server, "nv_inference_count") == 80
    assert metric(server, "serve_export_version_ready") == 1
    assert metric(server, "process_resident_memory_bytes") > 0


@pytest.mark.slow
def test_no_request_is_counted_twice_or_lost_while_many_come_at_once(start, infer, tiny):
    server = start(*FREE)
    address = server.address()

    with ThreadPoolExecutor(8) as threads:
        for rows in range(1, 9):
            threads.submit(ask, address, infer(tiny.images(rows)), 25)

    one = statistics(address)
    assert one.inference_stats.success.count == 200
    assert one.inference_count == 25 * sum(range(1, 9))
    assert one.inference_count == sum(
        size.batch_size * size.compute_infer.count for size in one.batch_stats
    )


@pytest.mark.slow
def test_worker_that_is_killed_is_replaced_and_what_it_counted_is_kept(
    start, temporary, infer, tiny
):
    server = start(*FREE, "--metrics-address", "127.0.0.1:0")
    address = server.address()
    request = infer(tiny.images(1))
    for _ in range(20):
        ask(address, request)
    before = answered_by_worker(temporary)
    workers = children(server.popen.pid)
    assert len(workers) == 2
    killed = workers.pop()

    os.kill(killed, signal.SIGKILL)

    until(lambda: len(children(server.popen.pid) - {killed}) == 2)
    assert re.search(r"worker \d ended with status -9; starting another", server.log.read_text())
    asked = 20
    while not all(
        count > before[worker] for worker, count in answered_by_worker(temporary).items()
    ):
        ask(address, request)  # none of these meets the new worker before it can answer
        asked += 1
    assert statistics(address).inference_stats.success.count == asked
    assert metric(server, "nv_inference_request_success") == asked
    server.popen.terminate()
    assert server.wait() == 0


def test_stop_drains_every_worker_and_leaves_neither_process_nor_file(
    start, temporary, infer, tiny
):
    server = start(*FREE, "--pre-drain-s", "0.3")
    address = server.address()
    workers = children(server.popen.pid)
    running = threading.Barrier(9)

    def hammer(seed):
        """Ask until a worker refuses; return how."""
        with grpc.insecure_channel(address, options=OWN) as channel:
            for number in range(100_000):
                images = tiny.images(1 + number % 8, seed)
                try:
                    answer = stub(channel).ModelInfer(infer(images), timeout=30)
                except grpc.RpcError as refused:
                    return refused.code(), refused.details()
                logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
                np.testing.assert_array_equal(logits, tiny.logits(images))
                if number == 20:
                    running.wait(WAIT_S)
        return None

    with ThreadPoolExecutor(8) as threads:
        refusals = [threads.submit(hammer, seed) for seed in range(8)]
        running.wait(WAIT_S)
        server.popen.terminate()
        for code, details in {refusal.result() for refusal in refusals}:
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details == f"[request id: <id_unknown>] {DRAINING}" or (
                "failed to connect" in details.lower()  # too late to be accepted by anybody
            )

    assert server.wait() == 0
    assert not any(is_running(worker) for worker in workers)
    assert list(temporary.iterdir()) == []
    assert server.log.read_text().rstrip().endswith("service.workers: stopped")
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_second_signal_ends_all_of_them_at_once(start):
    server = start(*FREE, "--pre-drain-s", "3600")
    server.address()
    workers = children(server.popen.pid)
    server.popen.terminate()
    until(lambda: server.log.read_text().count("stopping: not ready") == 2)

    server.popen.terminate()

    assert server.wait() == 128 + signal.SIGTERM
    until(lambda: not any(is_running(worker) for worker in workers))


@pytest.mark.slow
def test_workers_end_with_their_keeper_however_sudden_its_end(start):
    server = start(*FREE)
    server.address()
    workers = children(server.popen.pid)

    server.popen.kill()

    until(lambda: not any(is_running(worker) for worker in workers))


@pytest.mark.slow
def test_all_of_them_stop_with_standard_input_where_that_was_asked_for(start):
    server = start(*FREE, "--stop-with-stdin")
    server.address()

    server.popen.stdin.close()

    assert server.wait() == 0


@pytest.mark.slow
def test_new_version_is_served_by_all_of_them(start, make_bundle, infer, tiny):
    path = make_bundle()
    server = start(*FREE, bundle=path)
    address = server.address()
    request = infer(tiny.images(1))
    with ExitStack() as channels:
        stubs = [
            stub(channels.enter_context(grpc.insecure_channel(address, options=OWN)))
            for _ in range(16)
        ]
        assert {one.ModelInfer(request).model_version for one in stubs} == {"1"}

        make_bundle(path.parents[1] / ".staging", version=2).rename(path.parent / "2")

        until(lambda: {one.ModelInfer(request).model_version for one in stubs} == {"2"})


@pytest.mark.slow
def test_health_is_shown_by_each_of_them(start):
    server = start(*FREE)
    address = server.address()

    for _ in range(8):
        with grpc.insecure_channel(address, options=OWN) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(service="tiny"), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.slow
def test_nothing_is_announced_before_all_of_them_serve(start, make_bundle, infer, tiny, tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    server = start("--poll-s", "0.2", *FREE, bundle=tmp_path / "models" / "tiny" / "1")
    until(lambda: server.log.read_text().count("nothing to serve yet") == 2)

    make_bundle(tmp_path / ".staging").rename(tmp_path / "models" / "tiny" / "1")

    address = server.address()
    assert server.log.read_text().count("version ready: tiny 1") == 2
    assert ask(address, infer(tiny.images(1))) == {"1"}


def test_models_cannot_be_controlled_by_request(start):
    server = start(*FREE, "--model-control", "explicit")

    assert error(server, 2) == "error: explicit model control reaches one process; set --workers 1"


def test_unix_socket_cannot_be_shared(start, tmp_path):
    assert error(start("--address", f"unix:{tmp_path}/socket"), 2) == (
        "error: processes cannot share a unix socket; set --workers 1"
    )


def test_address_that_is_none_is_said_to_be_so(start):
    assert error(start("--address", "127.0.0.1"), 2) == (
        "error: --address is '127.0.0.1', expected HOST:PORT, such as 127.0.0.1:8001"
    )


@pytest.mark.parametrize("sharing", [False, True])
def test_port_that_another_server_listens_on_is_not_shared_with_it(start, sharing):
    """With SO_REUSEPORT the kernel alone would let two servers take turns without a word."""
    with socket.socket() as other:
        if sharing:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"

        server = start("--address", address)

        assert error(server) == (
            f"error: cannot listen on {address}: another process listens there already, which you "
            "may stop; choose another with --address HOST:PORT (port 0 takes a free one)"
        )
        assert "version ready" not in server.log.read_text()


@pytest.mark.slow
def test_two_servers_of_several_workers_do_not_share_a_port(start, make_bundle):
    path = make_bundle()
    first = start(*FREE, bundle=path)

    second = start("--address", first.address(), bundle=path)

    assert "another process listens there already" in error(second)


@pytest.mark.slow
def test_worker_that_cannot_start_ends_them_all_with_its_reason_in_the_log(start, make_bundle):
    path = make_bundle()
    (path / "model.onnx").unlink()

    server = start(*FREE, "--model-control", "none", bundle=path)

    assert re.fullmatch(
        r"error: worker \d ended with status 1 before it served; the log says why", error(server)
    )
    assert "tiny/1/model.onnx is missing" in server.log.read_text()
    assert children(server.popen.pid) == set()


def test_what_a_shadow_reports_to_one_worker_every_one_tells(start, infer, tiny):
    server = start(*FREE, "--metrics-address", "127.0.0.1:0", "--sample-rate", "1")
    address = server.address()
    rows: list[Any] = []
    ended = []

    def read(client):
        try:
            for one in client.sample():
                rows.append(one)  # noqa: PERF402  while others look
        except ServerError as error:
            ended.append(error.code)

    with ExitStack() as stack:
        shadows = [stack.enter_context(Client(address)) for _ in range(4)]  # of both, most likely
        threads = [threading.Thread(target=read, args=(client,)) for client in shadows]
        for thread in threads:
            thread.start()
        asked = until(lambda: rows or not ask(address, infer(tiny.images(2), model_version="1")))
        assert asked
        time.sleep(0.5)  # until rows of both have come, most likely
        found_rows = tuple(rows)
        for one in found_rows:
            found = agreement.figures(
                tiny.logits(one.inputs),
                one.outputs,
                one.inputs,
                allowed=agreement.Budget("float32", 40.0),
            )
            shadows[0].report(found, model="tiny", version="1", parent_sha256="")
        reported = sum(len(one.inputs) for one in found_rows)
        told = {client.parity("tiny").versions[0].live.total.rows for client in shadows}
        others = [stack.enter_context(Client(address)) for _ in range(8)]
        told |= {client.parity("tiny").versions[0].live.total.rows for client in others}

        assert told == {reported}
        assert metric(server, "serve_export_live_rows") == reported
        assert metric(server, "serve_export_live_passed") == 1
        assert metric(server, "serve_export_sampled_rows") >= reported
        for client in shadows:
            client.close()
        for thread in threads:
            thread.join(WAIT_S)
    assert ended == ["CANCELLED"] * 4
