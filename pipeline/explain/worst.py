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


def of_bundle(path: Path, variant: str, rows: int) -> Asked:
    """Take a variant's worst rows of the golden set and the hostile inputs.

    Raises:
        BundleError: the bundle is not whole.
        ParityError: it has no such variant, or not its original.
    """
    content = bundle.read(path)
    files = {one.variant: one.path for one in content.manifest.parity}
    missing = [one for one in (variant, ORIGINAL) if one not in files]
    if missing:
        raise ParityError(f"{path} has no {missing[0]}, expected one of {', '.join(files)}")
    golden = content.golden
    images = np.concatenate([golden.inputs, golden.hostile_inputs])
    session = content.manifest.session
    reference, candidate = path / files[ORIGINAL], path / files[variant]
    found = _worst(open_model(reference), open_model(candidate, options=session), images, rows)
    return Asked(reference, candidate, found, dict(session.config))


def of_pair(reference: Path, candidate: Path, data: Path, rows: int) -> Asked:
    """Take the worst rows of any data.

    Raises:
        PipelineError: a file cannot be read or run.
    """
    first = open_model(reference)
    asked = questions.read(data, labels=None, resize=False)(first.input)
    return Asked(reference, candidate, _worst(first, open_model(candidate), asked.rows, rows))


def explain(asked: Asked) -> Divergence:
    """Walk both models."""
    return first_divergence(asked.reference, asked.candidate, asked.images, config=asked.config)


def _worst(first: Model, second: Model, images: Rows, rows: int) -> Rows:
    """Return unexplained flips first, then what is furthest off."""
    right, found = (_logits(model, images) for model in (first, second))
    if right.shape != found.shape or right.ndim != 2:  # noqa: PLR2004  rows and classes
        return images[:rows]
    apart = np.abs(right.astype(np.float64) - found).max(axis=1)
    apart = np.where(np.isfinite(apart), apart, np.inf)
    allowed = agreement.budget("float32", right)
    flipped = right.argmax(axis=1) != found.argmax(axis=1)
    unexplained = flipped & (agreement.margins(right) > 2 * allowed.max_logit)
    return images[np.lexsort((-apart, ~unexplained))[:rows]]


def _logits(model: Model, images: Rows) -> Floats:
    answers = model.run(images)
    chosen = "logits" if "logits" in answers else next(iter(answers))
    return answers[chosen].astype(np.float32)
