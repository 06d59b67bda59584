"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[Path, typer.Option(help="Folder of the bundles.")]
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and exports, one a run.")]
SOURCE = (
    "What to learn from: a folder of IDX files or of pictures, one subfolder a class, or an .npz; "
    "by default Fashion-MNIST, from the cache, Debian's package, Keras' download or apt."
)
Data = Annotated[Path | None, typer.Option(envvar="TRAIN_EXPORT_DATA", help=SOURCE)]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")]
Address = Annotated[
    str,
    typer.Option(
        help="Of the Ray cluster: auto, the one started on this host; HOST:PORT; ray://HOST:PORT; "
        "local, one for this command alone."
    ),
]
UseTls = Annotated[bool, typer.Option("--tls", help="The server speaks TLS.")]
TlsCa = Annotated[
    Path | None, typer.Option(help="The server speaks TLS; who may have signed for it, PEM.")
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with our token; or the variable SERVE_EXPORT_TOKEN.")
]
