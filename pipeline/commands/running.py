"""Train and publish: `run` here, `deploy` for a Prefect server."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from pipeline import config
from pipeline.commands.options import (
    CONNECTION,
    LEARN,
    PUBLISH,
    SOURCE,
    TRAIN,
    AsJson,
    Models,
    TlsCa,
    TokenFile,
    UseTls,
    networks,
    presets,
    servers,
)
from pipeline.commands.terminal import REFUSED, fail, print_json, quietly, sentences
from pipeline.errors import ConfigError, DatasetError
from service import command_line

# What a run without a Prefect server needs; the environment wins, prefect.toml says the same.
PREFECT = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 is too short for two cores
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline",
    "DO_NOT_TRACK": "1",
}
KINDS = ("fashion-mnist", "idx", "npz", "pictures", "line")
SERVED = ("best", "onnx-float32", "onnx-float16", "onnx-int8")
UNREACHABLE = "Failed to reach API at"  # how Prefect's client words it
STOPPED = (
    "stopped; nothing was published unless the log says so, and the same command goes on where "
    "training was"
)


def run(  # noqa: PLR0913  one parameter an option
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"One of: {', '.join(config.PRESETS)}; by default that of --config, else quick.",
            rich_help_panel=TRAIN,
            autocompletion=presets,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML of settings over the preset's, a table a stage.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="SECTION.NAME=VALUE, any setting; may be repeated.", rich_help_panel=TRAIN
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=f"{SOURCE} The variable TRAIN_EXPORT_DATA is asked after --config.",
            rich_help_panel=LEARN,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of the data: fashion-mnist, idx, npz, pictures or line; else as found.",
            rich_help_panel=LEARN,
            autocompletion=command_line.one_of(*KINDS),
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model that is published.", rich_help_panel=PUBLISH)
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="As `train-export models` lists them, or module:function.",
            rich_help_panel=TRAIN,
            autocompletion=networks,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="fit: Keras' own loop; tape: ours with tf.GradientTape.",
            rich_help_panel=TRAIN,
            autocompletion=command_line.one_of("fit", "tape"),
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the training rows; by default the preset's.", rich_help_panel=TRAIN
        ),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(help="Of a training step.", rich_help_panel=TRAIN)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest that the schedule reaches.", rich_help_panel=TRAIN),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order and dropout.", rich_help_panel=TRAIN)
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            help="The ONNX variant to serve; best: the fastest within its budget here.",
            rich_help_panel=PUBLISH,
            autocompletion=command_line.one_of(*SERVED),
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder to publish into; by default models.", rich_help_panel=PUBLISH),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints and exports, one a run; by default runs.",
            rich_help_panel=PUBLISH,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Train anew where an earlier run could be resumed.",
            rich_help_panel=TRAIN,
        ),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Write its logs into the run's folder.", rich_help_panel=TRAIN
        ),
    ] = False,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT that serves --models; asked before the alias champion moves.",
            rich_help_panel=CONNECTION,
        ),
    ] = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Train, export, prove parity, serve once, and publish.

    Runs the flow train-export here. Nothing is published unless the model passes its accuracy
    gate, every export answers all test rows within its budget, and so does a real server over
    gRPC. Without a Prefect server (PREFECT_API_URL) the flow starts one of its own for as long as
    it runs.

    A run that was stopped goes on where it stopped when it is started again with the same
    settings; stages from which nothing has changed are not run again. Settings come from the
    preset, then --config, then --set, then the other options.

    With --endpoint the published version is asked for once more, in the deployment that serves it,
    and becomes champion only if it answers like the original there too.

    Exit status: 0 published, 1 refused or failed, and nothing was published, 2 wrong options,
    settings or data, 75 training was stopped by SIGTERM and goes on with the same command, 130
    stopped with Ctrl-C, 143 by SIGTERM elsewhere.

    Example: train-export run --preset smoke

    Example: train-export run --data flowers --network small --name flowers
    --set 'data.size=[64,64]'

    Example: train-export run --config mine.toml --set training.schedule=cosine --engine tape

    Example: train-export run --preset quick --models /srv/models --json
    """
    with sentences(STOPPED):
        layers = [config.read(file)] if file else []
        layers += [config.single(one) for one in assignments or []]
        layers.append(
            config.options(
                data__kind=kind,
                publishing__name=name,
                training__architecture=network,
                training__engine=engine,
                training__batch_rows=batch_rows,
                training__learning_rate=learning_rate,
                training__tensorboard=tensorboard or None,
                export__serve=serve,
            )
        )
        chosen = config.build(
            preset or config.preset_of(layers),
            config.options(data__source=os.environ.get("TRAIN_EXPORT_DATA") or None),
            *layers,
            config.options(
                data__source=data,
                training__epochs=epochs,
                training__seed=seed,
                training__fresh=fresh or None,
                runs=runs,
                publishing__models=models,
            ),
        )
        verify(chosen)  # now, not after half a minute of starting
        servers(endpoint or [], tls, tls_ca, token_file)
        path = _flow(
            preset=chosen.preset,
            settings=config.as_tables(chosen),
            models=str(chosen.publishing.models),
            runs=str(chosen.runs),
            endpoints=endpoint or [],
            tls=tls,
            tls_ca=_text(tls_ca),
            token_file=_text(token_file),
        )
        if as_json:
            _print_json(Path(path))
        else:
            _show(Path(path), shown(chosen.publishing.models), shown(chosen.runs))


def shown(path: Path) -> Path:
    """Return a path as it is shortest from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def verify(chosen: config.Config) -> None:
    """Refuse what can be seen to fail without TensorFlow.

    Raises:
        ConfigError: there is no such network, or the data are not there or not what they should be.
    """
    from pipeline import dataset  # noqa: PLC0415  not to print the help

    module, _, function = chosen.training.architecture.partition(":")
    if function and not _is_there(module):
        raise ConfigError(
            f"there is no module {module} in {Path.cwd()} or among the installed packages; "
            "--network takes module:function"
        )
    source = chosen.data.source
    if source is not None:
        try:
            dataset.verify(chosen.data)
        except DatasetError as error:
            raise ConfigError(str(error)) from error


def _is_there(module: str) -> bool:
    top = module.partition(".")[0]
    return (
        PathFinder.find_spec(top, [str(Path.cwd())]) is not None
        or PathFinder.find_spec(top) is not None
    )


def deploy(
    first_run: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="Also run it once with this preset, if nothing is published yet.",
            autocompletion=presets,
        ),
    ] = None,
    models: Models = Path("models"),
    as_json: AsJson = False,
) -> None:
    """Set a Prefect server up for runs of this folder.

    Reads prefect.yaml and asks the server of PREFECT_API_URL. Creates a work pool, the deployment,
    and an automation that makes runs whose process is gone Crashed; what there is already is
    brought up to date. A worker then runs them: prefect worker start --pool train-export.

    Example: train-export deploy

    Example: train-export deploy --first-run smoke --json
    """
    if first_run is not None:
        with sentences(""):
            config.build(first_run)
    use_prefect()
    with sentences("stopped; give the command again to finish"), reached():
        from pipeline import deployment  # noqa: PLC0415  not to print the help

        done = list(deployment.deploy(Path.cwd()))
        if first_run is not None:
            done.append(deployment.run_first(models, first_run))
    if as_json:
        print_json(done)
    else:
        print("\n".join(done))


def _flow(**parameters: Any) -> str:  # noqa: ANN401  the flow declares them
    use_prefect()
    signal.signal(signal.SIGTERM, leave)  # Prefect hands it on to what was there before its own
    starting = "starting TensorFlow and Prefect, some twenty seconds"
    if not sys.stderr.isatty():  # which shows it meanwhile
        print(starting, file=sys.stderr)
    errors = os.dup(2)  # the terminal's, which `quietly` holds back
    with quietly(starting):
        from pipeline.flow import prepare, train_export  # noqa: PLC0415  not to print the help

        prepare(errors)
    with reached():
        path: str = train_export(**parameters)
        return path


def leave(number: int, _: object) -> NoReturn:
    """End as SIGTERM does, but let Prefect stop the server that it has started."""
    raise SystemExit(128 + number)


def use_prefect() -> None:
    """Set what a run without a Prefect server needs, where the environment does not."""
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)


@contextmanager
def reached() -> Iterator[None]:
    """Say in one sentence that the Prefect server cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(UNREACHABLE):
            raise
        fail(f"{error}; start that Prefect server, or unset PREFECT_API_URL", status=REFUSED)


def _show(path: Path, models: Path, runs: Path) -> None:
    from pipeline import dataset, page, report  # noqa: PLC0415
    from service import bundle  # noqa: PLC0415

    console = Console()
    console.print()
    manifest = bundle.read_manifest(path)
    console.print(report.table(manifest))
    print(f"bundle: {path}")
    if (path / page.FILE).is_file():
        print(f"page:   {path / page.FILE}")
    serve = "serve-export"
    if not shutil.which(serve):  # the environment is not activated: `make run` does not need it
        serve = os.path.relpath(Path(sys.executable).with_name(serve))
    print(f"serve:  {serve} serve --repository {models}")
    stems = sorted(map(dataset.file_stem, manifest.labels), key=lambda stem: stem != "trouser")
    examples = [path for stem in stems if (path := runs / "examples" / f"{stem}.png").is_file()]
    if examples:
        print(f"ask:    {serve} predict {examples[0]} --model {manifest.name}")


def _print_json(path: Path) -> None:
    from service import bundle  # noqa: PLC0415

    manifest = bundle.read_manifest(path)
    counted = manifest.evaluation.accuracy
    print_json(
        {
            "bundle": str(path),
            "model": manifest.name,
            "version": manifest.version,
            "accuracy": counted.value if counted.rows and manifest.labels else None,
            "loss": manifest.evaluation.loss,
            "test_rows": manifest.dataset.test_rows,
            "served": manifest.served_variant,
            "variants": {one.variant: one.passed for one in manifest.parity},
        }
    )


def _text(path: Path | None) -> str | None:
    return str(path) if path else None
