import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import BusyError

HOLDER = """
import sys, pathlib
from pipeline import files
with files.locked(pathlib.Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until it dies."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_file_is_replaced_whole_and_no_partial_one_stays(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old and longer")

    files.write_whole(path, b"new")

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with pytest.raises(TypeError):
        files.write_whole(path, "text is not bytes")  # type: ignore[arg-type]

    assert path.read_bytes() == b"old"


def test_a_held_lock_is_refused_with_the_folder_that_is_busy(holder, tmp_path):
    lock = files.locked(tmp_path / "lock", wait=False)

    with pytest.raises(BusyError, match=f"{tmp_path} is in use by another run"), lock:
        pass


def test_a_lock_dies_with_its_process(holder, tmp_path):
    holder.kill()
    holder.wait()

    with files.locked(tmp_path / "lock", wait=False):
        pass


def test_waiting_for_a_lock_ends_when_it_is_given_back(holder, tmp_path):
    holder.stdin.close()

    with files.locked(tmp_path / "lock", wait=True):
        pass


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / ".a.json.partial").symlink_to("/dev/full")

    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        files.write_whole(path, b"new")


def test_a_library_s_own_words_are_told_with_the_file_too(tmp_path):
    with pytest.raises(OSError, match=rf"^{tmp_path} cannot be written: no room$"):  # noqa: SIM117
        with files.naming(tmp_path):
            raise OSError("no room")


def test_an_error_that_names_a_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="'other'"), files.naming(tmp_path):
        Path("other").read_bytes()


def test_what_is_not_utf8_is_shown_escaped():
    assert files.shown(Path(os.fsdecode(b"q\xff.txt"))) == "q\\udcff.txt"
    assert files.shown("猫") == "猫"


def test_a_lock_can_be_looked_at_without_making_one(holder, tmp_path):
    assert files.is_locked(tmp_path / "lock")
    holder.kill()
    holder.wait()

    assert not files.is_locked(tmp_path / "lock")
    assert not files.is_locked(tmp_path / "none")
    assert not (tmp_path / "none").exists()
