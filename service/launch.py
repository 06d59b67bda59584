"""Become a server: what `serve-export serve` does once its options are read.

The only module besides `service.commands` and `service.tables` that prints: one line, where it
serves.
"""

import gc
import os
import signal
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from service import host, logs
from service.settings import ENVIRONMENT_PREFIX, Settings
from service.trial import Trials

if TYPE_CHECKING:
    from service.server import Process

TOKEN = f"{ENVIRONMENT_PREFIX}TOKEN"
ADMIN_TOKEN = f"{ENVIRONMENT_PREFIX}ADMIN_TOKEN"


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ServiceError: it cannot start.
    """
    _prepare(settings)
    with _on_this_host(settings) as local:
        _serve(local)


def _serve(settings: Settings) -> None:
    if settings.workers > 1:
        import asyncio  # noqa: PLC0415

        from service import workers  # noqa: PLC0415  neither gRPC nor onnxruntime

        gc.enable()
        asyncio.run(workers.serve(settings, _announce, os.environ))
        return
    with _trials(settings) as trials:
        from service import server  # noqa: PLC0415
        from service.front import idle  # noqa: PLC0415

        idle.run(server.serve(settings, _announce, _process(settings, trials)))


def work(settings: Settings, *, index: int, statistics: Path) -> None:
    """Be one of several servers on an address, until its keeper ends it.

    Raises:
        ServiceError: it cannot start.
    """
    _prepare(settings)
    with _trials(settings) as trials:
        from service import server  # noqa: PLC0415
        from service.front import idle  # noqa: PLC0415

        process = replace(_process(settings, trials), statistics=statistics, worker=index)
        idle.run(server.serve(settings, _announce, process))


def _prepare(settings: Settings) -> None:
    """Set up what a server process needs before it imports the rest."""
    # An ignored SIGCHLD, which a parent may leave behind, would hide how a trial has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.disable()  # until everything is imported: it would look through it again and again
    logs.configure(settings.log_format)
    host.keep_memory_steady()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of clients' damaged pictures
    # A server multiplies no matrices with numpy, whose library would start a thread a core for it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # gRPC's core would repeat in its own words what we say in a sentence.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _on_this_host(settings: Settings) -> AbstractContextManager[Settings]:
    """Give settings whose repository is a folder, whatever they name."""
    if isinstance(settings.repository, Path):
        return nullcontext(settings)
    from service import mirror  # noqa: PLC0415  only for who has a URL

    return mirror.mirrored(settings)


def _trials(settings: Settings) -> Trials:
    """Have a process wait for the first version; it tries it while we import the rest."""
    trials = Trials()
    if settings.model_control == "poll":
        from service import candidate  # noqa: PLC0415  numpy and onnxruntime

        # A fork would have the tokens that the environment holds; a new process is not given them.
        secret = TOKEN in os.environ or ADMIN_TOKEN in os.environ
        trials.prepare(None if secret else candidate.main)
    return trials


def _process(settings: Settings, trials: Trials) -> "Process":
    from service.access import Access, read_tokens  # noqa: PLC0415
    from service.server import Process  # noqa: PLC0415  while the trial's process gets ready

    tokens = read_tokens(settings.token_file, os.environ.get(TOKEN, ""))
    admins = read_tokens(settings.admin_token_file, os.environ.get(ADMIN_TOKEN, ""))
    return Process(trials=trials, access=Access(tokens, admins))


def _announce(address: str) -> None:
    print(f"serving on {address}", flush=True)  # noqa: T201
