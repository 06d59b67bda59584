import os
from pathlib import Path

import pytest

from service import plain_file

OPEN = Path("/proc/self/fd")


def refusal(path, max_bytes=4):
    before = len(list(OPEN.iterdir()))
    with pytest.raises(OSError, match=r".") as caught:
        plain_file.read(path, max_bytes)
    assert len(list(OPEN.iterdir())) == before
    return caught.value.strerror


def test_content_up_to_the_limit_is_read_and_an_absent_file_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")

    assert plain_file.read(tmp_path / "file", 4) == b"1234"
    assert plain_file.read(tmp_path / "none", 4) is None


def test_file_over_the_limit_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")

    assert refusal(tmp_path / "file") == "it has over 4 bytes"


def test_folder_is_refused_and_no_descriptor_is_left_of_it(tmp_path):
    assert refusal(tmp_path) == "it is not a plain file"


def test_pipe_is_refused_without_waiting_whether_or_not_somebody_holds_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    assert refusal(tmp_path / "pipe") == "it is not a plain file"
    held = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        assert refusal(tmp_path / "pipe") == "it is not a plain file"
    finally:
        os.close(held)


def test_link_is_not_followed(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "file")

    assert refusal(tmp_path / "link") == "it is a link"
