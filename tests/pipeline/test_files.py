import subprocess
import sys

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
