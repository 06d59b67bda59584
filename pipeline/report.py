"""Show what a bundle promises."""

from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from protos import bundle_pb2

COLUMNS = ("format", "size", "accuracy", "agreed", "|Δlogit|", "allowed", "images/s")
FEW = 1000  # of a unit of size: from there on the next
SLOWER = 0.8  # of float32's images/s: less is no accident of the clock


def table(manifest: bundle_pb2.BundleManifest) -> Group:
    """Return one row a format, the original first, the served model last, and remarks below."""
    drawn = Table(
        title=f"{manifest.name} version {manifest.version}, on {_images(manifest)}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    for row in rows(manifest):
        drawn.add_row(*row)
    return Group(drawn, *(Text(f"{line}.") for line in remarks(manifest)))


def markdown(manifest: bundle_pb2.BundleManifest, path: Path) -> str:
    """Return the same table as Markdown, with the path of the bundle."""
    lines = [
        f"**{manifest.name} version {manifest.version}**, on {_images(manifest)}: `{path}`",
        "",
        f"| {' | '.join(COLUMNS)} |".replace("|Δlogit|", "Δlogit"),
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows(manifest)),
        "",
        *(f"- {line.replace('|', '')}." for line in remarks(manifest)),
    ]
    return "\n".join(lines)


def rows(manifest: bundle_pb2.BundleManifest) -> list[tuple[str, ...]]:
    """Return the cells of the table, one tuple a format."""
    original = manifest.evaluation
    first = (
        "original",
        _size(original.size_bytes),
        f"{original.accuracy.value:.2%}",
        "",
        "",
        "",
        f"{original.images_per_second:,.0f}",
    )
    return [first, *(_row(report) for report in (*manifest.parity, manifest.served))]


def remarks(manifest: bundle_pb2.BundleManifest) -> list[str]:
    """Return what the table's figures mean where they need a word, one sentence each.

    What failed, with its reason; what passed and is of no use: a variant that quantised nothing,
    or is bigger or slower than float32 of its format.
    """
    said = []
    if any(report.budget.precision == "int8" for report in manifest.parity):
        said.append("|Δlogit| is the largest; of variants with integers the 99.9th percentile")
    by_name = {report.variant: report for report in manifest.parity}
    for report in manifest.parity:
        usual = by_name.get(f"{report.variant.partition('-')[0]}-float32")
        if not report.passed:
            said.append(f"{report.variant} is not in the bundle: {report.failure}")
        elif usual is not None and report.variant != usual.variant:
            faults = _faults(report, usual)
            said.extend([f"{report.variant} is {' and '.join(faults)}"] if faults else [])
    return said


def _faults(report: bundle_pb2.ParityReport, usual: bundle_pb2.ParityReport) -> list[str]:
    """Return what speaks against a variant, held against float32 of its format."""
    # To the last bit of every statistic: the same weights.
    if (report.logits, report.probabilities) == (usual.logits, usual.probabilities):
        return [f"{usual.variant} again: it quantised nothing"]
    faults = []
    if report.size_bytes > usual.size_bytes:
        faults.append(f"bigger than {usual.variant}")
    if report.images_per_second < SLOWER * usual.images_per_second:
        times = usual.images_per_second / report.images_per_second
        faults.append(f"{times:.1f} times slower than {usual.variant}")
    return faults


def _row(report: bundle_pb2.ParityReport) -> tuple[str, ...]:
    served = " (gRPC)" if report.variant == "served" else ""
    name = report.variant + served
    if not report.accuracy.rows:  # never ran
        return (name, "", "failed", "", "", f"{report.budget.max_logit:.1e}", "")
    is_int8 = report.budget.precision == "int8"
    return (
        name,
        _size(report.size_bytes),
        f"{report.accuracy.value:.2%}",
        f"{report.agreement:.2%}" if report.passed else "failed",
        f"{report.logits.p999 if is_int8 else report.logits.max:.1e}",
        f"{report.budget.max_logit:.1e}",
        f"{report.images_per_second:,.0f}",
    )


def _images(manifest: bundle_pb2.BundleManifest) -> str:
    return f"{manifest.dataset.test_rows:,} test images"


def _size(size_bytes: int) -> str:
    """Return at most seven characters."""
    kib = size_bytes / 1024
    if kib < FEW:
        return f"{kib:.0f} KiB"
    mib = kib / 1024
    return f"{mib:.1f} MiB" if mib < FEW / 10 else f"{mib:.0f} MiB"
