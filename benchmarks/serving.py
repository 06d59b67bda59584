"""What serving costs: our server beside the naive ones, beside other systems, and beside the model.

    python benchmarks/serving.py            # ours and the naive servers
    python benchmarks/serving.py --peers    # each other system as well, beside ours and the naive

All servers serve one ONNX file, the network conv10 with random weights as our pipeline exports it,
and are asked by h2load, in turn, round after round: what disturbs the machine disturbs all of them.
A ratio is taken within a round; shown are medians, and the smallest and largest. Everything runs on
127.0.0.1 and needs no network. Writes benchmarks/results/serving.json (or peers.json) and a picture
beside it.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import bundles, load, measured, pictured
from benchmarks.contenders import (
    GRPCIO,
    GRPCIO_2,
    NAIVE_AIO,
    NAIVE_SYNC,
    NATIVE,
    ROOT,
    Contender,
    Running,
    naive,
    ours,
    running,
)
from benchmarks.load import Load, Outcome
from protos import bundle_pb2
from service.session import Session

SECONDS = 2.0  # of one load
PAIRED_SECONDS = 1.0  # and of one with batching, or without
CONFIDENT = 1.96  # standard errors, for 95 %
NETWORK = "conv10"
OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")
WITHOUT_BATCHES = "ours, native, without batching"
ONNX, TENSORFLOW = "onnxruntime in process", "TensorFlow in process"


@dataclass(frozen=True, slots=True)
class Case:
    """One way of asking."""

    name: str
    rows: int
    load: Load


CASES = (
    Case("1 image, 1 in flight", 1, Load(1)),
    Case("1 image, 8 in flight", 1, Load(8)),
    Case("1 image, 64 in flight", 1, Load(64)),
    Case("1 image, 64 in flight over 8 connections", 1, Load(8, 8)),
    Case("32 images, 4 in flight", 32, Load(4)),
    Case("128 images, 1 in flight", 128, Load(1)),
    Case("128 images, 4 in flight", 128, Load(4)),
)
ONE, _, MANY, SHARED, _, _, BATCH = CASES


class Measured:
    """Figures by what they are of and by round."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[Outcome]] = {}  # by contender and case
        self.limits: dict[str, list[dict[str, float]]] = {ONNX: [], TENSORFLOW: []}
        self.starts_s: dict[str, list[float]] = {}
        self.pss_mib: dict[str, list[float]] = {}

    def of(self, name: str, case: Case, figure: str) -> list[float]:
        """Return a figure of every round."""
        return [getattr(outcome, figure) for outcome in self.outcomes[name, case.name]]

    def ratios(self, name: str, other: str, case: Case, figure: str) -> list[float]:
        """Return one contender's figure over another's, round by round."""
        pairs = zip(self.of(name, case, figure), self.of(other, case, figure), strict=True)
        return [own / others for own, others in pairs]


def main(
    rounds: Annotated[int, typer.Option(min=5, help="Rounds; medians are of these.")] = 5,
    pairs: Annotated[int, typer.Option(min=20, help="Rounds with and without batching.")] = 24,
    peers: Annotated[bool, typer.Option("--peers", help="Other systems, each in turn.")] = False,
) -> None:
    """Measure, print, draw and write."""
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress,
    ):
        progress.console.print(f"making {NETWORK} and its bundle")
        made = Made.make(Path(folder))
        found = (
            _beside_peers(made, rounds, progress)
            if peers
            else _alone(made, rounds, pairs, progress)
        )
    name = "peers" if peers else "serving"
    _print(found)
    measured.write(name, {"network": NETWORK, "seconds": SECONDS, **_figures(found)})
    print(f"drawn in {pictured.serving(found.outcomes, measured.RESULTS / f'{name}.png')}")


@dataclass(frozen=True, slots=True)
class Made:
    """The one model, in every form that is served."""

    repository: Path
    onnx: Path
    saved_model: Path
    images: NDArray[np.uint8]  # (128, 28, 28, 1)
    expected: NDArray[np.float32]  # probabilities of them

    @staticmethod
    def make(folder: Path) -> "Made":
        """Build and export it, in a process that takes TensorFlow with it."""
        command = [sys.executable, "-m", "benchmarks.networks", str(folder), NETWORK]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        content = (folder / NETWORK / "model.onnx").read_bytes()
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (128, 28, 28, 1), np.uint8)
        bundles.write(folder / "models", bundles.exported(content, images[:8]))
        expected = Session(content, OPTIONS, threads=1).run(images)["probabilities"]
        return Made(
            repository=folder / "models",
            onnx=folder / NETWORK / "model.onnx",
            saved_model=folder / NETWORK / "saved_model",
            images=images,
            expected=expected.astype(np.float32),
        )


def _alone(made: Made, rounds: int, pairs: int, progress: Progress) -> Measured:
    """Measure our server, the naive ones, and the model itself."""
    contenders = [
        naive("aio", made.onnx),
        naive("sync", made.onnx),
        ours(NATIVE, made.repository, "--front", "native"),
        ours(GRPCIO, made.repository, "--front", "grpcio"),
        ours(GRPCIO_2, made.repository, "--front", "grpcio", "--workers", "2"),
    ]
    found = Measured()
    _start_often(contenders, made, found, rounds, progress)
    with ExitStack() as stack:
        started = [stack.enter_context(running(one, made.images)) for one in contenders]
        limits = {
            ONNX: stack.enter_context(_limit("onnx", made.onnx)),
            TENSORFLOW: stack.enter_context(_limit("saved-model", made.saved_model)),
        }
        _check_idle(started, progress)

        def measure_limits() -> None:
            for name, ask in limits.items():
                found.limits[name].append(ask())

        _rounds(started, CASES, made, found, rounds, progress, measure_limits)
    with ExitStack() as stack:
        both = [
            ours(NATIVE, made.repository, "--front", "native"),
            ours(WITHOUT_BATCHES, made.repository, "--front", "native", "--max-batch-rows", "1"),
        ]
        started = [stack.enter_context(running(one, made.images)) for one in both]
        paired = Measured()
        _rounds(started, (ONE,), made, paired, pairs, progress, seconds=PAIRED_SECONDS)
    found.outcomes[WITHOUT_BATCHES, ONE.name] = paired.outcomes[WITHOUT_BATCHES, ONE.name]
    found.outcomes[f"{NATIVE}, paired", ONE.name] = paired.outcomes[NATIVE, ONE.name]
    return found


def _beside_peers(made: Made, rounds: int, progress: Progress) -> Measured:
    """Measure each other system beside ours and the naive one, in rounds of its own."""
    from benchmarks.peers.catalog import contenders  # noqa: PLC0415  environments of their own

    found = Measured()
    for peer in contenders(made.onnx):
        beside = [
            naive("aio", made.onnx),
            ours(NATIVE, made.repository, "--front", "native"),
            peer,
        ]
        own = Measured()
        with ExitStack() as stack:
            started = [stack.enter_context(running(one, made.images)) for one in beside]
            _rounds(started, (ONE, MANY, BATCH), made, own, rounds, progress)
            found.starts_s[peer.name] = [started[-1].first_answer_s]
            found.pss_mib[peer.name] = [load.pss_mib(started[-1].pid)]
        for (name, case), outcomes in own.outcomes.items():
            shown = name if name == peer.name else f"{name}, beside {peer.name}"
            found.outcomes[shown, case] = outcomes
    return found


def _start_often(
    contenders: Sequence[Contender], made: Made, found: Measured, times: int, progress: Progress
) -> None:
    """Start each server several times, in turn, and note when it answers and what it takes."""
    task = progress.add_task("starts", total=times + 1)
    for number in range(times + 1):
        for one in contenders:
            with running(one, made.images) as server:
                if number:  # the first reads files that the others find in memory
                    found.starts_s.setdefault(one.name, []).append(server.first_answer_s)
                    found.pss_mib.setdefault(one.name, []).append(load.pss_mib(server.pid))
        progress.advance(task)


def _rounds(  # noqa: PLR0913  what is asked, of whom, how often, and where it goes
    servers: Sequence[Running],
    cases: Sequence[Case],
    made: Made,
    found: Measured,
    rounds: int,
    progress: Progress,
    between: Callable[[], object] = lambda: None,
    *,
    seconds: float = SECONDS,
) -> None:
    """Ask every server in every way, in an order that changes from round to round."""
    rng = random.Random(0)
    plans = []
    task = progress.add_task("warm-up", total=len(cases))
    for case in cases:
        for server in servers:
            request = server.request(made.images[: case.rows], made.expected[: case.rows])
            count = load.requests_for(request, case.load, seconds, server.pid)
            plans.append((server, case, request, count))
        progress.advance(task)
    task = progress.add_task("rounds", total=rounds * len(cases))
    for _ in range(rounds):
        for case in cases:
            turn = [plan for plan in plans if plan[1] == case]
            rng.shuffle(turn)
            for server, _, request, count in turn:
                outcome = load.run(request, case.load, count, server.pid)
                found.outcomes.setdefault((server.contender.name, case.name), []).append(outcome)
            progress.advance(task)
        between()


@contextmanager
def _limit(kind: str, model: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """Give a function that measures the model itself, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.limits", kind, str(model)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:

        def ask() -> dict[str, float]:
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            answer: dict[str, float] = json.loads(process.stdout.readline())
            return answer

        yield ask
        assert process.stdin
        process.stdin.close()


def _check_idle(servers: Sequence[Running], progress: Progress) -> None:
    share = load.idle_cpu([server.pid for server in servers])
    progress.console.print(f"all servers idle: {share:.1%} of a core")


def _print(found: Measured) -> None:
    console = Console(width=120)
    table = Table(
        box=box.SIMPLE_HEAD, title="medians; p50 and p99 in ms, processor time in ms a request"
    )
    for column in (
        "asked",
        "server",
        "requests/s",
        "images/s",
        "p50",
        "p99",
        "server CPU",
        "h2load",
    ):
        table.add_column(column, justify="left" if column in ("asked", "server") else "right")
    for case in CASES:
        names = [name for name, other in found.outcomes if other == case.name]
        for place, name in enumerate(names):
            figure = {key: float(np.median(found.of(name, case, key))) for key in Outcome.__slots__}
            rate = figure["requests_per_second"]
            table.add_row(
                "" if place else case.name,
                name,
                f"{rate:,.0f}",
                f"{rate * case.rows:,.0f}",
                *(f"{figure[key]:.2f}" for key in ("p50_ms", "p99_ms")),
                *(f"{figure[key]:.3f}" for key in ("server_cpu_ms", "client_cpu_ms")),
            )
        table.add_section()
    console.print(table)
    for name, rows in found.limits.items():
        if rows:
            one, many, cpu = (
                np.median([row[key] for row in rows])
                for key in ("images_per_second_1", "images_per_second_128", "cpu_ms_128")
            )
            console.print(
                f"{name}: {one:,.0f} images/s singly, {many:,.0f} in batches of 128 by two "
                f"callers, {cpu:.2f} ms of processor time a batch"
            )
    for name, starts in found.starts_s.items():
        console.print(
            f"{name}: first answer after {np.median(starts):.2f} s, "
            f"idle with {np.median(found.pss_mib[name]):.0f} MiB"
        )
    table = Table(box=box.SIMPLE_HEAD, title="claims: ratios within a round")
    for column in ("what", "median (least to most)", "at least or most", ""):
        table.add_column(column)
    for claim in _claims(found):
        holds = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        table.add_row(claim.what, claim.shown, claim.bound, holds)
    console.print(table)


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that is said of these figures, and whether they say so."""

    what: str
    values: list[float]
    limit: float
    at_least: bool
    upper: float | None = None  # of a confidence interval, where that is what is held

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def holds(self) -> bool:
        """Whether the median, or the upper bound, is on the right side."""
        if self.at_least:
            return self.median >= self.limit
        return (self.median if self.upper is None else self.upper) <= self.limit

    @property
    def shown(self) -> str:
        """The figures in words."""
        spread = f"{self.median:.3g} ({min(self.values):.3g} to {max(self.values):.3g})"
        return spread if self.upper is None else f"{spread}, below {self.upper:.3g} at 95 %"

    @property
    def bound(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def _claims(found: Measured) -> list[Claim]:
    claims = []
    rate, cpu = "requests_per_second", "server_cpu_ms"
    if not found.limits[ONNX]:
        for name, case in found.outcomes:
            if case == MANY.name and f"{NATIVE}, beside {name}" in {n for n, _ in found.outcomes}:
                own = found.ratios(f"{NATIVE}, beside {name}", name, MANY, rate)
                limit = 1.4 if name == "mosec" else 1.0
                claims.append(Claim(f"{MANY.name}: native over {name}", own, limit, True))
        return claims
    for what, ratios, limit, at_least in (
        (f"{MANY.name}: native over naive aio", (NATIVE, NAIVE_AIO, MANY, rate), 10, True),
        (f"{MANY.name}: CPU of native over naive aio's", (NATIVE, NAIVE_AIO, MANY, cpu), 0.14, False),
        (f"{ONE.name}: p50 of native over naive sync's", (NATIVE, NAIVE_SYNC, ONE, "p50_ms"), 0.6, False),
        (f"{BATCH.name}: native over naive aio", (NATIVE, NAIVE_AIO, BATCH, rate), 1.6, True),
        (f"{SHARED.name}: grpcio, 2 workers, over naive aio", (GRPCIO_2, NAIVE_AIO, SHARED, rate), 1.5, True),
    ):  # fmt: skip
        claims.append(Claim(what, found.ratios(*ratios), limit, at_least))
    model = [row["cpu_ms_128"] for row in found.limits[ONNX]]
    served = found.of(NATIVE, BATCH, cpu)
    claims.append(
        Claim(
            f"{BATCH.name}: CPU of native over the model's own",
            [own / limit for own, limit in zip(served, model, strict=True)],
            1.5,
            False,
        )
    )
    paired = found.ratios(f"{NATIVE}, paired", WITHOUT_BATCHES, ONE, cpu)
    bound = float(np.mean(paired) + CONFIDENT * np.std(paired, ddof=1) / len(paired) ** 0.5)
    claims.append(Claim(f"{ONE.name}: CPU with batching over without", paired, 1.05, False, bound))
    for what, figures in (("first answer", found.starts_s), ("idle memory", found.pss_mib)):
        ratios = [
            own / other for own, other in zip(figures[NATIVE], figures[NAIVE_AIO], strict=True)
        ]
        claims.append(Claim(f"{what}: native over naive aio's", ratios, 1.5, False))
    return claims


def _figures(found: Measured) -> dict[str, Any]:
    return {
        "claims": [
            {"what": claim.what, "figures": claim.shown, "limit": claim.bound, "holds": claim.holds}
            for claim in _claims(found)
        ],
        "outcomes": {
            f"{case}: {name}": [asdict(outcome) for outcome in outcomes]
            for (name, case), outcomes in found.outcomes.items()
        },
        "limits": found.limits,
        "first_answer_s": found.starts_s,
        "idle_pss_mib": found.pss_mib,
    }


if __name__ == "__main__":
    typer.run(main)
