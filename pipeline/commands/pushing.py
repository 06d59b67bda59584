"""Put a published bundle where others serve it from: `push`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, Models, Name, Version, published
from pipeline.commands.terminal import log_plainly, print_json, quietly, sentences
from pipeline.errors import UsageError
from service import command_line
from service.remote import Remote, connect


def push(
    name: Name,
    version: Version,
    to: Annotated[
        str, typer.Option(help="s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER.")
    ],
    models: Models = Path("models"),
    alias: Annotated[
        str,
        typer.Option(
            help="Point this alias there at the version, such as champion.",
            autocompletion=command_line.one_of("champion", "candidate"),
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Copy a published version to S3, Google Cloud or a folder.

    Servers copy it from there (serve-export serve --repository URL). It is visible once all of it
    is there, and then never changes. Of two publishers of one number one wins; the same bundle
    twice is no error, and a push that was stopped is ended by the same command. With --alias a
    version that is there already becomes the champion again: a rollback.

    Example: train-export push fashion-mnist 3 --to s3://bucket/models --alias champion

    Example: train-export push fashion-mnist 3 --to file:///srv/models --json
    """
    log_plainly()
    with quietly():
        from pipeline import push  # noqa: PLC0415  not to print the help
        from service import aliases  # noqa: PLC0415
    with sentences("stopped; the same command goes on"):
        store, path = connect(to), published(name, version, models)
        if alias and not aliases.ALIAS.fullmatch(alias):
            raise UsageError(f"{alias!r} is not an alias; expected lower-case letters and digits")
        with command_line.progress("pushing") as show:
            show(0, sum(one.stat().st_size for one in path.rglob("*") if one.is_file()))
            pushed = push.push(path, _Watched(store.url, show))
        before = push.set_alias(store, name, alias, version) if alias else None
    if as_json:
        moved = {"alias": alias, "before": before} if alias else {}
        print_json({**asdict(pushed), "model": name, "version": version, **moved})
        return
    print(f"{'already there' if pushed.already else 'pushed'}: {pushed.url}")
    print(f"files: {pushed.files}, {command_line.size(pushed.size_bytes)}")
    if alias:
        print(f"{alias}: {name} {version} (was {f'version {before}' if before else 'not set'})")


class _Watched(Remote):
    """A store that says how many bytes of a bundle it has been given."""

    def __init__(self, url: str, show: command_line.Show) -> None:
        super().__init__(url)
        self._show, self._done = show, 0

    def put(self, path: str, source: Path) -> None:
        """Put a file there, and say so."""
        super().put(path, source)
        self._done += source.stat().st_size
        self._show(self._done)
