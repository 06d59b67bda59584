"""Name the first layer in which a model departs from its reference, and why."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.explain import causes, tensors
from pipeline.explain.matching import PLANES, TOLERANCE, Pair, layouts, pairs, relative_error
from pipeline.explain.tensors import Floats, Reference, Rows, Tensor, Walked
from service import agreement

INPUT = "the input"
SATURATION = "session.x64quantprecision"
ADDED_UP = {  # said where no layer departs, and the logits do
    "unknown": "every tensor inside agrees, the logits as served do not",
    "rounding": (
        "every tensor inside is as near as its precision allows, and what they are off adds up: "
        "take a wider variant, such as onnx-float16, or train longer, which draws logits apart"
    ),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor of the reference beside its counterpart."""

    reference: str
    candidate: str
    layer: str  # that the reference's is of; the tensor's own name where it is of none
    max_error: float
    relative: float  # of the largest element; int8: of the standard deviation
    allowed: float
    good: bool


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where and why a candidate departs; `layer` and `cause` are empty where it does not."""

    diverges: bool
    layer: str
    cause: str
    text: str
    max_error: float  # of the logits
    allowed: float  # of the logits
    relative: float  # of the first bad tensor
    layers: tuple[Layer, ...]


def first_divergence(
    reference: Path,
    candidate: Path,
    images: Rows,
    *,
    config: Mapping[str, str] | None = None,
    allowed: agreement.Budget | None = None,
    apart: float | None = None,
) -> Divergence:
    """Walk both models on the same rows.

    Args:
        reference: a SavedModel's folder.
        candidate: a SavedModel's folder, a .onnx or a .tflite file.
        images: the worst rows, (rows, ...); two or more show what depends on its neighbours.
        config: switches of onnxruntime that the candidate is served with.
        allowed: what it was published with; None: by the precision that its file computes in.
        apart: the difference that its verdict was of, over more rows than these; None: the largest
            of these.

    Raises:
        ParityError: a file cannot be run.
    """
    original = Reference(reference)
    right = original.walk(images)
    found = tensors.walk(candidate, images, config or {})
    if allowed is None:
        allowed = agreement.budget(found.precision, right.logits)
    found = replace(found, precision=allowed.precision)
    paired = pairs(right, found)
    limit = allowed.max_logit
    error = _largest(right.logits, found.logits) if apart is None else apart
    suspects = {one.name for one in _suspects(right, paired)} if error > limit else set()
    # What agrees nowhere and yet leads to what does has no counterpart: it was folded away.
    layers = tuple(
        _layer(pair, found.precision)
        for pair in paired.values()
        if pair.good or pair.reference.name in suspects
    )
    which = "99.9th percentile of" if apart is not None and found.precision == "int8" else "max"
    if error <= limit:
        text = (
            f"{candidate.name} answers as the reference does: {which} |Δlogit| is {error:.2g} of "
            f"{limit:.2g} allowed"
        )
        return Divergence(False, "", "", text, error, limit, 0.0, layers)
    layer, cause, seen, relative = _blame(original, right, found, paired)
    mixed = _mixed_up(original, images, found)
    told = (
        _unsteady(candidate, images, config or {}, found)
        or _saturated(candidate, images, config or {}, right, limit)
        or mixed
        or (cause, seen)
    )
    layer = INPUT if mixed == told else layer
    text = (
        f"{candidate.name} diverges at {layer} ({told[0]}): {told[1]}; {which} |Δlogit| is "
        f"{error:.3g}, {limit:.2g} allowed"
    )
    return Divergence(True, layer, told[0], text, error, limit, relative, layers)


def _largest(reference: Floats, found: Floats) -> float:
    if reference.shape != found.shape:
        return float("inf")
    apart = np.abs(reference.astype(np.float64) - found)
    return float(apart.max()) if np.isfinite(apart).all() else float("inf")


def _layer(pair: Pair, precision: str) -> Layer:
    return Layer(
        reference=pair.reference.name,
        candidate=pair.candidate.name,
        layer=pair.reference.layer,
        max_error=_largest(pair.reference.value, pair.value),
        relative=pair.relative,
        allowed=TOLERANCE[precision],
        good=pair.good,
    )


def _suspects(right: Walked, paired: Mapping[str, Pair]) -> list[Tensor]:
    """Return the tensors that agree nowhere and lead to none that does, in order."""
    sound: set[str] = set()
    for tensor in reversed(right.tensors):
        pair = paired.get(tensor.name)
        if tensor.name in sound or (pair is not None and pair.good):
            sound.add(tensor.name)
            sound.update(tensor.inputs)  # what a right tensor is made from was right
    return [tensor for tensor in right.tensors if tensor.name not in sound]


def _blame(
    original: Reference, right: Walked, found: Walked, paired: Mapping[str, Pair]
) -> tuple[str, str, str, float]:
    suspects = _suspects(right, paired)
    seen = [paired[one.name] for one in suspects if one.name in paired]
    if not seen:
        layer = suspects[0].layer if suspects else "the logits"
        cause = "unknown" if found.precision == "float32" else "rounding"
        largest = max((pair.relative for pair in paired.values()), default=0.0)
        return layer, cause, ADDED_UP[cause], largest
    first = seen[0]
    for pair in seen[:6]:  # a kernel's product, its bias, its Relu: one fused tensor is one of them
        padded = _padded(original, right, pair, found.precision)
        if padded:
            return pair.reference.layer, "padding", padded, pair.relative
    cut = _cut_off(right, found) if found.precision == "int8" else None
    if cut is not None:
        return cut
    told = [(pair, causes.cause(pair, found.precision)) for pair in seen[:6]]
    own = first.reference.layer
    if not any(one[0] not in ("unknown", "different model") for _, one in told):
        # A scale that is folded away has a convolution's output for a counterpart.
        same = [one for one in told if _weighs(one[0]) and one[0].place == first.place]
        told = same or told
    named = [(pair, one) for pair, one in told if one[0] not in ("unknown", "different model")]
    pair, (cause, text) = next(iter(named or told))
    if cause != "scale" and own != pair.reference.layer and not _weighs(first):
        own = pair.reference.layer
    return (suspects[0].layer if cause == "scale" else own), cause, text, first.relative


def _cut_off(right: Walked, found: Walked) -> tuple[str, str, str, float] | None:
    """Find the first tensor that is one of the reference's, cut off at the end of its range."""
    for other in found.tensors:
        for tensor in right.tensors:
            for value in layouts(other.value, tensor.value.shape):
                seen = causes.clipped(tensor.value, value, TOLERANCE["int8"])
                if seen:
                    error = relative_error(tensor.value, value, "int8")
                    return tensor.layer, "range", seen, error
    return None


def _weighs(pair: Pair) -> bool:
    """Say whether a tensor is made by weights, not only moved or scaled."""
    return pair.reference.operator in ("Conv2D", "MatMul", "DepthwiseConv2dNative", "BiasAdd")


def _padded(original: Reference, right: Walked, pair: Pair, precision: str) -> str:
    """Convolve anew with the padding moved by one, and say if that is what was found."""
    convolved = _convolution(original, right, pair.reference)
    if convolved is None:
        return ""
    tensor, given = convolved
    kernel, strides = original.kernel(tensor.name) or (np.zeros(0), (1, 1))
    for vertical, horizontal in _paddings(given.shape, kernel.shape, strides, tensor.value.shape):
        made = tf.nn.conv2d(given, kernel, strides, [[0, 0], vertical, horizontal, [0, 0]]).numpy()
        if made.shape != pair.value.shape or relative_error(tensor.value, made, "float32") < 1e-3:  # noqa: PLR2004
            continue
        limit = TOLERANCE[precision]
        fits = relative_error(made, pair.value, precision) <= limit
        if fits or relative_error(_normalised(made, pair.value), pair.value, precision) <= limit:
            return (
                f"equal if rows are padded by {tuple(vertical)} and columns by {tuple(horizontal)}"
            )
    return ""


def _normalised(made: Floats, found: Floats) -> Floats:
    """Return what was made with the scale and offset of each channel that bring it nearest.

    A bias or a BatchNorm that was folded into the convolution is no part of its padding.
    """
    axes = tuple(range(made.ndim - 1))
    centred = made - made.mean(axes)
    spread = np.maximum((centred**2).mean(axes), np.finfo(np.float32).tiny)
    slope = (centred * (found - found.mean(axes))).mean(axes) / spread
    fitted: Floats = (centred * slope + found.mean(axes)).astype(np.float32)
    return fitted


def _convolution(
    original: Reference, right: Walked, tensor: Tensor
) -> tuple[Tensor, Floats] | None:
    """Return the convolution that a tensor is, or is the bias of, with what it reads."""
    known = {one.name: one for one in right.tensors}
    for one in (tensor, *(known[name] for name in tensor.inputs if name in known)):
        if one.operator == "Conv2D" and one.inputs[0] in known:
            return one, known[one.inputs[0]].value
    return None


def _paddings(
    given: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], made: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    totals = [
        max(0, (made[axis] - 1) * strides[axis - 1] + kernel[axis - 1] - given[axis])
        for axis in (1, 2)
    ]
    ways = [
        [[first, total + more - first] for more in (0, 1) for first in range(total + more + 1)]
        for total in totals
    ]
    return list(itertools.product(ways[0], ways[1]))


def _unsteady(
    candidate: Path, images: Rows, config: Mapping[str, str], found: Walked
) -> causes.Told | None:
    """Say whether a row's answer changes from run to run, or with the rows beside it."""
    again = tensors.answer_again(candidate, images, config)
    limit = 10 * TOLERANCE["float32"] * max(float(np.abs(found.logits).max()), 1e-30)
    if _largest(found.logits, again) > limit:
        return "training mode", "the same rows are answered otherwise each time: a dropout is on"
    if len(images) > 1:
        alone = tensors.walk(candidate, images[:1], config).logits
        if _largest(found.logits[:1], alone) > limit:
            return "training mode", (
                "a row's answer depends on the rows beside it: batch normalisation is training"
            )
    return None


def _saturated(
    candidate: Path, images: Rows, config: Mapping[str, str], right: Walked, allowed: float
) -> causes.Told | None:
    """Say whether int8 is right unoptimised, or with exact products, and wrong as served."""
    if candidate.suffix != ".onnx":
        return None
    served = _largest(right.logits, tensors.answer(candidate, images, "all", config))
    plain = _largest(right.logits, tensors.answer(candidate, images, "disable", config))
    if not plain <= allowed < served:
        return None
    exact = tensors.answer(candidate, images, "all", {**config, SATURATION: "1"})
    if _largest(right.logits, exact) <= allowed:
        return "saturation", f"right with {SATURATION}=1: serve with it, or quantise reduce_range"
    return "saturation", "right unoptimised, wrong optimised: quantise with reduce_range"


def _mixed_up(original: Reference, images: Rows, found: Walked) -> causes.Told | None:
    """Say whether it answers as the reference does to images that are turned."""
    if images.ndim != PLANES:
        return None
    for name, turned in causes.turns(images):
        if turned.shape != images.shape or np.array_equal(turned, images):
            continue
        logits = original.walk(np.ascontiguousarray(turned)).logits
        allowed = agreement.budget(found.precision, logits).max_logit
        if _largest(logits, found.logits) <= allowed:
            return "layout", f"it answers as the reference does where in the images {name}"
    return None
