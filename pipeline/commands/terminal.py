"""How commands end, and what they keep off the terminal."""

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

from pipeline.errors import InterruptedTrainingError, PipelineError
from service.errors import ServiceError

GPU_DRIVER = Path("/dev/nvidiactl")
REFUSED, WRONG, GO_ON_LATER, STOPPED = 1, 2, os.EX_TEMPFAIL, 130


def fail(reason: str, *, status: int) -> NoReturn:
    """End with a status and one sentence on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(reason)}", highlight=False)
    raise typer.Exit(status)


@contextmanager
def sentences(stopped: str) -> Iterator[None]:
    """End with one sentence whatever is refused inside the block.

    Args:
        stopped: what Ctrl-C leaves behind.
    """
    try:
        yield
    except InterruptedTrainingError as error:
        fail(str(error), status=GO_ON_LATER)
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=REFUSED)
    except OSError as error:
        fail(f"a file cannot be read or written: {error}", status=REFUSED)
    except KeyboardInterrupt:
        fail(stopped, status=STOPPED)


def log_plainly() -> None:
    """Show what the pipeline says, a line each with its time."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)


def quiet_tensorflow() -> None:
    """Hold TensorFlow's own lines back; it takes a GPU's driver that is not there for an error."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")


@contextmanager
def quietly() -> Iterator[None]:
    """Hold back what native code writes while it is loaded, and give it out if that fails.

    TensorFlow's own switch for it, TF_CPP_MIN_LOG_LEVEL, comes too late for its first lines.
    """
    quiet_tensorflow()
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except (PipelineError, ServiceError):  # says itself what is wrong
            raise
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
