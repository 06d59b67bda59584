"""What the load gate costs: a bundle is read, verified, loaded, warmed and checked on this host.

    python benchmarks/gate.py models/fashion-mnist/1

Every round is a process of its own, with everything imported and nothing loaded yet. Shown are
medians, of wall time and of processor time; the last row is all of it, as a server pays for it.
Writes benchmarks/results/gate.json.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import measured
from service import bundle, model_config, version
from service.host import cores
from service.model_config import ModelOptions
from service.session import Session
from service.settings import Settings

Result = TypeVar("Result")
LIMIT_MS = 150.0
PHASES = ("read and verified", "loaded by onnxruntime", "warmed up", "checked", "the whole gate")
CHILD = "from benchmarks.gate import once; import sys; once(sys.argv[1])"


def main(
    path: Annotated[Path, typer.Argument(help="NAME/VERSION in a folder of models.")],
    times: Annotated[int, typer.Option("--rounds", min=9, help="Medians are of these.")] = 15,
) -> None:
    """Measure, print and write."""
    rounds = [_child(path) for _ in range(times)]
    table = Table(box=box.SIMPLE_HEAD, title=f"{path}, {times} processes, ms")
    table.add_column("")
    for name in ("wall", "processor", "least", "most"):
        table.add_column(name, justify="right")
    medians = {}
    for place, phase in enumerate(PHASES):
        wall, used = np.array([one[place] for one in rounds]).T
        medians[phase] = {"wall_ms": float(np.median(wall)), "cpu_ms": float(np.median(used))}
        table.add_row(
            phase, *(f"{value:.1f}" for value in (*medians[phase].values(), wall.min(), wall.max()))
        )
    Console().print(table)
    holds = medians[PHASES[-1]]["wall_ms"] <= LIMIT_MS
    print(f"the gate is to cost at most {LIMIT_MS:g} ms: {'holds' if holds else 'does not hold'}")
    measured.write("gate", {"rounds": times, "limit_ms": LIMIT_MS, "holds": holds, **medians})


def once(path: str) -> None:
    """Print, as JSON, wall and processor milliseconds of every phase."""
    options = model_config.of_server(Settings(repository=Path(path).parents[1]), cores())
    parts: list[tuple[float, float]] = []
    whole = _timed(lambda: version.load(Path(path), options))  # first, as at a server's start
    content = _kept(parts, lambda: bundle.read(Path(path)))
    session = _kept(parts, lambda: _session(content, options))
    _kept(parts, lambda: session.warm_up(options.max_batch_rows, content.golden.inputs[0]))
    checked = tuple(all_ms - sum(part) for all_ms, *part in zip(whole, *parts, strict=True))
    print(json.dumps([*parts, checked, whole]))


def _session(content: bundle.Bundle, options: ModelOptions) -> Session:
    return Session(content.model, content.manifest.session, threads=options.threads)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall_s, used_s = time.perf_counter(), time.process_time()
    work()
    return 1000 * (time.perf_counter() - wall_s), 1000 * (time.process_time() - used_s)


def _kept(parts: list[tuple[float, float]], work: Callable[[], Result]) -> Result:
    kept: list[Result] = []
    parts.append(_timed(lambda: kept.append(work())))
    return kept[0]


def _child(path: Path) -> list[list[float]]:
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[list[float]] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    typer.run(main)
