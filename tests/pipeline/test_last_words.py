import os
import time

import pytest

from pipeline.last_words import LastWords

WAIT_S = 60


@pytest.fixture
def terminal(tmp_path):
    """A file that is passed on to, and what there is in it."""
    path = tmp_path / "terminal"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    yield descriptor, path.read_bytes
    os.close(descriptor)


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_all_that_is_written_is_passed_on_in_its_order_and_not_before_it_is_due(terminal):
    to, text = terminal
    words = LastWords(to, late_s=0.3)
    started_s = time.monotonic()
    for number in range(100):
        os.write(words.descriptor, b"%d " % number)

    until(text)
    assert time.monotonic() - started_s >= 0.3
    until(lambda: text() == b"".join(b"%d " % number for number in range(100)))
    os.close(words.descriptor)


def test_last_words_of_a_process_that_ends_by_itself_are_passed_on_at_once(terminal):
    to, text = terminal
    words = LastWords(to, late_s=10 * WAIT_S)
    os.write(words.descriptor, b"why")
    os.close(words.descriptor)

    until(lambda: text() == b"why")


def test_what_was_written_just_before_it_was_told_to_end_and_after_is_dropped(terminal):
    to, text = terminal
    words = LastWords(to, late_s=10 * WAIT_S)
    os.write(words.descriptor, b"before")
    words.drop()
    os.write(words.descriptor, b"after")
    os.close(words.descriptor)

    words._thread.join(WAIT_S)
    assert not words._thread.is_alive()
    assert text() == b""


def test_who_writes_much_is_not_kept_waiting(terminal):
    to, text = terminal
    words = LastWords(to, late_s=10 * WAIT_S)
    for _ in range(64):
        os.write(words.descriptor, bytes(1 << 16))
    os.close(words.descriptor)

    until(lambda: len(text()) == 64 << 16)
