"""Show what a bundle promises."""

from pathlib import Path

from rich import box
from rich.table import Table

from protos import bundle_pb2

COLUMNS = ("format", "size", "test accuracy", "agreement", "max |Δlogit|", "images/s")


def table(manifest: bundle_pb2.BundleManifest) -> Table:
    """Return one row a format: the original first, the served model last."""
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
    return drawn


def markdown(manifest: bundle_pb2.BundleManifest, path: Path) -> str:
    """Return the same table as Markdown, with the path of the bundle."""
    lines = [
        f"**{manifest.name} version {manifest.version}**, on {_images(manifest)}: `{path}`",
        "",
        f"| {' | '.join(COLUMNS)} |".replace("|Δlogit|", "Δlogit"),
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows(manifest)),
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
        f"{original.images_per_second:,.0f}",
    )
    return [first, *(_row(report) for report in (*manifest.parity, manifest.served))]


def _row(report: bundle_pb2.ParityReport) -> tuple[str, ...]:
    served = " (gRPC)" if report.variant == "served" else ""
    return (
        report.variant + served,
        _size(report.size_bytes),
        f"{report.accuracy.value:.2%}",
        f"{report.agreement:.2%}",
        f"{report.logits.max:.2e}",
        f"{report.images_per_second:,.0f}",
    )


def _images(manifest: bundle_pb2.BundleManifest) -> str:
    allowed = manifest.served.budget.max_logit
    return f"{manifest.dataset.test_rows:,} test images; |Δlogit| may be {allowed:.1e}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1024:,.0f} KiB"
