"""Write the page of a model, or of two beside each other: `report`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, Models, bundles, folder_of
from pipeline.commands.terminal import print_json, sentences
from pipeline.errors import UsageError


def report(
    first: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE",
            help="NAME/VERSION in the models' folder, or a path.",
            autocompletion=bundles,
        ),
    ],
    second: Annotated[
        str,
        typer.Argument(metavar="OTHER", help="What to compare it with.", autocompletion=bundles),
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="The HTML file; by default named after the bundles, in this folder."),
    ] = None,
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Write a model's page, or compare two models.

    One HTML file with everything in it. Every published bundle has its page already, report.html;
    this writes it anew, also for a bundle that was published without. Of two bundles, A and B, it
    shows accuracy with intervals, McNemar's test where both answered the same rows, the settings
    that differ, and parity, size and latency of every variant side by side.

    Exit status: 0 written, 1 a bundle cannot be read or is damaged, 2 wrong options, or a bundle
    that is not there, 130 stopped with Ctrl-C.

    Example: train-export report fashion-mnist/3 --output fashion-mnist.html

    Example: train-export report fashion-mnist/2 fashion-mnist/3
    """
    with sentences("stopped; no page was written"):
        from pipeline import files, page  # noqa: PLC0415  not to print the help

        paths = [folder_of(one, models) for one in (first, *filter(None, [second]))]
        written = output or Path(f"{'-and-'.join('-'.join(one.parts[-2:]) for one in paths)}.html")
        _check_writable(written)
        if len(paths) == 1:
            text, found = page.of_bundle(paths[0]), {}
        else:
            text, compared = page.of_two(*paths)
            found = asdict(compared)
        try:
            files.write_whole(written, text.encode())
        except OSError as error:  # which names the hidden file that is written first
            raise UsageError(f"{written} cannot be written: {error.strerror or error}") from error
    if as_json:
        print_json({"page": str(written), **found})
        return
    if found:
        print(f"{found['verdict']}.")
    print(f"page: {written}")


def _check_writable(page: Path) -> None:
    """Refuse a place where no file can be, before anything is read.

    Raises:
        UsageError: it is a folder, or in none.
    """
    if page.is_dir():
        raise UsageError(f"{page} is a folder; name a file with --output, such as report.html")
    if not page.parent.is_dir():
        raise UsageError(
            f"there is no folder {page.parent} to write {page.name} into; make it first, or name "
            "another file with --output"
        )
