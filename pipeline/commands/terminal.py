"""How commands end, and what they keep off the terminal."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.errors import (
    ConfigError,
    InterruptedTrainingError,
    PipelineError,
    SweepError,
    UsageError,
)
from service import command_line
from service.errors import ServiceError, SettingsError

GPU_DRIVER = Path("/dev/nvidiactl")
REFUSED, WRONG, GO_ON_LATER, STOPPED = 1, 2, os.EX_TEMPFAIL, 130
# What was typed cannot work; whatever else is refused is no mistake of who typed it.
MISTAKES = (ConfigError, UsageError, SweepError, SettingsError)


def fail(reason: str, *, status: int) -> NoReturn:
    """End with a status and one sentence on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(reason)}", highlight=False)
    raise typer.Exit(status)


@contextmanager
def stoppable(stopped: str = "stopped; nothing was written") -> Iterator[None]:
    """End with one line at Ctrl-C.

    Args:
        stopped: what it leaves behind.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail(stopped, status=STOPPED)


@contextmanager
def sentences(stopped: str) -> Iterator[None]:
    """End with one sentence whatever is refused inside the block.

    Args:
        stopped: what Ctrl-C leaves behind.
    """
    with stoppable(stopped):
        try:
            yield
        except InterruptedTrainingError as error:
            fail(str(error), status=GO_ON_LATER)
        except (PipelineError, ServiceError) as error:
            fail(str(error), status=WRONG if isinstance(error, MISTAKES) else REFUSED)
        except OSError as error:
            fail(f"a file cannot be read or written: {error}", status=REFUSED)


def log_plainly() -> None:
    """Show what the pipeline says, a line each with its time."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)


def print_json(value: object) -> None:
    """Print a value as JSON, whatever the terminal's width."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def quiet_tensorflow() -> None:
    """Hold TensorFlow's own lines back; it takes a GPU's driver that is not there for an error."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")


@contextmanager
def quietly(task: str = "starting TensorFlow") -> Iterator[command_line.Show]:
    """Hold back what native code writes while it is loaded, and give it out if that fails.

    TensorFlow's own switch for it, TF_CPP_MIN_LOG_LEVEL, comes too late for its first lines. On a
    terminal the task is shown meanwhile, how long it has taken, and the time left once it is told
    how much there is to do.

    Args:
        task: what is done.
    """
    quiet_tensorflow()
    sys.stderr.flush()
    kept = os.dup(2)
    with os.fdopen(kept, "w") as terminal, tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            with command_line.shown(task, terminal) as show:
                yield show
        except (PipelineError, ServiceError, KeyboardInterrupt):  # of which one sentence says all
            raise
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
