"""Choose the rows to explain: the ones that a candidate answers worst."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import questions
from pipeline.errors import ParityError
from pipeline.explain.divergence import Divergence, first_divergence
from pipeline.explain.tensors import Floats, Rows
from pipeline.runtimes import Model, open_model
from service import agreement, bundle

ORIGINAL = "saved-model"


@dataclass(frozen=True, slots=True)
class Asked:
    """Two models and the rows to walk."""

    reference: Path
    candidate: Path
    images: Rows
    config: Mapping[str, str] = field(default_factory=dict)
    allowed: agreement.Budget | None = None  # None: by the file
    apart: float | None = None  # over all rows; None: of these


def of_bundle(path: Path, variant: str, rows: int) -> Asked:
    """Take a variant's worst rows of the golden set and the hostile inputs.

    Raises:
        BundleError: the bundle is not whole.
        ParityError: it has no such variant, or not its original.
    """
    content = bundle.read(path)
    reports = {one.variant: one for one in content.manifest.parity}
    files = {
        name: one.path for name, one in reports.items() if one.path and (path / one.path).exists()
    }
    missing = [one for one in (variant, ORIGINAL) if one not in files]
    if missing:
        raise ParityError(
            f"{path} has no {missing[0]}, expected one of {', '.join(files)}; what failed its "
            "parity is in the run's folder: give it with --candidate"
        )
    golden = content.golden
    images = np.concatenate([golden.inputs, golden.hostile_inputs])
    session = content.manifest.session
    reference, candidate = path / files[ORIGINAL], path / files[variant]
    budget = reports[variant].budget
    allowed = agreement.Budget(budget.precision, budget.scale)
    answers = open_model(reference), open_model(candidate, options=session)
    right, wrong = (_logits(model, images) for model in answers)
    found = _worst(right, wrong, images, rows, allowed)
    known = len(golden.inputs)
    apart = agreement.difference(right[:known], wrong[:known])
    decisive = apart.p999
    if budget.precision != "int8":
        shares = allowed.max_logit / agreement.hostile_limits(allowed, right[known:])
        wide = shares.reshape(-1, *[1] * (right.ndim - 1))
        hostile = agreement.difference(right[known:] * wide, wrong[known:] * wide)
        decisive = max(apart.max, hostile.max)
    return Asked(reference, candidate, found, dict(session.config), allowed, decisive)


def of_pair(reference: Path, candidate: Path, data: Path, rows: int) -> Asked:
    """Take the worst rows of any data.

    Raises:
        PipelineError: a file cannot be read or run.
    """
    first = open_model(reference)
    asked = questions.read(data, labels=None, resize=False)(first.input)
    right, wrong = (_logits(model, asked.rows) for model in (first, open_model(candidate)))
    allowed = agreement.budget("float32", right)
    return Asked(reference, candidate, _worst(right, wrong, asked.rows, rows, allowed))


def explain(asked: Asked) -> Divergence:
    """Walk both models."""
    return first_divergence(
        asked.reference,
        asked.candidate,
        asked.images,
        config=asked.config,
        allowed=asked.allowed,
        apart=asked.apart,
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


def _logits(model: Model, images: Rows) -> Floats:
    answers = model.run(images)
    chosen = "logits" if "logits" in answers else next(iter(answers))
    return answers[chosen].astype(np.float32)
