"""Put a published bundle where others serve it from: `push`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Models
from pipeline.commands.terminal import log_plainly, quietly, sentences


def push(
    name: Annotated[str, typer.Argument(help="Of the model.")],
    version: Annotated[int, typer.Argument(min=1)],
    to: Annotated[
        str, typer.Option(help="s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER.")
    ],
    models: Models = Path("models"),
    alias: Annotated[
        str, typer.Option(help="Point this alias there at the version, such as champion.")
    ] = "",
) -> None:
    """Put a published version into a repository behind a URL, from which servers copy it.

    It is visible once all of it is there, and then never changes. Of two publishers of one number
    one wins; the same bundle twice is no error, and a push that was stopped is ended by the same
    command. With --alias a version that is there already becomes the champion again: a rollback.

    Example: train-export push fashion-mnist 3 --to s3://bucket/models --alias champion
    """
    log_plainly()
    with quietly():
        from pipeline import push  # noqa: PLC0415  not to print the help
        from service import remote  # noqa: PLC0415
    with sentences("stopped; the same command goes on"):
        store = remote.connect(to)
        pushed = push.push(models / name / str(version), store)
        print(f"{'already there' if pushed.already else 'pushed'}: {pushed.url}")
        print(f"files: {pushed.files}, {pushed.size_bytes:,} bytes")
        if alias:
            before = push.set_alias(store, name, alias, version)
            was = f"version {before}" if before else "not set"
            print(f"{alias}: {name} {version} (was {was})")
