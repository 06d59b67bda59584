"""Draw how training went: loss and accuracy over the epochs, as PNG."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline import files
from pipeline.records import Epoch

INCHES, DOTS = (12.0, 5.0), 100  # 1200 x 500 pixels
TRAINING, VALIDATION, BEST = "#8a8f98", "#2a6fbb", "#c0392b"
RUNS = ("#2a6fbb", "#d9822b", "#3c8d5a", "#c0392b", "#7d5ba6", "#8c6d46", "#3fa0a3", "#777777")
WIDE = 100  # the largest loss over the smallest: a linear axis would show the first epochs only
LEGEND: dict[str, Any] = {"edgecolor": "white", "framealpha": 0.9}
FEW = 12  # epochs whose points are worth a dot each
History = Sequence[Epoch]


@dataclass(frozen=True, slots=True)
class Quantity:
    """What one panel shows of an epoch."""

    name: str
    training: Callable[[Epoch], float]
    validation: Callable[[Epoch], float]
    form: str  # of one value


LOSS = Quantity("loss", lambda one: one.loss, lambda one: one.validation_loss, "{:.4g}")
ACCURACY = Quantity(
    "accuracy in %",
    lambda one: 100 * one.accuracy,
    lambda one: 100 * one.validation_accuracy,
    "{:.2f} %",
)


def draw(history: History, path: Path, title: str) -> Path:
    """Draw one run, training and validation, with the epoch of the lowest validation loss marked.

    The loss has the whole width where all accuracies are 0: the model does not classify. The file
    is replaced at once.

    Args:
        history: at least one epoch.
        path: of the PNG, 1200 x 500 pixels.
        title: above it all.

    Returns:
        The path.
    """
    best = min(history, key=LOSS.validation)
    figure = _figure(title)
    for axes, shown in _panels(figure, history):
        _line(axes, history, shown.training, color=TRAINING, label="training")
        _line(axes, history, shown.validation, color=VALIDATION, label="validation")
        value = shown.validation(best)
        label = f"epoch {best.number}, the best: {shown.form.format(value)}"
        axes.axvline(best.number, color=BEST, linestyle=":", linewidth=1.2, zorder=1)
        axes.plot(best.number, value, "o", color=BEST, markersize=8, zorder=4, label=label)
        axes.legend(**LEGEND)
    return _write(figure, path)


def compare(histories: Mapping[str, History], path: Path, title: str = "") -> Path:
    """Draw several runs over each other, as `draw` does one; training is dashed and faint.

    Args:
        histories: at least one epoch each, by the name of the run.
        path: of the PNG, 1200 x 500 pixels.
        title: above it all.

    Returns:
        The path.
    """
    figure = _figure(title)
    every = [epoch for history in histories.values() for epoch in history]
    for axes, shown in _panels(figure, every):
        for place, (name, history) in enumerate(histories.items()):
            color, best = RUNS[place % len(RUNS)], min(history, key=LOSS.validation)
            _line(axes, history, shown.training, color=color, linestyle="--", alpha=0.4)
            _line(axes, history, shown.validation, color=color, label=name)
            axes.plot(best.number, shown.validation(best), "o", color=color, markersize=8)
        legend = axes.legend(**LEGEND, title="lines: validation; dashed: training; dots: best")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may hold dollar signs
    return _write(figure, path)


def _figure(title: str) -> Figure:
    figure = Figure(figsize=INCHES, dpi=DOTS, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    return figure


def _panels(figure: Figure, epochs: History) -> list[tuple[Axes, Quantity]]:
    """Return axes, and what to draw on each, with room for all epochs."""
    classifies = any(one.accuracy or one.validation_accuracy for one in epochs)
    quantities = (LOSS, ACCURACY) if classifies else (LOSS,)
    places = figure.subplots(1, len(quantities), squeeze=False)[0]
    panels = list(zip(places, quantities, strict=True))
    numbers = [one.number for one in epochs]
    for axes, shown in panels:
        axes.set_xlabel("epoch")
        axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        axes.set_ylabel(shown.name)
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.grid(color="#e9e9e9")
        axes.spines[["top", "right"]].set_visible(False)
    losses = [loss for one in epochs for loss in (one.loss, one.validation_loss)]
    if min(losses) > 0 and max(losses) > WIDE * min(losses):
        panels[0][0].set_yscale("log")
    return panels


def _line(axes: Axes, history: History, figure: Callable[[Epoch], float], **look: Any) -> None:  # noqa: ANN401  matplotlib's
    marker = "." if len(history) <= FEW else ""
    places, values = [one.number for one in history], [figure(one) for one in history]
    axes.plot(places, values, marker=marker, linewidth=1.8, **look)


def _write(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, content.getvalue())
    return path
