"""Waiting that ends at once when the page is to stop."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

Message = TypeVar("Message")


async def until(
    stopped: asyncio.Event, messages: AsyncGenerator[Message, None]
) -> AsyncGenerator[Message, None]:
    """Give messages until there are no more, or `stopped` is set.

    A task of its own asks for them, because whoever cancels us may do so over and over: what was
    begun for a message is ended undisturbed.

    Args:
        stopped: set when no more is wanted.
        messages: closed in the end.
    """
    found: asyncio.Queue[Message | None] = asyncio.Queue()

    async def ask() -> None:
        async with aclosing(messages):
            async for message in messages:
                found.put_nowait(message)

    def end(task: asyncio.Task[object]) -> None:
        if not task.cancelled():
            task.exception()  # looked at, so that nothing is logged if nobody waits any more
        found.put_nowait(None)

    asking: asyncio.Task[object] = asyncio.create_task(ask())
    stopping: asyncio.Task[object] = asyncio.create_task(stopped.wait())
    asking.add_done_callback(end)
    stopping.add_done_callback(end)
    try:
        while (message := await found.get()) is not None:
            yield message
        if asking.done():
            await asking  # raises what it ended with
    finally:
        asking.cancel()
        stopping.cancel()
