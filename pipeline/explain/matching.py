"""Which tensor of one model is which of another, however it is laid out.

Decides by values first, by names and order where the values differ; runs no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.explain.tensors import Floats, Tensor, Walked

# How far a tensor may be off, as a share of its largest element; int8: of its standard deviation.
TOLERANCE = {"float32": 3e-5, "float16": 1e-2, "int8": 0.15}
PLANES = 4  # axes
BLOCK = 16  # our pass over convolutions fills their channels up to a multiple of this


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the reference and what stands for it in the candidate."""

    reference: Tensor
    candidate: Tensor
    value: Floats  # the candidate's in the reference's layout
    place: int  # of the candidate's tensor, in the order in which they are made
    relative: float
    good: bool


def relative_error(reference: Floats, candidate: Floats, precision: str) -> float:
    """Return how far a tensor is off as a share of what is right; infinite if not finite."""
    apart = np.abs(reference.astype(np.float64) - candidate.astype(np.float64))
    if not np.isfinite(apart).all():
        return float("inf")
    if precision == "int8":
        size = reference.astype(np.float64).std()
        error = np.sqrt(np.square(apart).mean())
    else:
        size, error = np.abs(reference).max(initial=0), apart.max(initial=0)
    return float(error / size) if size else float(error)


def layouts(value: Floats, shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Return a tensor in every way in which it can have a shape: as it is, turned, cut, flat."""
    found = [value] if value.shape == shape else []
    if value.ndim == len(shape) == PLANES:
        turned = value.transpose(0, 2, 3, 1)
        if turned.shape[:3] == shape[:3] and 0 <= turned.shape[3] - shape[3] < BLOCK:
            found.append(turned[..., : shape[3]])
    if not found and value.size == np.prod(shape):
        found.append(value.reshape(shape))
        if value.ndim == PLANES:  # what was turned and then made flat; ours is made flat unturned
            found.append(value.transpose(0, 2, 3, 1).reshape(shape))
    return found


def pairs(reference: Walked, candidate: Walked) -> dict[str, Pair]:
    """Return each of the reference's tensors that has a counterpart, by name.

    One that agrees is taken wherever it is. For one that agrees nowhere the counterpart is of the
    same name, else the first of its size that is made after all that agree and stands for none.
    """
    best = {one.name: _best(one, candidate) for one in reference.tensors}
    found = {name: pair for name, pair in best.items() if pair is not None and pair.good}
    taken = {
        pair.place
        for one in reference.tensors
        for place in range(len(candidate.tensors))
        for pair in _options(one, candidate, place)
        if pair.good
    }
    after = -1
    for tensor in reference.tensors:
        if tensor.name in found:
            after = max(after, found[tensor.name].place)
            continue
        pair = _by_order(tensor, candidate, after, taken)
        if pair is not None:
            found[tensor.name] = pair
    return found


def _options(tensor: Tensor, candidate: Walked, place: int) -> list[Pair]:
    other = candidate.tensors[place]
    found = []
    for value in layouts(other.value, tensor.value.shape):
        error = relative_error(tensor.value, value, candidate.precision)
        good = error <= TOLERANCE[candidate.precision]
        found.append(Pair(tensor, other, value, place, error, good))
    return found


def _best(tensor: Tensor, candidate: Walked) -> Pair | None:
    options = [
        pair
        for place in range(len(candidate.tensors))
        for pair in _options(tensor, candidate, place)
    ]
    return min(options, key=lambda pair: pair.relative, default=None)


def _by_order(tensor: Tensor, candidate: Walked, after: int, taken: set[int]) -> Pair | None:
    options = [
        pair
        for place in range(after + 1, len(candidate.tensors))
        if place not in taken
        for pair in _options(tensor, candidate, place)
    ]
    own = f"/{tensor.inside}"
    named = [pair for pair in options if own in f"/{pair.candidate.name}"]
    return next(iter(named or options), None)
