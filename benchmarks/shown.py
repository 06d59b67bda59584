"""What the benchmarks of serving print."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.claims import Claim
from benchmarks.load import Outcome
from benchmarks.rounds import Case, Measured

FIGURES = {
    "requests/s": ("requests_per_second", ",.0f"),
    "p50": ("p50_ms", ".2f"),
    "p99": ("p99_ms", ".2f"),
    "server CPU": ("server_cpu_ms", ".3f"),
    "h2load CPU": ("client_cpu_ms", ".3f"),
}
console = Console(width=120)


def outcomes(found: Measured, cases: Sequence[Case]) -> None:
    """Print the medians of every server in every case, and of the model itself."""
    table = Table(box=box.SIMPLE_HEAD, title="medians; times in ms, processor time in ms a request")
    for column in ("asked", "server", *FIGURES, "images/s"):
        table.add_column(column, justify="left" if column in ("asked", "server") else "right")
    for case in cases:
        names = [name for name, other in found.outcomes if other == case.name]
        for place, name in enumerate(sorted(names)):
            rate = _median(found.outcomes[name, case.name], "requests_per_second")
            table.add_row(
                "" if place else case.name,
                name,
                *(
                    f"{_median(found.outcomes[name, case.name], key):{form}}"
                    for key, form in FIGURES.values()
                ),
                f"{rate * case.rows:,.0f}",
            )
        table.add_section()
    console.print(table)
    for name, rows in found.limits.items():
        one, many, cpu = (
            float(np.median([row[key] for row in rows]))
            for key in ("images_per_second_1", "images_per_second_128", "cpu_ms_128")
        )
        console.print(
            f"{name} in process: {one:,.0f} images/s singly; {many:,.0f} in batches of 128, a "
            f"caller a core, {cpu:.2f} ms of processor time a batch"
        )
    for name, starts in found.starts_s.items():
        console.print(
            f"{name}: first answer {np.median(starts):.2f} s after its launch, "
            f"idle with {np.median(found.pss_mib[name]):.0f} MiB"
        )


def claimed(claims: Sequence[Claim]) -> None:
    """Print what is claimed, and whether it holds."""
    table = Table(box=box.SIMPLE_HEAD, title="claims: ratios within a round")
    for column in ("what", "median (least to most)", "claimed", ""):
        table.add_column(column)
    for claim in claims:
        holds = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        table.add_row(claim.what, claim.shown, claim.bound, holds)
    console.print(table)


def _median(outcomes: Sequence[Outcome], figure: str) -> float:
    return float(np.median([getattr(outcome, figure) for outcome in outcomes]))
