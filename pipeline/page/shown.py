"""What the page of one model shows: its manifest and evidence, as the template takes them."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline import report
from pipeline.page import evidence, images, words
from pipeline.page.drawing import Page
from pipeline.page.evidence import Evidence
from protos import bundle_pb2
from service import agreement

Report = bundle_pb2.ParityReport
CLASSES = 40  # that a table shows; of more the weakest
MATRIX_CLASSES = 16  # a wider matrix is a picture
COLUMNS = 16  # of kernels beside each other
FEW_MAPS = 16  # are laid out in a square
BETWEEN = 8  # rows of a call that the picture leaves out
BLUE = (74, 132, 204)  # of a matrix that is a picture, on light and dark


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with what is said about it."""

    uri: str
    text: str  # for those who do not see it
    row: int
    truth: str
    before: str  # what it was taken for; of a flip, by the original
    after: str = ""  # by the variant
    figure: str = ""


@dataclass(frozen=True, slots=True)
class Flips:
    """Images that a variant gives another class than the original does."""

    variant: str
    explained: int
    unexplained: int
    shown: tuple[Picture, ...]

    @property
    def total(self) -> int:
        """Number of them, shown or not."""
        return self.explained + self.unexplained


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table of parity."""

    report: Report
    judged: float  # |Δ| by which it is judged: the largest, or of integers the 99.9th percentile
    share: float  # of what is allowed; not finite where that is not known

    @property
    def ran(self) -> bool:
        """Whether there are any answers of it."""
        return bool(self.report.accuracy.rows)

    def took(self, rows: int) -> bundle_pb2.Latency:
        """Return how long a call takes; of zeros where it was not measured."""
        found = [one for one in self.report.latencies if one.rows == rows]
        return found[0] if found else bundle_pb2.Latency()


def context(manifest: bundle_pb2.BundleManifest, found: Evidence) -> dict[str, Any]:
    """Return what the template shows of a model, refused or published."""
    page = Page()
    classifies = manifest.kind != bundle_pb2.KIND_GENERIC
    variants = [variant(one) for one in manifest.parity]
    served = variant(manifest.served) if manifest.HasField("served") else None
    named = [one for one in variants if one.report.variant == manifest.served_variant]
    return {
        "m": manifest,
        "classifies": classifies,
        "delta": "|Δlogit|" if classifies else "|Δ|",
        "what": "images" if classifies else "rows",
        "seconds": sum(one.seconds for one in manifest.training.history),
        "ours": dict(manifest.provenance.tools).get("train-export", ""),  # a map adds what is asked
        "config": settings(manifest),
        "curves": list(curves(page, manifest, classifies=classifies)),
        "weakest_first": len(manifest.evaluation.classes) > CLASSES,
        "classes": shown_classes(manifest.evaluation.classes),
        "matrix": matrix(manifest),
        "matrix_image": matrix_image(manifest),
        "reliability": reliability(page, found),
        "points": _points(page, found),
        "worst": worst(found),
        "outputs": found.worst_outputs.shape[1],
        "first_layer": first_layer(found, manifest.labels),
        "mistakes": mistakes(manifest, found),
        "variants": variants,
        "served": served,
        "served_cost": named[0] if named else None,
        "passed": sum(one.report.passed for one in variants),
        "remarks": report.remarks(manifest),
        "ridges": ridges(page, manifest, found),
        "flips": list(flips(manifest, found)),
        "costs": costs(page, manifest, classifies=classifies),
        "batches": sorted({one.rows for row in manifest.parity for one in row.latencies}),
    }


def variant(found: Report) -> Variant:
    """Return a report with the figure by which it was judged."""
    judged = agreement.judged(found)
    allowed = found.budget.max_logit
    ran = bool(found.accuracy.rows and allowed)
    return Variant(found, judged, judged / allowed if ran else math.nan)


def settings(manifest: bundle_pb2.BundleManifest) -> dict[str, str]:
    """Return every setting of the run by its name; none where the manifest has none."""
    try:
        tables = json.loads(manifest.training.config or "{}")
    except ValueError:
        return {}
    return dict(words.flat(tables)) if isinstance(tables, dict) else {}


def curves(
    page: Page, manifest: bundle_pb2.BundleManifest, *, classifies: bool
) -> Iterator[tuple[str, Markup]]:
    """Give title and drawing of loss and accuracy over the epochs."""
    history = manifest.training.history
    if not history:
        return
    epochs = [one.number for one in history]
    kinds = [("Loss", "loss", False)]
    kinds += [("Accuracy", "accuracy", True)] if classifies else []
    for title, field, percent in kinds:
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            "validation": (epochs, [getattr(one, f"validation_{field}") for one in history]),
            "training": (epochs, [getattr(one, field) for one in history]),
        }
        last = lines["validation"][1][-1]
        label = (
            f"{title} of training and validation over {len(epochs)} epochs; validation ends at "
            f"{words.percent(last) if percent else format(last, '.4g')}"
        )
        marked = manifest.training.best_epoch
        yield title, page.curves(lines, label, marked=marked, percent=percent)


def shown_classes(found: Sequence[bundle_pb2.Evaluation.Class]) -> list[Any]:
    """Return all classes in their order, or of many the weakest."""
    if len(found) <= CLASSES:
        return list(found)
    return sorted(found, key=lambda one: one.f1)[:CLASSES]


def matrix(manifest: bundle_pb2.BundleManifest) -> list[tuple[str, list[tuple[int, float, bool]]]]:
    """Return label and cells of each class: rows, their share, and whether they are right."""
    found = manifest.evaluation.confusion
    if len(found) > MATRIX_CLASSES or len(found) != len(manifest.labels):
        return []
    return [
        (
            manifest.labels[place],
            [
                (rows, rows / max(1, sum(row.predicted)), place == column)
                for column, rows in enumerate(row.predicted)
            ],
        )
        for place, row in enumerate(found)
    ]


def matrix_image(manifest: bundle_pb2.BundleManifest) -> str:
    """Return a matrix of many classes as an image, darker where there is more; else nothing."""
    found = [list(row.predicted) for row in manifest.evaluation.confusion]
    if len(found) <= MATRIX_CLASSES or {len(row) for row in found} != {len(found)}:
        return ""
    counts = np.array(found, np.float64)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3] = BLUE
    pixels[..., 3] = (255 * np.sqrt(shares)).astype(np.uint8)
    return images.data_uri(pixels)


def reliability(page: Page, found: Evidence) -> Markup | None:
    """Draw how far confidence can be trusted; None where it is not known."""
    if not found.bin_rows.sum():
        return None
    rows = found.bin_rows.astype(np.int64)
    label = "Share of the test rows that are right, over the confidence of the original"
    return page.reliability(rows, found.bin_confidence, found.bin_right, label)


def worst(found: Evidence) -> list[tuple[int, str, str, float]]:
    """Return row, targets, answers and root mean squared error of those that come least close."""
    apart = found.worst_targets.astype(np.float64) - found.worst_outputs
    errors = np.sqrt(np.square(apart).sum(axis=1) / max(1, apart.shape[1]))
    return [
        (int(row), _numbers(target), _numbers(output), float(error))
        for row, target, output, error in zip(
            found.worst_rows, found.worst_targets, found.worst_outputs, errors, strict=True
        )
    ]


def first_layer(found: Evidence, labels: Sequence[str]) -> dict[str, Any] | None:
    """Return the images of kernels and maps; None of a network that has none."""
    count = found.kernels.shape[-1]
    if not count or not len(found.layer):
        return None
    examples = []
    for row, maps in zip(found.map_rows, found.maps, strict=True):
        image = found.image(int(row))
        if image is None:
            continue
        tiles = np.ascontiguousarray(maps.astype(np.uint8).transpose(2, 0, 1))[..., np.newaxis]
        examples.append(
            (
                images.data_uri(image),
                images.data_uri(images.mosaic(tiles, 4 if count <= FEW_MAPS else 8)),
                _label(labels, found.targets, int(row)),
            )
        )
    height, width, channels, _ = found.kernels.shape
    tiles = images.kernels(found.kernels)
    return {
        "name": str(found.layer[0]),
        "kernels": images.data_uri(images.mosaic(tiles, COLUMNS)),
        "shape": f"{height} by {width}",
        "averaged": channels not in (1, 3),
        "count": count,
        "columns": min(COLUMNS, count),
        "examples": examples,
    }


def mistakes(manifest: bundle_pb2.BundleManifest, found: Evidence) -> list[Picture]:
    """Return the most confident mistakes; without an image where none is kept."""
    return [
        Picture(
            uri=_uri(found, one.row),
            text=f"Test row {one.row}: {one.label}, taken for {one.predicted}",
            row=one.row,
            truth=one.label,
            before=one.predicted,
            figure=words.percent(one.probability),
        )
        for one in manifest.evaluation.hardest
    ]


def flips(manifest: bundle_pb2.BundleManifest, found: Evidence) -> Iterator[Flips]:
    """Give the flips of each variant that has some, with those images that are kept."""
    places = {str(name): place for place, name in enumerate(found.variants)}
    for one in manifest.parity:
        if not one.flips_explained + one.flips_unexplained:
            continue
        mine = np.flatnonzero(found.flip_variant == places.get(one.variant, -1))
        yield Flips(
            variant=one.variant,
            explained=one.flips_explained,
            unexplained=one.flips_unexplained,
            shown=tuple(_flip(manifest.labels, found, int(place), one.variant) for place in mine),
        )


def ridges(page: Page, manifest: bundle_pb2.BundleManifest, found: Evidence) -> Markup | None:
    """Draw how |Δ| is distributed, a row a variant; None where it is not known."""
    by_name = {one.variant: one for one in manifest.parity}
    known = [place for place, name in enumerate(found.variants) if str(name) in by_name]
    if not known:
        return None
    names = [str(found.variants[place]) for place in known]
    judged = [variant(by_name[name]) for name in names]
    marks = [(one.share, one.report.passed) for one in judged]
    label = "How the differences from the original are distributed, for each variant"
    return page.ridges(names, found.deltas[known], marks, evidence.DECADES, label)


def costs(
    page: Page, manifest: bundle_pb2.BundleManifest, *, classifies: bool
) -> tuple[Markup, Markup] | None:
    """Draw accuracy, size and latency of every variant that ran, wide and narrow; None of none."""
    ran = [variant(one) for one in manifest.parity if one.accuracy.rows]
    if not ran:
        return None
    accuracies = [one.report.accuracy for one in ran]
    panels: dict[str, list[tuple[float, str]]] = {
        "size": [(one.report.size_bytes, words.size(one.report.size_bytes)) for one in ran]
    }
    if classifies:
        shares = [(one.value, words.percent(one.value)) for one in accuracies]
        panels = {"accuracy": shares, **panels}
    for rows in sorted({one.rows for each in ran for one in each.report.latencies}):
        if rows != BETWEEN:
            seconds = [one.took(rows).p50_seconds for one in ran]
            panels[f"{rows} row{'s' * (rows > 1)}, ms"] = [
                (one or math.nan, words.milliseconds(one)) for one in seconds
            ]
    names = [one.report.variant for one in ran]
    label = f"{'Accuracy, size' if classifies else 'Size'} and latency of every variant"
    interval = [(one.low, one.high) for one in accuracies] if classifies else []
    wide, narrow = (
        page.costs(names, panels, label, interval=interval, columns=columns)
        for columns in (len(panels), 2)
    )
    return wide, narrow


def _points(page: Page, found: Evidence) -> Markup | None:
    if not len(found.point_targets):
        return None
    label = "Answers of the original over the targets of test rows"
    return page.points(found.point_targets, found.point_outputs, label)


def _flip(labels: Sequence[str], found: Evidence, place: int, name: str) -> Picture:
    row, after = int(found.flip_row[place]), _name(labels, int(found.flip_to[place]))
    before, truth = _label(labels, found.predicted, row), _label(labels, found.targets, row)
    return Picture(
        uri=_uri(found, row),
        text=f"Test row {row}: {truth}, to the original {before}, to {name} {after}",
        row=row,
        truth=truth,
        before=before,
        after=after,
        figure=words.percent(float(found.flip_margin[place]), 0),
    )


def _uri(found: Evidence, row: int) -> str:
    image = found.image(row)
    return "" if image is None else images.data_uri(image)


def _label(labels: Sequence[str], classes: evidence.Array, row: int) -> str:
    return _name(labels, int(classes[row])) if row < len(classes) else words.NONE


def _name(labels: Sequence[str], place: int) -> str:
    return labels[place] if place < len(labels) else str(place)


def _numbers(values: evidence.Array) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:4])
    return f"{shown}, …" if len(values) > 4 else shown  # noqa: PLR2004
