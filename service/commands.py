"""The commands of `serve-export`: serve a repository, ask a server, read its parity and health.

Exit status: 0 done, or stopped cleanly; 1 refused, with one sentence that says why; 2 wrong
options. Only this module prints, and `service.tables` for it. What a server does not need is
imported where it is used: it should start at once.
"""

import inspect
import json
import os
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service import launch
from service.errors import ServiceError
from service.launch import TOKEN
from service.settings import ENVIRONMENT_PREFIX, Settings, place

if TYPE_CHECKING:
    from service.client import Client

app = typer.Typer(
    help="Serve published bundles over gRPC, and ask a server about images and its parity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
ADDRESS = str(Settings.__dataclass_fields__["address"].default)
Address = Annotated[
    str,
    typer.Option(
        "--address", envvar=f"{ENVIRONMENT_PREFIX}ADDRESS", help="HOST:PORT of the server."
    ),
]
UseTls = Annotated[bool, typer.Option("--tls", help="The server speaks TLS.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="Who signed its certificate, PEM; by default who the system trusts."),
]
TlsCert = Annotated[
    Path | None, typer.Option(help="Our own certificate, PEM, for a server that asks for one.")
]
TlsKey = Annotated[Path | None, typer.Option(help="The key of that certificate, PEM.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File with our token; or the variable {TOKEN}.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def serve(**options: Any) -> None:  # noqa: ANN401  typer passes what Settings declares
    """Serve the bundles in a folder over gRPC until SIGTERM or Ctrl-C.

    Prints one line, `serving on HOST:PORT`, once a model has passed its self-check on this host;
    the log goes to standard error. A version that fails is refused and the rest are served; a new
    one takes the place of the old without a request being lost. Stopping answers what was
    accepted; a second signal does not wait.

    Each option is also an environment variable: --address is SERVE_EXPORT_ADDRESS. Options win.
    Tokens may come from SERVE_EXPORT_TOKEN and SERVE_EXPORT_ADMIN_TOKEN as well as from files.

    Exit status: 0 stopped cleanly, 1 could not start, 2 wrong options.

    Example: serve-export serve --repository models --metrics-address 127.0.0.1:8002
    """
    try:
        launch.serve(Settings(**options))
    except ServiceError as error:
        fail(error)


def worker(*, index: int, statistics: Path, **options: Any) -> None:  # noqa: ANN401
    """Be one of several servers on an address; started by `serve --workers`."""
    try:
        launch.work(Settings(**options), index=index, statistics=statistics)
    except ServiceError as error:
        fail(error)


def _options() -> list[inspect.Parameter]:
    """Make typer's parameters from the fields of Settings, the one list of options."""
    return [_option(field) for field in fields(Settings)]


def _option(field: Field[Any]) -> inspect.Parameter:
    anywhere = field.type == Path | str  # typer knows no unions
    option = typer.Option(
        f"--{field.name.replace('_', '-')}",
        envvar=f"{ENVIRONMENT_PREFIX}{field.name.upper()}",
        help=field.metadata["help"],
        rich_help_panel=field.metadata["group"],
        parser=place if anywhere else None,
        metavar="FOLDER|URL" if anywhere else None,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is MISSING else field.default,
        annotation=Annotated[str if anywhere else field.type, option],
    )


serve.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
app.command()(serve)
own = [
    inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, typer.Option(f"--{name}")],
    )
    for name, kind in (("index", int), ("statistics", Path))
]
worker.__signature__ = inspect.Signature([*own, *_options()])  # type: ignore[attr-defined]
app.command(hidden=True)(worker)


def doctor(*, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Say what this host, these settings and the repository are like, and what to mend.

    Takes the options of `serve` and starts nothing. Exit status: 1 if something should be mended.

    Example: serve-export doctor --repository models --tls-cert server.pem --tls-key server.key
    """
    from service.doctor import examine  # noqa: PLC0415  onnxruntime: only for who asks

    try:
        findings = examine(Settings(**options))
    except ServiceError as error:
        fail(error)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        from service import tables  # noqa: PLC0415  only for who reads

        tables.show_findings(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


doctor.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson
        ),
        *_options(),
    ]
)
app.command()(doctor)


@app.command()
def alias(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    name: Annotated[str, typer.Argument(help="The alias, such as champion.")],
    version: Annotated[
        int | None, typer.Argument(help="The version it points at; none removes it.")
    ] = None,
    repository: Annotated[
        Path, typer.Option(envvar=f"{ENVIRONMENT_PREFIX}REPOSITORY", help="Folder of bundles.")
    ] = Path("models"),
) -> None:
    """Point an alias of a model at one of its versions; servers that watch the folder follow.

    The champion answers requests that name no version. Pointing it back is a rollback.

    Example: serve-export alias fashion-mnist champion 3
    """
    from service import aliases, bundle  # noqa: PLC0415  none of it to print the help

    if not bundle.NAME.fullmatch(model):
        fail(f"{model!r} is not the name of a model")
    folder = repository / model
    try:
        with aliases.changing(folder):
            named = aliases.read(folder)
            before = named.pop(name, None)
            if version is not None:
                named[name] = version
            aliases.write(folder, named)
    except ServiceError as error:
        fail(error)
    was = f"version {before}" if before else "not set"
    print(f"{model} {name}: {f'version {version}' if version else 'not set'} (was {was})")


@app.command()
def predict(  # noqa: PLR0913  one parameter an option
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="PNG or JPEG files of any size.")
    ],
    address: Address = ADDRESS,
    model: Annotated[
        str, typer.Option(help="Name of the model; unneeded while the server has one.")
    ] = "",
    version: Annotated[
        str, typer.Option(help="Its version; by default the champion, else the highest.")
    ] = "",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    invert: Annotated[
        bool, typer.Option("--invert", help="Swap light and dark, for pictures on white.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Labels to show for each image.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Ask a server for the labels and probabilities of picture files.

    A picture is turned upright, laid on black where it is transparent, made gray or RGB as the
    model asks, fitted into the model's size with its proportions kept, and centred on black.

    Example: serve-export predict shirt.png --invert
    """
    import numpy as np  # noqa: PLC0415  none of these to print the help

    from service import pictures, tables  # noqa: PLC0415

    try:
        with _client(address, tls, tls_ca, (tls_cert, tls_key), token_file) as client:
            model = model or _only_model(client)
            shape = tuple(client.metadata(model, version).inputs[0].shape[1:])
            if len(shape) != 3:  # noqa: PLR2004  height, width, channels
                fail(f"{model} takes tensors of shape {shape}, not pictures")
            pixels = [pictures.read(path, shape, invert=invert) for path in images]
            answer = client.predict(np.stack(pixels), model=model, version=version)
    except ServiceError as error:
        fail(error)
    rows = [
        sorted(zip(answer.labels, map(float, row), strict=True), key=lambda pair: -pair[1])
        for row in answer.probabilities
    ]
    if as_json:
        print_json(
            [
                {
                    "image": str(path),
                    "model": answer.model,
                    "version": answer.version,
                    "probabilities": dict(row),
                }
                for path, row in zip(images, rows, strict=True)
            ]
        )
        return
    title = f"{answer.model} version {answer.version}"
    tables.show_predictions(title, list(zip(images, rows, strict=True)), top=top)
    if not invert and any(pictures.has_light_border(one) for one in pixels):
        tables.console.print(
            "A picture has a light border; if the model learnt light things on black, "
            "as Fashion-MNIST's are, add --invert."
        )


@app.command()
def parity(  # noqa: PLR0913  one parameter an option
    address: Address = ADDRESS,
    model: Annotated[str, typer.Option(help="Name of the model; by default all.")] = "",
    version: Annotated[str, typer.Option(help="Its version; needs --model.")] = "",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and show it again whenever it changes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a server says about its own parity with the original TensorFlow model.

    One row a variant, measured over the whole test set when the bundle was made; the served row
    over gRPC before it was published; the self-check on the server's host when it loaded it; the
    live row by what a shadow (train-export shadow) reports of answered requests.

    Ends with status 1 when a self-check or a live verdict failed.

    Example: serve-export parity --address 127.0.0.1:8001 --watch
    """
    from service import tables, watching  # noqa: PLC0415  none of these to print the help

    try:
        with _client(address, tls, tls_ca, (tls_cert, tls_key), token_file) as client:
            if watch:
                watching.watch(lambda: client.watch_parity(model, version), as_json=as_json)
            answer = client.parity(model, version)
    except ServiceError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        print(watching.as_line(answer, indent=2))
    else:
        tables.show_parity(answer)
    if failures := watching.failures(answer):
        fail("; ".join(failures))


@app.command()
def health(  # noqa: PLR0913  one parameter an option
    address: Address = ADDRESS,
    ready: Annotated[bool, typer.Option("--ready", help="It must take requests as well.")] = False,
    service: Annotated[
        str, typer.Option(help="Name of a model, or of a gRPC service, that must take requests.")
    ] = "",
    timeout_s: Annotated[float, typer.Option(help="Longest wait for an answer, in seconds.")] = 3.0,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: Annotated[
        str, typer.Option(help="Host that its certificate is for, if not the one of --address.")
    ] = "",
) -> None:
    """Say whether a server is live, or ready: for containers and probes.

    Live is whatever answers, with a model or without, and while it stops. Needs no token. An
    address to listen on everywhere, as in SERVE_EXPORT_ADDRESS=0.0.0.0:8001, is asked on this
    host.

    Exit status: 0 it is, 1 it is not, 2 wrong options.

    Example: serve-export health --ready
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would say is in our sentence
    from service import probe  # noqa: PLC0415  gRPC: only for who asks

    question = probe.Question(
        address=address,
        ready=ready,
        service=service,
        timeout_s=timeout_s,
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
    )
    try:
        print(probe.ask(question))
    except (ServiceError, ValueError) as error:
        fail(error)


def _client(
    address: str,
    tls: bool,
    ca: Path | None,
    pair: tuple[Path | None, Path | None],
    token_file: Path | None,
) -> "Client":
    """Return a client that shows what a secured server asks for."""
    from service import access  # noqa: PLC0415  gRPC: only for who asks
    from service.client import Client  # noqa: PLC0415
    from service.connection import Tls  # noqa: PLC0415

    try:
        tokens = access.read_tokens(token_file, "" if token_file else os.environ.get(TOKEN, ""))
        secured = Tls(ca=ca, certificate=pair[0], key=pair[1]) if tls or ca or any(pair) else None
        return Client(address, tls=secured, token=tokens[0] if tokens else None)
    except (ServiceError, ValueError) as error:
        fail(error)


def _only_model(client: "Client") -> str:
    names = sorted({model.name for model in client.models() if model.state == "READY"})
    if len(names) != 1:
        fail(f"the server has the models {', '.join(names) or 'none'}; choose one with --model")
    return names[0]


def print_json(value: object) -> None:
    """Print a value as JSON, whatever the terminal's width."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def fail(reason: object) -> NoReturn:
    """End with status 1 and one sentence on standard error."""
    from service import tables  # noqa: PLC0415  only for who is refused

    tables.show_refusal(reason)
    raise typer.Exit(1)
