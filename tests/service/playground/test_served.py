import asyncio

import numpy as np
import pytest

from protos import inference_pb2 as pb
from service.aio_client import AsyncClient
from service.errors import ServerError
from service.playground import served
from service.playground.errors import PlaygroundError

PIXELS = np.array([[[10], [20]], [[30], [40]]], np.uint8)


def about(shape=(-1, 28, 28, 1), datatype="UINT8"):
    response = pb.ModelMetadataResponse(name="tiny")
    response.inputs.add(name="image", datatype=datatype, shape=shape)
    return response


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        (about(), True),
        (about((-1, 224, 96, 3)), True),
        (about((-1, 28, 28, 2)), False),
        (about((-1, -1, -1, 3)), False),
        (about((-1, 28, 28)), False),
        (about(datatype="FP32"), False),
        (pb.ModelMetadataResponse(), False),
    ],
)
def test_only_pictures_of_one_size_are_taken(found, fits):
    assert served.takes_pictures(found) == fits


def run(loop, make):
    return asyncio.run_coroutine_threadsafe(make(), loop).result(60)


def test_an_answer_comes_with_where_its_time_went(loop, rpc, listen, tiny):
    address = listen(rpc)

    async def main():
        async with AsyncClient(address) as client:
            await served.metadata(client, "tiny", "")
            return await served.ask(client, PIXELS, model="tiny", version="")

    answer, latency = run(loop, main)

    assert answer.logits.tolist() == tiny.logits(PIXELS[np.newaxis]).tolist()
    assert latency.requests == 1
    assert 0 < latency.compute_ms < latency.total_ms
    assert 0 <= latency.queue_ms < latency.total_ms


def test_a_server_without_statistics_says_nothing_of_the_time(loop, serve, model):
    address = serve(**model.methods())

    async def main():
        async with AsyncClient(address) as client:
            return await served.ask(client, PIXELS, model="tiny", version="")

    _, latency = run(loop, main)

    assert latency.requests == 0
    assert latency.total_ms > 0


@pytest.mark.parametrize("counted", [0, 2])
def test_time_is_the_mean_of_what_was_counted_meanwhile(loop, serve, model, counted):
    turns = iter((5, 5 + counted))

    def statistics(request, context):
        response = pb.ModelStatisticsResponse()
        one = response.model_stats.add(name="tiny", version="1").inference_stats
        one.success.count = next(turns)
        one.queue.ns, one.compute_infer.ns = 2_000_000 * one.success.count, one.success.count
        return response

    address = serve(**model.methods(), ModelStatistics=statistics)

    async def main():
        async with AsyncClient(address) as client:
            return await served.ask(client, PIXELS, model="tiny", version="")

    _, latency = run(loop, main)

    assert latency.requests == counted
    assert latency.queue_ms == (2 if counted else 0)


def test_what_a_server_refuses_is_not_taken_for_missing_statistics(loop, serve, model, refusing):
    address = serve(**model.methods(), ModelStatistics=refusing(None))

    async def main():
        async with AsyncClient(address) as client:
            await served.ask(client, PIXELS, model="tiny", version="")

    with pytest.raises(ServerError, match="Exceeds maximum queue size"):
        run(loop, main)


def test_a_model_that_takes_no_pictures_is_named(
    loop, make_generic_bundle, open_repository, listen
):
    from service.rpc import Rpc

    address = listen(Rpc(open_repository(make_generic_bundle().parents[1])))

    async def main():
        async with AsyncClient(address) as client:
            await served.metadata(client, "line", "")

    with pytest.raises(
        PlaygroundError, match=r"line takes FP32 of shape \[-1\], the page has pict"
    ):
        run(loop, main)


def test_a_model_that_gives_no_classes_is_named(loop, serve, model):
    address = serve(**model.methods())

    async def main():
        async with AsyncClient(address) as client:
            await served.metadata(client, "tiny", "")

    with pytest.raises(PlaygroundError, match="the page shows probabilities of classes"):
        run(loop, main)
