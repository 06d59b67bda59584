"""Why a tensor is not what it should be, from its values alone.

Each rule looks for one relation between what is right and what was found; the first that holds
names the cause.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.explain.matching import PLANES, TOLERANCE, Pair, relative_error
from pipeline.explain.tensors import Floats

FEW = 0.25  # share of the channels that one broken weight may spoil
ALIKE = 0.5  # correlation below which two tensors have nothing to do with one another
CLIPPED = 0.02  # share of the elements at the end of the range
ENOUGH = 8  # elements from which a line through them says something
Told = tuple[str, str]  # the cause, and what was seen


def cause(pair: Pair, precision: str) -> Told:
    """Return the likely cause and a clause that says what was seen."""
    named: tuple[tuple[str, Callable[[Floats, Floats, float], str]], ...] = (
        ("overflow", overflow),
        ("layout", layout),
        ("scale", scale),
        ("offset", offset),
        ("padding", border),
        *((("range", clipped),) if precision == "int8" else ()),
        ("weights", channels),
    )
    for name, rule in named:
        seen = rule(pair.reference.value, pair.value, 3 * TOLERANCE[precision])
        if seen:
            return name, seen
    alike = _correlation(pair.reference.value, pair.value)
    if alike < ALIKE:
        return "different model", f"the two have nothing in common (correlation {alike:.2f})"
    return "unknown", f"no simple relation (correlation {alike:.2f})"


def overflow(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say how many elements are not finite although the reference's are."""
    bad = int((~np.isfinite(found)).sum() - (~np.isfinite(reference)).sum())
    largest = np.abs(reference).max(initial=0)
    return f"{bad} elements are not finite, the reference reaches {largest:.3g}" if bad > 0 else ""


def layout(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say which turn of the axes makes them equal."""
    if reference.ndim != PLANES:
        return ""
    for name, turned in turns(found):
        if turned.shape == reference.shape and _equal(reference, turned, tolerance):
            return f"equal once {name}"
    return ""


def turns(images: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    """Return planes (rows, height, width, channels) in the ways in which they get mixed up."""
    return [
        ("height and width are swapped", images.transpose(0, 2, 1, 3)),
        ("the channels are reversed", images[..., ::-1]),
        ("it is flipped upside down", images[:, ::-1]),
        ("it is flipped left to right", images[:, :, ::-1]),
    ]


def scale(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say by which one factor it is off, whatever is added a channel."""
    fitted = _lines(reference, found)
    if fitted is None:
        return ""
    slopes, left = fitted
    factor = float(np.median(slopes))
    same = np.abs(slopes - factor).max() <= max(tolerance, 1e-3) * abs(factor)
    off = abs(factor - 1) > max(10 * tolerance, 1e-3)
    return f"every element is {factor:.6g} times what it should be" if same and off and (
        left <= max(tolerance, 1e-3)
    ) else ""  # fmt: skip


def offset(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say that a constant a channel is missing; behind a Relu as far as both are above zero."""
    both = _both(reference, found)
    apart = np.where(both, reference.astype(np.float64) - found, np.nan)
    flat = apart.reshape(-1, apart.shape[-1])
    kept = flat[:, (~np.isnan(flat)).sum(axis=0) >= 2]  # noqa: PLR2004  a spread needs two
    if not kept.size:
        return ""
    spread = (np.nanmax(kept, axis=0) - np.nanmin(kept, axis=0)).max()
    size = float(np.nanmax(np.abs(kept)))
    if not spread <= max(2 * tolerance * np.abs(reference).max(), 1e-3 * size):
        return ""
    return f"each channel is off by a constant, up to {size:.3g}: a bias is missing or another"


def border(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say that only the border differs, or that all is moved by one."""
    if reference.ndim != PLANES or min(reference.shape[1:3]) < 4:  # noqa: PLR2004  an inside
        return ""
    if _equal(reference[:, 1:-1, 1:-1], found[:, 1:-1, 1:-1], tolerance):
        return "the borders differ, the inside is equal"
    for down, right in product((-1, 0, 1), repeat=2):
        moved = np.roll(found, (down, right), (1, 2))
        if _equal(reference[:, 1:-1, 1:-1], moved[:, 1:-1, 1:-1], tolerance):
            return f"equal once moved by ({down}, {right})"
    return ""


def clipped(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say that what is above or below some value is cut off there."""
    low, high = float(found.min()), float(found.max())
    width = high - low
    for end, beyond, at in (
        (high, reference > high, found >= high - 0.01 * width),
        (low, reference < low, found <= low + 0.01 * width),
    ):
        many = float(beyond.mean())
        inside = ~beyond
        if many > CLIPPED and at[beyond].mean() > 0.8 and inside.any():  # noqa: PLR2004  most
            near = relative_error(reference[inside], found[inside], "int8")
            if near <= max(tolerance, TOLERANCE["int8"]):
                reach = float(reference.max() if end == high else reference.min())
                return (
                    f"{many:.1%} of the elements are cut off at {end:.3g}, the reference reaches "
                    f"{reach:.3g}, which no row did that the range is from: look for outliers, or "
                    "bound what is before it, as relu with max_value does"
                )
    return ""


def channels(reference: Floats, found: Floats, tolerance: float) -> str:
    """Say which few channels are all that differ."""
    count = reference.shape[-1]
    apart = np.abs(reference.astype(np.float64) - found).reshape(-1, count).max(axis=0)
    bad = np.flatnonzero(apart > tolerance * np.abs(reference).max())
    if not 0 < len(bad) <= max(1, FEW * count) or count == 1:
        return ""
    names = ", ".join(map(str, bad[:4]))
    plural = "channel" if len(bad) == 1 else "channels"
    return f"only {plural} {names} of {count} differ, by up to {apart.max():.3g}: their weights"


def _equal(reference: Floats, found: Floats, tolerance: float) -> bool:
    return relative_error(reference, found, "float32") <= tolerance


def _both(reference: Floats, found: Floats) -> NDArray[np.bool_]:
    """Say where a Relu has cut neither; everywhere if there was none."""
    if min(reference.min(), found.min()) < 0:
        return np.ones(reference.shape, np.bool_)
    return (reference > 0) & (found > 0)


def _lines(reference: Floats, found: Floats) -> tuple[NDArray[np.float64], float] | None:
    """Fit a line a channel; return the slopes, and the largest residual as a share."""
    size = reference.shape[-1]
    x, y = (one.astype(np.float64).reshape(-1, size) for one in (reference, found))
    both = _both(reference, found).reshape(-1, size)
    slopes, left = [], 0.0
    for channel in range(size):
        kept = both[:, channel]
        if kept.sum() < ENOUGH or np.ptp(x[kept, channel]) == 0:
            continue
        slope, intercept = np.polyfit(x[kept, channel], y[kept, channel], 1)
        residual = np.abs(slope * x[kept, channel] + intercept - y[kept, channel]).max()
        slopes.append(slope)
        left = max(left, float(residual / max(np.abs(y).max(), 1e-30)))
    return (np.array(slopes), left) if slopes else None


def _correlation(reference: Floats, found: Floats) -> float:
    x, y = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
