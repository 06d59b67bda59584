import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from protos import parity_pb2
from service import tables, watching
from service.errors import ServerError

ROOM = {"COLUMNS": "100", "LINES": "40", "NO_COLOR": "1"}


def parity(*, failure="", live=""):
    """What a server says of one version, whose self-check or live parity failed for a reason."""
    one = parity_pb2.VersionParity(model="tiny", version="3")
    one.self_check.report.passed = not failure
    one.self_check.report.failure = failure
    if live:
        one.live.verdict, one.live.failure = parity_pb2.LIVE_VERDICT_FAILED, live
    return parity_pb2.GetParityResponse(versions=[one])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (parity(), []),
        (parity(failure="far off"), ["tiny version 3 fails its self-check: far off"]),
        (parity(live="a flip"), ["tiny version 3 fails live: a flip"]),
        (parity_pb2.GetParityResponse(), []),
    ],
)
def test_what_does_not_hold_is_a_sentence(answer, said):
    assert watching.failures(answer) == said


def test_every_answer_is_a_line_of_json_until_the_server_refuses(capsys, monkeypatch):
    monkeypatch.setattr(watching, "PAUSE_S", 0.0)
    turns = iter([[parity(), parity(live="a flip")], [parity()], "NOT_FOUND"])

    async def asked():
        found = next(turns)
        if isinstance(found, str):
            raise ServerError("no such model", code=found)
        for answer in found:
            yield answer
        if len(found) == 2:
            raise ServerError("no server answers", code="UNAVAILABLE")

    with pytest.raises(ServerError, match="no such model"):
        asyncio.run(watching.watch(asked, as_json=True))

    written = capsys.readouterr()
    lines = [json.loads(line) for line in written.out.splitlines()]
    assert [line["versions"][0].get("live", {}).get("failure") for line in lines] == [
        None, "a flip", None,
    ]  # fmt: skip
    assert "no server answers; trying again" in written.err
    assert "the server ended the stream; trying again" in written.err


def test_answers_are_tables_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(tables.console, "_force_terminal", False)

    async def asked():
        yield parity()
        raise ServerError("refused", code="PERMISSION_DENIED")

    with pytest.raises(ServerError):
        asyncio.run(watching.watch(asked, as_json=False))

    assert "tiny version 3: parity with the original" in capsys.readouterr().out


def seen(terminal, until, longest_s=60.0):
    """Read what a terminal shows until it has shown a text."""
    shown, found = b"", ""
    end_s = time.monotonic() + longest_s
    while until not in found:
        assert time.monotonic() < end_s, found
        shown += os.read(terminal, 65536)  # which may end within a character
        found = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    return found


def test_a_terminal_is_kept_up_to_date_through_a_restart_and_left_with_ctrl_c(
    make_bundle, start_server
):
    repository = str(make_bundle().parents[1])
    server = start_server("--repository", repository, "--address", "127.0.0.1:0")
    address = server.address()
    terminal, other = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "service", "parity", "--watch", "--address", address],
        stdin=other,
        stdout=other,
        stderr=other,
        env={**os.environ, **ROOM},
    ) as watcher:
        os.close(other)
        try:
            seen(terminal, "self-check on ")
            server.popen.terminate()
            assert server.wait() == 0
            seen(terminal, "; trying again")
            again = start_server("--repository", repository, "--address", address)
            again.address()
            seen(terminal, "self-check on ")
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait(30) == 130
        finally:
            watcher.kill()
            os.close(terminal)
