import io
import sys

from rich.console import Console

from pipeline import progress


def test_the_share_that_is_done_is_told_over_all_epochs(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    told: list[float] = []

    with progress.Bar(10, 4, 32, dict, told.append) as bar:
        bar.move(1, 5)
        bar.move(3, 10)

    assert told == [5 / 40, 30 / 40]


def test_the_figures_are_read_a_few_times_a_second_at_most():
    told: list[float] = []

    with progress.Bar(10, 4, 32, dict, told.append) as bar:
        for step in range(10):
            bar.move(1, step)

    assert len(told) < 10


def test_a_terminal_shows_loss_speed_and_time_left(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=shown, force_terminal=True, width=100)
    )

    with progress.Bar(10, 2, 32, lambda: {"loss": 0.25, "accuracy": 0.5}) as bar:
        bar.move(1, 1)
        bar.move(1, 5)
        bar._progress.refresh()

    assert "epoch 1 of 2" in shown.getvalue()
    assert "loss 0.2500, accuracy 0.5000" in shown.getvalue()
    assert "rows/s" in shown.getvalue()
