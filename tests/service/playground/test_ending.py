import asyncio
from contextlib import aclosing

import pytest

from service.playground.ending import until
from service.playground.errors import PlaygroundError


async def collect(stopped, messages):
    async with aclosing(until(stopped, messages)) as found:
        return [one async for one in found]


def test_everything_is_given_while_nobody_stops():
    async def messages():
        yield 1
        yield 2

    async def run():
        return await collect(asyncio.Event(), messages())

    assert asyncio.run(run()) == [1, 2]


def test_what_goes_wrong_is_raised_after_what_went_well():
    async def messages():
        yield 1
        raise PlaygroundError("no more")

    async def run():
        found = until(asyncio.Event(), messages())
        assert await anext(found) == 1
        await anext(found)

    with pytest.raises(PlaygroundError, match="no more"):
        asyncio.run(run())


def test_a_wait_ends_once_it_is_to_stop_and_its_messages_are_closed():
    stopped, closed = asyncio.Event(), asyncio.Event()

    async def messages():
        try:
            yield 1
            stopped.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed.set()

    async def run():
        found = await collect(stopped, messages())
        async with asyncio.timeout(30):
            await closed.wait()
        return found

    assert asyncio.run(run()) == [1]


def test_what_was_begun_is_ended_undisturbed_however_often_its_asker_is_cancelled():
    begun, closed = asyncio.Event(), asyncio.Event()

    async def messages():
        try:
            begun.set()
            await asyncio.Event().wait()
            yield 1
        finally:
            for _ in range(9):
                await asyncio.sleep(0)
            closed.set()

    async def run():
        asker = asyncio.create_task(collect(asyncio.Event(), messages()))
        await begun.wait()
        while not asker.done():
            asker.cancel()
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await closed.wait()

    asyncio.run(run())
