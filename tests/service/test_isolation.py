"""Whatever is asked beside it, a request gets the model's answer to its own rows, or its refusal.

Raw bytes over a real server process; what the tiny model answers is worked out in numpy.
"""

import asyncio
import random
import struct
from collections import Counter
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2, inference_pb2_grpc

METHOD = "/inference.GRPCInferenceService/ModelInfer"
MAX_BATCH_ROWS = 48
IN_FLIGHT = 320
WAIT_S = 300.0
FRONTS = ("grpcio", "native")
HURRIED_S = 0.04
FORGOTTEN_S = 60.0
MAX_FORGOTTEN = 20
PUSHBACK = "grpc-retry-pushback-ms"
TOO_MANY = "too_many_resets"
# What is done with a request, and how often.
KINDS = {
    "plain": 84,
    "cancelled": 5,
    "hurried": 5,
    "oversize": 2,
    "cut": 2,  # the message ends too soon
    "short": 1,  # the tensor does
    "unknown": 1,
}
REFUSED = {
    "oversize": (grpc.StatusCode.INVALID_ARGUMENT, "batch-size must be <= 48"),
    "cut": (grpc.StatusCode.INVALID_ARGUMENT, "is not a message of"),
    "short": (grpc.StatusCode.INVALID_ARGUMENT, "input byte size mismatch"),
    "unknown": (grpc.StatusCode.NOT_FOUND, "'nobody' is not found"),
}
LEFT = {
    "hurried": {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE},
    "cancelled": {grpc.StatusCode.CANCELLED},
}


class Asker:
    """Asks a server, each request a payload that no other has, and holds it to the model."""

    def __init__(self, tiny, requests: int, *, native: bool) -> None:
        self.tiny = tiny
        self.native = native
        self.lost = 0  # with their connection, which is ended where too many calls are cancelled
        # gRPC's client now and then never ends a call whose deadline passes while it connects.
        self.forgotten = 0
        self.numbers = iter(range(requests))
        self.rng = random.Random(11)
        self.outcomes: Counter[tuple[str, grpc.StatusCode]] = Counter()
        self.wrong: list[str] = []

    async def run(self, address: str) -> inference_pb2.ModelStatistics:
        # With the last channel gone it would wait for such a call for ever, and hang the process.
        grpc.aio.init_grpc_aio()
        async with grpc.aio.insecure_channel(address) as channel:
            self.infer: Any = channel.unary_unary(METHOD)
            await asyncio.gather(*(self.work() for _ in range(IN_FLIGHT)))
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            answer = await stub.ModelStatistics(inference_pb2.ModelStatisticsRequest(name="tiny"))
            return answer.model_stats[0]

    async def work(self) -> None:
        for number in self.numbers:
            (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
            await self.ask(number, kind)

    async def ask(self, number: int, kind: str) -> None:
        images = self.images(number, kind)
        call = self.infer(
            self.content(number, kind, images),
            timeout=self.rng.random() * HURRIED_S if kind == "hurried" else WAIT_S,
        )
        if kind == "cancelled":
            await asyncio.sleep(self.rng.random() * HURRIED_S)
            call.cancel()
        try:
            code = await asyncio.wait_for(call.code(), FORGOTTEN_S + WAIT_S * (kind != "hurried"))
        except TimeoutError:
            self.forgotten += 1
            return
        self.outcomes[kind, code] += 1
        if code is grpc.StatusCode.OK:
            fault = self.answer_fault(number, images, await call)
        else:
            fault = self.refusal_fault(
                number, kind, code, await call.details(), await call.trailing_metadata()
            )
        if fault:
            self.wrong.append(f"{number}, {kind}: {fault}")

    def images(self, number: int, kind: str):
        rows = self.rng.randint(1, MAX_BATCH_ROWS)
        if kind == "oversize":
            rows += MAX_BATCH_ROWS
        content = struct.pack("<I", number) + self.rng.randbytes(4 * (rows - 1))
        return np.frombuffer(content, np.uint8).reshape(rows, *self.tiny.shape)

    def content(self, number: int, kind: str, images) -> bytes:
        pixels = images.tobytes()
        request = inference_pb2.ModelInferRequest(
            model_name="nobody" if kind == "unknown" else "tiny",
            id=str(number),
            raw_input_contents=[pixels[:-1] if kind == "short" else pixels],
        )
        request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
        request.outputs.add(name="logits")
        content = request.SerializeToString()
        return content[:-2] if kind == "cut" else content

    def answer_fault(self, number: int, images, content: bytes) -> str:
        response = inference_pb2.ModelInferResponse.FromString(content)
        if response.id != str(number):
            return f"answered with the id {response.id!r}"
        if tuple(response.outputs[0].shape) != (len(images), 3):
            return f"answered with the shape {response.outputs[0].shape}"
        if response.raw_output_contents[0] != self.tiny.logits(images).tobytes():
            return "answered with what is not the model's answer to it"
        return ""

    def refusal_fault(self, number: int, kind: str, code, details: str, trailers) -> str:
        if self.native and code is grpc.StatusCode.UNAVAILABLE and TOO_MANY in details:
            self.lost += 1
            return ""
        if kind in LEFT:
            if code not in LEFT[kind]:
                return f"{code}: {details}"
            overloaded = code is grpc.StatusCode.UNAVAILABLE and not self.native
            return "no word when to come again" if overloaded and PUSHBACK not in trailers else ""
        if kind not in REFUSED:
            return f"{code}: {details}"
        expected, phrase = REFUSED[kind]
        named = kind == "cut" or details.startswith(f"[request id: {number}] ")
        return "" if code is expected and phrase in details and named else f"{code}: {details}"


@pytest.mark.parametrize(
    "requests", [pytest.param(5_000), pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_every_request_gets_the_answer_to_its_own_rows(
    make_bundle, start_server, front_kind, tiny, loop, requests
):
    server = start_server(
        *("--repository", str(make_bundle().parents[1]), "--address", "127.0.0.1:0"),
        *("--max-batch-rows", str(MAX_BATCH_ROWS), "--max-queue-rows", "100000"),
    )
    asker = Asker(tiny, requests, native=front_kind == "native")

    counted = asyncio.run_coroutine_threadsafe(asker.run(server.address()), loop).result()

    assert asker.wrong == []
    assert asker.lost < requests / 20
    assert asker.forgotten <= MAX_FORGOTTEN
    assert sum(asker.outcomes.values()) == requests - asker.forgotten
    answered = Counter(code for _, code in asker.outcomes.elements())[grpc.StatusCode.OK]
    assert {kind for kind, _ in asker.outcomes} == set(KINDS)
    assert asker.outcomes["hurried", grpc.StatusCode.DEADLINE_EXCEEDED]
    assert asker.outcomes["cancelled", grpc.StatusCode.CANCELLED]
    assert counted.inference_stats.success.count >= answered > requests // 2
    assert counted.execution_count < counted.inference_stats.success.count  # they were joined
    server.popen.terminate()
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()
