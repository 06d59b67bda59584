"""What the commands print for people: tables, and the sentence of a refusal.

Apart from `service.commands`, so that a server starts without the library that draws them.
"""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protos import bundle_pb2, parity_pb2
from service.doctor import Finding

console = Console()


def show_refusal(reason: object) -> None:
    """Print one sentence on standard error."""
    Console(stderr=True, soft_wrap=True).print(
        f"[red]error:[/] {escape(str(reason))}", highlight=False
    )


def show_findings(findings: Sequence[Finding]) -> None:
    """Print what `doctor` found, and what to mend."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("looked at", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]mend[/]"
        advice = f"\n→ {escape(finding.advice)}" if finding.advice else ""
        table.add_row(mark, finding.area, f"{escape(finding.found)}{advice}")
    console.print(table)


def show_predictions(
    title: str, rows: Sequence[tuple[Path, Sequence[tuple[str, float]]]], *, top: int
) -> None:
    """Print the likeliest labels of every picture; they come with the likeliest first."""
    table = Table(title=title)
    table.add_column("image", overflow="fold")
    table.add_column("label", style="bold")
    table.add_column("probability", justify="right")
    for path, row in rows:
        for place, (label, probability) in enumerate(row[:top]):
            table.add_row("" if place else str(path), label, f"{probability:.2%}")
        table.add_section()
    console.print(table)


def show_parity(one: parity_pb2.VersionParity) -> None:
    """Print what a server says about one version: a row a variant, and where it was checked."""
    table = Table(
        title=escape(f"{one.model} version {one.version}: parity with the original"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", no_wrap=True)
    for name in ("images", "accuracy", "agreement", "max |Δ|", "allowed", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    served = [one.served] if one.HasField("served") else []
    for report in [*one.variants, *served, one.self_check.report]:
        table.add_row(*_parity_row(report))
    console.print(table)
    console.print(
        f"self-check on {one.self_check.cpu}, {one.self_check.threads} threads, "
        f"{one.self_check.checked}, {one.self_check.seconds * 1000:.0f} ms\n"
    )


def _parity_row(report: bundle_pb2.ParityReport) -> list[str]:
    return [
        escape(report.variant),
        str(report.accuracy.rows),
        f"{report.accuracy.value:.2%}",
        f"{report.agreement:.2%}",
        f"{report.logits.max:.2g}",
        f"{report.budget.max_logit:.2g}",
        str(report.flips_explained + report.flips_unexplained),
        "[green]passed[/]" if report.passed else f"[red]failed[/]: {escape(report.failure)}",
    ]
