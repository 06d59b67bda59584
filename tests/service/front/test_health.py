import asyncio

import pytest

from service.front.health import Health


def run(test):
    """Run a coroutine function as a test, with its own Health."""
    asyncio.run(asyncio.wait_for(test(Health()), 30))


async def told(watch, states=1):
    return [await anext(watch) for _ in range(states)]


def test_nothing_is_known_before_it_is_shown():
    assert Health().services() == {}


def test_service_is_shown_and_one_that_is_left_out_later_is_not_serving():
    health = Health()

    health.show({"a": True, "b": False})
    health.show({"c": True})

    assert health.services() == {"a": False, "b": False, "c": True}


def test_stopped_server_serves_nothing_for_good():
    health = Health()
    health.show({"a": True, "b": True})

    health.stop()
    health.show({"a": True, "c": True})

    assert health.services() == {"a": False, "b": False}


def test_watcher_is_told_what_is_and_what_changes_and_nothing_twice():
    async def test(health):
        health.show({"a": True})
        watch = health.watch("a")
        assert await told(watch) == [True]

        health.show({"a": True, "b": True})
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        health.show({"a": False})
        assert await waiting is False
        health.show({"a": True})
        assert await told(watch) == [True]

    run(test)


def test_watcher_of_what_is_not_there_yet_is_told_when_it_comes():
    async def test(health):
        watch = health.watch("a")
        assert await told(watch) == [None]
        health.show({"a": True})
        assert await told(watch) == [True]

    run(test)


def test_watcher_that_does_not_read_keeps_nobody_waiting():
    async def test(health):
        health.show({"a": True})
        slow, quick = health.watch("a"), health.watch("a")
        assert await told(slow) == await told(quick) == [True]

        for serving in (False, True, False):  # none of which the slow one reads
            health.show({"a": serving})
            assert await told(quick) == [serving]
        health.stop()

        assert await told(slow) == [False]

    run(test)


@pytest.mark.parametrize("reads", [0, 1])
def test_closing_ends_every_watch(reads):
    async def test(health):
        watches = [health.watch("a"), health.watch("b")]
        for watch in watches:
            await told(watch, reads)
        waiting = [asyncio.ensure_future(anext(watch, "end")) for watch in watches]
        await asyncio.sleep(0)

        health.close()

        ends = await asyncio.gather(*waiting)
        assert ends == ["end"] * 2 if reads else set(ends) <= {None, "end"}
        assert [await anext(watch, "end") for watch in watches] == ["end"] * 2

    run(test)


def test_watch_that_is_left_is_forgotten():
    async def test(health):
        watch = health.watch("a")
        await told(watch)
        await watch.aclose()
        health.show({"a": True})
        assert not health._watchers

    run(test)
