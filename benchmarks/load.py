"""Load from h2load, and what it costs: the server's processor time and memory, and h2load's own.

h2load (Debian's nghttp2-client) sends one and the same body again and again, over HTTP/2 or
HTTP/1.1; it costs a few per cent of what a generator in Python does. An answer counts only if it is
as long as the one that was checked before.
"""

import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GENERATOR = "h2load"
INSTALL = "install it with: apt-get install nghttp2-client"
FINISHED = re.compile(r"finished in [\d.]+\w+, ([\d.]+) req/s")
COUNTED = re.compile(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout")
DATA = re.compile(r"traffic: .*, [\d.]+\w* \((\d+)\) data")
WARM_S = 0.5  # of asking, before a server counts as warm and its rate as known
LOGGED = 4  # a request in so many is asked again for how long it takes
CPU_CLOCK = 2  # of a process: CPUCLOCK_SCHED, which clock_getcpuclockid(3) makes from its number


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, the same each time."""

    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes  # with gRPC's prefix where it is gRPC
    answer_bytes: int  # of the answer's body
    http2: bool


@dataclass(frozen=True, slots=True)
class Load:
    """How many are asked at a time."""

    connections: int
    streams: int = 1  # requests in flight on each

    @property
    def in_flight(self) -> int:
        """Requests at a time."""
        return self.connections * self.streams

    def logged(self, requests: int) -> int:
        """Return how many requests more `run` asks to learn how long they take."""
        return 2 * self.in_flight + requests // LOGGED

    def over(self, *, http2: bool) -> "Load":
        """Return the same number in flight as a protocol can have it: HTTP/1.1 has no streams."""
        return self if http2 else Load(self.in_flight)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one load."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    server_cpu_ms: float  # of processor time a request, in all processes of the server
    client_cpu_ms: float


def check_installed() -> None:
    """Refuse to go on without the generator.

    Raises:
        SystemExit: it is not installed.
    """
    if shutil.which(GENERATOR) is None:
        raise SystemExit(f"error: {GENERATOR} is missing; {INSTALL}")


def run(request: Request, load: Load, requests: int, server_pid: int) -> Outcome:
    """Ask so many times, and return what came of it.

    How long each answer took is found out by a quarter as many requests more: h2load writes a line
    for each, which slows down whoever is asked with the same cores. So rate and latency are of two
    loads, one after the other.

    Raises:
        SystemExit: as `ask`.
    """
    before, client_before = cpu_seconds(server_pid), _children_s()
    rate = ask(request, load, requests)
    client_after, after = _children_s(), cpu_seconds(server_pid)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        ask(request, load, load.logged(requests), f"--log-file={log}")
        started_us, took_us = np.loadtxt(log, usecols=(0, 2), unpack=True)
    took_us = took_us[np.argsort(started_us)][load.in_flight :]  # without what began all at once
    return Outcome(
        requests_per_second=rate,
        p50_ms=float(np.percentile(took_us, 50)) / 1e3,
        p99_ms=float(np.percentile(took_us, 99)) / 1e3,
        server_cpu_ms=(after - before) / requests * 1e3,
        client_cpu_ms=(client_after - client_before) / requests * 1e3,
    )


def _children_s() -> float:
    """Return the processor time of all processes that this one started and that have ended."""
    taken = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken.ru_utime + taken.ru_stime


def ask(request: Request, load: Load, requests: int, *options: str) -> float:
    """Ask so many times and return how many answers came a second.

    Args:
        request: what.
        load: how many at a time.
        requests: how many.
        options: of h2load, beyond those.

    Raises:
        SystemExit: a request failed, or was answered with something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder, "body")
        body.write_bytes(request.body)
        command = [GENERATOR, "--threads=1", f"--requests={requests}", f"--data={body}", *options]
        command += [f"--clients={load.connections}", f"--max-concurrent-streams={load.streams}"]
        command += [f"--header={name}: {value}" for name, value in request.headers]
        if not request.http2:
            command.append("--h1")
        command.append(request.url)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout
    counted, data = COUNTED.search(printed), DATA.search(printed)
    rate = FINISHED.search(printed)
    if not (counted and data and rate):
        raise SystemExit(f"error: {GENERATOR} failed: {printed}{done.stderr}")
    good, *bad = map(int, counted.groups())
    if good != requests or any(bad) or int(data[1]) != requests * request.answer_bytes:
        raise SystemExit(
            f"error: of {requests} requests to {request.url} {good} succeeded, with "
            f"{data[1]} bytes, expected {request.answer_bytes} each:\n{printed}"
        )
    return float(rate[1])


def requests_for(request: Request, load: Load, seconds: float) -> int:
    """Return how many requests take about so long; warms the server up."""
    asked = 2 * load.in_flight
    while True:
        started_s = time.monotonic()
        ask(request, load, asked)
        took_s = time.monotonic() - started_s
        if took_s > WARM_S:
            return max(2 * load.in_flight, round(asked * seconds / took_s))
        asked *= 4


def tree(pid: int) -> Iterator[int]:
    """Give a process and all that come from it."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = file.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield from tree(int(child))


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and all that come from it and live."""
    total = 0.0
    for one in tree(pid):
        try:
            total += time.clock_gettime((~one << 3) | CPU_CLOCK)
        except OSError:  # it has ended
            continue
    return total


def pss_mib(pid: int) -> float:
    """Return the memory of a process and all that come from it; what they share counts once."""
    total = 0
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def idle_cpu(pids: Sequence[int], seconds: float = 2.0) -> float:
    """Return the share of one core that these servers take while nobody asks them."""
    before = sum(map(cpu_seconds, pids))
    time.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / seconds
