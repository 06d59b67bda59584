"""Move the alias `champion`: `promote` and `rollback`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import config, dataset
from pipeline.commands.options import Data, Models, TlsCa, TokenFile, UseTls
from pipeline.commands.terminal import log_plainly, quietly, sentences
from service import bundle


def promote(  # noqa: PLR0913  one parameter an option
    name: Annotated[str, typer.Argument(help="Of the model.")],
    version: Annotated[int, typer.Argument(min=1)],
    endpoint: Annotated[list[str], typer.Option(help="HOST:PORT that serves it; may be repeated.")],
    models: Models = Path("models"),
    data: Data = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
) -> None:
    """Make a published version the champion, if the deployment answers like its original.

    Every endpoint is asked for all test images, by the version's number; what was measured is
    written to models/NAME/records. If one does not hold, the champion stays what it was.

    Example: train-export promote fashion-mnist 3 --endpoint 127.0.0.1:8001
    """
    from pipeline import status  # noqa: PLC0415  not to print the help
    from pipeline.endpoint import Endpoint  # noqa: PLC0415

    log_plainly()
    with sentences(f"stopped; {models / name}/aliases.json says what the champion is"):
        path = status.home(models, name) / str(version)
        servers = [Endpoint(one, tls, tls_ca, token_file=token_file) for one in endpoint]
        with quietly():
            import tensorflow  # noqa: F401, PLC0415  it writes a few lines of its own

            from pipeline import promote  # noqa: PLC0415
        learnt_from = config.learnt_from(bundle.read_manifest(path).training.config, data)
        record = promote.promote(path, dataset.prepare(learnt_from), servers)
    print(f"champion: {name} {version}")
    print(f"record:   {record}")


def rollback(
    name: Annotated[str, typer.Argument(help="Of the model.")],
    models: Models = Path("models"),
) -> None:
    """Give the alias champion back to the version that had it before.

    Example: train-export rollback fashion-mnist
    """
    from pipeline import status  # noqa: PLC0415  not to print the help

    with sentences(f"stopped; {models / name}/aliases.json says what the champion is"):
        home = status.home(models, name)
        with quietly():
            from pipeline import promote  # noqa: PLC0415
        before, now = promote.rollback(home)
    print(f"champion: {name} {now}, was {before}")
