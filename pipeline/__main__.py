"""The command line `train-export`: options in, the flow's result out.

Exit status: 0 published; 1 refused, with one sentence that says why; 2 wrong options; 130 stopped
with Ctrl-C. Only this module prints.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from pipeline import config, dataset
from pipeline.errors import CheckError, PipelineError, UsageError
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.client import Client

app = typer.Typer(
    help="Train a TensorFlow CNN, export it, prove that every export answers like it, publish it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# What a run without a Prefect server needs; the environment wins, prefect.toml says the same.
PREFECT = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 is too short for two cores
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "pipeline",
    "DO_NOT_TRACK": "1",
}
UNREACHABLE = "Failed to reach API at"  # how Prefect's client words it
GPU_DRIVER = Path("/dev/nvidiactl")
UseTls = Annotated[bool, typer.Option("--tls", help="The server speaks TLS.")]
TlsCa = Annotated[
    Path | None, typer.Option(help="The server speaks TLS; who may have signed for it, PEM.")
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with our token; or the variable SERVE_EXPORT_TOKEN.")
]


@app.callback()
def main() -> None:
    """Train a TensorFlow CNN, export it, prove that every export answers like it, publish it."""


@app.command()
def run(  # noqa: PLR0913  one parameter an option
    preset: Annotated[
        str, typer.Option(help=f"One of: {', '.join(config.PRESETS)}; smoke takes seconds.")
    ] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="TRAIN_EXPORT_DATA",
            help="Folder of the four Fashion-MNIST files, packed or not; by default the cache, "
            "Debian's package, Keras' download and apt are tried in turn.",
        ),
    ] = None,
    models: Annotated[Path, typer.Option(help="Folder to publish into.")] = Path("models"),
    runs: Annotated[
        Path, typer.Option(help="Folder for checkpoints and exports, one a set of settings.")
    ] = Path("runs"),
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training images; by default the preset's."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew where an earlier run could be resumed.")
    ] = False,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT that serves --models; asked before the alias champion moves."),
    ] = None,
    tls_ca: TlsCa = None,
) -> None:
    """Run the flow train-export here: train, evaluate, export, check parity, serve, publish.

    Nothing is published unless the model passes its accuracy gate, every export answers all
    10,000 test images within its budget, and so does a real server over gRPC. Without a Prefect
    server (PREFECT_API_URL) the flow starts one of its own for as long as it runs.

    A run that was stopped goes on where it stopped when it is started again with the same
    settings.

    With --endpoint the published version is asked for once more, in the deployment that serves it,
    and becomes champion only if it answers like the original there too.

    Example: train-export run --preset smoke --models /srv/models
    """
    try:
        config.build(preset, config.options(training__epochs=epochs, training__seed=seed))
        if data:
            dataset.verify_folder(data)  # now, not after half a minute of starting
        path = _flow(
            preset=preset,
            data=str(data) if data else None,
            models=str(models),
            runs=str(runs),
            epochs=epochs,
            seed=seed,
            fresh=fresh,
            endpoints=endpoint or [],
            tls_ca=str(tls_ca) if tls_ca else None,
        )
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=1)
    except OSError as error:
        fail(f"a file cannot be read or written: {error}", status=1)
    except RuntimeError as error:
        if not str(error).startswith(UNREACHABLE):
            raise
        fail(f"{error}; start that Prefect server, or unset PREFECT_API_URL", status=1)
    except KeyboardInterrupt:
        fail(
            "stopped; nothing was published unless the log says so, and the same command goes on "
            "after the last epoch",
            status=130,
        )
    _show(Path(path), models, runs)


@app.command()
def promote(  # noqa: PLR0913  one parameter an option
    name: Annotated[str, typer.Argument(help="Of the model.")],
    version: Annotated[int, typer.Argument(min=1)],
    endpoint: Annotated[list[str], typer.Option(help="HOST:PORT that serves it; may be repeated.")],
    models: Annotated[Path, typer.Option(help="Folder of the bundles.")] = Path("models"),
    data: Annotated[
        Path | None, typer.Option(envvar="TRAIN_EXPORT_DATA", help="As of `run`.")
    ] = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
) -> None:
    """Make a published version the champion, if the deployment answers like its original.

    Every endpoint is asked for all test images, by the version's number; what was measured is
    written to models/NAME/records. If one does not hold, the champion stays what it was.

    Example: train-export promote fashion-mnist 3 --endpoint 127.0.0.1:8001
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    try:
        with _quietly():
            import tensorflow  # noqa: F401, PLC0415  it writes a few lines of its own

            from pipeline import promote  # noqa: PLC0415  not to print the help
            from pipeline.endpoint import Endpoint  # noqa: PLC0415
        record = promote.promote(
            models / name / str(version),
            dataset.prepare(config.DataConfig(source=data)),
            [Endpoint(one, tls, tls_ca, token_file=token_file) for one in endpoint],
        )
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail(f"stopped; {models / name}/aliases.json says what the champion is", status=130)
    print(f"champion: {name} {version}")
    print(f"record:   {record}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Of the model.")],
    models: Annotated[Path, typer.Option(help="Folder of the bundles.")] = Path("models"),
) -> None:
    """Give the alias champion back to the version that had it before.

    Example: train-export rollback fashion-mnist
    """
    with _quietly():
        from pipeline import promote  # noqa: PLC0415  not to print the help
    try:
        before, now = promote.rollback(models / name)
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=1)
    print(f"champion: {name} {now}, was {before}")


@app.command()
def check(  # noqa: PLR0913  one parameter an option
    bundle: Annotated[
        Path | None, typer.Option(help="NAME/VERSION in the models' folder: check all of it.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="SavedModel that the bundle must have been made from.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="SavedModel, .onnx or .tflite that is right.")
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(help="SavedModel, .onnx or .tflite to hold against it.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npy, .npz (images, labels), or a folder of PNG and JPEG files."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help=".npy of the true classes.")] = None,
    precision: Annotated[
        str, typer.Option(help="The candidate's: float32, float16 or int8.")
    ] = "float32",
    output: Annotated[str, typer.Option(help="Output to compare; by default logits.")] = "",
    signature: Annotated[str, typer.Option(help="Of SavedModels.")] = "serving_default",
    resize: Annotated[
        bool, typer.Option("--resize", help="Make pictures of other sizes fit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Say whether a bundle, or any pair of model files, still answers alike; for your CI.

    Ends with 0 if so, else with 1 and one sentence; with 2 if it was asked for what there is not.
    A bundle: its digests, the labels in its files, and the answers of every variant to its golden
    set, on this machine. A pair: every row of --data.

    Example: train-export check --bundle models/fashion-mnist/1

    Example: train-export check --reference saved_model --candidate model.onnx --data images.npz
    """
    files = [reference, candidate, data]
    whole = bundle is not None and not any([*files, labels])
    if not (whole or (bundle is None and against is None and None not in files)):
        fail(
            "give --bundle, with --against or not; or --reference, --candidate and --data",
            status=2,
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")
    try:
        with _quietly():
            from pipeline import check, questions  # noqa: PLC0415  not to print the help

            if bundle is not None:
                found = check.whole_bundle(bundle, against)
            else:
                found = check.pair(
                    reference or Path(),
                    candidate or Path(),
                    questions.read(data or Path(), labels=labels, resize=resize),
                    precision=precision,
                    output=output,
                    signature=signature,
                )
    except CheckError as error:
        fail(str(error), status=2 if isinstance(error, UsageError) else 1)
    if as_json:
        print(check.as_json(found))
    else:
        Console().print(check.table(found))
    if found.failure:
        fail(found.failure, status=1)


@app.command()
def explain(  # noqa: PLR0913  one parameter an option
    variant: Annotated[
        str, typer.Argument(help="Of the bundle, such as onnx-int8; nothing for a pair.")
    ] = "",
    bundle: Annotated[Path | None, typer.Option(help="NAME/VERSION in the models' folder.")] = None,
    reference: Annotated[Path | None, typer.Option(help="SavedModel that is right.")] = None,
    candidate: Annotated[
        Path | None, typer.Option(help="SavedModel, .onnx or .tflite to hold against it.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npy, .npz (images, labels), or a folder of PNG and JPEG files."),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="How many of the worst rows to walk.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Name the first layer in which a variant departs from its reference, and the likely cause.

    Ends with 0 if the variant answers as the reference does, and with 1 if it does not. Walks the
    tensors inside both on the worst rows, of the bundle's golden set or of --data, and draws how
    the error grows.

    Example: train-export explain onnx-int8 --bundle models/fashion-mnist/1
    """
    if (bundle is None or not variant) and None in (reference, candidate, data):
        fail(
            "give VARIANT and --bundle; or --reference, --candidate and --data",
            status=2,
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")
    try:
        with _quietly():
            from pipeline.explain import shown, worst  # noqa: PLC0415  not to print the help

            if bundle is not None and variant:
                asked = worst.of_bundle(bundle, variant, rows)
            else:
                asked = worst.of_pair(
                    reference or Path(), candidate or Path(), data or Path(), rows
                )
            found = worst.explain(asked)
            picture = shown.picture(found, out / f"{asked.candidate.stem}.explained.png")
    except (PipelineError, ServiceError) as error:
        fail(str(error), status=2)
    if as_json:
        print(shown.as_json(found, picture))
    else:
        print(f"{found.text}.")
        Console().print(shown.table(found))
        print(f"picture: {picture}")
    if found.diverges:
        raise typer.Exit(1)


@app.command()
def shadow(  # noqa: PLR0913  one parameter an option
    endpoint: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8001",
    models: Annotated[
        Path, typer.Option(help="Folder of the bundles that the server serves.")
    ] = Path("models"),
    original: Annotated[
        Path | None,
        typer.Option(help="SavedModel to hold answers against, where the bundles are not here."),
    ] = None,
    model: Annotated[str, typer.Option(help="Only this one's rows.")] = "",
    rows: Annotated[
        int | None, typer.Option(min=1, help="End after so many rows, with a verdict.")
    ] = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Our own certificate, PEM, for a server that asks for one.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of that certificate, PEM.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with an admin's token; or the variable SERVE_EXPORT_TOKEN."),
    ] = None,
) -> None:
    """Hold what a server answers its clients against the original, while it serves.

    Reads the rows that the server samples (serve-export serve --sample-rate 0.01), has the
    original SavedModel answer them on TensorFlow, and reports agreement, differences and drift
    back: they are in serve-export parity, in the server's metrics, and in its log when the budget
    is broken. The server never waits for it.

    The original is models/NAME/VERSION/variants/saved_model of the version that answered, with
    every file of that bundle verified. One given with --original must say, in the metadata that
    its exporter wrote, that it comes from the same .keras file.

    Ends with 0 on SIGTERM and 130 on Ctrl-C, with what was read reported. With --rows it ends
    with 1 where parity does not hold.

    Example: train-export shadow --endpoint 127.0.0.1:8001 --models models
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")
    try:
        from pipeline.endpoint import Endpoint  # noqa: PLC0415  gRPC: only for who asks

        server = Endpoint(endpoint, tls, tls_ca, tls_cert, tls_key, token_file)
        with server.connect(channels=1) as client:  # reports go to who has sampled the rows
            asked = {"model": model, "rows": rows}
            failure = _shadowed(client, endpoint, (original, models), asked)
    except (PipelineError, ServiceError, ValueError) as error:
        fail(str(error), status=1)
    except OSError as error:
        fail(f"a file cannot be read: {error}", status=1)
    except KeyboardInterrupt:
        fail("stopped; what was read has been reported", status=130)
    if failure and rows is not None:
        fail(failure, status=1)


def _shadowed(
    client: "Client", endpoint: str, places: tuple[Path | None, Path], asked: dict[str, Any]
) -> str:
    """Shadow a server until a signal; return why live parity does not hold, or nothing."""
    console = Console(stderr=True)
    stopped: list[int] = []
    with console.status("starting TensorFlow, some ten seconds") as status:
        # Only now, when rich has put itself before standard error: lines go above the live one.
        logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        logging.getLogger("pipeline").setLevel(logging.INFO)
        with _quietly():
            from pipeline import shadow  # noqa: PLC0415  not to print the help
        status.update(f"waiting for rows of {escape(endpoint)}")
        logging.getLogger("pipeline").info("waiting for rows of %s", endpoint)
        shadowing = shadow.Shadow(
            client,
            shadow.Originals(client, saved_model=places[0], models=places[1]),
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


def _flow(**parameters: Any) -> str:  # noqa: ANN401  the flow declares them
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)
    # TensorFlow reports a missing GPU driver as an error, also where there is no GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if GPU_DRIVER.exists() else "3")
    print("starting TensorFlow and Prefect, about half a minute", file=sys.stderr)
    with _quietly():
        from pipeline.flow import train_export  # noqa: PLC0415  not to print the help

    path: str = train_export(**parameters)
    return path


@contextmanager
def _quietly() -> Iterator[None]:
    """Hold back what native code writes while it is loaded, and give it out if that fails.

    TensorFlow's own switch for it, TF_CPP_MIN_LOG_LEVEL, comes too late for its first lines.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except (PipelineError, ServiceError):  # says itself what is wrong
            raise
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _show(path: Path, models: Path, runs: Path) -> None:
    from pipeline import report  # noqa: PLC0415
    from service import bundle  # noqa: PLC0415

    console = Console()
    console.print()
    manifest = bundle.read_manifest(path)
    console.print(report.table(manifest))
    print(f"bundle: {path}")
    serve = "serve-export"
    if not shutil.which(serve):  # the environment is not activated: `make run` does not need it
        serve = os.path.relpath(Path(sys.executable).with_name(serve))
    print(f"serve:  {serve} serve --repository {models}")
    print(f"ask:    {serve} predict {runs / 'examples' / 'trouser.png'} --model {manifest.name}")


def fail(reason: str, *, status: int) -> NoReturn:
    """End with a status and one sentence on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(reason)}", highlight=False)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
