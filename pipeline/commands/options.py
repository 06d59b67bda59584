"""Options that several commands have, and how a shell completes their values."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import config
from service import command_line

# Under which headings the help of commands with many options lists them.
LEARN, TRAIN, PUBLISH = "What to learn from", "How to train", "What to publish"
PAIR, WHERE, CONNECTION = "Any two model files", "Where it runs", "Connection"


def presets(incomplete: str) -> list[str]:
    """Complete the name of a preset."""
    return command_line.beginning(list(config.PRESETS), incomplete)


def networks(incomplete: str) -> list[str]:
    """Complete the name of a network of ours."""
    return command_line.beginning(list(config.NETWORKS), incomplete)


def engines(incomplete: str) -> list[str]:
    """Complete where scores and sweeps are computed."""
    return command_line.beginning(["local", "ray"], incomplete)


def names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a published model."""
    return command_line.beginning(command_line.models(_models(context)), incomplete)


def numbers(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a version of the model that was named before it."""
    name = str(context.params.get("name") or "")
    return command_line.beginning(command_line.versions(_models(context), name), incomplete)


def _models(context: typer.Context) -> Path:
    return Path(context.params.get("models") or "models")


Name = Annotated[str, typer.Argument(help="Of the model.", autocompletion=names)]
Version = Annotated[
    int, typer.Argument(min=1, help="Its version, a whole number.", autocompletion=numbers)
]
Models = Annotated[Path, typer.Option(help="Folder of the bundles.")]
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and exports, one a run.")]
SOURCE = (
    "What to learn from: a folder of IDX files or of pictures, one subfolder a class, or an .npz; "
    "by default Fashion-MNIST, from the cache, Debian's package, Keras' download or apt."
)
Data = Annotated[Path | None, typer.Option(envvar="TRAIN_EXPORT_DATA", help=SOURCE)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Address = Annotated[
    str,
    typer.Option(
        help="Of the Ray cluster: auto, the one started on this host; HOST:PORT; ray://HOST:PORT; "
        "local, one for this command alone.",
        rich_help_panel=WHERE,
    ),
]
UseTls = Annotated[
    bool, typer.Option("--tls", help="The server speaks TLS.", rich_help_panel=CONNECTION)
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="The server speaks TLS; who may have signed for it, PEM.", rich_help_panel=CONNECTION
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with our token; or the variable SERVE_EXPORT_TOKEN.", rich_help_panel=CONNECTION
    ),
]
