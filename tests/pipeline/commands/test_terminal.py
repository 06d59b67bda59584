import os

import pytest
import typer

from pipeline.commands.terminal import quietly, sentences, stoppable
from pipeline.errors import InterruptedTrainingError, PublishError
from service.errors import BundleError


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (PublishError("not served"), 1, "error: not served"),
        (BundleError("no such model"), 1, "error: no such model"),
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


def test_what_a_library_says_is_given_out_if_it_cannot_be_loaded(capfd):
    with pytest.raises(ImportError), quietly():
        os.write(2, b"why")
        raise ImportError

    assert capfd.readouterr().err == "why"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), sentences("stopped"):
        raise ZeroDivisionError
