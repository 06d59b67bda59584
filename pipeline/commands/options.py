"""Options that several commands have, what they mean, and how a shell completes their values."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import config
from pipeline.errors import UsageError
from service import command_line

if TYPE_CHECKING:
    from pipeline.endpoint import Endpoint

# Under which headings the help of commands with many options lists them.
LEARN, TRAIN, PUBLISH = "What to learn from", "How to train", "What to publish"
PAIR, WHERE, CONNECTION = "Any two model files", "Where it runs", "Connection"
PUBLISHED = re.compile(r"[^/]+/[0-9]+")  # NAME/VERSION
MANIFEST = "manifest.json"  # as service.bundle has it, which takes numpy to import
VARIANTS = (  # of pipeline.export, which takes TensorFlow to import
    "saved-model", "tflite-float32", "tflite-float16", "tflite-dynamic-range", "tflite-int8",
    "tflite-int16x8", "onnx-float32", "onnx-float16", "onnx-int8",
)  # fmt: skip


def presets(incomplete: str) -> list[str]:
    """Complete the name of a preset."""
    return command_line.beginning(list(config.PRESETS), incomplete)


def networks(incomplete: str) -> list[str]:
    """Complete the name of a network of ours."""
    return command_line.beginning(list(config.NETWORKS), incomplete)


def names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a published model."""
    return command_line.beginning(command_line.models(_models(context)), incomplete)


def numbers(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a version of the model that was named before it."""
    name = str(context.params.get("name") or "")
    return command_line.beginning(command_line.versions(_models(context), name), incomplete)


def bundles(context: typer.Context, incomplete: str) -> list[str]:
    """Complete NAME/VERSION."""
    return command_line.beginning(command_line.bundles(_models(context)), incomplete)


def variants(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a variant: of the bundle, if it was named before, else any that there may be."""
    found = list(VARIANTS)
    if named := context.params.get("bundle"):
        try:
            manifest = json.loads((folder_of(named, _models(context)) / MANIFEST).read_bytes())
            found = [one["variant"] for one in manifest["parity"]]
        except (UsageError, OSError, ValueError, KeyError, TypeError):
            return []
    return command_line.beginning(found, incomplete)


def folder_of(text: str, models: Path) -> Path:
    """Return a bundle's folder.

    Args:
        text: NAME/VERSION, which is looked for in `models` first, or a path.
        models: the folder that has NAME/VERSION.

    Raises:
        UsageError: there is none of that name.
    """
    if not text:
        raise UsageError("the bundle's name is empty, expected NAME/VERSION or a path")
    places = [Path(text), models / text]
    for path in reversed(places) if PUBLISHED.fullmatch(text) else places:
        if (path / MANIFEST).is_file():
            return path.resolve()
    raise UsageError(
        f"there is no bundle {text}, neither a path nor in {models}; train-export status lists "
        "what is published"
    )


def published(name: str, version: int, models: Path) -> Path:
    """Return the folder of a version in `models`, and nowhere else.

    Raises:
        UsageError: it is not there.
    """
    path = models / name / str(version)
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"there is no version {version} of {name} in {models}; train-export status lists what "
            "is published"
        )
    return path.resolve()


def servers(
    addresses: Sequence[str], tls: bool, tls_ca: Path | None, token_file: Path | None
) -> "list[Endpoint]":
    """Return servers that can be asked, though perhaps none is there yet.

    Raises:
        ConfigError: an address is none.
        UsageError: a file cannot be read, or is not what it should be.
    """
    from pipeline.endpoint import Endpoint  # noqa: PLC0415  gRPC: only for who asks

    found = [Endpoint(one, tls, tls_ca, token_file=token_file) for one in addresses]
    for one in found:
        try:
            one.connect().close()
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
    return found


def _models(context: typer.Context) -> Path:
    return Path(context.params.get("models") or "models")


Name = Annotated[str, typer.Argument(help="Of the model.", autocompletion=names)]
Version = Annotated[
    int, typer.Argument(min=1, help="Its version, a whole number.", autocompletion=numbers)
]
Bundle = Annotated[
    str,
    typer.Option(
        metavar="BUNDLE",
        help="NAME/VERSION in the models' folder, or a path.",
        autocompletion=bundles,
    ),
]
Models = Annotated[Path, typer.Option(help="Folder of the bundles.")]
AsJson = command_line.AsJson
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and exports, one a run.")]
SOURCE = (
    "What to learn from: a folder of IDX files or of pictures, one subfolder a class, or an .npz; "
    "by default Fashion-MNIST, from the cache, Debian's package, Keras' download or apt."
)
Data = Annotated[Path | None, typer.Option(envvar="TRAIN_EXPORT_DATA", help=SOURCE)]
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
