"""Show what a bundle promises: on a terminal of 80 columns, and as Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from protos import bundle_pb2
from service import agreement
from service.command_line import size

COLUMNS = ("format", "size", "accuracy", "agreed", "|Δlogit|", "allowed", "images/s")
GENERIC_COLUMNS = ("format", "size", "verdict", "|Δ|", "allowed", "rows/s")
SLOWER = 0.8  # of float32's images/s: less is no accident of the clock
NAMED = 3  # pairs of classes in one line
MATRIX_CLASSES = 20  # a wider matrix is no longer read
MILLION = 1_000_000
DIGITS = 10  # milliseconds below it are shown to the hundredth


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table before it is drawn; its first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def drawn(self) -> Table:
        """Return it for a terminal."""
        table = Table(
            title=Text(self.title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> list[str]:
        """Return its lines as Markdown, without the title."""
        lines = (self.columns, ("---",) * len(self.columns), *self.rows)
        return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def table(manifest: bundle_pb2.BundleManifest) -> Group:
    """Return what is known of the original, one row a format, how fast each is, and remarks."""
    known = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts(manifest):
        known.add_row(Text(name), Text(value))
    speed = speeds(manifest)
    return Group(
        known,
        formats(manifest).drawn(),
        *((speed.drawn(),) if speed.rows else ()),
        *(Text(f"{line}.") for line in remarks(manifest)),
    )


def markdown(manifest: bundle_pb2.BundleManifest, path: Path) -> str:
    """Return the same as Markdown, with the path of the bundle, and what each class came to."""
    speed = speeds(manifest)
    sheets = [*([speed] if speed.rows else []), *evaluated(manifest.evaluation)]
    lines = [
        f"**{_title(manifest)}**: `{path}`",
        "",
        *(f"- {name}: {cell(value)}" for name, value in facts(manifest)),
        "",
        *formats(manifest).markdown(),
        "",
        *(f"- {cell(line)}." for line in remarks(manifest)),
        *sections(sheets),
    ]
    return "\n".join(lines)


def sections(sheets: list[Sheet]) -> Iterator[str]:
    """Give the lines of several tables as Markdown, each below its title."""
    for sheet in sheets:
        yield from ("", f"**{sheet.title}**", "", *sheet.markdown())


def cell(text: str) -> str:
    """Return a text that ends no cell and no line of Markdown."""
    return " ".join(text.replace("|", "\\|").split())


def facts(manifest: bundle_pb2.BundleManifest) -> list[tuple[str, str]]:
    """Return name and value of what is known of the original, as far as it is."""
    found, training = manifest.evaluation, manifest.training
    pairs = [f"{one.label} as {one.predicted} {one.rows:,}" for one in found.confused[:NAMED]]
    weakest = min(found.classes, key=lambda one: one.f1, default=None)
    lines = {
        "network": _network(training),
        "trained": _trained(training),
        "accuracy": _accuracy(found.accuracy) if found.classes else "",
        _loss_name(manifest): f"{found.loss:.4g}",
        "calibration error": f"{found.calibration_error:.4f}" if found.classes else "",
        "weakest class": f"{weakest.label}, F1 {weakest.f1:.3f}" if weakest else "",
        "most confused": ", ".join(pairs),
        "champion": _champion(found) if found.HasField("champion") else "",
    }
    return [(name, value) for name, value in lines.items() if value]


def formats(manifest: bundle_pb2.BundleManifest) -> Sheet:
    """Return one row a format, the original first, the served model last."""
    columns = COLUMNS if _classifies(manifest) else GENERIC_COLUMNS
    return Sheet(_title(manifest), columns, tuple(rows(manifest)))


def rows(manifest: bundle_pb2.BundleManifest) -> list[tuple[str, ...]]:
    """Return the cells of the table, one tuple a format."""
    found = manifest.evaluation
    classifies = _classifies(manifest)
    row = _row if classifies else _generic_row
    unheld = (f"{found.accuracy.value:.2%}", "", "", "") if classifies else ("", "", "")
    original = (
        "original",
        size(found.size_bytes),
        *unheld,
        f"{found.images_per_second:,.0f}",
    )
    return [original, *(row(report) for report in (*manifest.parity, manifest.served))]


def speeds(manifest: bundle_pb2.BundleManifest) -> Sheet:
    """Return how long each format takes to load and to answer, and its memory; those measured."""
    measured = [one for one in manifest.parity if one.load_seconds or one.latencies]
    sizes = sorted({one.rows for report in measured for one in report.latencies})
    return Sheet(
        "milliseconds to load, and of a call, p50/p99",
        ("format", "load", *(f"{rows} row{'s' * (rows > 1)}" for rows in sizes), "peak RSS"),
        tuple(_speed_row(report, sizes) for report in measured),
    )


def evaluated(found: bundle_pb2.Evaluation) -> list[Sheet]:
    """Return what is known of each class, of pairs of them, and of single rows; no empty table."""
    labels = [one.label for one in found.classes]
    sheets = [
        Sheet(
            "classes",
            ("class", "rows", "precision", "recall", "F1"),
            tuple(
                (
                    one.label,
                    f"{one.rows:,}",
                    *map("{:.4f}".format, (one.precision, one.recall, one.f1)),
                )
                for one in found.classes
            ),
        ),
        Sheet(
            "true class, and what it was taken for",
            ("class", *labels),
            tuple(
                (label, *(f"{count:,}" for count in row.predicted))
                for label, row in zip(labels, found.confusion, strict=True)
            )
            if len(labels) <= MATRIX_CLASSES
            else (),
        ),
        Sheet(
            "most confused",
            ("class", "taken for", "rows"),
            tuple((one.label, one.predicted, f"{one.rows:,}") for one in found.confused),
        ),
        Sheet(
            "most confident mistakes",
            ("test row", "class", "taken for", "probability"),
            tuple(
                (str(one.row), one.label, one.predicted, f"{one.probability:.4f}")
                for one in found.hardest
            ),
        ),
    ]
    return [sheet for sheet in sheets if sheet.rows]


def remarks(manifest: bundle_pb2.BundleManifest) -> list[str]:
    """Return what the table's figures mean where they need a word, one sentence each.

    What failed, with its reason; what passed and is of no use: a variant that quantised nothing,
    or is bigger or slower than float32 of its format.
    """
    said = []
    if any(report.budget.precision == "int8" for report in manifest.parity):
        delta = "|Δlogit|" if _classifies(manifest) else "|Δ|"
        said.append(f"{delta} is the largest; of variants with integers the 99.9th percentile")
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
    if not report.accuracy.rows:  # never ran
        return (_name(report), "", "failed", "", "", f"{report.budget.max_logit:.1e}", "")
    return (
        _name(report),
        size(report.size_bytes),
        f"{report.accuracy.value:.2%}",
        f"{report.agreement:.2%}" if report.passed else "failed",
        _judged(report),
        f"{report.budget.max_logit:.1e}",
        f"{report.images_per_second:,.0f}",
    )


def _generic_row(report: bundle_pb2.ParityReport) -> tuple[str, ...]:
    verdict, allowed = "passed" if report.passed else "failed", f"{report.budget.max_logit:.1e}"
    if not report.accuracy.rows:  # never ran
        return (_name(report), "", verdict, "", allowed, "")
    speed = f"{report.images_per_second:,.0f}"
    return (_name(report), size(report.size_bytes), verdict, _judged(report), allowed, speed)


def _speed_row(report: bundle_pb2.ParityReport, sizes: list[int]) -> tuple[str, ...]:
    took = {one.rows: one for one in report.latencies}
    return (
        _name(report),
        _milliseconds(report.load_seconds),
        *(
            f"{_milliseconds(took[rows].p50_seconds)}/{_milliseconds(took[rows].p99_seconds)}"
            if rows in took
            else ""
            for rows in sizes
        ),
        size(1024 * report.peak_rss_kib) if report.peak_rss_kib else "",
    )


def _name(report: bundle_pb2.ParityReport) -> str:
    return report.variant + (" (gRPC)" if report.variant == "served" else "")


def _judged(report: bundle_pb2.ParityReport) -> str:
    return f"{agreement.judged(report):.1e}"


def _network(training: bundle_pb2.Training) -> str:
    if not training.parameters:
        return ""
    name = f"{training.architecture}, " if training.architecture else ""
    adds = training.multiply_adds
    shown = f"{adds / MILLION:.1f} M" if adds >= MILLION else f"{adds:,.0f}"
    more = f", {shown} multiply-adds" if adds else ""
    return f"{name}{training.parameters:,} parameters{more}"


def _trained(training: bundle_pb2.Training) -> str:
    seconds = sum(epoch.seconds for epoch in training.history)
    return (
        f"{len(training.history)} epochs in {seconds:,.0f} s on {training.device}, "
        f"the best is epoch {training.best_epoch}"
        if training.history
        else ""
    )


def _accuracy(found: bundle_pb2.Accuracy) -> str:
    return f"{found.value:.2%}, 95 % interval {found.low:.2%} to {found.high:.2%}"


def _champion(found: bundle_pb2.Evaluation) -> str:
    old = found.champion
    return (
        f"version {old.version}: {old.correct / found.accuracy.rows:.2%}; right only now "
        f"{old.only_new:,}, only then {old.only_champion:,}, p {old.mcnemar_p:.2g}"
    )


def _loss_name(manifest: bundle_pb2.BundleManifest) -> str:
    return "loss" if _classifies(manifest) else "mean squared error"


def _classifies(manifest: bundle_pb2.BundleManifest) -> bool:
    return manifest.kind != bundle_pb2.KIND_GENERIC


def _title(manifest: bundle_pb2.BundleManifest) -> str:
    what = "images" if _classifies(manifest) else "rows"
    return (
        f"{manifest.name} version {manifest.version}, on {manifest.dataset.test_rows:,} test {what}"
    )


def _milliseconds(seconds: float) -> str:
    """Return at most five characters below a hundred seconds."""
    value = 1000 * seconds
    if value < DIGITS:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < DIGITS**2 else f"{value:.0f}"
