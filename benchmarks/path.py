"""Where the processor time of one request goes: single images, 64 in flight, the native front.

    python benchmarks/path.py

The server's threads tell what they took, by the kernel's count. What the model and our own code
take of it is measured in this process: the model with batches as large as the server's were, our
code with a model and a front that do nothing. The rest is pygrpc-native's: to hand over calls and
take back answers, under the interpreter's lock. Prints microseconds a request.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import typer
from pygrpc_native import EVENT_CALL
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import load, measured
from benchmarks.contenders import NATIVE, Running, message, ours, running
from benchmarks.load import Load
from benchmarks.rounds import OPTIONS, Made
from protos import inference_pb2
from service import model_config, version
from service.access import Access
from service.front import native
from service.front.grpcio import Transport
from service.front.turns import Turn, Turns
from service.model_config import ModelOptions
from service.repository import Repository
from service.rpc import INFER, Rpc
from service.session import Session
from service.settings import Settings

LOADS = {"one connection": Load(1, 64), "64 connections": Load(64)}
SECONDS = 3.0
ROUNDS = 5
IO_THREAD = "grpc-native-io"
TICKS = os.sysconf("SC_CLK_TCK")
US = 1e6
STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"
HEADERS = (("user-agent", "h2load"), ("content-type", "application/grpc"), ("te", "trailers"))
PEER = "ipv4:127.0.0.1:1"


def main() -> None:
    """Measure, print and write."""
    load.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        made = Made.make(Path(folder), "conv10")
        with running(ours(NATIVE, made.repository, "--front", "native"), made.images) as server:
            found = {name: _asked(server, made, way) for name, way in LOADS.items()}
        session = Session(made.onnx.read_bytes(), OPTIONS, threads=1)
        for taken in found.values():
            rows = round(taken["rows"])
            images = made.images[:rows]
            taken["model"] = _best(partial(session.run, images)) / rows
            taken["ours"] = _best(_beginning(made, rows)) / rows
            taken["library"] = taken["runners"] - taken["model"] - taken["ours"]
    table = Table(box=box.SIMPLE_HEAD, title="µs of processor time a request, 64 in flight")
    table.add_column("where")
    table.add_column("what")
    for name, taken in found.items():
        table.add_column(f"{name}, {taken['rows']:.0f} a batch", justify="right")
    for where, what, key in (
        ("front's thread", "HTTP/2 and gRPC, in Rust", "io, user"),
        ("", "the kernel's sockets", "io, system"),
        ("runner's thread", "calls in, answers out: the front's side", "library"),
        ("", "find the form, check, join, count, write", "ours"),
        ("", "the model", "model"),
    ):
        table.add_row(where, what, *(f"{taken[key]:.1f}" for taken in found.values()))
    Console().print(table)
    measured.write("path", {"us_a_request": found})


def _asked(server: Running, made: Made, way: Load) -> dict[str, float]:
    """Return what the server's threads took for a request, in microseconds, and a batch's rows."""
    request = server.request(made.images[:1], made.expected[:1])
    count = load.requests_for(request, way, SECONDS)

    def once() -> dict[str, float]:
        before, begun = _threads(server.pid), _executions(server.port)
        load.ask(request, way, count)
        after, ended = _threads(server.pid), _executions(server.port)
        took = {name: (after[name] - before[name]) / count * US for name in after}
        return {**took, "rows": count / (ended - begun)}

    rounds = [made.steady.measure(once) for _ in range(ROUNDS)]
    return {name: statistics.median(took[name] for took in rounds) for name in rounds[0]}


def _threads(pid: int) -> dict[str, float]:
    """Return the seconds that the front's thread and all others have taken."""
    taken = {"io, user": 0.0, "io, system": 0.0, "runners": 0.0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        user, system = map(int, (task / "stat").read_text().rpartition(")")[2].split()[11:13])
        if (task / "comm").read_text().startswith(IO_THREAD):
            taken["io, user"] += user / TICKS
            taken["io, system"] += system / TICKS
        else:
            taken["runners"] += (user + system) / TICKS
    return taken


def _executions(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask: Any = channel.unary_unary(STATISTICS)
        answer = inference_pb2.ModelStatisticsResponse.FromString(ask(b""))
    return int(answer.model_stats[0].execution_count)


def _beginning(made: Made, rows: int) -> Callable[[], object]:
    """Return a call of what the native front does with so many calls at once, less its library."""
    nothing = np.zeros((rows, 10), np.float32)

    def load_idle(path: Path, options: ModelOptions) -> version.Version:
        loaded = version.load(path, options)
        answers = {output.name: nothing for output in loaded.manifest.outputs}
        return replace(loaded, session=cast("Any", SimpleNamespace(run=lambda _: answers)))

    defaults = model_config.of_server(Settings(repository=made.repository), cores=1)
    repository = Repository(made.repository, defaults=defaults, load=load_idle)
    repository.reconcile()
    rpc = Rpc(repository)
    front = native.NativeFront(
        rpc,
        Transport(address="127.0.0.1:0", max_message_bytes=1 << 26),
        access=Access((), ()),
        limit_bytes=1 << 60,
    )
    (name,) = repository.answering()
    content = message(made.images[:1], name)[5:]
    details = (HEADERS, PEER, None)
    method = rpc.paths.index(INFER)
    events = [(EVENT_CALL, number, method, content, None, details) for number in range(rows)]
    sink: Any = SimpleNamespace(respond=lambda *_: True, fail=lambda *_: True)
    turn = Turn(Turns())
    return lambda: front._begin(sink, cast("Any", events), turn.expect)


def _best(call: Callable[[], object], times: int = 400) -> float:
    """Return the microseconds of processor time of one call, the best of many."""
    found = []
    for _ in range(times):
        started_s = time.thread_time()
        call()
        found.append(time.thread_time() - started_s)
    return min(found) * US


if __name__ == "__main__":
    typer.run(main)
