"""Choose the rows to explain: the ones that a candidate answers worst."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline import questions
from pipeline.errors import UsageError
from pipeline.explain.divergence import Divergence, first_divergence
from pipeline.explain.tensors import Floats, Rows
from pipeline.runtimes import Model, Show, answers, counted, open_model
from protos import bundle_pb2
from service import agreement, bundle

ORIGINAL = "saved-model"
ASK, ROWS = "train-export explain", "--data ROWS, all test rows in an .npz or a folder"


@dataclass(frozen=True, slots=True)
class Asked:
    """Two models and the rows to walk."""

    reference: Path
    candidate: Path
    images: Rows
    config: Mapping[str, str] = field(default_factory=dict)
    allowed: agreement.Budget | None = None  # None: by the file
    apart: float | None = None  # over all rows; None: of these
    failure: str = ""  # of these models over more rows than were asked about, and how to ask them


def of_bundle(path: Path, variant: str, rows: int, show: Show = lambda done, total: None) -> Asked:
    """Take a variant's worst rows of the golden set and the hostile inputs.

    Args:
        path: the bundle.
        variant: its name, such as onnx-int8.
        rows: how many.
        show: told of the progress, in rows of both models.

    Raises:
        BundleError: the bundle is not whole.
        UsageError: it has no such variant, or not its original.
    """
    content = bundle.read(path)
    reports = {one.variant: one for one in content.manifest.parity}
    files = {
        name: one.path for name, one in reports.items() if one.path and (path / one.path).exists()
    }
    missing = [one for one in (variant, ORIGINAL) if one not in files]
    if missing:
        raise UsageError(_missing(path, missing[0], files, reports.get(missing[0])))
    golden = content.golden
    images = np.concatenate([golden.inputs, golden.hostile_inputs])
    session = content.manifest.session
    reference, candidate = path / files[ORIGINAL], path / files[variant]
    budget = reports[variant].budget
    allowed = agreement.Budget(budget.precision, budget.scale)
    told = counted(show, 2 * len(images))
    models = open_model(reference), open_model(candidate, options=session)
    right, wrong = (_logits(model, images, told) for model in models)
    found = _worst(right, wrong, images, rows, allowed)
    known = len(golden.inputs)
    apart = agreement.difference(right[:known], wrong[:known])
    decisive = agreement.decisive(apart, budget.precision, known)
    if budget.precision != "int8":
        shares = allowed.max_logit / agreement.hostile_limits(allowed, right[known:])
        wide = shares.reshape(-1, *[1] * (right.ndim - 1))
        hostile = agreement.difference(right[known:] * wide, wrong[known:] * wide)
        decisive = max(apart.max, hostile.max)
    failure = _failed(reports[variant], reference, candidate)
    return Asked(reference, candidate, found, dict(session.config), allowed, decisive, failure)


def of_pair(
    reference: Path, candidate: Path, data: Path, rows: int, show: Show = lambda done, total: None
) -> Asked:
    """Take the worst rows of any data; `show` is told of the progress, in rows of both models.

    Raises:
        PipelineError: a file cannot be read or run.
    """
    first = open_model(reference)
    asked = questions.read(data, labels=None, resize=False)(first.input)
    told = counted(show, 2 * len(asked.rows))
    right, wrong = (_logits(model, asked.rows, told) for model in (first, open_model(candidate)))
    allowed = agreement.budget("float32", right)
    return Asked(reference, candidate, _worst(right, wrong, asked.rows, rows, allowed))


def explain(asked: Asked) -> Divergence:
    """Walk both models; what they are known to fail is said where these rows do not show it."""
    found = first_divergence(
        asked.reference,
        asked.candidate,
        asked.images,
        config=asked.config,
        allowed=asked.allowed,
        apart=asked.apart,
    )
    if asked.failure and not found.diverges:
        found = replace(found, text=f"{found.text}; but {asked.failure}")
    return found


def _missing(
    path: Path, variant: str, there: Mapping[str, str], report: bundle_pb2.ParityReport | None
) -> str:
    """Say what a bundle has, and where a variant is that was left out of it."""
    if report is None or report.passed or ORIGINAL not in there:
        return f"{path} has no {variant}, expected one of {', '.join(there)}"
    return (
        f"{path} has no {variant}, which was left out, since over all {report.accuracy.rows:,} "
        f"test rows it failed: {report.failure}; its file is in the run's folder: {ASK} "
        f"--reference {path / there[ORIGINAL]} --candidate runs/RUN/exports/FILE {ROWS}"
    )


def _failed(report: bundle_pb2.ParityReport, reference: Path, candidate: Path) -> str:
    """Say that a variant has failed on all test rows, and how to walk those; nothing if not."""
    if report.passed:
        return ""
    return (
        f"over all {report.accuracy.rows:,} test rows it failed: {report.failure}; to walk the "
        f"worst of those: {ASK} --reference {reference} --candidate {candidate} {ROWS}"
    )


def _worst(
    right: Floats, found: Floats, images: Rows, rows: int, allowed: agreement.Budget
) -> Rows:
    """Return unexplained flips first, then what is furthest off."""
    if right.shape != found.shape or right.ndim != 2:  # noqa: PLR2004  rows and classes
        return images[:rows]
    apart = np.abs(right.astype(np.float64) - found).max(axis=1)
    apart = np.where(np.isfinite(apart), apart, np.inf)
    flipped = right.argmax(axis=1) != found.argmax(axis=1)
    if flipped.any():  # a lone output has no margin, and does not flip
        flipped &= agreement.margins(right) > 2 * allowed.max_logit
    return images[np.lexsort((-apart, ~flipped))[:rows]]


def _logits(model: Model, images: Rows, told: Callable[[int], None]) -> Floats:
    found = answers(model, images, told)
    chosen = "logits" if "logits" in found else next(iter(found))
    return found[chosen].astype(np.float32)
