import os
import signal
import threading

import pytest

from pipeline import stopping
from pipeline.errors import InterruptedTrainingError


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, InterruptedTrainingError), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_is_kept_until_somebody_asks(number, error):
    with stopping.watched() as found:
        os.kill(os.getpid(), number)

        assert found.signal == number
        with pytest.raises(error):
            found.leave()


def test_handlers_are_put_back_at_the_end_and_after_the_first_signal():
    def before(number, frame):
        raise RuntimeError("the second one")

    usual = signal.signal(signal.SIGTERM, before)
    try:
        with stopping.watched():
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(RuntimeError, match="the second one"):
                os.kill(os.getpid(), signal.SIGTERM)
        with stopping.watched():
            pass
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_thread_that_is_not_the_main_one_gets_no_signals_and_no_error():
    found = []

    def work():
        with stopping.watched() as one:
            found.append(one.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert found == [0]
