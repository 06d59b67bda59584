import asyncio
import socket
import time

import pytest

from service.front import idle


@pytest.fixture
def loop():
    loop = idle.Loop()
    yield loop
    loop.close()


def after(loop, rounds, then):
    """Call back after that many rounds in which the loop does nothing else."""
    loop.call_soon(after, loop, rounds - 1, then) if rounds else then()


@pytest.mark.parametrize("patient", [False, True])
def test_callback_waits_for_all_that_the_loop_has_to_do(loop, patient, monkeypatch):
    monkeypatch.setattr(idle, "LATEST_S", 30)
    done: list[str] = []

    async def main():
        loop.when_idle(lambda: done.append("idle"), patient=patient)
        after(loop, 3, lambda: done.append("busy"))
        while len(done) < 2:  # noqa: ASYNC110  an event would wake the loop
            await asyncio.sleep(0.01)

    loop.run_until_complete(asyncio.wait_for(main(), 30))

    assert done == ["busy", "idle"]


@pytest.mark.parametrize("patient", [False, True])
def test_callback_comes_before_the_loop_sleeps(loop, patient):
    called = loop.create_future()
    loop.when_idle(lambda: called.set_result(None), patient=patient)

    async def main():
        await called  # nothing else would wake the loop

    loop.run_until_complete(asyncio.wait_for(main(), 30))


def test_callback_comes_after_what_a_socket_brings_meanwhile(loop, monkeypatch):
    monkeypatch.setattr(idle, "LATEST_S", 30)
    ours, theirs = socket.socketpair()
    done: list[object] = []

    async def main():
        loop.add_reader(ours, lambda: done.append(ours.recv(1)))
        loop.when_idle(lambda: done.append("idle"), patient=True)
        theirs.send(b"x")
        while len(done) < 2:  # noqa: ASYNC110  an event would wake the loop
            await asyncio.sleep(0.01)
        loop.remove_reader(ours)

    with ours, theirs:
        loop.run_until_complete(asyncio.wait_for(main(), 30))

    assert done == [b"x", "idle"]


def test_callback_does_not_wait_for_ever_for_a_loop_that_is_always_busy(loop):
    called = []

    async def main():
        loop.when_idle(lambda: called.append(time.monotonic()), patient=True)
        until_s = time.monotonic() + 30
        while not called and time.monotonic() < until_s:  # noqa: ASYNC110  it is kept busy
            await asyncio.sleep(0)

    started_s = time.monotonic()
    loop.run_until_complete(main())

    assert called[0] - started_s >= idle.LATEST_S


def test_each_callback_is_called_once(loop):
    called = []

    async def main():
        loop.when_idle(lambda: called.append(1), patient=False)
        loop.when_idle(lambda: called.append(2), patient=False)
        for _ in range(3):
            await asyncio.sleep(0.001)

    loop.run_until_complete(main())

    assert called == [1, 2]


def test_callback_may_ask_to_be_called_again(loop):
    called, thrice = [], loop.create_future()

    def again():
        called.append(1)
        if len(called) < 3:
            loop.when_idle(again, patient=True)
        else:
            thrice.set_result(None)

    async def main():
        loop.when_idle(again, patient=False)
        await thrice

    loop.run_until_complete(asyncio.wait_for(main(), 30))


def test_error_of_a_callback_is_reported_and_the_loop_lives(loop):
    reported = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def main():
        loop.when_idle(lambda: 1 / 0, patient=False)
        await asyncio.sleep(0.01)
        return "alive"

    assert loop.run_until_complete(main()) == "alive"
    assert [type(error) for error in reported] == [ZeroDivisionError]


def test_loop_that_waits_takes_no_processor_time(loop):
    async def main():
        loop.when_idle(lambda: None, patient=True)
        await asyncio.sleep(0.01)
        started_s = time.thread_time()
        await asyncio.sleep(1)
        return time.thread_time() - started_s

    assert loop.run_until_complete(main()) < 0.5


def test_callback_that_is_withdrawn_is_not_called_and_those_after_it_wait_their_time(loop):
    called: list[float] = []

    def late():
        called.append(time.monotonic())

    def early():
        called.append(0.0)

    async def main():
        loop.when_idle(early, patient=True)
        time.sleep(2 * idle.LATEST_S)  # noqa: ASYNC251  it would be due
        loop.withdraw(early)
        loop.withdraw(early)  # of no effect
        started_s = time.monotonic()
        loop.when_idle(late, patient=True)
        until_s = started_s + 30
        while not called and time.monotonic() < until_s:  # noqa: ASYNC110  it is kept busy
            await asyncio.sleep(0)
        return started_s

    started_s = loop.run_until_complete(main())

    assert called[0] - started_s >= idle.LATEST_S


def test_other_loops_are_told_apart():
    async def main():
        idle.running_loop()

    with pytest.raises(RuntimeError, match="need an event loop"):
        asyncio.run(main())
    loop = idle.Loop()
    loop.run_until_complete(main())
    loop.close()


def test_run_ends_with_the_error_of_what_it_ran_and_closes_its_loop():
    loops = []

    async def main():
        loops.append(asyncio.get_running_loop())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        idle.run(main())
    assert isinstance(loops[0], idle.Loop)
    assert loops[0].is_closed()
