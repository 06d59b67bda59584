"""Hold two bundles against each other: figures, settings, parity and cost, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.page import shown, words
from pipeline.page.drawing import Page
from pipeline.page.evidence import Evidence
from protos import bundle_pb2
from service import agreement

Manifest = bundle_pb2.BundleManifest
CHANCE = 0.05  # p below which a difference is called one
SKIPPED = ("publishing.", "preset")  # settings that change no model
LONGEST = 60  # of the classes that are compared


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same test rows."""

    only_first: int  # rows that only the first gets right
    only_second: int
    same: int  # rows to which both give the same class
    rows: int
    p: float  # McNemar's exact test that both are equally accurate


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two bundles, A and B."""

    first: str  # NAME VERSION
    second: str
    accuracies: tuple[float, float] | None  # None unless both classify
    losses: tuple[float, float]
    same_data: bool
    comparable: bool  # the same data, and losses of the same kind
    settings: tuple[tuple[str, str, str], ...]  # name, A's and B's; only those that differ
    paired: Paired | None  # None unless both answered the same rows
    verdict: str  # one sentence


def compare(manifests: Sequence[Manifest], founds: Sequence[Evidence]) -> Comparison:
    """Return what is different between two bundles.

    Args:
        manifests: of A and B.
        founds: of A and B; what each said of every test row is in it, if it is known.
    """
    first, second = manifests
    kinds = [_classifies(one) for one in manifests]
    same_data = first.dataset.sha256 == second.dataset.sha256
    paired = _paired(founds) if same_data and first.labels == second.labels else None
    accuracies = tuple(one.evaluation.accuracy.value for one in manifests)
    return Comparison(
        first=f"{first.name} {first.version}",
        second=f"{second.name} {second.version}",
        accuracies=(accuracies[0], accuracies[1]) if all(kinds) else None,
        losses=(first.evaluation.loss, second.evaluation.loss),
        same_data=same_data,
        comparable=same_data and kinds[0] == kinds[1],
        settings=tuple(_differing(first, second)),
        paired=paired,
        verdict=_why_not(manifests, same_data=same_data) or _verdict(manifests, paired),
    )


def context(manifests: Sequence[Manifest], found: Comparison) -> dict[str, Any]:
    """Return what the template shows of two bundles."""
    page = Page()
    named = [{one.variant: shown.variant(one) for one in each.parity} for each in manifests]
    names = list(dict.fromkeys(name for each in named for name in each))
    scores = [{one.label: one for one in each.evaluation.classes} for each in manifests]
    labels = [label for label in scores[0] if label in scores[1]]
    labels.sort(key=lambda label: -abs(scores[1][label].f1 - scores[0][label].f1))
    return {
        "c": found,
        "sides": list(zip("AB", manifests, strict=True)),
        "losses": _losses(manifests),
        "curves": list(_curves(page, manifests)),
        "variants": [(name, [each.get(name) for each in named]) for name in names],
        "classes": [(label, [each[label] for each in scores]) for label in labels[:LONGEST]],
        "batches": [1, 64],
    }


def _classifies(manifest: Manifest) -> bool:
    return manifest.kind != bundle_pb2.KIND_GENERIC and bool(manifest.labels)


def _losses(manifests: Sequence[Manifest]) -> list[tuple[str, list[float | None]]]:
    """Return a row a kind of loss, with that of each side, or None where it has another kind."""
    kinds = [("loss", True), ("mean squared error", False)]
    rows = [
        (name, [one.evaluation.loss if _classifies(one) == kind else None for one in manifests])
        for name, kind in kinds
    ]
    return [(name, values) for name, values in rows if values != [None, None]]


def _paired(founds: Sequence[Evidence]) -> Paired | None:
    first, second = founds
    if not len(first.targets) or not np.array_equal(first.targets, second.targets):
        return None
    ours, theirs = (one.predicted == one.targets for one in founds)
    only_first, only_second = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return Paired(
        only_first=only_first,
        only_second=only_second,
        same=int((first.predicted == second.predicted).sum()),
        rows=len(first.targets),
        p=agreement.mcnemar(only_first, only_second),
    )


def _differing(first: Manifest, second: Manifest) -> list[tuple[str, str, str]]:
    ours, theirs = shown.settings(first), shown.settings(second)
    names = sorted({*ours, *theirs})
    return [
        (name, ours.get(name, words.NONE), theirs.get(name, words.NONE))
        for name in names
        if ours.get(name) != theirs.get(name) and not name.startswith(SKIPPED)
    ]


def _why_not(manifests: Sequence[Manifest], *, same_data: bool) -> str:
    """Say why figures are not to be held against each other; nothing where they are."""
    kinds = [_classifies(one) for one in manifests]
    if kinds[0] != kinds[1]:
        return "One names classes and the other does not: their figures are not to be compared"
    if not same_data:
        return "They were tested on other data: their figures are not to be compared"
    return ""


def _verdict(manifests: Sequence[Manifest], paired: Paired | None) -> str:
    if not _classifies(manifests[0]):
        return _by_loss(manifests)
    apart = 100 * (manifests[1].evaluation.accuracy.value - manifests[0].evaluation.accuracy.value)
    if not apart and (paired is None or paired.only_first == paired.only_second == 0):
        return (
            "Both are right equally often" if paired is None else "Both are right on the same rows"
        )
    better, points = ("B" if apart > 0 else "A"), f"{abs(apart):.2f} points"
    if paired is None:
        return f"{better} is {points} more accurate; who was right on which row is not known"
    if paired.p >= CHANCE:
        return f"No difference beyond chance: {points} for {better}, p {words.chance(paired.p)}"
    return (
        f"{better} is {points} more accurate; chance would do that with p {words.chance(paired.p)}"
    )


def _by_loss(manifests: Sequence[Manifest]) -> str:
    losses = [one.evaluation.loss for one in manifests]
    if losses[0] == losses[1]:
        return "Both have the same mean squared error"
    better = "A" if losses[0] < losses[1] else "B"
    return f"{better} has the lower mean squared error, {min(losses):.4g} and {max(losses):.4g}"


def _curves(page: Page, manifests: Sequence[Manifest]) -> Any:  # noqa: ANN401  titles and drawings
    histories = [each.training.history for each in manifests]
    classify = [_classifies(one) for one in manifests]
    if not all(histories) or classify[0] != classify[1]:
        return
    kinds = [("Validation loss", "validation_loss", False)]
    kinds += [("Validation accuracy", "validation_accuracy", True)] if all(classify) else []
    for title, field, percent in kinds:
        lines = {
            side: ([one.number for one in history], [getattr(one, field) for one in history])
            for side, history in zip("AB", histories, strict=True)
        }
        yield title, page.curves(lines, f"{title} of A and B over the epochs", percent=percent)
