"""Show what was found: a table, JSON, and a picture of how the error grows."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.explain.divergence import Divergence, Layer

SMALLEST = 1e-9  # of an error in the picture, whose axis has no zero
LARGEST = 1e9  # nor infinity
GOOD, BAD = "#2a6fbb", "#c0392b"


def layers(found: Divergence) -> list[Layer]:
    """Return one tensor a layer: the one in it that agrees best where it is right, else worst."""
    kept: dict[str, Layer] = {}
    for one in found.layers:
        name = one.layer
        blamed = found.diverges and name == found.layer  # of that one what is wrong is shown
        if name not in kept or one.good != blamed or kept[name].good == blamed:
            kept[name] = one
    return list(kept.values())


def table(found: Divergence) -> Table:
    """Return one row a layer, in order."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("layer", overflow="fold")
    for name in ("max |Δ|", "relative", "allowed"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    for one in layers(found):
        name = one.layer
        verdict = "[green]agrees[/]" if one.good else "[red]differs[/]"
        if found.diverges and name == found.layer:
            verdict = f"[bold red]first: {found.cause}[/]"
        drawn.add_row(
            Text(name), f"{one.max_error:.2g}", f"{one.relative:.2g}", f"{one.allowed:.2g}", verdict
        )
    return drawn


def as_json(found: Divergence, picture: Path) -> str:
    """Return all of it; what is infinite is null."""
    content = {**asdict(found), "picture": str(picture)}
    text = json.dumps(content, ensure_ascii=False)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1, ensure_ascii=False)


def picture(found: Divergence, path: Path) -> Path:
    """Draw the error of every layer on a logarithmic axis, and write it as PNG.

    Returns:
        The path.
    """
    drawn = layers(found)
    names = [one.layer for one in drawn]
    errors = [float(np.clip(one.relative, SMALLEST, LARGEST)) for one in drawn]
    figure = Figure(figsize=(max(7.0, 0.6 * len(names) + 2), 4.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(names))
    axes.plot(places, errors, color="#888888", linewidth=1, zorder=1)
    colours = [GOOD if one.good else BAD for one in drawn]
    axes.scatter(places, errors, c=colours, s=42, zorder=2)
    limit = drawn[0].allowed if drawn else 1.0
    axes.axhline(limit, color="#444444", linestyle="--", linewidth=1)
    axes.text(-0.4, limit * 1.3, f"allowed: {limit:.2g}", fontsize=9, color="#444444", ha="left")
    axes.set_yscale("log")
    axes.set_ylim(min([*errors, limit]) / 10, max([*errors, limit]) * 60)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(list(places), names, rotation=40, ha="right", fontsize=9)
    axes.set_ylabel("error as a share of the layer's values")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    if found.diverges and found.layer in names:
        _mark(axes, names, found, max([*errors, limit]) * 8)
    title = (
        f"first divergence: {found.layer} ({found.cause})" if found.diverges else "no divergence"
    )
    axes.set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _mark(axes: Axes, names: list[str], found: Divergence, height: float) -> None:
    place = names.index(found.layer)
    axes.axvline(place, color=BAD, linewidth=8, alpha=0.12)
    side = "left" if place < len(names) / 2 else "right"
    said = f"  {found.layer}: {found.cause}  "
    axes.text(place, height, said, color=BAD, ha=side, weight="bold")
