"""What the commands print for people: tables, and the sentence of a refusal.

Apart from `service.commands`, so that a server starts without the library that draws them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from protos import bundle_pb2, parity_pb2
from service import agreement
from service.doctor import Finding

console = Console()
BAR = 3  # characters
INT8 = "int8"
EIGHTHS = "▏▎▍▌▋▊▉"
LITTLE, MUCH = 0.1, 0.25  # as a population stability index is usually read


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


def show_parity(answer: parity_pb2.GetParityResponse) -> None:
    """Print what a server says about the parity of what it serves."""
    console.print(parity_view(answer))


def parity_view(answer: parity_pb2.GetParityResponse) -> Group:
    """Return what a server says about its parity: a table a version, and where it was checked."""
    parts: list[RenderableType] = []
    for one in answer.versions:
        parts += [_parity_table(one), *_failures(one), Text(_self_check(one.self_check))]
        if one.HasField("live"):
            parts.append(Text(_live(one.live)))
        parts.append("")
    return Group(*parts or ["nothing is loaded"])


def _failures(one: parity_pb2.VersionParity) -> list[Text]:
    found = [(report.variant, report.failure) for report in [*one.variants, one.self_check.report]]
    found.append(("live", one.live.failure))
    return [Text(f"{name} failed: {why}", "red") for name, why in found if why]


def _parity_table(one: parity_pb2.VersionParity) -> Table:
    rows = max((report.accuracy.rows for report in one.variants), default=0)
    table = Table(
        title=escape(f"{one.model} version {one.version}: parity with the original")
        + (f", on {rows:,} test images" if rows else ""),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", no_wrap=True)
    for name in ("accuracy", "agreement", "|Δ|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("allowed", no_wrap=True)
    table.add_column("flips", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    served = [one.served] if one.HasField("served") else []
    for report in [*one.variants, *served, one.self_check.report]:
        table.add_row(*_parity_row(report, rows))
    if one.HasField("live"):
        table.add_section()
        table.add_row(*_live_row(one.live))
    return table


def _parity_row(report: bundle_pb2.ParityReport, rows: int) -> list[str]:
    own = report.accuracy.rows
    classifies = report.reference_accuracy.rows > 0
    # As its verdict is of: integers are judged by a percentile.
    apart = agreement.judged(report)
    return [
        escape(report.variant) + (f", {own:,}" if own != rows else ""),
        f"{report.accuracy.value:.2%}" if classifies else "",
        f"{report.agreement:.2%}" if classifies else "",
        f"{apart:.2g}",
        _of_allowed(apart, report.budget.max_logit),
        _flips(report.flips_explained, report.flips_unexplained) if classifies else "",
        "[green]passed[/]" if report.passed else "[red]failed[/]",
    ]


def _live_row(live: parity_pb2.LiveParity) -> list[str]:
    window = live.window
    verdict = {
        parity_pb2.LIVE_VERDICT_PASSED: "[green]passed[/]",
        parity_pb2.LIVE_VERDICT_FAILED: "[red]failed[/]",
    }.get(live.verdict, "unknown")
    if not window.rows:
        return ["live", "", "", "", "", "", verdict]
    judged = live.budget.precision != INT8  # whose largest difference nothing is held to
    return [
        f"live, {window.rows:,}",
        "",
        f"{window.agreed / window.rows:.2%}",
        f"{window.max_logit:.2g}",
        _of_allowed(window.max_logit, live.budget.max_logit) if judged else "",
        _flips(window.flips_explained, window.flips_unexplained),
        verdict,
    ]


def _flips(explained: int, unexplained: int) -> str:
    """Return the explained flips, and in red the others, one of which is too many."""
    return f"{explained} [red]+ {unexplained}[/]" if unexplained else str(explained)


def _of_allowed(found: float, allowed: float) -> str:
    """Return a difference as a share of its budget: a bar, red beyond it, and a number."""
    share = found / allowed if allowed else math.inf
    if not share <= 1:
        return f"[red]{'█' * BAR} {'over':>4}[/]"
    eighths = math.ceil(share * BAR * 8)
    full, rest = divmod(eighths, 8)
    bar = "█" * full + (EIGHTHS[rest - 1] if rest else "")
    return f"[green]{bar:<{BAR}}[/] {share:>4.0%}"


def _self_check(check: parity_pb2.SelfCheck) -> str:
    session = check.session
    options = [f"graph {session.graph_optimization}"] if session.graph_optimization else []
    options += [f"{key}={value}" for key, value in sorted(session.config.items())]
    where = ", ".join((*check.gpus, check.cpu))
    said = (
        f"self-check on {where}, {check.threads} threads, {check.report.runtime}, "
        f"{check.checked}, {check.seconds * 1000:.0f} ms"
    )
    details = "; ".join(filter(None, (" ".join(check.cpu_flags), ", ".join(options))))
    return f"{said}\n{details}" if details else said


def _live(live: parity_pb2.LiveParity) -> str:
    window = live.window
    said = [
        f"live: the last {live.window_s:g} s; {live.total.rows:,} rows since it was loaded, "
        f"{live.sampled:,} sampled, reported {live.reported}"
    ]
    if window.rows and window.predicted:
        said.append(f"mean confidence {window.sum_confidence / window.rows:.1%}")
    for name, has in (("classes", "predicted_psi"), ("pixels", "pixel_mean_psi")):
        if live.HasField(has):  # type: ignore[arg-type] # one of two names
            said.append(f"{name} have drifted {_drift(getattr(live, has))}")
    if live.dropped:
        said.append(f"{live.dropped:,} rows dropped")
    return ", ".join(said)


def _drift(index: float) -> str:
    word = "little" if index < LITTLE else "some" if index < MUCH else "much"
    return f"{word} ({index:.2f})"
