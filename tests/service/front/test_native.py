"""What the native front does otherwise than grpcio's, and what of its clients' doing it bounds.

Everything that both do alike is tested on both, in test_grpcio.py, test_status_codes.py and others
that name two FRONTS.
"""

import asyncio
import logging
import os
import socket
import struct
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2, inference_pb2_grpc
from service import host
from service.access import Access
from service.call import DRAINING, CallError, Status
from service.errors import SettingsError
from service.front import nearby
from service.front.grpcio import Transport
from service.front.native import MAX_METADATA_BYTES, MAX_STREAMS, NativeFront
from service.rpc import INFER, STREAM
from tests.service.front.fake import Fake
from tests.service.front.hostile import HEADERS, LIVE, MAX_CONCURRENT_STREAMS, RESET, Hostile

FRONTS = ("native",)
MIB = 1 << 20
WAIT_S = 60


@pytest.fixture
def dial():
    channels = []

    def dial(address, **options) -> Any:
        given = [("grpc.use_local_subchannel_pool", 1), *options.items()]
        channels.append(grpc.insecure_channel(address, given))
        return channels[-1]

    yield dial
    for channel in channels:
        channel.close()


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


# The differences that remain; docs/serving.md has the same list


def test_compression_other_than_gzip_is_unimplemented(listen, dial):
    channel = dial(listen(Fake()))

    ask = channel.unary_unary(LIVE)
    assert ask(b"", compression=grpc.Compression.Gzip) == b""
    code, _ = refusal(lambda: ask(bytes(100), compression=grpc.Compression.Deflate))
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_too_much_metadata_is_refused_by_http_and_the_next_call_is_answered(listen, dial):
    live = dial(listen(Fake())).unary_unary(LIVE)

    for size in (MAX_METADATA_BYTES, 1_000_000):
        code, _ = refusal(lambda size=size: live(b"", metadata=(("x", "y" * size),)))
        assert code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
    assert live(b"", metadata=(("x", "y" * 4_000),)) == b""


def test_overload_does_not_say_when_to_come_again_but_its_other_trailers_do_come(listen, dial):
    trailers = (("grpc-retry-pushback-ms", "5"), ("some-key", "value"))
    error = CallError(Status.UNAVAILABLE, "full", trailers)

    with pytest.raises(grpc.RpcError) as caught:
        dial(listen(Fake(lambda call: call.refuse(error)))).unary_unary(LIVE)(b"")

    found: Any = caught.value
    assert found.code() is grpc.StatusCode.UNAVAILABLE
    assert [tuple(pair) for pair in found.trailing_metadata()] == [("some-key", "value")]


def test_a_long_path_to_temporary_files_does_not_keep_it_from_listening(
    listen, dial, monkeypatch, tmp_path
):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    assert dial(listen(Fake())).unary_unary(LIVE)(b"") == b""


def test_peer_of_a_stream_is_the_socket_to_the_front_behind(listen, dial):
    fake = Fake(lambda call: call.answer(inference_pb2.ModelInferResponse().SerializeToString()))
    channel = dial(listen(fake))

    channel.unary_unary(INFER)(b"")
    list(channel.stream_stream(STREAM)(iter([b""])))

    unary, streamed = fake.calls
    assert unary.peer.startswith("ipv4:127.0.0.1:")
    assert streamed.peer.startswith("unix:")


def test_message_is_inflated_before_it_is_refused(listen, dial):
    channel = dial(listen(Fake(), max_message_bytes=MIB))

    code, details = refusal(
        lambda: channel.unary_unary(LIVE)(bytes(8 * MIB), compression=grpc.Compression.Gzip)
    )

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == f"SERVER: Received message larger than max ({8 * MIB} vs. {MIB})"


# Calls and their ends


def test_calls_that_cannot_be_begun_are_refused_and_the_next_are_answered(listen, dial, caplog):
    class Broken(Fake):
        def run(self, calls, longest_s, expect=None):
            if any(call.content for call in calls):
                raise ZeroDivisionError
            super().run(calls, longest_s)

    live = dial(listen(Broken())).unary_unary(LIVE)

    code, details = refusal(lambda: live(b"x"))

    assert code is grpc.StatusCode.INTERNAL
    assert details.startswith("internal error, request ")
    until(lambda: "ZeroDivisionError" in caplog.text)
    assert live(b"") == b""


@pytest.mark.parametrize("expected_s", [1.0, 0.0], ids=["is long", "was to be short"])
def test_calls_are_answered_while_another_thread_is_at_work_that(listen, dial, expected_s):
    begun, end = threading.Event(), threading.Event()

    class Working(Fake):
        def run(self, calls, longest_s, expect=None):
            for call in calls:
                if call.content:
                    expect(expected_s)
                    begun.set()
                    assert end.wait(WAIT_S)
                call.answer(call.content)

    live = dial(listen(Working())).unary_unary(LIVE)
    working = live.future(b"x", timeout=WAIT_S)
    assert begun.wait(WAIT_S)

    assert live(b"", timeout=WAIT_S) == b""
    assert not working.done()
    end.set()
    assert working.result(WAIT_S) == b"x"


def test_front_whose_threads_cannot_keep_to_a_cpu_says_so_and_listens_nowhere(loop):
    fake: Any = Fake()
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1000)
    front = NativeFront(fake, transport, access=Access((), ()), io_threads=2, io_cpus=(9999,))

    with pytest.raises(SettingsError, match="io_cpus lists 9999, which the system refuses"):
        asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)

    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


@pytest.mark.skipif(len(host.cpus()) < 2, reason="on the only CPU a thread has nowhere to go")
def test_calls_of_a_lone_client_are_taken_where_they_are_read_and_others_anywhere(loop, dial):
    held: list[Any] = []
    fake: Any = Fake(lambda call: held.append(call) if call.content else call.answer(b""))
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1000)
    here, anywhere = {min(host.cpus())}, host.cpus()
    front = NativeFront(fake, transport, access=Access((), ()), threads=1, io_cpus=here)
    channel = dial(asyncio.run_coroutine_threadsafe(front.start(), loop).result(30))
    live, infer = channel.unary_unary(LIVE), channel.unary_unary(INFER)
    (thread,) = front._threads

    def where():
        return os.sched_getaffinity(thread.native_id or 0)

    def lone(method):
        for _ in range(nearby.CALLS + 1):
            method(b"", timeout=WAIT_S)
        return where()

    assert lone(live) == anywhere  # what may begin a load must not be kept anywhere
    assert lone(infer) == here
    waiting = infer.future(b"x", timeout=WAIT_S)
    until(lambda: held)
    infer(b"", timeout=WAIT_S)
    assert where() == anywhere

    held.pop().answer(b"")
    assert waiting.result(WAIT_S) == b""
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


@pytest.mark.parametrize("io_threads", [1, 2])
def test_nothing_is_kept_of_calls_that_are_over(loop, dial, io_threads):
    held: list[Any] = []
    fake: Any = Fake(lambda call: held.append(call) if call.content else call.answer(b""))
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1000)
    front = NativeFront(fake, transport, access=Access(("token",), ()), io_threads=io_threads)
    address = asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)
    live, bearer = dial(address).unary_unary(LIVE), (("authorization", "Bearer token"),)

    assert live(b"", metadata=bearer) == b""
    refusal(lambda: live(b""))  # without a token
    refusal(lambda: live(bytes(1001), metadata=bearer))  # too large
    left = live.future(b"x", metadata=bearer)
    late = live.future(b"x", metadata=bearer, timeout=2)
    until(lambda: len(held) == 2)
    left.cancel()
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    until(lambda: not front._calls)
    assert all(call.over for call in held)
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_nothing_is_kept_of_calls_by_a_thread_that_waits_for_its_turn(listen, dial, monkeypatch):
    kept: list[Any] = []
    begin = NativeFront._begin

    def begin_and_remember(self, front, events, turn):
        kept.append(events)
        begin(self, front, events, turn)

    monkeypatch.setattr(NativeFront, "_begin", begin_and_remember)

    class Long(Fake):
        def run(self, calls, longest_s, expect=None):
            expect(1.0)
            for call in calls:
                call.answer(b"")

    live = dial(listen(Long())).unary_unary(LIVE)

    assert live(bytes(1 << 20)) == b""

    until(lambda: kept and not any(kept))


def test_stop_waits_for_no_call_longer_than_it_may(loop, dial):
    fake: Any = Fake(lambda call: None)
    front = NativeFront(
        fake, Transport(address="127.0.0.1:0", max_message_bytes=1000), access=Access((), ())
    )
    address = asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)
    call = dial(address).unary_unary(LIVE).future(b"")
    until(lambda: fake.calls)
    started_s = time.monotonic()

    asyncio.run_coroutine_threadsafe(front.stop(0.3), loop).result(30)

    assert 0.3 <= time.monotonic() - started_s < 10
    assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_call_that_comes_while_it_stops_is_refused_in_the_servers_words(loop, dial):
    fake: Any = Fake(lambda call: call.answer(b"") if not call.content else None)
    front = NativeFront(
        fake, Transport(address="127.0.0.1:0", max_message_bytes=1000), access=Access((), ())
    )
    address = asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)
    live = dial(address).unary_unary(LIVE)
    running = live.future(b"x")
    until(lambda: fake.calls)
    stopping = asyncio.run_coroutine_threadsafe(front.stop(WAIT_S), loop)

    def ask():
        while True:  # until the stop has come through
            live(b"")

    assert refusal(ask) == (grpc.StatusCode.UNAVAILABLE, DRAINING)
    fake.calls[0].answer(b"abc")
    assert running.result(WAIT_S) == b"abc"
    stopping.result(WAIT_S)


# What hostile clients can do


def resident_mib(pid, field="VmRSS"):
    status = Path(f"/proc/{pid}/status").read_text()
    (found,) = [line.split()[1] for line in status.splitlines() if line.startswith(field)]
    return int(found) / 1024


@pytest.fixture
def server(make_bundle, start_server):
    """A server process with the native front: (address, process)."""
    process = start_server(
        *("--repository", str(make_bundle().parents[1]), "--address", "127.0.0.1:0"),
        *("--max-batch-rows", "8", "--max-message-mib", "16"),
    )
    return process.address(), process


def test_calls_of_one_connection_are_bounded(listen):
    with Hostile(listen(Fake(lambda call: None))) as client:
        assert client.settings[MAX_CONCURRENT_STREAMS] == MAX_STREAMS == 256
        for number in range(MAX_STREAMS + 2):
            client.begin(2 * number + 1)

        client.wait(lambda: any(kind == RESET for kind, _, _ in client.frames))
        refused = {stream for kind, stream, _ in client.frames if kind == RESET}

    assert min(refused) == 2 * MAX_STREAMS + 1


def test_message_far_beyond_the_limit_is_refused_and_its_memory_given_back(server):
    address, process = server
    before = resident_mib(process.popen.pid)
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        content = bytes(256 * MIB)

        infer: Any = channel.unary_unary(INFER)
        live: Any = channel.unary_unary(LIVE)

        code, details = refusal(lambda: infer(content, timeout=WAIT_S))

        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == f"SERVER: Received message larger than max ({256 * MIB} vs. {16 * MIB})"
        until(lambda: resident_mib(process.popen.pid) < before + 64)
        assert live(b"") == b"\x08\x01"


def test_bomb_is_refused_and_its_memory_given_back(server, dial):
    address, process = server
    before = resident_mib(process.popen.pid)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(bytes(512 * MIB)) + packer.flush()
    with Hostile(address) as client:
        client.begin(1, encoding="gzip")
        assert client.give(1, struct.pack(">BI", 1, len(bomb)) + bomb, end=True)
        client.wait(lambda: any(kind == HEADERS for kind, _, _ in client.frames))

    until(lambda: resident_mib(process.popen.pid) < before + 64)
    assert dial(address).unary_unary(LIVE)(b"") == b"\x08\x01"


def test_bytes_that_are_no_http_end_their_connection_alone(server, dial):
    address, _ = server
    channel = dial(address)
    assert channel.unary_unary(LIVE)(b"") == b"\x08\x01"
    rng = np.random.default_rng(5)
    host, _, port = address.rpartition(":")

    for number in range(50):
        with socket.create_connection((host, int(port)), WAIT_S) as client:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if number % 2 else b""
            client.sendall(preface + rng.integers(0, 256, 500, np.uint8).tobytes())

    assert channel.unary_unary(LIVE)(b"") == b"\x08\x01"


@pytest.fixture
def guarded(loop, caplog):
    """Return a function that starts a front with a limit on this process's memory."""
    started = []
    caplog.set_level(logging.WARNING)

    def start(fake, limit_bytes):
        front = NativeFront(
            fake,
            Transport(address="127.0.0.1:0", max_message_bytes=64 * MIB),
            access=Access((), ()),
            limit_bytes=limit_bytes,
        )
        started.append(front)
        return asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)

    yield start
    for front in started:
        asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_client_that_makes_the_server_hold_messages_without_end_loses_its_connection(
    guarded, dial, caplog
):
    own = resident_mib("self")
    address = guarded(Fake(), int((own + 96) * MIB))
    peak = 0.0

    with Hostile(address) as client:
        for number in range(64):
            client.begin(2 * number + 1)
            if not client.give(2 * number + 1, struct.pack(">BI", 0, 60 * MIB) + bytes(4 * MIB)):
                break
            peak = max(peak, resident_mib("self"))
        client.wait(lambda: client.closed)

    assert peak - own < 96 + 100
    until(lambda: "ended 1 connections" in caplog.text)
    assert dial(address).unary_unary(LIVE)(b"", wait_for_ready=True, timeout=WAIT_S) == b""


def test_client_whose_messages_come_to_an_end_keeps_its_connection(guarded, dial, caplog):
    address = guarded(Fake(), int((resident_mib("self") + 200) * MIB))
    live = dial(address).unary_unary(LIVE)

    for _ in range(400):
        assert live(bytes(MIB // 2)) == b""
    for _ in range(2000):
        live(b"")

    assert "ended" not in caplog.text


def test_batch_of_calls_that_cannot_be_made_is_refused_and_none_is_kept(loop, dial, caplog):
    def observe(call):
        if call.content:
            raise ZeroDivisionError

    fake: Any = Fake()
    front = NativeFront(
        fake,
        Transport(address="127.0.0.1:0", max_message_bytes=1000),
        access=Access((), ()),
        observe=observe,
    )
    address = asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)
    live = dial(address).unary_unary(LIVE)

    codes = [refusal(lambda: live(b"x", timeout=WAIT_S))[0] for _ in range(3)]

    assert set(codes) == {grpc.StatusCode.INTERNAL}
    until(lambda: "ZeroDivisionError" in caplog.text)
    assert live(b"") == b""
    assert not front._calls
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_unary_calls_of_a_real_model_are_answered_beside_a_hostile_client(server, infer, tiny):
    address, _ = server
    with Hostile(address) as client, grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(100):
            client.begin(2 * number + 1)
            assert client.give(2 * number + 1, struct.pack(">BI", 0, MIB) + bytes(64 << 10))
            images = tiny.images(2, seed=number)

            answer = stub.ModelInfer(infer(images), timeout=WAIT_S)

            logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
            np.testing.assert_array_equal(logits, tiny.logits(images))
