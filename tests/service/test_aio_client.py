import asyncio
import inspect
import threading

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from service.aio_client import AsyncClient
from service.asking import PARTS_IN_FLIGHT, Asker
from service.client import Client
from service.errors import ServerError

NOBODY = "127.0.0.1:1"
CODE = grpc.StatusCode


@pytest.fixture
def run(loop):
    """Return a function that runs a coroutine in the one event loop."""
    return lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(60)


class Model:
    """The tiny model on a real server; may be held, and refuses a row of nothing but 13."""

    def __init__(self, tiny):
        self._tiny = tiny
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Semaphore(0)
        self.ended = threading.Event()  # a call was, by us or by its caller
        self.inside = self.most = 0
        self.rows: list[int] = []
        self.peers: list[str] = []
        self.tokens: list[object] = []

    def hold(self):
        self._open.clear()

    def open(self):
        self._open.set()

    async def arrival(self):
        """Wait until another ModelInfer has come."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)

    def about(self, request, context):
        response = pb.ModelMetadataResponse(name=request.name, properties={"max_batch_rows": "8"})
        response.inputs.add(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])
        return response

    def infer(self, request, context):
        context.add_callback(self.ended.set)
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.release()
        self._open.wait(30)
        self.inside -= 1
        self.peers.append(context.peer())
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        tensor, raw = request.inputs[0], request.raw_input_contents[0]
        self.rows.append(tensor.shape[0])
        if tensor.datatype == "BYTES":
            raw = b"".join(raw[start + 4 : start + 8] for start in range(0, len(raw), 8))
        pixels = np.frombuffer(raw, np.uint8).reshape(-1, 4)
        if (pixels == 13).all(axis=1).any():
            context.abort(CODE.INVALID_ARGUMENT, "13 is not lucky")
        logits = self._tiny.logits(pixels)
        response = pb.ModelInferResponse(model_name="tiny", model_version="1")
        response.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        response.raw_output_contents.append(logits.tobytes())
        return response


@pytest.fixture
def model(tiny):
    model = Model(tiny)
    yield model
    model.open()


@pytest.fixture
def serve(serve, model):
    """Return a function that serves the model, and other methods, and returns its address."""
    own = {"ModelMetadata": model.about, "ModelInfer": model.infer}
    return lambda **methods: serve(**own | methods)


async def refusal(work):
    with pytest.raises(ServerError) as caught:
        await work
    return caught.value.code, str(caught.value)


async def queued(client, callers):
    """Wait until so many callers wait to be joined; the model is held, so that none leaves."""
    waiting = client._wire._queue._waiting
    async with asyncio.timeout(30):
        while sum(map(len, waiting.values())) != callers:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0)


def test_both_clients_have_the_same_methods_and_options():
    asked = {name for name in vars(Asker) if not name.startswith("_")}

    assert asked | {"close"} == {name for name in vars(Client) if not name.startswith("_")}
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    for name in asked:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(Asker, name))


@pytest.mark.parametrize("rows", [1, 8, 9, 25, 100])
def test_images_of_any_number_are_answered_in_their_order(run, serve, model, tiny, rows):
    async def ask():
        async with AsyncClient(serve()) as client:
            return await client.predict(tiny.images(rows), model="tiny")

    answer = run(ask())

    np.testing.assert_array_equal(answer.logits, tiny.logits(tiny.images(rows)))
    assert sorted(model.rows, reverse=True) == [8] * (rows // 8) + [rows % 8] * (rows % 8 > 0)


def test_parts_are_in_flight_together_and_not_too_many(run, serve, model, tiny):
    async def ask():
        async with AsyncClient(serve()) as client:
            await client.predict(tiny.images(1), model="tiny")
            await model.arrival()
            model.hold()
            asked = asyncio.ensure_future(client.predict(tiny.images(8 * 10), model="tiny"))
            await model.arrival()
            first_alone = model.most == 1
            model.open()
            await asked
            return first_alone

    assert run(ask())
    assert model.most <= PARTS_IN_FLIGHT


def test_pictures_are_sent_as_they_are(run, serve, tiny, tmp_path):
    images = tiny.images(3)
    (tmp_path / "0.png").write_bytes(images[0].tobytes())

    async def ask():
        async with AsyncClient(serve()) as client:
            files = [tmp_path / "0.png", images[1].tobytes(), images[2].tobytes()]
            return await client.predict_pictures(files, model="tiny")

    np.testing.assert_array_equal(run(ask()).logits, tiny.logits(images))


def test_refusals_are_the_sentences_of_the_other_client(run, serve, tiny):
    async def ask():
        async with AsyncClient(NOBODY) as client:
            assert await refusal(client.models()) == (
                "UNAVAILABLE",
                f"no server answers at {NOBODY}; start one with: "
                "serve-export serve --repository models",
            )
        async with AsyncClient(serve(), max_message_mib=1) as client:
            assert (await refusal(client.models()))[0] == "UNIMPLEMENTED"
            code, sentence = await refusal(client.metadata("n" * (1 << 20)))
            assert code == "RESOURCE_EXHAUSTED"
            assert sentence.endswith("or raise max_message_mib of the client")
            with pytest.raises(ValueError, match="images is float64, tiny takes uint8"):
                await client.predict(np.zeros((1, 2, 2, 1)), model="tiny")

    run(ask())


def test_call_that_takes_too_long_ends_with_its_deadline_alone_or_joined(run, serve, model, tiny):
    async def ask(coalesce_rows):
        address = serve()
        async with AsyncClient(address, coalesce_rows=coalesce_rows) as client:
            assert await refusal(client.predict(tiny.images(1), model="tiny", timeout_s=0.2)) == (
                "DEADLINE_EXCEEDED",
                f"{address} did not answer in time; it may be busy, or need a longer timeout_s",
            )

    model.hold()
    run(ask(0))
    run(ask(8))


def test_unavailable_server_is_asked_again(run, serve):
    attempts = []

    def ready(request, context):
        attempts.append(request)
        if len(attempts) < 3:
            context.set_trailing_metadata([("grpc-retry-pushback-ms", "1")])
            context.abort(CODE.UNAVAILABLE, "Exceeds maximum queue size")
        return pb.ServerReadyResponse(ready=len(attempts) > 3)

    async def ask():
        async with AsyncClient(serve(ServerReady=ready)) as client:
            await client.wait_ready(30)  # not ready at first, and asked after a while

    run(ask())
    assert len(attempts) == 4


def test_requests_take_the_connections_in_turn_with_the_token(run, serve, model, tiny):
    async def ask():
        async with AsyncClient(serve(), channels=3, token="a.b-c") as client:
            for _ in range(9):
                await client.predict(tiny.images(1), model="tiny")

    run(ask())
    assert len(set(model.peers)) == 3
    assert set(model.tokens) == {"Bearer a.b-c"}


def test_calls_that_come_while_one_is_in_flight_are_joined(run, serve, model, tiny):
    images = [tiny.images(rows, seed=rows) for rows in (1, 2, 3, 4, 5)]

    async def ask():
        async with AsyncClient(serve(), coalesce_rows=6) as client:
            model.hold()
            asked = [asyncio.ensure_future(client.predict(images[0], model="tiny"))]
            await model.arrival()  # a lone call is sent at once
            for later in images[1:]:
                asked.append(asyncio.ensure_future(client.predict(later, model="tiny")))
                await queued(client, len(asked) - 1)
            model.open()
            return await asyncio.gather(*asked)

    answers = run(ask())

    assert model.rows == [1, 5, 4, 5]  # 2 and 3 together; no more than six
    for answer, asked in zip(answers, images, strict=True):
        np.testing.assert_array_equal(answer.logits, tiny.logits(asked))


def test_call_that_spoils_a_joined_request_is_refused_alone(run, serve, model, tiny):
    good, bad = np.full((1, 2, 2, 1), 7, np.uint8), np.full((1, 2, 2, 1), 13, np.uint8)

    async def ask():
        async with AsyncClient(serve(), coalesce_rows=8) as client:
            model.hold()
            first = asyncio.ensure_future(client.predict(good, model="tiny"))
            await model.arrival()
            others = [
                asyncio.ensure_future(client.predict(one, model="tiny")) for one in (good, bad)
            ]
            await queued(client, 2)
            model.open()
            assert await refusal(others[1]) == ("INVALID_ARGUMENT", "13 is not lucky")
            return [await first, await others[0]]

    for answer in run(ask()):
        np.testing.assert_array_equal(answer.logits, tiny.logits(good))


def test_caller_that_gives_up_is_left_out_and_the_others_are_answered(run, serve, model, tiny):
    async def ask():
        async with AsyncClient(serve(), coalesce_rows=8) as client:
            model.hold()
            first = asyncio.ensure_future(client.predict(tiny.images(1), model="tiny"))
            await model.arrival()
            others = [
                asyncio.ensure_future(client.predict(tiny.images(rows), model="tiny"))
                for rows in (2, 3)
            ]
            await queued(client, 2)
            others[0].cancel()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await others[0]
            model.open()
            return await others[1]

    np.testing.assert_array_equal(run(ask()).logits, tiny.logits(tiny.images(3)))
    assert model.rows == [1, 3]


def test_caller_that_gives_up_ends_its_request(run, serve, model, tiny):
    async def ask():
        async with AsyncClient(serve()) as client:
            model.hold()
            asked = asyncio.ensure_future(client.predict(tiny.images(1), model="tiny"))
            await model.arrival()
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert await asyncio.to_thread(model.ended.wait, 30)

    run(ask())


@pytest.mark.parametrize("coalesce_rows", [0, 8])
def test_client_that_is_closed_answers_all_who_wait_and_asks_nothing(
    run, serve, model, tiny, coalesce_rows
):
    async def ask():
        client = AsyncClient(serve(), coalesce_rows=coalesce_rows)
        model.hold()
        asked = [
            asyncio.ensure_future(client.predict(tiny.images(1), model="tiny")) for _ in range(3)
        ]
        for _ in asked if not coalesce_rows else asked[:1]:
            await model.arrival()
        await queued(client, 2 if coalesce_rows else 0)
        await client.close()
        for one in asked:
            assert (await refusal(one))[0] == "CANCELLED"
        with pytest.raises(ValueError, match="closed"):
            await client.models()

    run(ask())


@pytest.mark.parametrize("coalesce_rows", [0, 1, 7])
def test_every_caller_gets_the_answers_to_its_own_rows(run, serve, model, tiny, coalesce_rows):
    sizes = np.random.default_rng(coalesce_rows).integers(1, 20, 200)

    async def ask_one(client, number, rows):
        images = tiny.images(rows, seed=number)
        answer = await client.predict(images, model="tiny")
        np.testing.assert_array_equal(answer.logits, tiny.logits(images))

    async def ask():
        async with AsyncClient(serve(), coalesce_rows=coalesce_rows, channels=2) as client:
            await asyncio.gather(
                *(ask_one(client, number, rows) for number, rows in enumerate(sizes.tolist()))
            )

    run(ask())
    assert sum(model.rows) == sizes.sum()
    assert max(model.rows) <= 8
