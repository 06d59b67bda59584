"""The page's own web server: what it answers, to whom, and what it refuses.

All that the browser loads comes from here; the policy that goes with every answer lets it load
nothing else. A page of somebody else's in the same browser may not ask.
"""

import asyncio
import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from service.aio_client import AsyncClient
from service.errors import ServiceError
from service.playground import live, words
from service.playground.answers import Answers, Asked
from service.playground.bundles import Bundles, Reader
from service.playground.ending import until
from service.playground.errors import PlaygroundError
from service.playground.variants import COMMAND, Variants

STATIC = Path(__file__).parent / "static"
FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
MAX_UPLOAD_BYTES = 32 << 20
MAX_READ_BYTES = 1 << 30  # whoever sends more sees his connection closed
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
AWAY = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
OUR_OWN = ("same-origin", "none")
MAX_DIGITS = 9  # of a row
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the page is made of."""

    client: AsyncClient  # of the server
    address: str  # of the server, as it is shown
    bundles: Bundles
    loopback: bool = True  # only names of this host may be asked for
    command: Sequence[str] = COMMAND  # that answers with the variants


def application(parts: Parts, stopped: asyncio.Event) -> Starlette:
    """Return the page as an ASGI application; what it streams ends once `stopped` is set."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        others = Variants(parts.command)
        async with parts.client as client:
            app.state.answers = Answers(client, Reader(parts.bundles), others)
            app.state.stopped = stopped
            try:
                yield
            finally:
                await others.close()

    async def states(_: Request) -> StreamingResponse:
        return _events(parts, stopped)

    app = Starlette(
        routes=[
            *(Route(path, _file) for path in FILES),
            Route("/api/live", states),
            Route("/api/images", _until_stopped(_images)),
            Route("/api/answer", _until_stopped(_answer), methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, loopback=parts.loopback)],
        lifespan=lifespan,
    )
    app.add_exception_handler(ServiceError, _refused)
    return app


class _Guard:
    """Refuses what another page sends, and adds the headers to every answer."""

    def __init__(self, app: Any, *, loopback: bool) -> None:  # noqa: ANN401  any ASGI application
        self._app, self._loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                added = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        if reason := self._reason(Request(scope)):
            answer = JSONResponse({"error": reason}, 403)
            await answer(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _reason(self, request: Request) -> str:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._loopback and name not in LOOPBACK:
            return "this page is asked for by another name than this host's own"
        if request.headers.get("sec-fetch-site", "none") not in OUR_OWN and request.url.path != "/":
            return "another page may not ask"
        origin = request.headers.get("origin")
        ours = [f"{scheme}://{host}".lower() for scheme in ("http", "https")]
        if origin is not None and origin.lower() not in ours:
            return "another page may not ask"
        return ""


def _until_stopped(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint that gives up what it waits for once the page is to stop."""

    async def given_up(request: Request) -> Response:
        async def answered() -> AsyncGenerator[Response, None]:
            yield await endpoint(request)

        async with aclosing(until(request.app.state.stopped, answered())) as found:
            async for response in found:
                return response
        return JSONResponse({"error": "the playground stops", "away": True}, 503)

    return given_up


async def _file(request: Request) -> FileResponse:
    return FileResponse(STATIC / FILES[request.url.path])


async def _images(request: Request) -> JSONResponse:
    asked = request.query_params
    answers: Answers = request.app.state.answers
    found = await answers.test_images(
        asked.get("model", ""), asked.get("version", ""), _number(asked, "from") or 0
    )
    return JSONResponse(words.plain(found))


async def _answer(request: Request) -> Response:
    asked = request.query_params
    try:
        content = await _content(request)
    except ClientDisconnect:
        return Response(status_code=400)
    if content is None:
        return JSONResponse(
            {
                "error": f"the file is over {MAX_UPLOAD_BYTES >> 20} MiB, which no picture here "
                "needs; make it smaller"
            },
            413,
            headers={"connection": "close"},
        )
    answers: Answers = request.app.state.answers
    messages = answers.answer(
        Asked(
            model=asked.get("model", ""),
            version=asked.get("version", ""),
            content=content,
            row=_number(asked, "row"),
            invert=asked.get("invert") == "1",
        )
    )
    first = await anext(messages)  # whose refusal is the answer's

    async def lines() -> AsyncGenerator[str, None]:
        async with aclosing(until(request.app.state.stopped, messages)) as found:
            yield _line(first)
            try:
                async for message in found:
                    yield _line(message)
            except ServiceError as error:
                yield _line({"error": str(error)})

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _content(request: Request) -> bytes | None:
    """Read what was uploaded; None if it is too large.

    That is read on and forgotten: a browser shows no answer that comes before it has sent all.
    """
    content, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_READ_BYTES:
            break
        if size <= MAX_UPLOAD_BYTES:
            content += part
        else:
            content.clear()
    return bytes(content) if size <= MAX_UPLOAD_BYTES else None


def _events(parts: Parts, stopped: asyncio.Event) -> StreamingResponse:
    async def events() -> AsyncGenerator[str, None]:
        async with aclosing(live.states(parts.client, stopped=stopped)) as found:
            async for state in found:
                state["address"] = parts.address
                yield f"data: {_line(state)}\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    code = getattr(error, "code", "")  # of what the server refused
    away = code in AWAY
    status = 503 if away else 502 if code else 400
    return JSONResponse({"error": words.plain(str(error)), "away": away}, status)


def _number(asked: Mapping[str, str], name: str) -> int | None:
    """Return what a query says, None if it does not; raises PlaygroundError for no number."""
    text = asked.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        shown = text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}..."
        raise PlaygroundError(
            f"{name} is {shown!r}, expected a whole number of at most {MAX_DIGITS} digits"
        )
    return int(text)


def _line(message: dict[str, Any]) -> str:
    return f"{json.dumps(words.plain(message))}\n"
