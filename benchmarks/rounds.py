"""Servers that are asked in turn, round after round, so that what disturbs one disturbs all.

A ratio is taken within a round. Decides nothing about which servers, nor what follows.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks import bundles, load
from benchmarks.contenders import ROOT, Contender, Running, running
from benchmarks.load import Load, Outcome
from benchmarks.steady import Steady
from protos import bundle_pb2
from service.session import Session

SECONDS = 0.6  # of one load: of many short ones a busy host disturbs fewer than of few long ones
OPTIONS = bundle_pb2.SessionOptions(graph_optimization="all")


@dataclass(frozen=True, slots=True)
class Case:
    """One way of asking."""

    name: str
    rows: int
    load: Load


class Measured:
    """Figures by what they are of and by round."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[Outcome]] = {}  # by contender and case
        self.limits: dict[str, list[dict[str, float]]] = {}  # of the model itself
        self.starts_s: dict[str, list[float]] = {}
        self.pss_mib: dict[str, list[float]] = {}

    def of(self, name: str, case: Case, figure: str) -> list[float]:
        """Return a figure of every round."""
        return [getattr(outcome, figure) for outcome in self.outcomes[name, case.name]]

    def ratios(self, name: str, other: str, case: Case, figure: str) -> list[float]:
        """Return one contender's figure over another's, round by round."""
        pairs = zip(self.of(name, case, figure), self.of(other, case, figure), strict=True)
        return [own / others for own, others in pairs]


@dataclass(frozen=True, slots=True)
class Made:
    """The one model, in every form that is served."""

    repository: Path
    onnx: Path
    saved_model: Path
    images: NDArray[np.uint8]  # (128, 28, 28, 1)
    expected: NDArray[np.float32]  # probabilities of them
    steady: Steady  # by calling it

    @staticmethod
    def make(folder: Path, network: str) -> "Made":
        """Build and export it, in a process that takes TensorFlow with it."""
        command = [sys.executable, "-m", "benchmarks.networks", str(folder), network]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        content = (folder / network / "model.onnx").read_bytes()
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (128, 28, 28, 1), np.uint8)
        bundles.write(folder / f"models-{network}", bundles.exported(content, images[:8]))
        model = Session(content, OPTIONS, threads=1)
        expected = model.run(images)["probabilities"]
        return Made(
            repository=folder / f"models-{network}",
            onnx=folder / network / "model.onnx",
            saved_model=folder / network / "saved_model",
            images=images,
            expected=expected.astype(np.float32),
            steady=Steady(model, images),
        )


def start_often(
    contenders: Sequence[Contender], made: Made, found: Measured, times: int, progress: Progress
) -> None:
    """Start each server several times, in turn, and note when it answers and what it takes."""

    def started(one: Contender) -> tuple[float, float]:
        with running(one, made.images) as server:
            return server.first_answer_s, load.pss_mib(server.pid)

    task = progress.add_task("starts", total=times + 1)
    for number in range(times + 1):
        for one in contenders:
            first_answer_s, pss_mib = made.steady.measure(partial(started, one))
            if number:  # the first reads files that the others find in memory
                found.starts_s.setdefault(one.name, []).append(first_answer_s)
                found.pss_mib.setdefault(one.name, []).append(pss_mib)
        progress.advance(task)


def ask_in_turn(  # noqa: PLR0913  what is asked, of whom, how often, and where it goes
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
    """Ask every server in every way, in an order that changes from round to round.

    What is measured while this machine has not all of its cores is measured again.
    """
    rng = random.Random(sum(map(len, found.outcomes.values())))
    plans = []
    task = progress.add_task("warm-up", total=len(cases))
    for case in cases:
        for server in servers:
            request = server.request(made.images[: case.rows], made.expected[: case.rows])
            asked = case.load.over(http2=server.contender.http2)
            count = load.requests_for(request, asked, seconds)
            plans.append((server, case, request, asked, count))
        progress.advance(task)
    task = progress.add_task("rounds", total=rounds * len(cases))
    for _ in range(rounds):
        for case in cases:
            turn = [plan for plan in plans if plan[1] == case]
            rng.shuffle(turn)
            for server, _, request, asked, count in turn:
                once = partial(load.run, request, asked, count, server.pid)
                outcome = made.steady.measure(once)
                found.outcomes.setdefault((server.contender.name, case.name), []).append(outcome)
            progress.advance(task)
        between()


@contextmanager
def limit(kind: str, model: Path) -> Iterator[Callable[[], dict[str, float]]]:
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
