"""What serving costs: our server beside the naive ones, beside other systems, and beside the model.

    python benchmarks/serving.py                       # ours, the naive servers, the model itself
    python benchmarks/serving.py --peers mosec,kserve  # each of them, beside ours and a naive one

All servers serve one ONNX file, the network conv10 with random weights as our pipeline exports it,
and are asked by h2load, in turn, round after round. Shown are medians; a ratio is taken within a
round; what was measured while the host had taken a core is measured again (benchmarks/steady.py).
Everything runs on 127.0.0.1 and needs no network. Writes benchmarks/results/serving.json (or
peers.json, or peers-mosec.json for one of them), and a picture beside it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import claims, load, measured, pictured, rounds, shown
from benchmarks.claims import Claim
from benchmarks.contenders import (
    GRPCIO,
    GRPCIO_2,
    NATIVE,
    NATIVE_2,
    Contender,
    Running,
    naive,
    ours,
    running,
)
from benchmarks.load import Load
from benchmarks.peers.catalog import NAMES, contenders
from benchmarks.rounds import Case, Made, Measured
from benchmarks.steady import TRIES
from service import host

PAIRED_SECONDS = 1.0  # of one load with batching, or without
# Where a process's memory came to lie makes it some per cent faster or slower for all its life, so
# that all are started anew after so many rounds.
ROUNDS_A_START = 3
NETWORK = "conv10"
WITHOUT_BATCHES = "ours, native, without batching"
SINGLE = ("--front", "native", "--io-threads", "1")
CASES = (
    Case("1 image, 1 in flight", 1, Load(1)),
    Case("1 image, 8 in flight", 1, Load(8)),
    Case("1 image, 64 in flight", 1, Load(1, 64)),  # on one connection, as a channel of gRPC
    Case("1 image, 64 in flight over 8 connections", 1, Load(8, 8)),
    Case("1 image, 64 in flight over 64 connections", 1, Load(64)),
    Case("32 images, 4 in flight", 32, Load(4)),
    Case("128 images, 1 in flight", 128, Load(1)),
    Case("128 images, 4 in flight", 128, Load(4)),
)
ONE, _, MANY, SHARED, SINGLY, _, _, BATCH = CASES


def main(
    times: Annotated[int, typer.Option("--rounds", min=5, help="Medians are of these.")] = 9,
    pairs: Annotated[int, typer.Option(min=20, help="Rounds with and without batching.")] = 36,
    peers: Annotated[str, typer.Option(help="Other systems, by commas, each in turn.")] = "",
) -> None:
    """Measure, print, draw and write."""
    load.check_installed()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)
        ) as progress,
    ):
        progress.console.print(f"making {NETWORK} and its bundle")
        made = Made.make(Path(folder), NETWORK)
        if peers:
            found, claimed = _beside_peers(made, peers.split(","), times, progress)
        else:
            found, claimed = _alone(made, times, pairs, progress)
    name = "serving"
    if peers:
        every = set(peers.split(",")) >= set(NAMES)
        name = "peers" if every else f"peers-{peers.replace(',', '-')}"
    shown.outcomes(found, CASES)
    shown.claimed(claimed)
    steady = made.steady
    print(
        f"{steady.repeated} loads were measured again, because the host had taken a core; "
        f"{steady.unsteady} count although it had in all {TRIES} tries"
    )
    figures = {
        "network": NETWORK,
        "measured_again": steady.repeated,
        "unsteady": steady.unsteady,
        "seconds": rounds.SECONDS,
        "rounds_a_start": ROUNDS_A_START,
        "claims": [
            {"what": one.what, "found": one.shown, "limit": one.bound, "holds": one.holds}
            for one in claimed
        ],
        "outcomes": {
            f"{case}: {name}": [asdict(outcome) for outcome in outcomes]
            for (name, case), outcomes in found.outcomes.items()
        },
        "limits": found.limits,
        "first_answer_s": found.starts_s,
        "idle_pss_mib": found.pss_mib,
    }
    measured.write(name, figures)
    print(f"drawn in {pictured.serving(found.outcomes, measured.RESULTS / f'{name}.png')}")


def _alone(made: Made, times: int, pairs: int, progress: Progress) -> tuple[Measured, list[Claim]]:
    """Measure our server, the naive ones, and the model itself."""
    contenders = [
        naive("aio", made.onnx),
        naive("sync", made.onnx),
        *_natives(made),
        ours(GRPCIO, made.repository, "--front", "grpcio"),
        ours(GRPCIO_2, made.repository, "--front", "grpcio", "--workers", "2"),
    ]
    found, paired = Measured(), Measured()
    rounds.start_often(contenders, made, found, times, progress)
    for asked in _by_start(times):
        _ask_all(contenders, made, found, asked, progress)
    both = [
        ours(NATIVE, made.repository, *SINGLE),
        ours(WITHOUT_BATCHES, made.repository, *SINGLE, "--max-batch-rows", "1"),
    ]
    for asked in _by_start(pairs):
        with ExitStack() as stack:
            started = [stack.enter_context(running(one, made.images)) for one in both]
            rounds.ask_in_turn(
                started, (ONE,), made, paired, asked, progress, seconds=PAIRED_SECONDS
            )
    claimed = [
        *claims.of_serving(found, one=ONE, many=MANY, shared=SHARED, batch=BATCH),
        *claims.of_many(found, SINGLY),
        claims.of_batching(paired, ONE, NATIVE, WITHOUT_BATCHES, a_start=ROUNDS_A_START),
    ]
    return found, claimed


def _by_start(times: int) -> Iterator[int]:
    """Give how many rounds there are between one start of the processes and the next."""
    for done in range(0, times, ROUNDS_A_START):
        yield min(ROUNDS_A_START, times - done)


def _ask_all(
    contenders: Sequence[Contender], made: Made, found: Measured, times: int, progress: Progress
) -> None:
    """Start every server and ask it some times in every way, and the model itself in between."""
    with ExitStack() as stack:
        started = [stack.enter_context(running(one, made.images)) for one in contenders]
        limits = {
            "onnxruntime": stack.enter_context(rounds.limit("onnx", made.onnx)),
            "TensorFlow": stack.enter_context(rounds.limit("saved-model", made.saved_model)),
        }
        _say_idle(started, progress)

        def measure_limits() -> None:
            for name, measure in limits.items():
                found.limits.setdefault(name, []).append(made.steady.measure(measure))

        rounds.ask_in_turn(started, CASES, made, found, times, progress, measure_limits)


def _beside_peers(
    made: Made, names: Sequence[str], times: int, progress: Progress
) -> tuple[Measured, list[Claim]]:
    """Measure each other system beside ours and a naive one, in rounds of its own."""
    found, claimed = Measured(), []
    for peer in contenders(made.onnx, names):
        own = Measured()
        beside = [
            naive("aio", made.onnx),
            *_natives(made),
            peer,
        ]
        for asked in _by_start(times):
            with ExitStack() as stack:
                started = [stack.enter_context(running(one, made.images)) for one in beside]
                _say_idle(started, progress)
                found.starts_s.setdefault(peer.name, []).append(started[-1].first_answer_s)
                found.pss_mib.setdefault(peer.name, []).append(load.pss_mib(started[-1].pid))
                rounds.ask_in_turn(started, (ONE, MANY, BATCH), made, own, asked, progress)
        claimed += claims.of_peer(own, MANY, peer.name)
        for (name, case), outcomes in own.outcomes.items():
            named = name if name == peer.name else f"{name}, beside {peer.name}"
            found.outcomes[named, case] = outcomes
    return found, claimed


def _natives(made: Made) -> list[Contender]:
    """Return our native front for a lone client, and for many requests at a time."""
    two = ("--io-threads", "2", "--io-cpus", str(min(host.cpus())))
    return [
        ours(NATIVE, made.repository, *SINGLE),
        ours(NATIVE_2, made.repository, "--front", "native", *two),
    ]


def _say_idle(servers: Sequence[Running], progress: Progress) -> None:
    share = load.idle_cpu([server.pid for server in servers])
    progress.console.print(f"all servers idle: {share:.1%} of a core")


if __name__ == "__main__":
    typer.run(main)
