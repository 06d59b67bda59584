import os
import re
import subprocess
import sys

import pytest
import typer

from pipeline.commands.terminal import quietly, sentences, stoppable
from pipeline.errors import (
    ConfigError,
    InterruptedTrainingError,
    PublishError,
    SweepError,
    UsageError,
)
from service.errors import BundleError, SettingsError
from tests.service.test_command_line import on_terminal


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (PublishError("not served"), 1, "error: not served"),
        (BundleError("no such model"), 1, "error: no such model"),
        (ConfigError("no such setting"), 2, "error: no such setting"),
        (UsageError("not there"), 2, "error: not there"),
        (SweepError("no grid"), 2, "error: no grid"),
        (SettingsError("no store"), 2, "error: no store"),
        (OSError("broken"), 1, "error: a file cannot be read or written: broken"),
        (InterruptedTrainingError("saved"), 75, "error: saved"),
        (KeyboardInterrupt(), 130, "error: stopped halfway"),
    ],
)
def test_whatever_is_refused_ends_with_its_status_and_one_sentence(error, status, sentence, capsys):
    with pytest.raises(typer.Exit) as ended, sentences("stopped halfway"):
        raise error

    assert ended.value.exit_code == status
    assert capsys.readouterr().err.strip() == sentence


def test_ctrl_c_is_one_line_and_130_wherever_it_comes(capfd):
    with pytest.raises(typer.Exit) as ended, stoppable("stopped; all is well"), quietly():
        os.write(2, b"what a library says")
        raise KeyboardInterrupt

    assert ended.value.exit_code == 130
    assert capfd.readouterr().err == "error: stopped; all is well\n"


WALK = """
import time
from pipeline.commands.terminal import quietly
with quietly("walking") as show:
    time.sleep(0.3)
    for done in range(5):
        show(done, 8)
        time.sleep(0.2)
"""


def test_the_time_left_is_shown_on_a_terminal_once_it_is_known_how_much_there_is_to_do():
    status, said = on_terminal(sys.executable, "-c", WALK, COLUMNS="100", NO_COLOR="1")
    first, _, rest = said.partition(b"%")

    assert status == 0
    assert b"walking" in first
    assert b"left" not in first
    assert b"50%" in rest
    assert re.search(rb"0:00:0[0-9] left", rest)


def test_nothing_is_shown_where_there_is_no_terminal():
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, check=True)

    assert (done.stdout, done.stderr) == (b"", b"")


def test_what_a_library_says_is_given_out_if_it_cannot_be_loaded(capfd):
    with pytest.raises(ImportError), quietly():
        os.write(2, b"why")
        raise ImportError

    assert capfd.readouterr().err == "why"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), sentences("stopped"):
        raise ZeroDivisionError
