"""The page on a server of the tiny model, and a process that plays its other variants."""

import asyncio
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from protos import bundle_pb2
from service.aio_client import AsyncClient
from service.playground.bundles import Bundles
from service.playground.page import Parts, application

# Answers as the tiny model does; a first pixel of 66 ends it, 77 is too much for one variant.
VARIANTS = """
import json, sys
names = ["saved-model", "onnx-float32", "onnx-int8"]
print(json.dumps({"variants": names}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    pixels = [value for row in asked["rows"][0] for column in row for value in column]
    if pixels[0] == 66:
        sys.exit("error: no memory is left")
    light = sum(pixels) / 4
    logits = [127 - light, light - 127, (pixels[0] - pixels[1] + pixels[2] - pixels[3]) / 4]
    for name in names:
        said = {"id": asked["id"], "variant": name}
        more = 0.25 if name == "onnx-int8" else 0
        if pixels[0] == 77 and name == "onnx-int8":
            said["error"] = "it overflowed"
        else:
            said |= {"outputs": [[logits[0], logits[1] + more, logits[2]]], "seconds": 0.002}
        print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="session")
def command() -> tuple[str, ...]:
    return (sys.executable, "-c", VARIANTS)


def with_variants(manifest: bundle_pb2.BundleManifest) -> None:
    """Report the variants that the process above answers with, and one that was refused."""
    (served,) = manifest.parity
    for name in ("saved-model", "onnx-int8", "tflite-int8"):
        report = manifest.parity.add()
        report.CopyFrom(served)
        report.variant = name
        report.budget.precision = "int8" if name.endswith("int8") else "float32"
    refused = manifest.parity[-1]
    refused.passed, refused.failure = False, "it was over its budget"
    refused.path = ""


@pytest.fixture
def variants_of() -> Callable[[bundle_pb2.BundleManifest], None]:
    return with_variants


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Page:
    """The page as a browser reaches it."""

    url: str
    port: int

    def get(self, path: str, content: bytes | None = None, **headers: str) -> Reply:
        """GET, or with contents POST."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=content, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Reply(answer.status, dict(answer.headers), answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read().decode())


@pytest.fixture
def open_page(loop, command) -> Iterator[Callable[..., Page]]:
    """Return a function that serves the page for a server; the variants are the ones above."""
    running = []

    def open_page(
        address: str, models: Path | None = None, *, loopback=True, command=command
    ) -> Page:
        async def start() -> tuple[uvicorn.Server, socket.socket, asyncio.Event]:
            bundles, stopped = Bundles(models), asyncio.Event()
            client = AsyncClient(address)
            parts = Parts(client, address, bundles, loopback, command)
            config = uvicorn.Config(
                application(parts, stopped), log_config=None, timeout_graceful_shutdown=1
            )
            bound = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(config)
            running.append((server, stopped, asyncio.create_task(server.serve(sockets=[bound]))))
            while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0.01)
            return server, bound, stopped

        _, bound, _ = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        port = bound.getsockname()[1]
        return Page(f"http://127.0.0.1:{port}", port)

    yield open_page

    async def stop() -> None:
        for server, stopped, task in running:
            stopped.set()
            server.should_exit = True
            await task

    asyncio.run_coroutine_threadsafe(stop(), loop).result(60)


@pytest.fixture
def served(make_bundle, open_repository, listen, variants_of) -> tuple[str, Path]:
    """Serve the tiny model; give the address and the folder of its bundle."""
    from service.rpc import Rpc

    models = make_bundle(edit=variants_of).parents[1]
    return listen(Rpc(open_repository(models))), models
