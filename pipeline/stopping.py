"""Turn SIGTERM and Ctrl-C into a question that training asks between two steps."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import InterruptedTrainingError

log = logging.getLogger(__name__)


class Stopping:
    """Which signal came, if any. A second one does what it did before `watched`."""

    def __init__(self) -> None:
        self.signal = 0

    def leave(self) -> None:
        """End training as the signal asks.

        Raises:
            InterruptedTrainingError: SIGTERM came.
            KeyboardInterrupt: SIGINT came.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise InterruptedTrainingError(
            "training was stopped by SIGTERM and its state is saved; the same command goes on there"
        )


@contextmanager
def watched() -> Iterator[Stopping]:
    """Take note of the signals inside the block; only the main thread can, others take none."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: FrameType | None) -> None:
        stopping.signal = number
        log.info("stopping after this step, to save it")
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
