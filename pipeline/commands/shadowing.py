"""Hold what a server answers against the original: `shadow`."""

import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.commands.options import CONNECTION, TlsCa, UseTls, names
from pipeline.commands.terminal import REFUSED, fail, log_plainly, quietly, sentences
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.endpoint import Endpoint
    from pipeline.replicas import Replicas
    from service.client import Client


def shadow(  # noqa: PLR0913  one parameter an option
    endpoint: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8001",
    every_address: Annotated[
        bool,
        typer.Option(
            "--every-address", help="Shadow the servers at all addresses that HOST has, and gets."
        ),
    ] = False,
    models: Annotated[
        Path, typer.Option(help="Folder of the bundles that the server serves.")
    ] = Path("models"),
    original: Annotated[
        Path | None,
        typer.Option(help="SavedModel to hold answers against, where the bundles are not here."),
    ] = None,
    model: Annotated[str, typer.Option(help="Only this one's rows.", autocompletion=names)] = "",
    rows: Annotated[
        int | None, typer.Option(min=1, help="End after so many rows, with a verdict.")
    ] = None,
    heartbeat: Annotated[
        Path | None,
        typer.Option(help="File to touch every second or so while this works, for health checks."),
    ] = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            help="Our own certificate, PEM, for a server that asks for one.",
            rich_help_panel=CONNECTION,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(help="The key of that certificate, PEM.", rich_help_panel=CONNECTION),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with an admin's token; or the variable SERVE_EXPORT_TOKEN.",
            rich_help_panel=CONNECTION,
        ),
    ] = None,
) -> None:
    """Hold what a server answers against the original, live.

    Reads the rows that the server samples (serve-export serve --sample-rate 0.01), has the
    original SavedModel answer them on TensorFlow, and reports agreement, differences and drift
    back: they are in serve-export parity, in the server's metrics, and in its log when the budget
    is broken. The server never waits for it.

    The original is models/NAME/VERSION/variants/saved_model of the version that answered, with
    every file of that bundle verified. One given with --original must say, in the metadata that
    its exporter wrote, that it comes from the same .keras file.

    With --every-address, HOST is looked up again every few seconds, and every server behind it is
    shadowed and reported to by itself: replicas without a balancer in between.

    Exit status: 0 stopped by SIGTERM, or --rows hold; 1 --rows do not hold, or the server cannot be
    shadowed; 2 wrong options; 130 stopped with Ctrl-C. What was read has been reported.

    Example: train-export shadow --endpoint 127.0.0.1:8001 --models models

    Example: train-export shadow --model fashion-mnist --rows 10000
    """
    with sentences("stopped; what was read has been reported"):
        from pipeline.endpoint import Endpoint  # noqa: PLC0415  gRPC: only for who asks

        server = Endpoint(endpoint, tls, tls_ca, tls_cert, tls_key, token_file)
        with _servers(server, every_address=every_address) as servers:
            asked = {"model": model, "rows": rows, "heartbeat": heartbeat}
            failure = _shadowed(servers, endpoint, (original, models), asked)
    if failure and rows is not None:
        fail(failure, status=REFUSED)


def _servers(server: "Endpoint", *, every_address: bool) -> "Client | Replicas":
    """Return the one server, or all those that its name stands for."""
    try:
        client = server.connect(channels=1)  # reports go to who has sampled the rows
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    if not every_address:
        return client
    client.close()  # what is wrong with the options has been said now
    if server.tls or server.tls_ca or server.tls_cert:
        raise UsageError(
            "--every-address connects to addresses, and a certificate is for a name, which our "
            "client cannot be told to expect there; leave the options of TLS out, or start one "
            "shadow for each server's own name, without --every-address"
        )
    from pipeline.replicas import Name, Replicas  # noqa: PLC0415  gRPC: only for who asks

    return Replicas(
        Name.of(server.address).addresses,
        lambda address: replace(server, address=address).connect(channels=1),
    )


def _shadowed(
    servers: "Client | Replicas",
    endpoint: str,
    places: tuple[Path | None, Path],
    asked: dict[str, Any],
) -> str:
    """Shadow servers until a signal; return why live parity does not hold, or nothing."""
    console = Console(stderr=True)
    stopped: list[int] = []
    with console.status("starting TensorFlow, some ten seconds") as status:
        # Only now, when rich has put itself before standard error: lines go above the live one.
        log_plainly()
        with quietly():
            from pipeline import shadow  # noqa: PLC0415  not to print the help
        status.update(f"waiting for rows of {escape(endpoint)}")
        logging.getLogger("pipeline").info("waiting for rows of %s", endpoint)
        shadowing = shadow.Shadow(
            servers,
            shadow.Originals(saved_model=places[0], models=places[1]),
            show=status.update if console.is_terminal else None,
            **asked,
        )

        def stop(number: int, _: object) -> None:
            stopped.append(number)
            shadowing.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        failure = shadowing.run()
    if signal.SIGINT in stopped:
        raise KeyboardInterrupt
    return failure
