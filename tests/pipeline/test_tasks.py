import errno

import pytest

from pipeline.errors import InterruptedTrainingError, PublishError
from pipeline.tasks import Progress, is_transient


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("no answer"),
        OSError(errno.EIO, "input/output error"),
        OSError(errno.ESTALE, "stale file handle"),
    ],
)
def test_what_may_be_gone_in_a_minute_is_tried_again(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left on device"),
        PermissionError(errno.EACCES, "permission denied"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PublishError("the server did not start"),
        InterruptedTrainingError("stopped by SIGTERM"),
        ValueError("a bug"),
        None,
    ],
)
def test_what_stays_as_it_is_is_not_tried_again(error):
    assert not is_transient(error)


def test_progress_is_told_in_percent_and_not_with_every_step():
    told = []

    def create(percent, **_):
        told.append(percent)
        return "artifact"

    progress = Progress(create=create, update=lambda _, percent: told.append(percent))

    for share in (0.01, 0.02, 0.03):
        progress(share)
    progress(1.0)

    assert told == [1.0, 100.0]


def test_a_server_that_cannot_be_told_of_progress_does_not_stop_training():
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise ConnectionError("gone")

    progress = Progress(create=refuse, update=refuse)
    progress(0.5)
    progress(1.0)

    assert len(asked) == 1
