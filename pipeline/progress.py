"""Show how far training is: a bar on a terminal, nothing elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_S = 0.2  # reading the loss waits for the steps that were started
Figures = Callable[[], dict[str, float]]  # loss and, of a classifier, accuracy so far


class Bar:
    """One bar for the whole training, with the figures of the epoch that runs.

    Args:
        steps: of an epoch.
        epochs: of the whole training.
        batch_rows: of a step.
        figures: read a few times a second.
        share: told the share of the training that is done, at the same times.
    """

    def __init__(
        self,
        steps: int,
        epochs: int,
        batch_rows: int,
        figures: Figures,
        share: Callable[[float], None] | None = None,
    ) -> None:
        self._steps = steps
        self._epochs = epochs
        self._batch_rows = batch_rows
        self._figures = figures
        self._share = share
        self._shown_s = 0.0
        self._started = (0, 0.0)  # steps and time
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]} of {task.fields[epochs]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %{task.fields[figures]}"),
            TextColumn("{task.fields[speed]} rows/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=self._steps * self._epochs, epoch=1, epochs=self._epochs, figures="", speed=""
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def move(self, epoch: int, step: int) -> None:
        """Say that `step` steps of an epoch, of which 1 is the first, are done."""
        now_s = time.monotonic()
        done = (epoch - 1) * self._steps + step
        if not self._started[1]:
            self._started = (done, now_s)
        if now_s - self._shown_s < EVERY_S:
            return
        self._shown_s = now_s
        if self._share is not None:
            self._share(done / (self._steps * self._epochs))
        if self._progress.disable:
            return
        figures = "".join(f", {name} {value:.4f}" for name, value in self._figures().items())
        seconds = now_s - self._started[1]
        speed = (done - self._started[0]) * self._batch_rows / seconds if seconds else 0.0
        self._progress.update(
            self._task, completed=done, epoch=epoch, figures=figures, speed=f"{speed:,.0f}"
        )
