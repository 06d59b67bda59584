"""Say whether a model's files answer alike: those of a bundle, or any pair that somebody has.

For the CI of those who export and serve: the statistics and the rule are those of the server.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.errors import CheckError, UsageError
from pipeline.questions import RANK, Questions, cast, fits
from pipeline.runtimes import Array, Model, Show, Tensor, answers, counted, open_model
from protos import bundle_pb2
from service import agreement, bundle
from service.errors import BundleError

WORST_ROWS = 3
LOGITS = "logits"
PROBABILITIES = "probabilities"
INT8 = "int8"
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Found:
    """What a check has found."""

    reports: tuple[bundle_pb2.ParityReport, ...]
    notes: tuple[str, ...] = ()
    worst: dict[str, tuple[int, ...]] = field(default_factory=dict)  # rows by variant, worst first

    @property
    def failure(self) -> str:
        """Why parity does not hold, in one sentence; empty if it does."""
        failed = [f"{one.variant}: {one.failure}" for one in self.reports if not one.passed]
        return f"parity does not hold, {'; '.join(failed)}" if failed else ""


def pair(  # noqa: PLR0913  one argument an option of the command
    reference: Path,
    candidate: Path,
    asked: Callable[[Tensor], Questions],
    *,
    precision: str = "float32",
    output: str = "",
    signature: str = "serving_default",
    show: Show = lambda done, total: None,
) -> Found:
    """Hold one model file against another.

    Args:
        reference: usually a SavedModel; ONNX and TFLite work as well.
        candidate: what is to answer like it.
        asked: makes the questions, for the reference's input.
        precision: whose budget: float32, float16 or int8.
        output: name of the output in both; empty: `logits`, or the only one.
        signature: of SavedModels.
        show: told of the progress, in rows of both models.

    Raises:
        CheckError: a file cannot be run, or the two do not take and give the same.
    """
    if precision not in agreement.COEFFICIENT:
        raise UsageError(
            f"the precision is {precision!r}, expected one of {', '.join(agreement.COEFFICIENT)}"
        )
    first, second = (open_model(path, signature=signature) for path in (reference, candidate))
    questions = asked(first.input)
    if not len(questions.rows):
        raise UsageError("there are no rows to ask about")
    names = _output(first, output), _output(second, output)
    rows, notes = _laid_out(questions.rows, first.input, second.input)
    told = counted(show, 2 * len(rows))
    outputs = answers(second, rows, told)
    found = answers(first, questions.rows, told)[names[0]], outputs[names[1]]
    if found[0].shape != found[1].shape:
        raise CheckError(
            f"{candidate.name} answers {names[1]} of shape {list(found[1].shape)}, "
            f"{reference.name} {names[0]} of shape {list(found[0].shape)}; choose with --output"
        )
    logits = all(LOGITS in name for name in names) and found[0].ndim == 2  # noqa: PLR2004
    truth = questions.labels
    if logits and truth is not None and not (truth.min() >= 0 and truth.max() < len(found[0].T)):
        raise UsageError(
            f"the labels go from {truth.min()} to {truth.max()}, the models have "
            f"{len(found[0].T)} classes"
        )
    report = _compared(*found, truth, precision=precision, logits=logits)
    if logits:
        _check_probabilities(report, outputs, names[1])
    report.variant, report.path = candidate.name, str(candidate)
    if not logits:
        notes.append(f"{names[0]} and {names[1]} are no logits: judged by their differences alone")
    worst = {candidate.name: _worst(*found)}
    return Found((report,), tuple(notes), {} if report.passed else worst)


def whole_bundle(
    path: Path, against: Path | None = None, show: Show = lambda done, total: None
) -> Found:
    """Check a bundle: digests, labels in every file, and every variant's answers to the golden set.

    Args:
        path: NAME/VERSION.
        against: a SavedModel that the golden set must have been answered by.
        show: told of the progress, in files.

    Raises:
        CheckError: a file is not what the manifest says, or cannot be run.
    """
    try:
        content = bundle.read(path)
    except BundleError as error:
        raise CheckError(str(error)) from error
    manifest, golden = content.manifest, content.golden
    output = bundle.checked_output(manifest)
    reports, worst = [], {}
    runnable = _runnable(path, manifest)
    told = counted(show, len(runnable) + (against is not None))
    if against is not None:
        original = open_model(against)
        report = _golden(manifest, golden, *_answers(original, output, golden)[:2], "float32")
        report.variant, report.path = "golden set", bundle.GOLDEN
        if report.failure:
            report.failure += f"; {against} is not the model that answered it"
        reports.append(report)
        told(1)
    for published in runnable:
        options = manifest.session if published.path == bundle.MODEL else None
        model = open_model(path / published.path, options=options)
        found, hostile, outputs = _answers(model, output, golden)
        report = _golden(manifest, golden, found, hostile, published.budget.precision)
        if not _generic(manifest):
            _check_probabilities(report, outputs, output)
        report.variant, report.path = published.variant, published.path
        _check_labels(model, manifest, report)
        reports.append(report)
        if not report.passed:
            worst[report.variant] = _worst(golden.outputs, found)
        told(1)
    return Found(tuple(reports), (), worst)


def table(found: Found) -> Group:
    """Return one row a variant, with its worst rows and all notes below."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("variant", overflow="fold")
    for name in ("rows", "agreement", "|Δ|", "allowed", "flips"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("verdict", no_wrap=True)
    for one in found.reports:
        drawn.add_row(
            Text(one.variant),
            f"{one.accuracy.rows:,}",
            f"{one.agreement:.2%}",
            f"{agreement.judged(one):.2g}",
            f"{one.budget.max_logit:.2g}",
            str(one.flips_explained + one.flips_unexplained),
            "[green]passed[/]" if one.passed else "[red]failed[/]",
        )
    lines = [*found.notes]
    if any(one.budget.precision == INT8 for one in found.reports):
        lines.append("|Δ| is the largest; of variants with integers the 99.9th percentile")
    for name, rows in found.worst.items():
        lines.append(f"{name} is furthest off on the rows {', '.join(map(str, rows))}")
    return Group(drawn, *(Text(f"{line}.") for line in lines))


def as_json(found: Found) -> str:
    """Return the reports as a JSON array, and what else was found."""
    reports = [
        json_format.MessageToDict(one, preserving_proto_field_name=True) for one in found.reports
    ]
    content = {"failure": found.failure, "notes": found.notes, "worst": found.worst}
    return json.dumps({**content, "reports": reports}, indent=1, ensure_ascii=False)


def _runnable(path: Path, manifest: bundle_pb2.BundleManifest) -> list[bundle_pb2.ParityReport]:
    """Return the published reports whose files are in the bundle, and the served file's."""
    found = [one for one in manifest.parity if one.passed and (path / one.path).exists()]
    served = next((one for one in manifest.parity if one.variant == manifest.served_variant), None)
    if served is None:
        raise CheckError(
            f"{bundle.shown(path)} has no report of its served variant "
            f"{manifest.served_variant!r}; publish it again"
        )
    model = bundle_pb2.ParityReport()
    model.CopyFrom(served)
    model.variant, model.path = bundle.MODEL, bundle.MODEL
    return [*found, model]


def _generic(manifest: bundle_pb2.BundleManifest) -> bool:
    return manifest.kind == bundle_pb2.KIND_GENERIC


def _answers(
    model: Model, output: str, golden: bundle.Golden
) -> tuple[Floats, Floats, dict[str, Array]]:
    """Return what it answers to the golden inputs and the hostile ones, and all its outputs."""
    name = _output(model, output)
    outputs, hostile = (model.run(rows) for rows in (golden.inputs, golden.hostile_inputs))
    first, second = (found[name].astype(np.float32, copy=False) for found in (outputs, hostile))
    return first, second, outputs


def _check_probabilities(
    report: bundle_pb2.ParityReport, outputs: dict[str, Array], name: str
) -> None:
    """Fail a model that passed, but whose probabilities are not those of its logits."""
    if PROBABILITIES in outputs and name != PROBABILITIES:
        logits, found = (outputs[one].astype(np.float32) for one in (name, PROBABILITIES))
        agreement.judge_probabilities(report, logits, found)


def _golden(
    manifest: bundle_pb2.BundleManifest,
    golden: bundle.Golden,
    answers: Floats,
    hostile: Floats,
    precision: str,
) -> bundle_pb2.ParityReport:
    """Hold answers to the golden set to the budget that was published."""
    scale = next(one.budget.scale for one in manifest.parity if one.HasField("budget"))
    allowed = agreement.Budget(precision, scale)
    try:
        report = agreement.compare_by_kind(
            golden.outputs,
            answers,
            golden.labels,
            allowed=allowed,
            class_names=[] if _generic(manifest) else list(manifest.labels),
        )
        agreement.add_hostile(report, golden.hostile_outputs, hostile)
    except (ValueError, KeyError) as error:
        raise CheckError(f"{manifest.name} {manifest.version}: {error}") from error
    return report


def _check_labels(
    model: Model, manifest: bundle_pb2.BundleManifest, report: bundle_pb2.ParityReport
) -> None:
    """Fail a file that names its classes otherwise than its manifest: no logit shows it."""
    said = model.texts.get("labels")
    promised = list(manifest.labels)
    if said is not None and promised and said != json.dumps(promised):
        report.passed = False
        report.failure = f"the file has the labels {said[:300]}, the manifest {str(promised)[:300]}"


def _compared(
    reference: Array,
    candidate: Array,
    labels: NDArray[np.integer] | None,
    *,
    precision: str,
    logits: bool,
) -> bundle_pb2.ParityReport:
    first, second = (array.astype(np.float32, copy=False) for array in (reference, candidate))
    try:
        allowed = agreement.budget(precision, first)
        if not logits:
            return agreement.compare_outputs(first, second, allowed=allowed)
        truth = first.argmax(axis=1) if labels is None else labels
        names = [str(place) for place in range(first.shape[1])]
        return agreement.compare(first, second, truth, allowed=allowed, class_names=names)
    except ValueError as error:
        raise CheckError(str(error)) from error


def _output(model: Model, wanted: str) -> str:
    """Return the name of the output to compare."""
    names = [one.name for one in model.outputs]
    for name in (wanted, "" if wanted else LOGITS):
        if name in names:
            return name
    if not wanted and len(names) == 1:
        return names[0]
    missing = f"no output {wanted!r}" if wanted else "several outputs"
    raise UsageError(f"{model.path} has {missing}: {', '.join(names)}; choose one with --output")


def _laid_out(rows: Array, first: Tensor, second: Tensor) -> tuple[Array, list[str]]:
    """Return the rows as the candidate takes them, and what was done to them."""
    notes = []
    if rows.ndim == RANK and not fits(rows.shape, second.shape):
        turned = rows.transpose(0, 3, 1, 2)
        if fits(turned.shape, second.shape):
            rows = np.ascontiguousarray(turned)
            notes.append("the candidate takes its channels first: images were transposed for it")
    if not fits(rows.shape, second.shape):
        raise CheckError(
            f"the candidate takes {list(second.shape)}, the reference {list(first.shape)}: rows of "
            f"shape {list(rows.shape[1:])} do not fit"
        )
    if rows.dtype != second.dtype:
        rows = cast(rows, second)
        notes.append(f"the candidate takes {second.dtype}: the same numbers were given to it so")
    return rows, notes


def _worst(reference: Array, candidate: Array) -> tuple[int, ...]:
    apart = np.abs(reference.astype(np.float64) - candidate.astype(np.float64))
    largest = np.where(np.isfinite(apart), apart, np.inf).reshape(len(apart), -1).max(axis=1)
    return tuple(int(row) for row in np.argsort(-largest, kind="stable")[:WORST_ROWS])
