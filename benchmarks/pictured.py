"""What the benchmarks measured, drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.load import Outcome

OURS, OTHERS = "#0b6e4f", "#9aa5b1"
PANELS = (
    # title, case, figure, factor
    ("requests/s, single images, 64 in flight", "1 image, 64 in flight", "requests_per_second", 1),
    ("server CPU, ms a request, the same", "1 image, 64 in flight", "server_cpu_ms", 1),
    ("p50, ms, single images, 1 in flight", "1 image, 1 in flight", "p50_ms", 1),
    (
        "images/s, batches of 128, 4 at a time",
        "128 images, 4 in flight",
        "requests_per_second",
        128,
    ),
)


def serving(outcomes: Mapping[tuple[str, str], Sequence[Outcome]], path: Path) -> Path:
    """Draw four figures of every server as bars, with their spread; return where."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axis, (title, case, name, factor) in zip(axes.flat, PANELS, strict=True):
        found = {
            server: [getattr(outcome, name) * factor for outcome in rounds]
            for (server, asked), rounds in outcomes.items()
            if asked == case and "paired" not in server and "without" not in server
        }
        _bars(axis, title, found)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars(axis: Any, title: str, found: Mapping[str, Sequence[float]]) -> None:  # noqa: ANN401
    names = list(found)
    medians = np.array([np.median(found[name]) for name in names])
    low = medians - [min(found[name]) for name in names]
    high = np.array([max(found[name]) for name in names]) - medians
    colours = [OURS if name.startswith("ours") else OTHERS for name in names]
    axis.barh(names, medians, color=colours, xerr=(low, high), error_kw={"ecolor": "#444"})
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.2)
    axis.locator_params(axis="x", nbins=6)
    for place, (median, above) in enumerate(zip(medians, high, strict=True)):
        text = f" {median:,.0f}" if median >= 100 else f" {median:.3g}"  # noqa: PLR2004
        axis.text(median + above, place, text, va="center", fontsize=9)
