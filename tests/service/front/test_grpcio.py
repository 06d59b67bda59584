import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc, parity_pb2, parity_pb2_grpc
from service.errors import AddressError
from service.front.grpcio import CODES, MAX_MESSAGE_BYTES, GrpcioFront
from service.rpc import SERVICES, CallError, Rpc, Status

LARGE = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@pytest.fixture
def stub(listen, rpc):
    """The inference service of a real server in this process."""
    with grpc.insecure_channel(listen(rpc), options=LARGE) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


class Fake:
    """An Rpc whose one method does what the test says."""

    def __init__(self, call, *, computes=True):
        self.methods = {
            f"/{SERVICES[0]}/ModelInfer": SimpleNamespace(computes=computes),
            f"/{SERVICES[0]}/ServerLive": SimpleNamespace(computes=False),
        }
        self._call = call

    def call(self, path, content):
        return self._call(content) if path.endswith("ModelInfer") else b""


def raw(channel, method="ModelInfer"):
    return channel.unary_unary(f"/{SERVICES[0]}/{method}")


def health(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    answer = health_pb2_grpc.HealthStub(channel).Check(request)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_every_status_is_one_of_grpcs():
    assert {CODES[status].name for status in Status} == {status.name for status in Status}


def test_generated_stubs_are_answered(stub, listen, rpc, infer, tiny):
    assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(inference_pb2.ServerReadyRequest()).ready
    answer = stub.ModelInfer(infer(tiny.images(2)))
    assert answer.outputs[1].shape == [2, 3]
    with grpc.insecure_channel(listen(rpc)) as channel:
        parity = parity_pb2_grpc.ParityServiceStub(channel)
        assert len(parity.GetParity(parity_pb2.GetParityRequest()).versions) == 1


def test_refusal_carries_its_status_and_message(stub, infer, tiny):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer(tiny.images(1), model_name="none", id="call-ä"))

    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == (
        "[request id: call-ä] Request for unknown model: 'none' is not found"
    )


def test_rpc_that_is_not_served_is_unimplemented(listen, rpc):
    with grpc.insecure_channel(listen(rpc)) as channel:
        for method in ("ModelConfig", "Nonsense"):
            with pytest.raises(grpc.RpcError) as caught:
                raw(channel, method)(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_message_that_is_longer_than_the_limit_is_refused(stub):
    request = inference_pb2.ModelInferRequest(
        model_name="none", raw_input_contents=[bytes(MAX_MESSAGE_BYTES - 40)]
    )
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    request.raw_input_contents[0] = bytes(MAX_MESSAGE_BYTES + 1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_status_reaches_the_client_from_both_kinds_of_methods(listen):
    for computes in (True, False):
        for status in Status:

            def refuse(content, status=status):
                raise CallError(status, f"refused as {status.name}")

            address = listen(Fake(refuse, computes=computes))
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                raw(channel)(b"")
            assert caught.value.code() == CODES[status]
            assert caught.value.details() == f"refused as {status.name}"


def test_health_is_not_serving_until_it_is_said_to_be(listen, rpc):
    with grpc.insecure_channel(listen(rpc, serving=False)) as channel:
        assert {health(channel, service) for service in ("", *SERVICES)} == {"NOT_SERVING"}
    with grpc.insecure_channel(listen(rpc)) as channel:
        assert {health(channel, service) for service in ("", *SERVICES)} == {"SERVING"}


def test_health_of_an_unknown_service_is_not_found(listen, rpc):
    with grpc.insecure_channel(listen(rpc)) as channel, pytest.raises(grpc.RpcError) as caught:
        health(channel, "nonsense")

    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_address_that_is_taken_or_foreign_is_refused(listen, rpc):
    taken = listen(rpc)

    for address in (taken, "192.0.2.1:0", "nonsense"):
        with pytest.raises(AddressError) as caught:
            listen(rpc_of_nobody(), address=address)
        assert str(caught.value) == (
            f"cannot listen on {address}: it is in use, or not an address of this machine; "
            "choose another with --address HOST:PORT (port 0 takes a free one)"
        )


def rpc_of_nobody() -> Any:
    return Fake(lambda content: content)


def test_other_calls_are_answered_while_the_model_runs(listen):
    begun, done = threading.Event(), threading.Event()

    def compute(content):
        begun.set()
        assert done.wait(30)
        return content

    with grpc.insecure_channel(listen(Fake(compute))) as channel:
        running = raw(channel).future(b"abc", timeout=30)
        assert begun.wait(30)
        assert raw(channel, "ServerLive")(b"", timeout=30) == b""
        assert health(channel) == "SERVING"
        assert not running.done()
        done.set()
        assert running.result(30) == b"abc"


def test_stop_lets_a_call_in_flight_finish_and_refuses_new_ones(listen, loop):
    begun, done = threading.Event(), threading.Event()

    def compute(content):
        begun.set()
        assert done.wait(30)
        return content

    fake: Any = Fake(compute)

    async def start():
        front = GrpcioFront(fake, model_threads=1)
        return front, await front.start("127.0.0.1:0")

    front, address = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    with grpc.insecure_channel(address) as channel:
        running = raw(channel).future(b"abc", timeout=30)
        assert begun.wait(30)
        stopping = asyncio.run_coroutine_threadsafe(front.stop(30), loop)
        with grpc.insecure_channel(address) as other, pytest.raises(grpc.RpcError) as caught:
            while True:  # until the stop has come through
                raw(other, "ServerLive")(b"", timeout=30)
        # gRPC's core cancels what arrives in the very moment of the stop.
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert not running.done()
        done.set()
        assert running.result(30) == b"abc"
        stopping.result(30)


def test_front_that_was_never_started_can_be_stopped(loop):
    async def stop():
        await GrpcioFront(rpc_of_nobody(), model_threads=1).stop(0)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(30)


@pytest.mark.parametrize("field", ["id", "model_name", "model_version"])
def test_refusal_of_a_request_with_a_very_long_text_keeps_its_status(stub, infer, tiny, field):
    request = infer(tiny.images(1), **{"model_name": "none", field: "\U0001f642" * 100_000})

    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)

    assert caught.value.code().name in ("NOT_FOUND", "INVALID_ARGUMENT")


def test_each_of_thousands_of_concurrent_requests_gets_its_own_answer(
    make_bundle, load, listen, infer, tiny
):
    address = listen(Rpc(load(make_bundle(), max_batch_rows=16)))
    requests, window = 2000, 50

    def ask(worker):
        wrong = []
        with grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            seeds = range(worker, requests, 4)
            for start in range(0, len(seeds), window):
                calls = []
                for seed in seeds[start : start + window]:
                    images = tiny.images(1 + seed % 16, seed)
                    request = infer(images, id=str(seed))
                    if seed % 3 == 0:
                        request.outputs.add(name="logits")
                    calls.append((seed, images, stub.ModelInfer.future(request, timeout=60)))
                wrong += [seed for seed, images, call in calls if not right(seed, images, call)]
        return wrong

    def right(seed, images, call):
        answer = call.result()
        place = [output.name for output in answer.outputs].index("logits")
        logits = np.frombuffer(answer.raw_output_contents[place], "<f4").reshape(-1, 3)
        return answer.id == str(seed) and np.array_equal(logits, tiny.logits(images))

    with ThreadPoolExecutor(4) as threads:
        assert [wrong for part in threads.map(ask, range(4)) for wrong in part] == []
