"""Curves and bars as SVG inside a page, in the page's own colours and type.

Drawn with stand-in colours, which the page's style sheet then decides: dark on light, light on
dark, black on paper.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import NDArray

INK, MUTED, LINE, FIRST, SECOND, GOOD, BAD, FAINT = (f"#0101{n:02x}" for n in range(1, 9))
VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", FIRST: "first", SECOND: "second", GOOD: "good",
    BAD: "bad", FAINT: "faint",
}  # fmt: skip
WIDTH = 5.4  # inches: as wide as a phone's page, at the size of its text
LOOK: Any = {  # matplotlib lists every name in its type
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "page",  # ids, and with them the file, are the same each time
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
WIDE = 30  # the largest value over the smallest: a linear axis would show the largest only
WIDEST = 1000  # the same: on a logarithmic axis, powers of ten are enough marks then
FEW = 15  # epochs whose points are worth a dot each
HEAD = re.compile(r"^.*?(?=<svg )", re.DOTALL)
META = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
STYLE = re.compile(r"<style.*?</style>", re.DOTALL)
ID = re.compile(r' id="([^"]+)"')
USED = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')
Pairs = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # x and y of each line by its name


class Page:
    """Draws the figures of one page; their ids are apart."""

    def __init__(self) -> None:
        self._drawn = 0

    def curves(
        self, lines: Pairs, label: str, *, marked: float = 0, percent: bool = False
    ) -> Markup:
        """Draw two lines over the epochs.

        Args:
            lines: epochs and values by name; the first is drawn on top.
            label: what it shows, for those who do not see it.
            marked: the epoch that a line stands at; 0: none.
            percent: the values are shares.
        """
        with mpl.rc_context(LOOK):
            figure, axes = _figure(2.9)
            for place, (name, (x, y)) in reversed(list(enumerate(lines.items()))):
                marker, colour = "o" if len(x) <= FEW else "", (FIRST, SECOND)[place % 2]
                axes.plot(x, y, marker=marker, markersize=3.2, color=colour, label=name)
            values = np.array([one for _, y in lines.values() for one in y if np.isfinite(one)])
            if marked:
                axes.axvline(marked, color=MUTED, linestyle=(0, (2, 3)), linewidth=1.1, zorder=1)
            _over_epochs(axes, values, percent=percent)
            axes.legend(*_reversed_legend(axes), loc="best")
            return self._inline(figure, label)

    def reliability(
        self, rows: NDArray[Any], confidence: NDArray[Any], right: NDArray[Any], label: str
    ) -> Markup:
        """Draw the share that is right over the confidence, and how many rows there are of each.

        Args:
            rows: of each bin of equal width.
            confidence: their sum in each bin.
            right: how many of each bin are right.
            label: as above.
        """
        with mpl.rc_context(LOOK):
            figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
            width = 1 / len(rows)
            there = np.flatnonzero(rows)
            share = right[there] / rows[there]
            axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1.1, linestyle=(0, (2, 3)))
            axes.bar(there * width, share, width * 0.92, align="edge", color=FIRST, alpha=0.3)
            axes.plot(confidence[there] / rows[there], share, "o", color=FIRST, markersize=4.5)
            axes.set_ylabel("share that is right")
            axes.set_ylim(0, 1.02)
            below.bar(there * width, rows[there], width * 0.92, align="edge", color=MUTED)
            below.set_ylabel("rows")
            below.set_xlabel("confidence, the highest probability")
            below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            for one in (axes, below):
                one.set_xlim(0, 1)
                one.xaxis.grid(visible=False)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            return self._inline(figure, label)

    def points(self, targets: NDArray[Any], outputs: NDArray[Any], label: str) -> Markup:
        """Draw what a model gives over what it should have given."""
        with mpl.rc_context(LOOK):
            figure, axes = _figure(3.2)
            both = np.concatenate([targets, outputs])
            both = both[np.isfinite(both)]
            ends = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
            axes.plot(ends, ends, color=MUTED, linewidth=1.1, linestyle=(0, (2, 3)))
            axes.plot(targets, outputs, "o", color=FIRST, markersize=3, alpha=0.5)
            axes.set_xlabel("target")
            axes.set_ylabel("answer")
            return self._inline(figure, label)

    def ridges(
        self,
        names: Sequence[str],
        counts: NDArray[Any],
        marks: Sequence[tuple[float, bool]],
        decades: tuple[int, int],
        label: str,
    ) -> Markup:
        """Draw one histogram a variant over a common logarithmic scale, the allowed at 1.

        Args:
            names: of the variants.
            counts: (variants, 1 + bins + 1): without a difference, in bins, not finite.
            marks: the figure that each is judged by, as a share of what is allowed, and whether
                it passed.
            decades: the ends of the bins.
            label: as above.
        """
        with mpl.rc_context(LOOK):
            figure, axes = _figure(0.75 + 0.36 * len(names))
            edges = np.linspace(*decades, counts.shape[1] - 1)
            for place, (name, row, (mark, passed)) in enumerate(
                zip(names, counts, marks, strict=True)
            ):
                base, bins = len(names) - 1 - place, row[1:-1]
                heights = 0.82 * np.sqrt(bins / max(1, bins.max()))
                axes.stairs(base + heights, edges, baseline=base, fill=True, color=FIRST, alpha=0.4)
                axes.axhline(base, color=LINE, linewidth=0.8)
                if not bins.any():
                    said = "no difference at all" if row[0] else "not finite"
                    axes.text(decades[0] + 0.15, base + 0.16, said, color=MUTED, fontsize=9)
                elif 0 < mark < np.inf:
                    at = float(np.clip(np.log10(mark), *decades))
                    axes.plot(
                        (at, at), (base, base + 0.62), linewidth=2.4, color=GOOD if passed else BAD
                    )
                axes.text(decades[0] - 0.15, base + 0.12, name, ha="right", color=INK, fontsize=9.5)
            axes.axvline(0, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.set_xlim(*decades)
            axes.set_ylim(-0.02, len(names) + 0.1)
            axes.yaxis.set_major_locator(NullLocator())
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(FixedLocator(range(-6, decades[1] + 1, 2)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _share(value)))
            axes.set_xlabel("|Δ| as a share of what is allowed")
            return self._inline(figure, label)

    def costs(
        self,
        names: Sequence[str],
        panels: Mapping[str, Sequence[tuple[float, str]]],
        label: str,
        *,
        interval: Sequence[tuple[float, float]] = (),
        columns: int = 4,
    ) -> Markup:
        """Draw one row a variant and one panel a figure, so that a row reads across.

        Args:
            names: of the variants.
            panels: value and text of each variant by the panel's title; not finite: none.
            label: as above.
            interval: of the values of the first panel, which are then dots.
            columns: how many panels are beside each other.
        """
        with mpl.rc_context(LOOK):
            lines, wide = -(-len(panels) // columns), 0.45 * columns
            size = (WIDTH * max(1.0, wide), lines * (0.55 + 0.29 * len(names)))
            figure = Figure(figsize=size, layout="constrained")
            places = np.arange(len(names))[::-1]
            every = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
            for axes in every[len(panels) :]:
                axes.set_visible(False)
            for axes, (title, found) in zip(every, panels.items(), strict=False):
                axes.set_title(title, fontsize=9.5, color=MUTED, loc="left")
                _panel(axes, places, found, interval if axes is every[0] else ())
            every[0].set_yticks(places, names)
            for axes in every[::columns]:
                axes.tick_params(axis="y", labelcolor=INK)
            return self._inline(figure, label)

    def _inline(self, figure: Figure, label: str) -> Markup:
        """Return a figure as an <svg> whose colours are the page's, and whose ids are its own."""
        self._drawn += 1
        content = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
        text = META.sub("", HEAD.sub("", content.getvalue()))
        text = STYLE.sub("", text).replace("'DejaVu Sans'", "var(--font)")
        used = set(USED.findall(text))
        prefix = f"f{self._drawn}-"
        text = ID.sub(lambda one: f' id="{prefix}{one[1]}"' if one[1] in used else "", text)
        text = USED.sub(lambda one: one[0][: -len(one[1])] + prefix + one[1], text)
        for colour, name in VARIABLES.items():
            text = text.replace(colour, f"var(--{name})")
        opening, rest = text.split(">", 1)
        opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
        return Markup(f'{opening} role="img" aria-label="{escape(label)}">{rest}')  # noqa: S704  matplotlib escapes text


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _over_epochs(axes: Axes, values: NDArray[Any], *, percent: bool) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.grid(visible=False)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    elif len(values) and values.min() > 0 and values.max() > WIDE * values.min():
        axes.set_yscale("log")
        steps = (1,) if values.max() > WIDEST * values.min() else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        # Its own formatter writes formulas, which are not parsed here.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _reversed_legend(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, names = axes.get_legend_handles_labels()
    return handles[::-1], names[::-1]


def _panel(
    axes: Axes,
    places: NDArray[Any],
    found: Sequence[tuple[float, str]],
    interval: Sequence[tuple[float, float]],
) -> None:
    """Draw dots with their interval, or bars, with each value's text beside it."""
    values = np.array([value for value, _ in found])
    there = np.isfinite(values)
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    if interval:
        low, high = np.array(interval).T
        axes.hlines(places[there], low[there], high[there], color=FIRST, linewidth=3, alpha=0.3)
        axes.plot(values[there], places[there], "o", color=FIRST, markersize=5)
        axes.spines["left"].set_visible(False)
        ends = (low[there].min(), high[there].max()) if there.any() else (0, 1)
        axes.set_xlim(ends[0], ends[1] + 0.75 * (ends[1] - ends[0]))
    else:
        largest = float(values[there].max()) if there.any() else 1.0
        axes.barh(places[there], values[there], 0.56, color=FIRST, alpha=0.5)
        axes.set_xlim(0, 1.75 * (largest or 1))
    for place, (_, text), end in zip(places, found, _ends(values, interval), strict=True):
        axes.annotate(
            text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9
        )


def _ends(values: NDArray[Any], interval: Sequence[tuple[float, float]]) -> list[float]:
    """Return where the text of each value begins."""
    if interval:
        return [high for _, high in interval]
    return [float(value) if np.isfinite(value) else 0.0 for value in values]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"  # noqa: PLR2004


def _share(exponent: float) -> str:
    return f"{10.0 ** (exponent + 2):,.{max(0, -round(exponent) - 2)}f} %"
