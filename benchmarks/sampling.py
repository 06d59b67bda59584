"""What sampling costs: one row in a hundred goes to a shadow, or none.

    python benchmarks/sampling.py

Two servers on one model, on the native front, are asked by h2load in turn, round after round. One
samples 1 % of its rows, and a client reads them in a thread of its own, as a shadow would. Held is
the upper bound of a 95 % interval of the ratio of their processor time a request: of the mean of
its logarithm, in which half and twice as much are equally far from 1. Loads are short and many, so
that what else the machine does falls on both. Writes benchmarks/results/sampling.json.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import load, measured, rounds, shown
from benchmarks.claims import CONFIDENT, CPU, Claim
from benchmarks.contenders import NATIVE, Running, ours, running
from benchmarks.load import Load
from benchmarks.rounds import Case, Made, Measured
from service.client import Client
from service.errors import ServerError

NETWORK = "conv10"
RATE = 0.01
SAMPLING = f"{NATIVE}, sampling {RATE:.0%}"
LIMIT = 1.05
SECONDS = 0.5  # of one load
CASES = (
    Case("1 image, 64 in flight", 1, Load(64)),
    Case("1 image, 1 in flight", 1, Load(1)),
)


def main(
    times: Annotated[int, typer.Option("--rounds", min=20, help="Rounds with and without.")] = 60,
) -> None:
    """Measure, print and write."""
    load.check_installed()
    found = Measured()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)
        ) as progress,
        ExitStack() as stack,
    ):
        made = Made.make(Path(folder), NETWORK)
        front = ("--front", "native")
        contenders = (
            ours(NATIVE, made.repository, *front),
            ours(SAMPLING, made.repository, *front, "--sample-rate", str(RATE)),
        )
        servers = [stack.enter_context(running(one, made.images)) for one in contenders]
        read = stack.enter_context(_shadow(servers[1]))
        rounds.ask_in_turn(servers, CASES, made, found, times, progress, seconds=SECONDS)
    if not read:
        raise SystemExit("error: the shadow was given no row")
    claimed = [_claim(found, case) for case in CASES]
    shown.claimed(claimed)
    print(f"the shadow has read {sum(read):,} rows in {len(read):,} messages")
    measured.write(
        "sampling",
        {
            "network": NETWORK,
            "rate": RATE,
            "rows_read": sum(read),
            "claims": [
                {"what": one.what, "found": one.shown, "limit": one.bound, "holds": one.holds}
                for one in claimed
            ],
            "outcomes": {
                f"{case}: {name}": [asdict(outcome) for outcome in outcomes]
                for (name, case), outcomes in found.outcomes.items()
            },
        },
    )


@contextmanager
def _shadow(server: Running) -> Iterator[list[int]]:
    """Read what a server samples; give the rows of every message so far."""
    read: list[int] = []
    with Client(f"127.0.0.1:{server.port}") as client:

        def follow() -> None:
            with suppress(ServerError):  # that the client is closed
                read.extend(len(rows.inputs) for rows in client.sample())

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield read
        finally:
            client.close()
            thread.join()


def _claim(found: Measured, case: Case) -> Claim:
    values = found.ratios(SAMPLING, NATIVE, case, CPU)
    logs = np.log(values)
    upper = float(np.exp(logs.mean() + CONFIDENT * logs.std(ddof=1) / len(logs) ** 0.5))
    named = f"{case.name}: server CPU a request, sampling {RATE:.0%} / none"
    return Claim(named, values, LIMIT, False, upper)


if __name__ == "__main__":
    typer.run(main)
