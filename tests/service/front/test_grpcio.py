import asyncio
import logging
import math
import queue
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc, parity_pb2, parity_pb2_grpc
from service.access import CONTROL, OPEN, ROWS, Access
from service.call import CallError, Status
from service.errors import AddressError, LimitError, SettingsError
from service.front.grpcio import CODES, MAX_STREAMED, MAX_TOGETHER, GrpcioFront, Transport
from service.front.native import NativeFront
from service.rpc import INFER, INFERENCE, SAMPLE, SERVICES, STREAM, WATCH, Rpc

LARGE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
DRAINING = "GRPC server is shutting down and has stopped accepting new requests."
LIVE = f"/{INFERENCE}/ServerLive"
ALIVE = inference_pb2.ServerLiveResponse(live=True).SerializeToString()
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
USER, ADMIN = "a-token-of-a-user", "a-token-of-an-admin"
WAIT_S = 60
FRONTS = ("grpcio", "native")
KINDS: dict[str, Any] = {"grpcio": GrpcioFront, "native": NativeFront}


def infer_response(content):
    return inference_pb2.ModelInferResponse(id=content.decode()).SerializeToString()


class Fake:
    """An Rpc whose ModelInfer does what the test says; ServerLive answers at once."""

    paths = (INFER, LIVE)
    streamed = INFER
    streaming: tuple[str, ...] = ()

    def __init__(self, begin=lambda call: None):
        self.calls: list[Any] = []
        self._begin = begin
        self._changed = threading.Condition()

    def begin(self, call):
        if call.path == LIVE:
            call.answer(ALIVE)
            return
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        self._begin(call)

    def run(self, calls, longest_s, expect=None):
        for call in calls:
            self.begin(call)

    def wait(self, calls=1):
        """Wait until that many calls have come, and return them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= calls, WAIT_S)
            return self.calls[:]


@pytest.fixture
def dial():
    """Return a function that opens a channel, closed in the end."""
    channels = []

    def dial(address, credentials=None, options=()) -> Any:
        options = (*LARGE, *OWN_CONNECTION, *options)
        channels.append(
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        return channels[-1]

    yield dial
    for channel in channels:
        channel.close()


@pytest.fixture
def stub(listen, dial, rpc):
    """The inference service of a real server in this process."""
    return inference_pb2_grpc.GRPCInferenceServiceStub(dial(listen(rpc)))


class Stream:
    """A stream of bytes, which the test sends and reads as it likes."""

    def __init__(self, channel, metadata=(), path=STREAM):
        self._requests: queue.Queue[bytes | None] = queue.Queue()
        self.answers = channel.stream_stream(path)(
            iter(self._requests.get, None), metadata=metadata, timeout=WAIT_S
        )

    def send(self, *contents):
        for content in contents:
            self._requests.put(content)

    def end(self):
        self._requests.put(None)

    def read(self):
        """Return the id of the next answer, or the message of a refusal."""
        answer = inference_pb2.ModelStreamInferResponse.FromString(next(self.answers))
        return answer.error_message or answer.infer_response.id

    def rest(self):
        found = [inference_pb2.ModelStreamInferResponse.FromString(one) for one in self.answers]
        return [one.error_message or one.infer_response.id for one in found]


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def alive(channel):
    return channel.unary_unary(LIVE)(b"", timeout=WAIT_S) == ALIVE


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


# Calls


def test_every_status_is_one_of_grpcs():
    assert {CODES[status].name for status in Status} == {status.name for status in Status}


def test_generated_stubs_are_answered(stub, listen, dial, rpc, infer, tiny):
    assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(inference_pb2.ServerReadyRequest()).ready
    assert stub.ModelInfer(infer(tiny.images(2))).outputs[1].shape == [2, 3]
    streamed = list(stub.ModelStreamInfer(iter([infer(tiny.images(2))] * 3)))
    assert [one.infer_response.outputs[1].shape for one in streamed] == [[2, 3]] * 3
    parity = parity_pb2_grpc.ParityServiceStub(dial(listen(rpc)))
    assert len(parity.GetParity(parity_pb2.GetParityRequest()).versions) == 1


@pytest.mark.parametrize("status", sorted(set(Status) - {Status.OK}))
@pytest.mark.parametrize("later", [False, True])
def test_every_status_reaches_the_client_with_its_message_and_trailers(listen, dial, status, later):
    error = CallError(status, f"refused as {status.name}: größer\n%", (("some-key", "value"),))

    def refuse(call):
        if later:
            threading.Thread(target=call.refuse, args=(error,)).start()
        else:
            call.refuse(error)

    with pytest.raises(grpc.RpcError) as caught:
        dial(listen(Fake(refuse))).unary_unary(INFER)(b"")

    found: Any = caught.value
    assert (found.code(), found.details()) == (CODES[status], str(error))
    assert ("some-key", "value") in found.trailing_metadata()


def test_call_has_what_came_with_it(listen, dial):
    contents: list[bytes] = []

    def answer(call):
        contents.append(call.content)
        call.answer(b"yes")

    fake = Fake(answer)
    address = listen(fake)
    metadata = (("x-text", "value"), ("x-bytes-bin", b"\xff"))

    before_s = time.monotonic()
    assert dial(address).unary_unary(INFER)(b"content", metadata=metadata, timeout=50) == b"yes"
    assert dial(address).unary_unary(INFER)(b"") == b"yes"

    first, second = fake.calls
    assert (first.path, contents) == (INFER, [b"content", b""])
    assert first.metadata["x-text"] == "value"
    assert "x-bytes-bin" not in first.metadata
    assert first.peer.startswith("ipv4:127.0.0.1:")
    assert before_s + 40 < first.deadline_s < time.monotonic() + 51
    assert second.deadline_s == math.inf


def test_cancellation_by_the_client_and_by_its_deadline_reach_the_call(listen, dial):
    fake = Fake()
    channel = dial(listen(fake))
    assert alive(channel)
    infer = channel.unary_unary(INFER)
    left = threading.Semaphore(0)

    cancelled = infer.future(b"", timeout=WAIT_S)
    late = infer.future(b"", timeout=2)
    for call in fake.wait(2):
        call.on_cancel(left.release)
    cancelled.cancel()

    for _ in range(2):
        assert left.acquire(timeout=WAIT_S)
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: all(call.over for call in fake.calls))


def test_other_calls_are_answered_while_one_waits(listen, dial):
    fake = Fake()
    channel = dial(listen(fake))

    waiting = channel.unary_unary(INFER).future(b"", timeout=WAIT_S)
    (call,) = fake.wait()

    assert alive(channel)
    assert health(channel) == "SERVING"
    assert not waiting.done()
    call.answer(b"abc")
    assert waiting.result(WAIT_S) == b"abc"


def test_calls_that_come_at_once_are_begun_together(loop, dial):
    together = []

    class Counting(Fake):
        def run(self, calls, longest_s, expect=None):
            together.append(len(calls))
            for call in calls:
                call.answer(call.content)

    fake: Any = Counting()
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1000)
    front = GrpcioFront(fake, transport, access=Access((), ()))
    infer = dial(asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)).unary_unary(
        INFER
    )

    calls = [infer.future(b"%d" % number, timeout=WAIT_S) for number in range(200)]

    assert [call.result(WAIT_S) for call in calls] == [b"%d" % number for number in range(200)]
    assert sum(together) == 200
    assert 1 < max(together) <= MAX_TOGETHER
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_calls_are_refused_if_what_begins_them_fails(loop, dial, caplog):
    class Broken(Fake):
        def run(self, calls, longest_s, expect=None):
            raise ZeroDivisionError

    fake: Any = Broken()
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1000)
    front = GrpcioFront(fake, transport, access=Access((), ()))
    infer = dial(asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)).unary_unary(
        INFER
    )

    calls = [infer.future(b"", timeout=WAIT_S) for _ in range(40)]

    assert {call.code() for call in calls} == {grpc.StatusCode.INTERNAL}
    assert "ZeroDivisionError" in caplog.text
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_outcome_that_comes_when_nobody_waits_any_more_does_no_harm(listen, dial, caplog):
    fake = Fake()
    channel = dial(listen(fake))
    future = channel.unary_unary(INFER).future(b"", timeout=WAIT_S)
    (call,) = fake.wait()

    future.cancel()
    until(lambda: call.over)
    call.answer(b"late")

    assert alive(channel)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("field", ["id", "model_name", "model_version"])
def test_refusal_of_a_request_with_a_very_long_text_keeps_its_status(stub, infer, tiny, field):
    request = infer(tiny.images(1), **{"model_name": "none", field: "\U0001f642" * 100_000})

    assert refusal(lambda: stub.ModelInfer(request))[0].name in ("NOT_FOUND", "INVALID_ARGUMENT")


def test_observer_is_told_of_every_call_before_it_begins(loop, front_kind, dial):
    seen = []
    fake: Any = Fake(lambda call: call.answer(infer_response(call.content)))
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1 << 20)
    front = KINDS[front_kind](
        fake,
        transport,
        access=Access((), ()),
        observe=lambda call: seen.append((call.path, len(fake.calls))),
    )
    channel = dial(asyncio.run_coroutine_threadsafe(front.start(), loop).result(30))

    channel.unary_unary(INFER)(b"")
    channel.unary_unary(LIVE)(b"")
    stream = Stream(channel)
    stream.send(b"1", b"2")
    stream.end()

    assert stream.rest() == ["1", "2"]
    assert seen == [(INFER, 0), (LIVE, 1), (INFER, 1), (INFER, 2)]
    assert front.begun == 4
    asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_each_of_thousands_of_calls_at_once_gets_its_own_answer(stub, infer, tiny):
    calls = [
        (images, stub.ModelInfer.future(infer(images, id=str(seed)), timeout=WAIT_S))
        for seed in range(3000)
        for images in [tiny.images(1, seed)]
    ]

    for seed, (images, call) in enumerate(calls):
        answer = call.result()
        assert answer.id == str(seed)
        logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
        np.testing.assert_array_equal(logits, tiny.logits(images))


def test_each_of_many_requests_of_several_clients_gets_its_own_rows(
    make_bundle, open_repository, listen, infer, tiny
):
    rpc = Rpc(open_repository(make_bundle().parents[1], max_batch_rows=16))
    address = listen(rpc)
    requests, window = 2000, 50

    def ask(worker):
        wrong = []
        with grpc.insecure_channel(address, options=OWN_CONNECTION) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            seeds = range(worker, requests, 4)
            for start in range(0, len(seeds), window):
                calls = []
                for seed in seeds[start : start + window]:
                    images = tiny.images(1 + seed % 16, seed)
                    request = infer(images, id=str(seed))
                    if seed % 3 == 0:
                        request.outputs.add(name="logits")
                    calls.append((seed, images, stub.ModelInfer.future(request, timeout=WAIT_S)))
                wrong += [seed for seed, images, call in calls if not right(seed, images, call)]
        return wrong

    def right(seed, images, call):
        answer = call.result()
        place = [output.name for output in answer.outputs].index("logits")
        logits = np.frombuffer(answer.raw_output_contents[place], "<f4").reshape(-1, 3)
        return answer.id == str(seed) and np.array_equal(logits, tiny.logits(images))

    with ThreadPoolExecutor(4) as threads:
        assert [wrong for part in threads.map(ask, range(4)) for wrong in part] == []
    rpc.close()


# Streams


def test_stream_is_answered_in_order_though_the_last_is_ready_first(listen, dial):
    fake = Fake()
    stream = Stream(dial(listen(fake)))
    sent = [str(number) for number in range(20)]
    stream.send(*[text.encode() for text in sent])

    for call in reversed(fake.wait(20)):
        call.answer(infer_response(call.content))
    stream.end()

    assert stream.rest() == sent


def test_error_in_a_stream_is_said_in_its_message_and_the_rest_is_answered(listen, dial):
    def begin(call):
        if call.content == b"bad":
            call.notes["request_id"] = "the bad one"
            call.refuse(CallError(Status.NOT_FOUND, "not here"))
        else:
            call.answer(infer_response(call.content))

    stream = Stream(dial(listen(Fake(begin))))
    stream.send(b"1", b"bad", b"2", b"bad")
    stream.end()

    answers = [inference_pb2.ModelStreamInferResponse.FromString(one) for one in stream.answers]

    assert [one.error_message for one in answers] == ["", "not here", "", "not here"]
    assert [one.infer_response.id for one in answers] == ["1", "the bad one", "2", "the bad one"]
    assert stream.answers.code() is grpc.StatusCode.OK


def test_error_ends_a_stream_that_asks_for_it_and_what_came_later_is_cancelled(listen, dial):
    fake = Fake()
    stream = Stream(dial(listen(fake)), (("triton_grpc_error", "true"),))
    stream.send(b"1", b"2", b"3", b"4")
    first, second, *later = fake.wait(4)

    second.refuse(CallError(Status.NOT_FOUND, "not here", (("some-key", "value"),)))
    first.answer(infer_response(b"1"))

    assert stream.read() == "1"
    assert refusal(stream.read) == (grpc.StatusCode.NOT_FOUND, "not here")
    assert ("some-key", "value") in stream.answers.trailing_metadata()
    until(lambda: all(call.over for call in later))


def test_stream_of_nothing_ends_well(listen, dial):
    stream = Stream(dial(listen(Fake())))
    stream.end()

    assert stream.rest() == []
    assert stream.answers.code() is grpc.StatusCode.OK


def test_answers_come_after_the_client_has_said_all_it_had_to_say(listen, dial):
    fake = Fake()
    stream = Stream(dial(listen(fake)))
    stream.send(b"1", b"2")
    stream.end()

    for call in fake.wait(2):
        call.answer(infer_response(call.content))

    assert stream.rest() == ["1", "2"]


def test_stream_is_read_no_further_than_its_limit_until_an_answer_is_given(listen, dial):
    fake = Fake()
    channel = dial(listen(fake))
    stream = Stream(channel)
    stream.send(*[str(number).encode() for number in range(MAX_STREAMED + 10)])

    calls = fake.wait(MAX_STREAMED)
    for _ in range(20):  # which give the server time to do the wrong thing
        channel.unary_unary(LIVE)(b"")
    assert len(fake.calls) == MAX_STREAMED == 64

    calls[0].answer(infer_response(b"0"))
    assert stream.read() == "0"
    fake.wait(MAX_STREAMED + 1)
    for _ in range(20):
        channel.unary_unary(LIVE)(b"")
    assert len(fake.calls) == MAX_STREAMED + 1


@pytest.mark.parametrize("calls", [3, MAX_STREAMED])
def test_cancelled_stream_cancels_what_waits(listen, dial, caplog, calls):
    fake = Fake()
    channel = dial(listen(fake))
    stream = Stream(channel)
    stream.send(*[b"x"] * (calls + 5 * (calls == MAX_STREAMED)))
    fake.wait(calls)

    stream.answers.cancel()

    until(lambda: all(call.over for call in fake.calls))
    assert alive(channel)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_stream_of_a_client_that_is_gone_cancels_what_waits(listen, caplog):
    fake = Fake()
    with grpc.insecure_channel(listen(fake), options=OWN_CONNECTION) as channel:
        stream = Stream(channel)
        stream.send(b"1", b"2")
        fake.wait(2)

    until(lambda: all(call.over for call in fake.calls))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_real_stream_joins_its_requests_and_answers_each(stub, infer, tiny):
    batches = [tiny.images(1 + seed % 8, seed) for seed in range(300)]

    answers = stub.ModelStreamInfer(
        iter([infer(images, id=str(number)) for number, images in enumerate(batches)])
    )

    for number, (images, answer) in enumerate(zip(batches, answers, strict=True)):
        assert answer.infer_response.id == str(number)
        logits = np.frombuffer(answer.infer_response.raw_output_contents[1], "<f4")
        np.testing.assert_array_equal(logits.reshape(-1, 3), tiny.logits(images))


# Starting and stopping


def test_address_that_is_taken_or_foreign_is_refused(listen, rpc):
    taken = listen(rpc)

    for address, why in (
        (taken, "another process listens there already, which you may stop"),
        ("192.0.2.1:0", "this machine has no such address"),
    ):
        with pytest.raises(AddressError) as caught:
            listen(Fake(), address=address)
        assert str(caught.value) == (
            f"cannot listen on {address}: {why}; "
            "choose another with --address HOST:PORT (port 0 takes a free one)"
        )


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_address_that_is_none_is_not_taken_for_another(listen, address):
    with pytest.raises(SettingsError, match="expected HOST:PORT"):
        listen(Fake(), address=address)


def test_socket_in_the_file_system_is_an_address(listen, dial, tmp_path):
    address = f"unix:{tmp_path}/server"

    assert listen(Fake(), address=address) == address

    assert alive(dial(address))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_address_of_ipv6_comes_back_with_its_port(listen, dial):
    address = listen(Fake(), address="[::1]:0")

    assert address.startswith("[::1]:")
    assert alive(dial(address))


@pytest.fixture
def front(loop, front_kind):
    """Return a function that starts a front on an Rpc: (front, address)."""
    started = []

    def start(rpc: Any):
        transport = Transport(address="127.0.0.1:0", max_message_bytes=1 << 20)
        front = KINDS[front_kind](rpc, transport, access=Access((), ()))
        address = asyncio.run_coroutine_threadsafe(front.start(), loop).result(30)
        started.append(front)
        return front, address

    yield start
    for front in started:
        asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(30)


def test_stop_lets_a_call_in_flight_finish_and_refuses_new_ones(front, loop, dial):
    fake = Fake()
    front, address = front(fake)
    running = dial(address).unary_unary(INFER).future(b"", timeout=WAIT_S)
    (call,) = fake.wait()

    stopping = asyncio.run_coroutine_threadsafe(front.stop(30), loop)
    other = dial(address)

    def ask():
        while True:  # until the stop has come through
            other.unary_unary(LIVE)(b"", timeout=WAIT_S)

    # gRPC's core cancels what arrives in the very moment of the stop.
    assert refusal(ask)[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert not running.done()
    call.answer(b"abc")
    assert running.result(WAIT_S) == b"abc"
    stopping.result(WAIT_S)


def test_stop_ends_watches_and_streams_that_their_clients_would_keep_open(front, loop, dial):
    fake = Fake()
    front, address = front(fake)
    channel = dial(address)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    next(watch)
    idle, busy = Stream(channel), Stream(channel)
    idle.send(b"0")
    fake.wait()[0].answer(infer_response(b"0"))
    assert idle.read() == "0"
    busy.send(b"1", b"2")
    calls = fake.wait(3)[1:]

    started_s = time.monotonic()
    stopping = asyncio.run_coroutine_threadsafe(front.stop(WAIT_S), loop)

    ended = (grpc.StatusCode.UNAVAILABLE, DRAINING)
    assert refusal(lambda: next(watch)) == refusal(idle.read) == ended
    assert not stopping.done()
    for call in calls:
        call.answer(infer_response(call.content))
    assert [busy.read(), busy.read()] == ["1", "2"]
    assert refusal(busy.read) == ended
    stopping.result(WAIT_S)
    assert time.monotonic() - started_s < WAIT_S / 2


@pytest.mark.only_grpcio("no call need be held: its end is UNAVAILABLE for whatever comes")
def test_calls_that_are_held_wait_until_the_core_has_said_that_it_shuts_down(front, loop, dial):
    fake = Fake(lambda call: call.refuse(CallError(Status.UNAVAILABLE, DRAINING)))
    front, address = front(fake)
    channel = dial(address)
    infer = channel.unary_unary(INFER)
    assert refusal(lambda: infer(b"")) == (grpc.StatusCode.UNAVAILABLE, DRAINING)

    async def hold():
        front.hold()

    asyncio.run_coroutine_threadsafe(hold(), loop).result(WAIT_S)
    calls = [infer.future(b"", timeout=WAIT_S) for _ in range(8)]
    end_s = time.monotonic() + WAIT_S
    while front.begun < 9:
        assert time.monotonic() < end_s
        time.sleep(0.001)

    assert len(fake.calls) == 1
    asyncio.run_coroutine_threadsafe(front.stop(WAIT_S), loop).result(WAIT_S)
    ended = {refusal(call.result) for call in calls}
    assert ended == {(grpc.StatusCode.UNAVAILABLE, DRAINING)}


def test_stop_ends_a_stream_of_reflection_that_its_client_would_keep_open(front, loop, dial):
    front, address = front(Fake())
    kept = threading.Event()

    def requests():
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        kept.wait(WAIT_S)

    stub = reflection_pb2_grpc.ServerReflectionStub(dial(address))
    answers = stub.ServerReflectionInfo(requests(), timeout=WAIT_S)
    assert next(answers).list_services_response.service

    asyncio.run_coroutine_threadsafe(front.stop(WAIT_S), loop).result(WAIT_S / 2)

    assert list(answers) == []
    kept.set()


def test_watch_of_a_service_with_an_endless_name_is_refused_and_not_kept(front, dial):
    _, address = front(Fake())

    with pytest.raises(grpc.RpcError) as caught:
        next(watch(dial(address), "x" * 257))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "a service's name has 257 characters, expected at most 256"
    assert next(watch(dial(address), "x" * 256)) == "SERVICE_UNKNOWN"


def test_front_that_was_never_started_can_be_stopped(loop, front_kind):
    fake: Any = Fake()
    transport = Transport(address="127.0.0.1:0", max_message_bytes=1)

    async def stop():
        await KINDS[front_kind](fake, transport, access=Access((), ())).stop(0)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(30)


# Health


def health(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def watch(channel, service=""):
    """Give the states of a service by their names, as they are told."""
    request = health_pb2.HealthCheckRequest(service=service)
    for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=WAIT_S):
        yield health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def show(loop, front, **shown):
    async def show():
        front.show_health(**shown)

    asyncio.run_coroutine_threadsafe(show(), loop).result(30)


def test_health_is_not_serving_until_it_is_said_to_be(front, loop, dial):
    front, address = front(Fake())
    channel = dial(address)
    assert {health(channel, name) for name in ("", *SERVICES)} == {"NOT_SERVING"}

    show(loop, front, ready=True, models={"tiny": True, "other": False})

    assert {health(channel, name) for name in ("", *SERVICES, "tiny")} == {"SERVING"}
    assert health(channel, "other") == "NOT_SERVING"
    show(loop, front, ready=False, models={"other": True})
    assert {health(channel, name) for name in ("", *SERVICES, "tiny")} == {"NOT_SERVING"}
    assert health(channel, "other") == "SERVING"


def test_health_of_a_model_called_like_a_service_is_that_of_the_service(front, loop, dial):
    front, address = front(Fake())

    show(loop, front, ready=False, models={SERVICES[0]: True})

    assert health(dial(address), SERVICES[0]) == "NOT_SERVING"


def test_health_of_an_unknown_service_is_not_found(listen, dial):
    channel = dial(listen(Fake()))

    assert refusal(lambda: health(channel, "nonsense")) == (
        grpc.StatusCode.NOT_FOUND,
        "'nonsense' is no service or model of this server",
    )


def test_health_of_everything_is_listed(listen, dial):
    stub = health_pb2_grpc.HealthStub(dial(listen(Fake())))

    statuses = stub.List(health_pb2.HealthListRequest(), timeout=WAIT_S).statuses

    assert {name: status.status for name, status in statuses.items()} == dict.fromkeys(
        ("", *SERVICES, "tiny"), health_pb2.HealthCheckResponse.SERVING
    )


@pytest.mark.parametrize("service", ["", SERVICES[0], "tiny"])
def test_watcher_of_health_is_told_of_every_change(front, loop, dial, service):
    front, address = front(Fake())
    show(loop, front, ready=False, models={"tiny": False})
    states = watch(dial(address), service)
    assert next(states) == "NOT_SERVING"

    for ready in (True, False, True):
        show(loop, front, ready=ready, models={"tiny": ready})
        assert next(states) == ("SERVING" if ready else "NOT_SERVING")


def test_watcher_of_an_unknown_service_is_told_so_and_later_that_it_is_there(front, loop, dial):
    front, address = front(Fake())
    states = watch(dial(address), "tiny")
    assert next(states) == "SERVICE_UNKNOWN"

    show(loop, front, ready=True, models={"tiny": True})

    assert next(states) == "SERVING"


def test_stopping_server_is_not_serving_for_good(front, loop, dial):
    front, address = front(Fake())
    show(loop, front, ready=True, models={"tiny": True})
    channel = dial(address)
    states = [watch(channel, service) for service in ("", "tiny")]
    assert [next(state) for state in states] == ["SERVING"] * 2

    loop.call_soon_threadsafe(front.show_stopping)

    assert [next(state) for state in states] == ["NOT_SERVING"] * 2
    show(loop, front, ready=True, models={"tiny": True})
    assert {health(channel, name) for name in ("", *SERVICES, "tiny")} == {"NOT_SERVING"}


HEADERS, SETTINGS = 1, 4
INITIAL_WINDOW_SIZE = 4


class Http2:
    """A client that speaks just enough HTTP/2 to misbehave."""

    def __init__(self, address, **settings):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), WAIT_S)
        changed = b"".join(struct.pack(">HI", *pair) for pair in settings.get("settings", ()))
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(SETTINGS, 0, 0, changed)
        self._received = b""
        self.read_until(SETTINGS)  # which allow more data than the first 64 KiB

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def call(self, path, content, *, compressed=False, encoding="identity"):
        """Send one call whole."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "x",
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-encoding": encoding,
        }
        block = b"".join(
            b"\0" + bytes([len(key)]) + key.encode() + bytes([len(value)]) + value.encode("latin-1")
            for key, value in headers.items()
        )
        self._send(HEADERS, 4, 1, block)
        message = struct.pack(">BI", compressed, len(content)) + content
        for start in range(0, len(message), 16_384):
            last = start + 16_384 >= len(message)
            self._send(0, int(last), 1, message[start : start + 16_384])

    def read_until(self, kind):
        """Return the payload of the next frame of a kind."""
        while True:
            while len(self._received) < 9 or len(self._received) < 9 + self._length():
                read = self._socket.recv(65_536)
                assert read, "the server closed the connection"
                self._received += read
            end = 9 + self._length()
            frame, self._received = self._received[:end], self._received[end:]
            if frame[3] == SETTINGS and not frame[4] & 1:
                self._send(SETTINGS, 1, 0, b"")
            if frame[3] == kind:
                return frame[9:]

    def read_to_the_end(self):
        """Read until the server closes the connection, or says nothing more."""
        self._socket.settimeout(1)
        with suppress(TimeoutError, OSError):
            while self._socket.recv(65_536):
                pass

    def _length(self):
        return int.from_bytes(self._received[:3], "big")

    def _send(self, kind, flags, stream, payload):
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self._socket.sendall(head + payload)


def test_watcher_that_takes_nothing_stops_neither_the_others_nor_the_server(front, loop, dial):
    front, address = front(Fake())
    with Http2(address, settings=[(INITIAL_WINDOW_SIZE, 0)]) as stuck:
        stuck.call("/grpc.health.v1.Health/Watch", b"")
        stuck.read_until(HEADERS)
        states = watch(dial(address))
        assert next(states) == "NOT_SERVING"

        show(loop, front, ready=True, models={})
        assert next(states) == "SERVING"
        loop.call_soon_threadsafe(front.show_stopping)
        assert next(states) == "NOT_SERVING"
        asyncio.run_coroutine_threadsafe(front.stop(0), loop).result(WAIT_S)


class Rows:
    """A stream that has as many messages as the test says, each when it is asked for."""

    pause_s = 0.01

    def __init__(self, content=b"row"):
        self.content = content
        self.left = 0
        self.sent = 0
        self.error: Exception | None = None
        self.closed = threading.Event()

    def due(self):
        if self.error is not None:
            raise self.error
        while self.left:
            self.left -= 1
            self.sent += 1
            yield self.content

    def close(self):
        assert not self.closed.is_set()
        self.closed.set()


class Streaming(Fake):
    """An Rpc with a stream that lasts."""

    streaming = (SAMPLE,)

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def open(self, call):
        if isinstance(self.rows, CallError):
            raise self.rows
        self.calls.append(call)
        return self.rows


def sampled(channel):
    return channel.unary_stream(SAMPLE)(b"question", timeout=WAIT_S)


def test_stream_that_lasts_is_sent_what_is_due_until_its_caller_leaves(front, dial):
    rows = Rows()
    fake = Streaming(rows)
    _, address = front(fake)
    answers = sampled(dial(address))

    for count in (1, 3):
        rows.left = count
        assert [next(answers) for _ in range(count)] == [b"row"] * count
    (call,) = fake.calls
    assert (call.path, call.over) == (SAMPLE, False)
    answers.cancel()

    assert rows.closed.wait(WAIT_S)
    until(lambda: call.over)


@pytest.mark.parametrize("later", [False, True])
def test_refusal_of_a_stream_that_lasts_reaches_the_caller(front, dial, later):
    rows: Any = Rows()
    error = CallError(Status.RESOURCE_EXHAUSTED, "enough of them")
    if later:
        rows.error = LimitError("enough of them")
    else:
        rows = error
    _, address = front(Streaming(rows))

    found = refusal(lambda: next(sampled(dial(address))))

    assert found == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough of them")
    if later:
        assert rows.closed.wait(WAIT_S)


def test_failure_inside_of_a_stream_that_lasts_is_told_as_a_token_alone(front, dial, caplog):
    rows = Rows()
    rows.error = OSError("disk full at /secret")
    _, address = front(Streaming(rows))

    code, text = refusal(lambda: next(sampled(dial(address))))

    assert code is grpc.StatusCode.INTERNAL
    assert text.startswith("internal error, request ")
    assert "secret" in caplog.text
    assert rows.closed.is_set()


def test_stop_ends_streams_that_last_at_once_and_says_why(front, loop, dial):
    rows = Rows()
    front, address = front(Streaming(rows))
    answers = sampled(dial(address))
    rows.left = 1
    assert next(answers) == b"row"

    asyncio.run_coroutine_threadsafe(front.stop(10 * WAIT_S), loop).result(WAIT_S)

    assert refusal(lambda: next(answers)) == (grpc.StatusCode.UNAVAILABLE, DRAINING)
    assert rows.closed.is_set()


def test_reader_that_takes_nothing_holds_neither_memory_nor_the_stop(front, loop, dial):
    rows = Rows(bytes(1 << 19))
    fake = Streaming(rows)
    front, address = front(fake)
    with Http2(address, settings=[(INITIAL_WINDOW_SIZE, 0)]) as stuck:
        stuck.call(SAMPLE, b"")
        rows.left = 10**6
        until(lambda: rows.sent)
        running = dial(address).unary_unary(INFER).future(b"", timeout=WAIT_S)
        until(lambda: any(call.path == INFER for call in fake.calls))
        time.sleep(0.2)
        assert rows.sent < 64  # some of them on their way, in windows and in buffers

        stopping = asyncio.run_coroutine_threadsafe(front.stop(10 * WAIT_S), loop)
        time.sleep(1)
        assert not stopping.done()  # others are let finish
        next(call for call in fake.calls if call.path == INFER).answer(b"done")
        assert running.result(WAIT_S) == b"done"
        stopping.result(WAIT_S)

    assert rows.closed.wait(WAIT_S)


GARBAGE = b"\x0a\xff"


@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
def test_bytes_that_are_no_message_of_health_are_the_clients_fault(listen, dial, caplog, method):
    channel = dial(listen(Fake()))

    code, text = refusal(
        lambda: list(channel.unary_stream(f"/grpc.health.v1.Health/{method}")(GARBAGE))
    )

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("the request is not a grpc.health.v1.Health")
    assert not caplog.records


# Reflection


@dataclass
class Reflected:
    """What a client learns of a server that it knows nothing of."""

    services: list[str]
    pool: descriptor_pool.DescriptorPool

    def methods(self):
        """Return the full path of every method that is described."""
        return [
            f"/{service}/{method.name}"
            for service in self.services
            for method in self.pool.FindServiceByName(service).methods
        ]


def reflect(channel, metadata=(), **request):
    """Ask one question of reflection."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(**request)])
    (answer,) = stub.ServerReflectionInfo(asked, metadata=metadata, timeout=WAIT_S)
    return answer


def discover(channel, metadata=()):
    """Learn all services and files of a server, as grpcurl does."""
    listed = reflect(channel, metadata, list_services="").list_services_response.service
    services = [service.name for service in listed]
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    questions = [{"file_containing_symbol": service} for service in services]
    while questions:
        answer = reflect(channel, metadata, **questions.pop())
        assert not answer.HasField("error_response"), answer
        for content in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(content)
            files[file.name] = file
            missing = set(file.dependency) - files.keys()
            questions += [{"file_by_filename": name} for name in missing]
    pool = descriptor_pool.DescriptorPool()
    while files:
        ready = [file for file in files.values() if not set(file.dependency) & files.keys()]
        for file in ready:
            pool.Add(files.pop(file.name))
    return Reflected(services, pool)


def test_reflection_describes_every_service_with_all_of_its_files(listen, dial):
    found = discover(dial(listen(Fake())))

    assert sorted(found.services) == sorted(
        [*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    )
    assert {INFER, SAMPLE, WATCH} < set(found.methods())
    assert len(found.methods()) == 12 + 4 + 3 + 1


def test_client_that_knows_only_reflection_can_ask_for_an_inference(listen, dial, rpc, infer, tiny):
    channel = dial(listen(rpc))
    method = discover(channel).pool.FindMethodByName(f"{INFERENCE}.ModelInfer")
    images = tiny.images(2)

    asked: Any = message_factory.GetMessageClass(method.input_type).FromString(
        infer(images).SerializeToString()
    )
    assert asked.inputs[0].shape == [2, 2, 2, 1]
    answer: Any = message_factory.GetMessageClass(method.output_type).FromString(
        channel.unary_unary(INFER)(asked.SerializeToString())
    )

    logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(2, 3)
    np.testing.assert_array_equal(logits, tiny.logits(images))


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "no.Such"},
        {"file_by_filename": "/etc/passwd"},
        {"file_by_filename": "../protos/inference.proto"},
    ],
)
def test_reflection_of_what_is_not_there_is_not_found_and_the_stream_goes_on(
    listen, dial, question
):
    stub = reflection_pb2_grpc.ServerReflectionStub(dial(listen(Fake())))
    asked = [reflection_pb2.ServerReflectionRequest(**question)] * 2

    answers = list(stub.ServerReflectionInfo(iter(asked), timeout=WAIT_S))

    assert [answer.error_response.error_code for answer in answers] == [5, 5]


def test_bytes_that_are_no_question_of_reflection_are_the_clients_fault(listen, dial, caplog):
    stream = Stream(dial(listen(Fake())), path=REFLECTION)
    stream.send(GARBAGE)

    assert refusal(lambda: next(stream.answers)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the request is not a grpc.reflection.v1alpha.ServerReflectionRequest",
    )
    assert not caplog.records


# Tokens


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def outcome(channel, path, metadata=()):
    """Return the name of the status of a call, whether it streams or not."""
    call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=WAIT_S)
    try:
        next(call)
    except StopIteration:
        return "OK"
    except grpc.RpcError as error:
        found: Any = error
        return found.code().name
    finally:
        call.cancel()
    return "OK"


UNKNOWN = (
    f"/{INFERENCE}/Nonsense",
    f"/{INFERENCE}/modelinfer",
    "/grpc.health.v1.Health/Nonsense",
    "/no.such.Service/Method",
    "/inference.model_repository.ModelRepositoryService/RepositoryModelLoad",
)


def test_every_rpc_of_every_service_wants_a_token_but_health(listen, dial, rpc):
    channel = dial(listen(rpc, access=Access((USER,), (ADMIN,))))
    found = discover(channel, bearer(USER))
    paths = {*found.methods(), *rpc.paths, *UNKNOWN}
    assert {INFER, STREAM, WATCH, REFLECTION} | OPEN | CONTROL | ROWS <= paths

    for path in sorted(paths):
        for metadata in ((), bearer("nonsense"), (("authorization", USER),)):
            status = outcome(channel, path, metadata)
            assert (status == "OK") if path in OPEN else (status == "UNAUTHENTICATED"), path
    for path in sorted(paths):
        refused = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
        assert outcome(channel, path, bearer(ADMIN)) not in refused, path
        if path in CONTROL | ROWS:
            assert outcome(channel, path, bearer(USER)) == "PERMISSION_DENIED"
        else:
            assert outcome(channel, path, bearer(USER)) not in refused, path
        if path in UNKNOWN:
            assert outcome(channel, path, bearer(USER)) == "UNIMPLEMENTED"


def test_server_without_tokens_lets_everybody_do_everything_but_load(listen, dial, rpc):
    channel = dial(listen(rpc))

    for path in sorted({*discover(channel).methods(), *UNKNOWN}):
        status = outcome(channel, path)
        assert (status == "PERMISSION_DENIED") is (path in CONTROL), path


def test_refused_call_is_not_read_nor_begun(listen, dial):
    fake = Fake()
    channel = dial(listen(fake, access=Access((USER,), ())))

    assert outcome(channel, INFER) == outcome(channel, STREAM) == "UNAUTHENTICATED"
    large = channel.unary_unary(INFER)
    assert refusal(lambda: large(bytes(1 << 20)))[0] is grpc.StatusCode.UNAUTHENTICATED

    assert fake.calls == []


# TLS


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


@pytest.fixture(scope="module")
def certify(tmp_path_factory):
    """Return a function that makes a certificate, signed by an authority of a name."""
    folder = tmp_path_factory.mktemp("certificates")
    authorities: dict[str, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]] = {}

    def make(subject, authority):
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, issuer_key = authorities[authority] if authority else (None, key)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
        now = datetime.now(UTC)
        hosts = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer.subject if issuer else name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
            .add_extension(hosts, False)
            .sign(issuer_key, hashes.SHA256())
        )
        return made, key

    def certify(subject: str, authority: str = "") -> Pair:
        if authority and authority not in authorities:
            certify(authority)
        made, key = make(subject, authority)
        if not authority:
            authorities[subject] = made, key
        pair = Pair(folder / f"{subject}.pem", folder / f"{subject}-key.pem")
        pair.cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair

    return certify


@pytest.fixture(scope="module")
def pairs(certify):
    """An authority, what it signed for a server and a client, and a stranger's client."""
    made = {"authority": certify("authority")}
    made |= {name: certify(name, "authority") for name in ("server", "client")}
    made["stranger"] = certify("stranger", "strangers")
    return made


def credentials(pairs, authority="authority", client=None):
    own = (pairs[client].key.read_bytes(), pairs[client].cert.read_bytes()) if client else ()
    return grpc.ssl_channel_credentials(pairs[authority].cert.read_bytes(), *own)


def unreachable(channel):
    return refusal(lambda: channel.unary_unary(LIVE)(b"", timeout=WAIT_S))[0] is (
        grpc.StatusCode.UNAVAILABLE
    )


@pytest.mark.only_grpcio("no TLS")
def test_tls_answers_who_trusts_its_authority_and_nobody_in_plain_text(listen, dial, pairs):
    server = pairs["server"]
    address = listen(Fake(), tls_cert=server.cert, tls_key=server.key)

    assert alive(dial(address, credentials(pairs)))
    assert unreachable(dial(address, credentials(pairs, "stranger")))
    assert unreachable(dial(address))


@pytest.mark.only_grpcio("no TLS")
def test_mutual_tls_answers_only_who_the_authority_has_signed(listen, dial, pairs):
    server = pairs["server"]
    address = listen(
        Fake(),
        tls_cert=server.cert,
        tls_key=server.key,
        tls_client_ca=pairs["authority"].cert,
    )

    assert alive(dial(address, credentials(pairs, client="client")))
    assert unreachable(dial(address, credentials(pairs)))
    assert unreachable(dial(address, credentials(pairs, client="stranger")))
    assert unreachable(dial(address))


@pytest.mark.only_grpcio("no TLS")
def test_token_is_wanted_over_tls_as_well(listen, dial, pairs):
    server = pairs["server"]
    address = listen(Fake(), tls_cert=server.cert, tls_key=server.key, access=Access((USER,), ()))
    channel = dial(address, credentials(pairs))

    assert outcome(channel, LIVE) == "UNAUTHENTICATED"
    assert outcome(channel, LIVE, bearer(USER)) == "OK"


@pytest.mark.only_grpcio("no TLS")
def test_certificate_of_another_key_is_refused(listen, pairs):
    with pytest.raises(AddressError, match="or the certificate does not fit its key; choose"):
        listen(Fake(), tls_cert=pairs["server"].cert, tls_key=pairs["client"].key)


@pytest.mark.only_grpcio("no TLS")
@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_client_ca"])
def test_file_of_tls_that_cannot_be_read_is_refused(listen, pairs, tmp_path, missing):
    files = {
        "tls_cert": pairs["server"].cert,
        "tls_key": pairs["server"].key,
        "tls_client_ca": pairs["authority"].cert,
    }

    with pytest.raises(SettingsError) as caught:
        listen(Fake(), **{**files, missing: tmp_path / "none"})

    assert str(caught.value) == f"{tmp_path / 'none'} cannot be read: No such file or directory"


# Limits


@pytest.mark.parametrize("times", [1, 3])
def test_path_that_is_no_text_ends_no_server(listen, dial, times):
    address = listen(Fake())
    assert alive(dial(address))

    for _ in range(times):
        with Http2(address) as client:
            client.call("/\xff", b"")
            client.read_to_the_end()
        live = dial(address).unary_unary(LIVE)
        assert live(b"", timeout=WAIT_S, wait_for_ready=True) == ALIVE
        assert health(dial(address)) == "SERVING"


def test_message_at_the_limit_is_taken_and_a_byte_more_is_refused_either_way(listen, dial):
    limit = 100_000
    fake = Fake(lambda call: call.answer(call.content * (2 if call.content[:1] == b"2" else 1)))
    infer = dial(listen(fake, max_message_bytes=limit)).unary_unary(INFER)

    assert len(infer(bytes(limit))) == limit
    assert refusal(lambda: infer(bytes(limit + 1))) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"SERVER: Received message larger than max ({limit + 1} vs. {limit})",
    )
    assert len(fake.calls) == 1
    assert len(infer(b"2" + bytes(limit // 2 - 1))) == limit
    code, text = refusal(lambda: infer(b"2" + bytes(limit // 2)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"({limit + 2} vs. {limit})" in text


@pytest.mark.only_grpcio("HTTP refuses too much metadata, which clients take for UNKNOWN")
def test_metadata_that_is_too_large_is_refused_and_the_next_call_is_answered(listen, dial):
    channel = dial(listen(Fake()))
    live = channel.unary_unary(LIVE)

    for size in (20_000, 1_000_000):
        code, _ = refusal(lambda size=size: live(b"", metadata=(("x", "y" * size),)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert live(b"", metadata=(("x", "y" * 4_000),)) == ALIVE


def test_compressed_request_is_understood(stub, infer, tiny):
    assert_answered(stub, infer, tiny, grpc.Compression.Gzip)


@pytest.mark.only_grpcio("it knows gzip alone")
def test_request_compressed_without_a_frame_is_understood(stub, infer, tiny):
    assert_answered(stub, infer, tiny, grpc.Compression.Deflate)


def assert_answered(stub, infer, tiny, compression):
    images = tiny.images(8)

    answer = stub.ModelInfer(infer(images), compression=compression)

    logits = np.frombuffer(answer.raw_output_contents[1], "<f4").reshape(-1, 3)
    np.testing.assert_array_equal(logits, tiny.logits(images))


def zeros(mebibytes, wbits):
    """Compress zeros, quickly: behind a full flush the same bytes unpack to the same zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    start = packer.compress(b"\x3a\xff\xff\xff\xff\x07") + packer.flush(zlib.Z_FULL_FLUSH)
    one = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + one * mebibytes + packer.flush()


def resident_mib(pid, field):
    status = Path(f"/proc/{pid}/status").read_text()
    (found,) = [line.split()[1] for line in status.splitlines() if line.startswith(field)]
    return int(found) / 1024


@pytest.mark.only_grpcio("it inflates before it looks")
@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15)])
def test_bomb_is_not_unpacked_beyond_the_limit_of_a_message(
    make_bundle, start_server, dial, encoding, wbits
):
    server = start_server(
        *("--repository", str(make_bundle().parents[1]), "--address", "127.0.0.1:0"),
        *("--max-batch-rows", "8", "--max-message-mib", "16"),
    )
    address = server.address()
    bomb = zeros(2048, wbits)
    assert len(bomb) < 5 << 20
    before = resident_mib(server.popen.pid, "VmHWM")

    for _ in range(3):
        with Http2(address) as client:
            client.call(INFER, bomb, compressed=True, encoding=encoding)
            refused = client.read_until(HEADERS)
        assert b"grpc-status\x018" in refused  # RESOURCE_EXHAUSTED
        assert b"Decompressed message larger than max" in refused

    assert resident_mib(server.popen.pid, "VmHWM") - before < 150
    assert alive(dial(address))


@pytest.mark.only_grpcio("connections have no age")
def test_old_connection_is_ended_and_no_call_is_lost(listen, dial):
    fake = Fake(lambda call: call.answer(b""))
    infer = dial(listen(fake, max_connection_age_s=1)).unary_unary(INFER)

    peers: set[str] = set()
    while len(peers) < 4:
        infer(b"", timeout=WAIT_S)
        peers.add(fake.calls[-1].peer)


def test_connection_has_no_age_unless_it_is_told_to():
    plain = dict(Transport(address="x:0", max_message_bytes=1).options())
    aged = dict(Transport(address="x:0", max_message_bytes=1, max_connection_age_s=2.5).options())

    assert "grpc.max_connection_age_ms" not in plain
    assert aged["grpc.max_connection_age_ms"] == 2500
    assert aged["grpc.max_connection_age_grace_ms"] == 2500


@pytest.mark.parametrize("shared", [False, True])
def test_port_is_shared_only_if_it_is_told_to_be(listen, shared):
    taken = listen(Fake(), shared_port=shared)

    if shared:
        assert listen(Fake(), address=taken, shared_port=True) == taken
    else:
        with pytest.raises(AddressError):
            listen(Fake(), address=taken)


@pytest.mark.slow
@pytest.mark.parametrize("idle", [True, False])
def test_client_that_keeps_its_connection_alive_is_not_punished(listen, dial, idle):
    channel = dial(
        listen(Fake()),
        options=(
            ("grpc.keepalive_time_ms", 6_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ),
    )
    states: list[grpc.ChannelConnectivity] = []
    assert alive(channel)
    channel.subscribe(states.append)
    watching = [] if idle else [watch(channel)]
    assert [next(one) for one in watching] == ["SERVING"] * len(watching)

    time.sleep(26)  # four pings; the third was punished

    assert set(states) == {grpc.ChannelConnectivity.READY}
    assert alive(channel)
