import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import watchfiles

from service import watch

LONG_S = 600.0  # nothing here waits for it
WAIT_S = 60


@pytest.fixture
def looking(tmp_path) -> Iterator[Callable[..., threading.Semaphore]]:
    """Return a function that looks at a folder in a thread; released at each look."""
    stop = threading.Event()
    threads = []

    def looking(poll_s=LONG_S, root=None):
        looks = threading.Semaphore(0)

        def look():
            for _ in watch.looks(root or tmp_path, poll_s, stop):
                looks.release()

        threads.append(threading.Thread(target=look))
        threads[-1].start()
        return looks

    yield looking
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def until_noticed(looks, change):
    """Make a change again and again: the first may come before the folder is watched."""
    for number in range(200):
        change(number)
        if looks.acquire(timeout=0.5):
            return
    raise AssertionError("the change was not noticed")


def test_folder_that_appears_is_noticed_at_once(looking, tmp_path):
    looks = looking()

    until_noticed(looks, lambda number: (tmp_path / f"tiny{number}").mkdir())


def test_bundle_that_is_renamed_into_place_is_noticed_at_once(looking, tmp_path):
    (tmp_path / "tiny").mkdir()
    looks = looking()

    def publish(number):
        (tmp_path / f".staging-{number}").mkdir()
        (tmp_path / f".staging-{number}").rename(tmp_path / "tiny" / str(number + 1))

    until_noticed(looks, publish)


def test_file_that_changes_deep_below_is_noticed_at_once(looking, tmp_path):
    (tmp_path / "tiny/1").mkdir(parents=True)
    looks = looking()

    until_noticed(looks, lambda number: (tmp_path / "tiny/1/model.onnx").write_text(str(number)))


def test_what_is_hidden_below_the_folder_is_no_reason_to_look(tmp_path):
    root = tmp_path / ".models"
    visible = watch._Visible(root)

    for path, wanted in (
        ("tiny/1/model.onnx", True),
        ("tiny/aliases.json", True),
        (".staging-x/tiny/1/model.onnx", False),
        ("tiny/.lock", False),
        ("tiny/.aliases.json.x1y2", False),
    ):
        assert visible(watchfiles.Change.added, str(root / path)) is wanted
    assert visible(watchfiles.Change.added, "/elsewhere/.hidden")


def test_folder_is_looked_at_now_and_then_though_nothing_happens(looking):
    looks = looking(poll_s=0.05)

    for _ in range(3):
        assert looks.acquire(timeout=WAIT_S)


def test_folder_is_looked_at_now_and_then_where_there_are_no_events(looking, monkeypatch, caplog):
    def no_events(*_, **__):
        raise OSError("OS file watch limit reached")

    monkeypatch.setattr(watchfiles, "watch", no_events)
    looks = looking(poll_s=0.05)

    for _ in range(3):
        assert looks.acquire(timeout=WAIT_S)
    assert (
        "no events from the file system: OS file watch limit reached; looking every 0.05 s"
        in caplog.text
    )


def test_folder_that_is_not_there_is_looked_for(looking, tmp_path):
    looks = looking(poll_s=0.05, root=tmp_path / "later")

    for _ in range(3):
        assert looks.acquire(timeout=WAIT_S)


def test_folder_that_was_taken_away_is_looked_for_on(looking, tmp_path):
    (tmp_path / "root").mkdir()
    looks = looking(poll_s=0.05, root=tmp_path / "root")
    assert looks.acquire(timeout=WAIT_S)

    (tmp_path / "root").rmdir()

    for _ in range(5):
        assert looks.acquire(timeout=WAIT_S)


def test_looks_end_when_told_to_long_before_the_next_one(tmp_path):
    stop = threading.Event()
    thread = threading.Thread(target=lambda: list(watch.looks(tmp_path, LONG_S, stop)))
    thread.start()

    stop.set()

    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_nothing_is_looked_at_after_the_end(tmp_path):
    stop = threading.Event()
    stop.set()

    assert list(watch.looks(tmp_path, LONG_S, stop)) == []


WAITING = """
import threading
from service import watch
ended = threading.Event()
watch.when_stdin_ends(ended.set)
print("waiting", flush=True)
ended.wait()
print("ended", flush=True)
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_end_of_standard_input_is_noticed_and_what_comes_before_is_passed_over(terminal):
    inside, outside = os.openpty() if terminal else os.pipe()
    read, write = (outside, inside) if terminal else (inside, outside)
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdin=read, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(read)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.write(write, b"this is not the end\n")
        if terminal:
            os.write(write, b"\x04")  # what Ctrl-D sends
        else:
            os.close(write)
        assert process.stdout.readline() == "ended\n"
        assert process.wait(WAIT_S) == 0
    if terminal:
        os.close(write)


def test_folder_is_looked_at_where_what_watches_cannot_be_loaded(looking, monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)  # as where no descriptor is left for it
    looks = looking(poll_s=0.01)

    for _ in range(2):
        assert looks.acquire(timeout=WAIT_S)
