"""Move the alias `champion`: `promote` and `rollback`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import config
from pipeline.commands.options import (
    AsJson,
    Data,
    Models,
    Name,
    TlsCa,
    TokenFile,
    UseTls,
    Version,
    published,
    servers,
)
from pipeline.commands.terminal import log_plainly, print_json, quietly, sentences
from pipeline.errors import ConfigError, PromotionError
from service import command_line


def promote(  # noqa: PLR0913  one parameter an option
    name: Name,
    version: Version,
    endpoint: Annotated[list[str], typer.Option(help="HOST:PORT that serves it; may be repeated.")],
    models: Models = Path("models"),
    data: Data = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion, if its deployment proves itself.

    Every endpoint is asked for all test images, by the version's number, and held against the
    original; what was measured is written to models/NAME/records. If one does not hold, the
    champion stays what it was. Needs the data that the version was trained on, and TensorFlow.

    Exit status: 0 it is the champion, 1 an endpoint does not hold or cannot be asked, 2 wrong
    options, or a version that is not there, 130 stopped with Ctrl-C.

    Example: train-export promote fashion-mnist 3 --endpoint 127.0.0.1:8001

    Example: train-export promote fashion-mnist 3 --endpoint a:8001 --endpoint b:8001 --json
    """
    from pipeline import status  # noqa: PLC0415  not to print the help

    log_plainly()
    with sentences(f"stopped; {models / name}/aliases.json says what the champion is"):
        home = status.home(models, name)
        asked = servers(endpoint, tls, tls_ca, token_file)
        path = published(home.name, version, models)
        with quietly():
            import tensorflow  # noqa: F401, PLC0415  it writes a few lines of its own

            from pipeline import dataset, promote  # noqa: PLC0415
            from service import bundle  # noqa: PLC0415
        try:
            learnt_from = config.learnt_from(bundle.read_manifest(path).training.config, data)
        except ConfigError as error:  # whoever has typed the command has not typed that
            raise PromotionError(f"{path} was trained with other settings: {error}") from error
        prepared = dataset.prepare(learnt_from)
        with command_line.progress("asking for all test rows") as show:
            record = promote.promote(path, prepared, asked, show=show)
    if as_json:
        print_json({"model": name, "champion": version, "record": str(record)})
        return
    print(f"champion: {name} {version}")
    print(f"record:   {record}")


def rollback(
    name: Name,
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Give the alias champion back to the version before.

    Asks no server: those that watch the folder follow. A version that is gone is not gone back to.

    Example: train-export rollback fashion-mnist

    Example: train-export rollback fashion-mnist --models /srv/models --json
    """
    from pipeline import status  # noqa: PLC0415  not to print the help

    with sentences(f"stopped; {models / name}/aliases.json says what the champion is"):
        home = status.home(models, name)
        with quietly():
            from pipeline import promote  # noqa: PLC0415
        before, now = promote.rollback(home)
    if as_json:
        print_json({"model": name, "champion": now, "before": before})
        return
    print(f"champion: {name} {now}, was {before}")
