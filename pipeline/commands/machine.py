"""What this machine and this installation can do: `doctor` and `models`."""

import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.commands.options import AsJson, Models, Runs
from pipeline.commands.terminal import REFUSED, fail, print_json, quietly, sentences


def doctor(
    models: Models = Path("models"), runs: Runs = Path("runs"), as_json: AsJson = False
) -> None:
    """Say what TensorFlow sees here, and name what is broken.

    Every device computes a small convolution, held against numpy; packages, disks and the Prefect
    server are looked at. Writes nothing, and takes about ten seconds.

    Exit status: 0 all is well, 1 something has to be mended before a run can end well, and one
    sentence says what, 2 wrong options, 130 stopped with Ctrl-C.

    Example: train-export doctor

    Example: train-export doctor --models /srv/models --runs /srv/runs --json
    """
    with sentences("stopped"), quietly():
        from pipeline import doctor  # noqa: PLC0415  not to print the help

        found = doctor.examine([models, runs], os.environ.get("PREFECT_API_URL", ""))
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        drawn = Table.grid(padding=(0, 2, 0, 0))
        for one in found:
            drawn.add_row("broken" if one.wrong else "ok", one.name, one.found)
        Console().print(drawn)
    wrong = [one.wrong for one in found if one.wrong]
    if wrong:
        fail("; ".join(wrong), status=REFUSED)


def models(as_json: AsJson = False) -> None:
    """List the networks, with parameters and multiply-adds.

    A network of your own goes by module:function: train-export run --network.

    Example: train-export models

    Example: train-export models --json
    """
    with sentences("stopped"), quietly():
        from pipeline.models import listing  # noqa: PLC0415  not to print the help

        found = listing.networks()
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        Console().print(listing.table(found))
