"""The commands of `serve-export`: serve a repository, ask a server, read its parity and health.

Exit statuses are those of `service.command_line`. Only this module prints, and `service.tables` for
it. What a server does not need is imported where it is used: it should start at once.
"""

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service import command_line, launch
from service.command_line import AsJson
from service.errors import ServiceError, SettingsError
from service.launch import TOKEN
from service.settings import CHOICES, ENVIRONMENT_PREFIX, Settings, place

if TYPE_CHECKING:
    from service.client import Client
    from service.connection import Tls

app = command_line.program(
    "Serve published bundles over gRPC, and ask a server about images and its parity."
)
SERVE, ASK, MACHINE = "Serve", "Ask a server", "This machine"
CONNECTION = "Connection"
WRONG, STOPPED = 2, 130
COMPLETED = {  # what a shell completes of the settings
    **CHOICES,
    "providers": ("cpu", "cuda,cpu"),
    "version_policy": ("latest:1", "all", "specific:1"),
}
PART_ROWS = 64  # pictures of one request; servers take 256 unless they were told otherwise
ADDRESS = str(Settings.__dataclass_fields__["address"].default)
Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=f"{ENVIRONMENT_PREFIX}ADDRESS",
        help="HOST:PORT of the server.",
        rich_help_panel=CONNECTION,
    ),
]
UseTls = Annotated[
    bool, typer.Option("--tls", help="The server speaks TLS.", rich_help_panel=CONNECTION)
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="Who signed its certificate, PEM; by default who the system trusts.",
        rich_help_panel=CONNECTION,
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="Our own certificate, PEM, for a server that asks for one.",
        rich_help_panel=CONNECTION,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(help="The key of that certificate, PEM.", rich_help_panel=CONNECTION),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help=f"File with our token; or the variable {TOKEN}.", rich_help_panel=CONNECTION),
]


def _models(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a model in the repository of this host."""
    return command_line.beginning(command_line.models(_repository(context)), incomplete)


def _versions(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a version of the model that was named before it."""
    model = str(context.params.get("model") or "")
    return command_line.beginning(command_line.versions(_repository(context), model), incomplete)


def _repository(context: typer.Context) -> Path:
    named = context.params.get("repository") or os.environ.get(f"{ENVIRONMENT_PREFIX}REPOSITORY")
    return Path(named or "models")


@contextmanager
def _sentences() -> Iterator[None]:
    """End with one sentence whatever is refused inside the block, and at Ctrl-C."""
    try:
        yield
    except (SettingsError, ValueError) as error:  # the latter of what a client is made with
        fail(error, status=WRONG)
    except ServiceError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped", status=STOPPED)


def serve(**options: Any) -> None:  # noqa: ANN401  typer passes what Settings declares
    """Serve the bundles in a folder, or behind a URL, over gRPC.

    Prints one line, `serving on HOST:PORT`, once a model has passed its self-check on this host;
    the log goes to standard error. A version that fails is refused and the rest are served; a new
    one takes the place of the old without a request being lost. Stopping answers what was
    accepted, until SIGTERM or Ctrl-C; a second signal does not wait.

    Each option is also an environment variable: --address is SERVE_EXPORT_ADDRESS. Options win.
    Tokens may come from SERVE_EXPORT_TOKEN and SERVE_EXPORT_ADMIN_TOKEN as well as from files.

    Exit status: 0 stopped cleanly, 1 could not start, 2 wrong options.

    Example: serve-export serve --repository models

    Example: serve-export serve --repository models --metrics-address 127.0.0.1:8002

    Example: serve-export serve --repository s3://bucket/models --address 0.0.0.0:8001
    --tls-cert server.pem --tls-key server.key --token-file tokens
    """
    with _sentences():
        launch.serve(Settings(**options))


def worker(*, index: int, statistics: Path, **options: Any) -> None:  # noqa: ANN401
    """Be one of several servers on an address; started by `serve --workers`."""
    with _sentences():
        launch.work(Settings(**options), index=index, statistics=statistics)


def _options() -> list[inspect.Parameter]:
    """Make typer's parameters from the fields of Settings, the one list of options."""
    return [_option(field) for field in fields(Settings)]


def _option(field: Field[Any]) -> inspect.Parameter:
    anywhere = field.type == Path | str  # typer knows no unions
    words = COMPLETED.get(field.name)
    option = typer.Option(
        f"--{field.name.replace('_', '-')}",
        envvar=f"{ENVIRONMENT_PREFIX}{field.name.upper()}",
        help=field.metadata["help"],
        rich_help_panel=field.metadata["group"],
        autocompletion=command_line.one_of(*words) if words else None,
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
command_line.add(app, serve, group=SERVE)
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
    """Say what host, settings and repository are like; what to mend.

    Takes the options of `serve`, starts nothing and writes nothing.

    Exit status: 0 all is well, 1 something should be mended, 2 wrong options, 130 stopped with
    Ctrl-C.

    Example: serve-export doctor --repository models

    Example: serve-export doctor --repository models --tls-cert server.pem --tls-key server.key
    """
    from service.doctor import examine  # noqa: PLC0415  onnxruntime: only for who asks

    with _sentences():
        findings = examine(Settings(**options))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        from service import tables  # noqa: PLC0415  only for who reads

        tables.show_findings(findings)
    if wrong := [finding.area for finding in findings if not finding.ok]:
        fail(f"mend {', '.join(dict.fromkeys(wrong))}; doctor says how")


doctor.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson
        ),
        *_options(),
    ]
)


def alias(
    model: Annotated[str, typer.Argument(help="Name of the model.", autocompletion=_models)],
    name: Annotated[
        str,
        typer.Argument(
            help="The alias, such as champion.",
            autocompletion=command_line.one_of("champion", "candidate"),
        ),
    ],
    version: Annotated[
        int | None,
        typer.Argument(help="The version it points at; none removes it.", autocompletion=_versions),
    ] = None,
    repository: Annotated[
        str, typer.Option(envvar=f"{ENVIRONMENT_PREFIX}REPOSITORY", help="Folder of bundles.")
    ] = "models",
    as_json: AsJson = False,
) -> None:
    """Point an alias of a model at one of its versions.

    Servers that watch the folder follow. The champion answers requests that name no version;
    pointing it back is a rollback. Behind a URL aliases are set by train-export push --alias.

    Example: serve-export alias fashion-mnist champion 3

    Example: serve-export alias fashion-mnist candidate --repository /srv/models --json
    """
    from service import aliases, bundle  # noqa: PLC0415  none of it to print the help

    if not bundle.NAME.fullmatch(model):
        fail(f"{model!r} is not the name of a model", status=WRONG)
    root = place(repository)
    if isinstance(root, str):
        fail(
            f"{root} is an address, and alias changes folders of this host; to point one at a "
            f"version there: train-export push {model} {version or 'VERSION'} --to {root} "
            f"--alias {name}",
            status=WRONG,
        )
    folder = root / model
    if not folder.is_dir():
        fail(f"there is no model {model!r} in {root}; name one that was published", status=WRONG)
    if version is not None and not (folder / str(version)).is_dir():
        fail(f"{model} has no version {version} for {name} to point at", status=WRONG)
    if not aliases.ALIAS.fullmatch(name):
        fail(f"{name!r} is not an alias; expected lower-case letters and digits", status=WRONG)
    with _sentences(), aliases.changing(folder):
        named = aliases.read(folder)
        before = named.pop(name, None)
        if version is not None:
            named[name] = version
        aliases.write(folder, named)
    if as_json:
        print_json({"model": model, "alias": name, "version": version, "before": before})
        return
    was = f"version {before}" if before else "not set"
    print(f"{model} {name}: {f'version {version}' if version else 'not set'} (was {was})")


def predict(  # noqa: PLR0913  one parameter an option
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="PNG or JPEG files of any size.")
    ],
    address: Address = ADDRESS,
    model: Annotated[
        str,
        typer.Option(
            help="Name of the model; unneeded while the server has one.", autocompletion=_models
        ),
    ] = "",
    version: Annotated[
        str,
        typer.Option(
            help="Its version; by default the champion, else the highest.",
            autocompletion=_versions,
        ),
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

    Exit status: 0 all were answered, 1 a file is no picture or the server refused, 2 wrong options,
    or a file that is not there, 130 stopped with Ctrl-C.

    Example: serve-export predict shirt.png --invert

    Example: serve-export predict *.png --address server:8001 --model fashion-mnist --json
    """
    from service import tables  # noqa: PLC0415  none of it to print the help

    if absent := next((str(one) for one in images if not one.exists()), ""):
        fail(f"{absent} is not there; name PNG or JPEG files", status=WRONG)
    with (
        _sentences(),
        _client(address, tls, tls_ca, (tls_cert, tls_key), token_file) as client,
        command_line.progress("asking") as show,
    ):
        model = model or _only_model(client)
        show(0, len(images))
        answered = []
        for one in _answers(client, images, model, version, invert=invert):
            answered.append(one)
            show(len(answered))
    if as_json:
        print_json(
            [
                {
                    "image": str(one.path),
                    "model": one.model,
                    "version": one.version,
                    "probabilities": dict(one.row),
                }
                for one in answered
            ]
        )
        return
    for title in dict.fromkeys(one.title for one in answered):  # two, if it was changed meanwhile
        rows = [(one.path, one.row) for one in answered if one.title == title]
        tables.show_predictions(title, rows, top=top)
    if not invert and any(one.light for one in answered):
        tables.console.print(
            "A picture has a light border; if the model learnt light things on black, "
            "as Fashion-MNIST's are, add --invert."
        )


@dataclass(frozen=True, slots=True)
class _Answered:
    """What a server says about one picture."""

    path: Path
    model: str
    version: str
    row: list[tuple[str, float]]  # labels and their probabilities, the likeliest first
    light: bool  # whether the picture has a light border

    @property
    def title(self) -> str:
        return f"{self.model} version {self.version}"


def _answers(
    client: "Client", paths: list[Path], model: str, version: str, *, invert: bool
) -> Iterator[_Answered]:
    """Read pictures and ask for them, some in each request."""
    import numpy as np  # noqa: PLC0415  none of these to print the help

    from service import pictures  # noqa: PLC0415

    shape = tuple(client.metadata(model, version).inputs[0].shape[1:])
    if len(shape) != 3:  # noqa: PLR2004  height, width, channels
        fail(f"{model} takes tensors of shape {shape}, not pictures")
    for start in range(0, len(paths), PART_ROWS):
        part = paths[start : start + PART_ROWS]
        pixels = [pictures.read(path, shape, invert=invert) for path in part]
        try:
            answer = client.predict(np.stack(pixels), model=model, version=version)
        except ValueError as error:  # the model takes other numbers than those of pictures
            fail(error)
        for path, picture, row in zip(part, pixels, answer.probabilities, strict=True):
            pairs = zip(answer.labels, map(float, row), strict=True)
            likeliest = sorted(pairs, key=lambda pair: -pair[1])
            light = pictures.has_light_border(picture)
            yield _Answered(path, answer.model, answer.version, likeliest, light)


def parity(  # noqa: PLR0913  one parameter an option
    address: Address = ADDRESS,
    model: Annotated[
        str, typer.Option(help="Name of the model; by default all.", autocompletion=_models)
    ] = "",
    version: Annotated[
        str, typer.Option(help="Its version; needs --model.", autocompletion=_versions)
    ] = "",
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
    """Show what a server says about its parity with the original.

    The original is the TensorFlow model that the bundle was made from. One row a variant, measured
    over the whole test set when the bundle was made; the served row over gRPC before it was
    published; the self-check on the server's host when it loaded it; the live row by what a shadow
    (train-export shadow) reports of answered requests.

    Exit status: 0 it holds, 1 a self-check or a live verdict failed, the server refused, or nobody
    answered (with --watch it is asked again), 2 wrong options, 130 stopped with Ctrl-C.

    Example: serve-export parity

    Example: serve-export parity --address 127.0.0.1:8001 --watch

    Example: serve-export parity --model fashion-mnist --version 3 --json
    """
    from service import tables, watching  # noqa: PLC0415  none of these to print the help

    with _sentences():
        if watch:
            secrets = _secrets(tls, tls_ca, (tls_cert, tls_key), token_file)
            _watch(address, *secrets, (model, version), as_json=as_json)
        with _client(address, tls, tls_ca, (tls_cert, tls_key), token_file) as client:
            answer = client.parity(model, version)
    if as_json:
        print(watching.as_line(answer, indent=2))
    else:
        tables.show_parity(answer)
    if failures := watching.failures(answer):
        fail("; ".join(failures))


def health(  # noqa: PLR0913  one parameter an option
    address: Address = ADDRESS,
    ready: Annotated[bool, typer.Option("--ready", help="It must take requests as well.")] = False,
    service: Annotated[
        str,
        typer.Option(
            help="Name of a model, or of a gRPC service, that must take requests.",
            autocompletion=_models,
        ),
    ] = "",
    timeout_s: Annotated[float, typer.Option(help="Longest wait for an answer, in seconds.")] = 3.0,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: Annotated[
        str,
        typer.Option(
            help="Host that its certificate is for, if not the one of --address.",
            rich_help_panel=CONNECTION,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Say whether a server is live, or ready, for probes.

    Live is whatever answers, with a model or without, and while it stops. Needs no token. An
    address to listen on everywhere, as in SERVE_EXPORT_ADDRESS=0.0.0.0:8001, is asked on this
    host.

    Exit status: 0 it is, 1 it is not, 2 wrong options.

    Example: serve-export health --ready

    Example: serve-export health --address server:8001 --tls-ca ca.pem --json
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
    with _sentences():
        state = probe.ask(question)
    if as_json:
        print_json({"address": address, "state": state})
    else:
        print(state)


def playground(  # noqa: PLR0913  one parameter an option
    address: Address = ADDRESS,
    models: Annotated[
        Path | None,
        typer.Option(help="The server's repository, for test images and the other variants."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Folder of one bundle, MODELS/NAME/VERSION, instead of all of them."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of the page; port 0 picks a free one. Off loopback any Host is taken."
        ),
    ] = "127.0.0.1:7860",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Serve a web page to try a served model on.

    Draw, upload or pick an image: the page shows what the server answers, where the time went, and
    what every other variant and the original answer, and the server's load and parity while it
    serves. The variants need --models or --bundle, and train-export[pipeline] beside this command.
    The page loads nothing from elsewhere. Whoever reaches --listen may ask the server with our
    token; names other than this host's own are refused only while --listen is a loopback address.
    SIGTERM or Ctrl-C ends it at once.

    Exit status: 0 stopped with SIGTERM or Ctrl-C, 1 could not start, 2 wrong options.

    Example: serve-export playground --models models

    Example: serve-export playground --address server:8001 --tls-ca ca.pem --token-file token
    """
    if models is not None and bundle is not None:
        fail("give --models or --bundle, not both", status=WRONG)
    if (given := models or bundle) is not None and not given.is_dir():
        fail(f"{given} is not a folder; name the one that the server serves", status=WRONG)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would say is on the page
    try:
        from service.playground import launch as page  # noqa: PLC0415  not for who only serves
    except ImportError as error:
        fail(f"{error.name} is not installed; the page needs train-export[playground]")
    from service.aio_client import AsyncClient  # noqa: PLC0415
    from service.playground.bundles import Bundles  # noqa: PLC0415

    with _sentences():
        secured, token = _secrets(tls, tls_ca, (tls_cert, tls_key), token_file)
        client = AsyncClient(address, tls=secured, token=token)
        page.run(client, address, Bundles(models, bundle), listen=listen, announce=print)


command_line.add(app, alias, group=SERVE)
for command in (predict, parity, health, playground):
    command_line.add(app, command, group=ASK)
command_line.add(app, doctor, group=MACHINE)
command_line.add_completion(app, "serve-export", group=MACHINE)


def _client(
    address: str,
    tls: bool,
    ca: Path | None,
    pair: tuple[Path | None, Path | None],
    token_file: Path | None,
) -> "Client":
    """Return a client that shows what a secured server asks for."""
    from service.client import Client  # noqa: PLC0415  gRPC: only for who asks

    with _sentences():
        secured, token = _secrets(tls, ca, pair, token_file)
        return Client(address, tls=secured, token=token)


def _watch(
    address: str, tls: "Tls | None", token: str | None, asked: tuple[str, str], *, as_json: bool
) -> NoReturn:
    """Show what a server says of a model's version, until Ctrl-C.

    By an event loop, which ends where it waits: a blocking stream begins with a thread of gRPC's,
    and if Ctrl-C comes between its start and the call's, it fails or is waited for without end.
    """
    import asyncio  # noqa: PLC0415  seldom needed

    from service import watching  # noqa: PLC0415
    from service.aio_client import AsyncClient  # noqa: PLC0415

    async def shown() -> NoReturn:
        async with AsyncClient(address, tls=tls, token=token) as client:
            await watching.watch(lambda: client.watch_parity(*asked), as_json=as_json)

    asyncio.run(shown())


def _secrets(
    tls: bool, ca: Path | None, pair: tuple[Path | None, Path | None], token_file: Path | None
) -> tuple["Tls | None", str | None]:
    """Return what a secured server asks for: certificates and a token."""
    from service import access  # noqa: PLC0415  gRPC: only for who asks
    from service.connection import Tls  # noqa: PLC0415

    tokens = access.read_tokens(token_file, "" if token_file else os.environ.get(TOKEN, ""))
    secured = Tls(ca=ca, certificate=pair[0], key=pair[1]) if tls or ca or any(pair) else None
    return secured, tokens[0] if tokens else None


def _only_model(client: "Client") -> str:
    names = sorted({model.name for model in client.models() if model.state == "READY"})
    if len(names) != 1:
        fail(f"the server has the models {', '.join(names) or 'none'}; choose one with --model")
    return names[0]


def print_json(value: object) -> None:
    """Print a value as JSON, whatever the terminal's width."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def fail(reason: object, *, status: int = 1) -> NoReturn:
    """End with a status and one sentence on standard error."""
    from service import tables  # noqa: PLC0415  only for who is refused

    tables.show_refusal(reason)
    raise typer.Exit(status)
