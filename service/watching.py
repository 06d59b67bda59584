"""Keep what a server says about its parity on the screen, through its restarts."""

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import NoReturn

from google.protobuf import json_format
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape

from protos import parity_pb2
from service import tables
from service.errors import ServerError

PAUSE_S = 1.0  # before a server that went away is asked again
AGAIN = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})


async def watch(
    asked: Callable[[], AsyncIterable[parity_pb2.GetParityResponse]], *, as_json: bool
) -> NoReturn:
    """Show every answer, in the place of the one before it on a terminal, until it is cancelled.

    Args:
        asked: asks the server; every item is what it says now.
        as_json: print one line of JSON an answer instead.

    Raises:
        ServerError: the server refused, as it would again.
    """
    if as_json or not tables.console.is_terminal:
        await _each(asked, lambda answer: _print(answer, as_json=as_json), tables.show_refusal)
    view: RenderableType = "waiting for the server"
    with Live(view, console=tables.console, auto_refresh=False) as live:

        def show(answer: parity_pb2.GetParityResponse) -> None:
            nonlocal view
            view = tables.parity_view(answer)
            live.update(view, refresh=True)

        def say(reason: str) -> None:
            live.update(Group(view, f"[red]{escape(reason)}[/]"), refresh=True)

        await _each(asked, show, say)


def failures(answer: parity_pb2.GetParityResponse) -> list[str]:
    """Return a sentence for everything loaded that does not hold its parity."""
    found = []
    for one in answer.versions:
        name = f"{one.model} version {one.version}"
        if not one.self_check.report.passed:
            found.append(f"{name} fails its self-check: {one.self_check.report.failure}")
        if one.live.verdict == parity_pb2.LIVE_VERDICT_FAILED:
            found.append(f"{name} fails live: {one.live.failure}")
    return found


def as_line(answer: parity_pb2.GetParityResponse, indent: int | None = None) -> str:
    """Return an answer as JSON."""
    return json_format.MessageToJson(
        answer, preserving_proto_field_name=True, ensure_ascii=False, indent=indent
    )


def _print(answer: parity_pb2.GetParityResponse, *, as_json: bool) -> None:
    if as_json:
        tables.console.out(as_line(answer), highlight=False)
    else:
        tables.show_parity(answer)


async def _each(
    asked: Callable[[], AsyncIterable[parity_pb2.GetParityResponse]],
    show: Callable[[parity_pb2.GetParityResponse], None],
    say: Callable[[str], None],
) -> NoReturn:
    while True:
        try:
            async for answer in asked():
                show(answer)
            reason = "the server ended the stream"
        except ServerError as error:
            if error.code not in AGAIN:
                raise
            reason = str(error)
        say(f"{reason}; trying again")
        await asyncio.sleep(PAUSE_S)
