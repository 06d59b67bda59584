"""What the page of a model shows besides its manifest: rows, histograms, kernels; arrays only.

Gathered while the answers of a run are still there, and kept in its bundle as report.npz. Decides
nothing about the model.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import measures
from pipeline.errors import CheckError
from service import agreement, bundle

FILE = "report.npz"
MAX_BYTES = 1 << 26  # unpacked; ours are below a tenth of it
SIDE = 64  # pixels; a larger image is made to fit
FLIPS = 8  # of a variant that are kept
SHOWN_CLASSES = 4  # whose first test row goes through the first layer
POINTS = 600  # of targets and outputs that are no classes
WORST = 10  # rows that come least close
DECADES = (-7, 3)  # of |Δ| as a share of what is allowed
PER_DECADE = 6
BINS = (DECADES[1] - DECADES[0]) * PER_DECADE
CHUNK_ROWS = 4096
KERNELS = 1024  # more than any first layer that is kept has
VARIANTS = 256  # more than any bundle has
LONGEST = 1024  # characters of a name
Array = NDArray[Any]
MORE_SIZES = {  # of arrays that are no plain lists, after the first
    "images": (1, 1, 1),
    "deltas": (BINS + 2,),
    "kernels": (1, 1, 0),
    "maps": (1, 1, 0),
    "worst_targets": (0,),
    "worst_outputs": (0,),
}
TOGETHER = (  # have as many elements
    ("targets", "predicted"),
    ("bin_rows", "bin_confidence", "bin_right"),
    ("image_rows", "images"),
    ("variants", "deltas"),
    ("flip_variant", "flip_row", "flip_to", "flip_margin"),
    ("map_rows", "maps"),
    ("point_targets", "point_outputs"),
    ("worst_rows", "worst_targets", "worst_outputs"),
)
LARGEST = {  # sizes of what is drawn element by element; others are bound by MAX_BYTES
    "bin_rows": (measures.BINS,),
    "image_rows": (VARIANTS * FLIPS,),
    "images": (VARIANTS * FLIPS, SIDE, SIDE, 3),
    "variants": (VARIANTS,),
    "deltas": (VARIANTS, BINS + 2),
    "flip_row": (VARIANTS * FLIPS,),
    "layer": (1,),
    "kernels": (KERNELS, KERNELS, KERNELS, KERNELS),
    "map_rows": (KERNELS,),
    "maps": (KERNELS, KERNELS, KERNELS, KERNELS),
    "point_targets": (POINTS,),
    "worst_rows": (WORST,),
}
NAMES = ("variants", "layer")
PIXELS = ("images", "maps")
NUMBERS = (  # may be negative
    "flip_margin", "kernels", "point_targets", "point_outputs", "worst_targets", "worst_outputs",
)  # fmt: skip
SUMS = ("bin_confidence", "bin_right")  # of shares and of rows, none below 0; all others count


@dataclass(frozen=True, slots=True)
class FirstLayer:
    """The first convolution of a network and what it makes of a few images."""

    name: str
    kernels: NDArray[np.float32]  # (height, width, channels, kernels)
    maps: NDArray[np.float32]  # (images, height, width, kernels)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Arrays by what they are of; empty where a model has nothing of the kind."""

    targets: Array  # (test rows,), classes
    predicted: Array  # (test rows,), what the original calls them
    bin_rows: Array  # (measures.BINS,), test rows by the original's confidence
    bin_confidence: Array  # (measures.BINS,), sums
    bin_right: Array  # (measures.BINS,), rows
    image_rows: Array  # (images,), test rows, rising
    images: Array  # uint8 (images, height, width, 1 or 3), made to fit SIDE
    variants: Array  # (variants,), names of what was run
    deltas: Array  # (variants, 1 + BINS + 1), elements by |Δ| / allowed: none, the bins, not finite
    flip_variant: Array  # (flips,), position in `variants`
    flip_row: Array  # (flips,), test rows
    flip_to: Array  # (flips,), the variant's class
    flip_margin: Array  # (flips,), of the original, as a share of what explains a flip
    layer: Array  # (0 or 1,), name of the first convolution
    kernels: Array  # float32 (height, width, channels, kernels)
    map_rows: Array  # (examples,), test rows
    maps: Array  # uint8 (examples, height, width, kernels), of each example's highest value
    point_targets: Array  # float32 (points,), of a model that does not classify
    point_outputs: Array  # float32 (points,)
    worst_rows: Array  # (rows,), test rows that come least close, the worst first
    worst_targets: Array  # float32 (rows, outputs)
    worst_outputs: Array  # float32 (rows, outputs)

    @classmethod
    def empty(cls) -> Self:
        """Return what a bundle has that was made without any."""
        return cls(
            **{one.name: np.zeros((0, *MORE_SIZES.get(one.name, ()))) for one in fields(cls)}
        )

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Read what `packed` wrote; `source` is named in the error.

        Raises:
            CheckError: it is something else.
        """
        nothing = cls.empty()
        arrays = {one.name: getattr(nothing, one.name) for one in fields(cls)}
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                size_bytes = sum(one.file_size for one in archive.infolist())
            if size_bytes > MAX_BYTES:
                raise ValueError(
                    f"it has {size_bytes} bytes unpacked, at most {MAX_BYTES} are read"
                )
            with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as found:
                arrays |= {name: found[name] for name in found.files if name in arrays}
            _check(arrays)
        except bundle.NOT_GOLDEN as error:
            raise CheckError(f"{source} cannot be read: {error}; publish it again") from error
        return cls(**arrays)

    def packed(self) -> bytes:
        """Return it as the content of an .npz."""
        content = io.BytesIO()
        arrays = {one.name: getattr(self, one.name) for one in fields(self)}
        np.savez_compressed(content, allow_pickle=False, **arrays)
        return content.getvalue()

    def image(self, row: int) -> NDArray[np.uint8] | None:
        """Return the image of a test row, if it is kept."""
        place = int(np.searchsorted(self.image_rows, row))
        if place < len(self.image_rows) and self.image_rows[place] == row:
            found: NDArray[np.uint8] = self.images[place]
            return found
        return None


def example_rows(targets: Array) -> list[int]:
    """Return the first test row of each of a few classes."""
    first = {int(one): row for row, one in reversed(list(enumerate(targets)))}
    return [first[one] for one in sorted(first)[:SHOWN_CLASSES]]


def of_classifier(
    inputs: Array,
    targets: Array,
    reference: NDArray[np.floating],
    *,
    candidates: Mapping[str, tuple[NDArray[np.floating], float]] | None = None,
    mistakes: Sequence[int] = (),
    first: FirstLayer | None = None,
) -> Evidence:
    """Gather it from the answers of a classifier.

    Args:
        inputs: test images, uint8 (rows, height, width, channels).
        targets: classes, (rows,).
        reference: logits of the original, (rows, classes).
        candidates: logits of each variant that was run, and the largest |Δ| that it is allowed.
        mistakes: test rows whose images are to be kept.
        first: what the network's first convolution makes of `example_rows`.
    """
    flips = _flips(reference, candidates or {})
    examples = example_rows(targets) if first is not None else []
    kept = sorted({*mistakes, *examples, *(row for _, row, _, _ in flips)})
    pictured = inputs.dtype == np.uint8 and inputs.ndim == 4  # noqa: PLR2004  a batch of images
    rows = np.array(kept if pictured else [], np.int64)
    arrays = _binned(reference, targets) | {
        "targets": targets.astype(np.uint32),
        "predicted": reference.argmax(axis=1).astype(np.uint32),
        "image_rows": rows,
        "flip_variant": np.array([one[0] for one in flips], np.int64),
        "flip_row": np.array([one[1] for one in flips], np.int64),
        "flip_to": np.array([one[2] for one in flips], np.int64),
        "flip_margin": np.array([one[3] for one in flips], np.float64),
    }
    if len(rows):
        arrays["images"] = np.stack([fitted(inputs[row]) for row in rows])
    if first is not None:
        arrays |= _first(first, examples)
    return _evidence(arrays, reference, candidates or {})


def of_numbers(
    targets: NDArray[np.floating],
    reference: NDArray[np.floating],
    *,
    candidates: Mapping[str, tuple[NDArray[np.floating], float]] | None = None,
) -> Evidence:
    """Gather it from the answers of a model that comes close to numbers.

    Args:
        targets: (rows, outputs).
        reference: the original's, (rows, outputs).
        candidates: outputs of each variant that was run, and the largest |Δ| that it is allowed.
    """
    flat = [one.reshape(len(one), -1) for one in (targets, reference)]
    apart = np.square(flat[0].astype(np.float64) - flat[1]).mean(axis=1)
    worst = np.argsort(-apart, kind="stable")[:WORST]
    places = np.linspace(0, flat[0].size - 1, min(POINTS, flat[0].size)).round().astype(np.int64)
    points = [one.reshape(-1)[places].astype(np.float32) for one in flat]
    arrays: dict[str, Array] = {
        "point_targets": points[0],
        "point_outputs": points[1],
        "worst_rows": worst,
        "worst_targets": flat[0][worst].astype(np.float32),
        "worst_outputs": flat[1][worst].astype(np.float32),
    }
    return _evidence(arrays, reference, candidates or {})


def fitted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image as gray or RGB, no side longer than SIDE, its proportions kept."""
    height, width, channels = image.shape
    if channels not in (1, 3):
        image = image.mean(axis=2, keepdims=True).astype(np.uint8)
    scale = SIDE / max(height, width)
    if scale >= 1:
        return image
    picture = Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(picture.resize(size, Image.Resampling.BOX))
    return small.reshape(*small.shape[:2], -1)


def shares(reference: Array, candidate: Array, allowed: float) -> NDArray[np.int64]:
    """Count all elements by |Δ| as a share of what is allowed.

    Returns:
        (1 + BINS + 1,): those without any difference, those in bins of equal width on a
        logarithmic scale over DECADES, the ends being open, and those that are not finite.
    """
    counts = np.zeros(BINS + 2, np.int64)
    for start in range(0, len(reference), CHUNK_ROWS):
        ours, theirs = (one[start : start + CHUNK_ROWS] for one in (reference, candidate))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.abs(ours.astype(np.float64) - theirs).reshape(-1) / allowed
            places = 1 + np.floor((np.log10(share) - DECADES[0]) * PER_DECADE)
        places = np.where(np.isfinite(places), np.clip(places, 1, BINS), 0)
        places[~np.isfinite(share)] = BINS + 1
        counts += np.bincount(places.astype(np.int64), minlength=BINS + 2)
    return counts


def _check(arrays: Mapping[str, Any]) -> None:
    """Raise ValueError unless arrays are laid out as the fields of `Evidence` are."""
    for name, array in arrays.items():
        sizes = 1 + len(MORE_SIZES.get(name, ()))
        if not isinstance(array, np.ndarray) or array.ndim != sizes:
            raise ValueError(f"{name} is no array of {sizes} sizes")
        _check_sizes(name, array.shape)
        if array.size:
            _check_values(name, array)
    for names in TOGETHER:
        if len({len(arrays[name]) for name in names}) > 1:
            raise ValueError(f"{' and '.join(names)} differ in length")


def _check_sizes(name: str, shape: tuple[int, ...]) -> None:
    """Refuse what takes long to draw: a large size costs time beside one of 0 as well."""
    if 0 in shape and shape != (0, *MORE_SIZES.get(name, ())):
        raise ValueError(f"{name} has the sizes {shape}, with 0 among them")
    largest = LARGEST.get(name, shape)
    if any(size > most for size, most in zip(shape, largest, strict=True)):
        raise ValueError(f"{name} has the sizes {shape}, expected at most {largest}")


def _check_values(name: str, array: Array) -> None:
    """Refuse values that are not of the type of the field, or beyond what it can hold."""
    if name in NAMES:
        if array.dtype.kind != "U" or array.dtype.itemsize > 4 * LONGEST:
            raise ValueError(f"{name} is {array.dtype}, expected text of {LONGEST} characters")
        return
    expected = "f" if name in (*NUMBERS, *SUMS) else "iu"
    if array.dtype.kind not in expected or (name in PIXELS and array.dtype != np.uint8):
        kind = "uint8" if name in PIXELS else "floats" if expected == "f" else "integers"
        raise ValueError(f"{name} is {array.dtype}, expected {kind}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    if name not in NUMBERS and array.min() < 0:
        raise ValueError(f"{name} has values below 0")


def _evidence(
    arrays: dict[str, Array],
    reference: Array,
    candidates: Mapping[str, tuple[Array, float]],
) -> Evidence:
    nothing = Evidence.empty()
    counted = [shares(reference, answers, allowed) for answers, allowed in candidates.values()]
    arrays |= {
        "variants": np.array(list(candidates), np.str_),
        "deltas": np.array(counted, np.int64).reshape(-1, BINS + 2),
    }
    return Evidence(
        **{one.name: arrays.get(one.name, getattr(nothing, one.name)) for one in fields(Evidence)}
    )


def _binned(logits: NDArray[np.floating], targets: Array) -> dict[str, Array]:
    """Return what `measures.calibration_error` is the sum of."""
    confidence = agreement.softmax(logits).max(axis=1)
    right = logits.argmax(axis=1) == targets
    edges = np.linspace(0, 1, measures.BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    return {
        name: np.bincount(bins, weights=weights, minlength=measures.BINS)
        for name, weights in (
            ("bin_rows", None), ("bin_confidence", confidence), ("bin_right", right),
        )
    }  # fmt: skip


def _flips(
    reference: Array, candidates: Mapping[str, tuple[Array, float]]
) -> list[tuple[int, int, int, float]]:
    """Return variant, row, class and share of the margin of flips, the widest margins first."""
    ours, margins = reference.argmax(axis=1), agreement.margins(reference)
    found = []
    for place, (answers, allowed) in enumerate(candidates.values()):
        theirs = answers.argmax(axis=1)
        rows = np.flatnonzero(ours != theirs)
        widest = rows[np.argsort(-margins[rows], kind="stable")][:FLIPS]
        found += [
            (place, int(row), int(theirs[row]), float(margins[row] / (2 * allowed)))
            for row in widest
        ]
    return found


def _first(first: FirstLayer, examples: Sequence[int]) -> dict[str, Array]:
    """Return the arrays of a first layer, each example's maps scaled by the highest of them."""
    low, high = (getattr(first.maps, end)(axis=(1, 2, 3), keepdims=True) for end in ("min", "max"))
    scaled = 255 * (first.maps - low) / np.where(high > low, high - low, 1)
    return {
        "layer": np.array([first.name]),
        "kernels": first.kernels.astype(np.float32),
        "map_rows": np.array(examples, np.int64),
        "maps": scaled.astype(np.uint8),
    }
