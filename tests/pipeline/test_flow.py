import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import flow
from pipeline.commands import running
from pipeline.endpoint import Endpoint

ENDED = "Finished in state Failed('"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            f"{ENDED}Task run encountered an exception EvaluationError: too low;\nlook at it')",
            f"{ENDED}Task run encountered an exception EvaluationError')",
        ),
        (
            f"{ENDED}Flow run encountered an exception: EvaluationError: too low')",
            f"{ENDED}Flow run encountered an exception: EvaluationError')",
        ),
        ("Finished in state Completed()", "Finished in state Completed()"),
        ("epoch 1 encountered an exception: X: y", "epoch 1 encountered an exception: X: y"),
    ],
)
def test_a_state_that_a_terminal_shows_does_not_repeat_the_error(said, shown):
    record = logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, said, None, None)

    assert flow.shorten(record)
    assert record.getMessage() == shown


def test_servers_that_are_not_there_yet_are_named_at_once_and_others_are_not(caplog):
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as b:
        there, gone = (Endpoint(f"127.0.0.1:{each.getsockname()[1]}") for each in (one, b))
        b.close()
        flow.tell_of_absent([there, gone], Path("models"))

    (line,) = caplog.messages
    assert line.startswith(f"nothing listens on {gone.address}: the run goes on, but a server of m")


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_prefects_temporary_server_is_up_once_all_is_imported_unless_another_is_named(
    tmp_path, named
):
    environment = {"PREFECT_HOME": str(tmp_path), **running.PREFECT}
    if named:
        environment["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    code = (
        "import json, os, sys, urllib.request\n"
        "from pipeline import flow\n"
        "flow.prepare(os.dup(2))\n"
        "server = flow.SubprocessASGIServer()\n"
        "up = server.running and urllib.request.urlopen(f'{server.api_url}/health').status\n"
        "print(json.dumps([up, 'tensorflow' in sys.modules]))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert json.loads(done.stdout) == [False if named else 200, True]
