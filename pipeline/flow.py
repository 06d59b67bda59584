"""The flow `train-export`, read from top to bottom.

Nothing of TensorFlow is imported before it runs, so that it is deployed in seconds.
"""

import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

from prefect import flow, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.server.api import server as prefect_server
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED
from prefect.states import AwaitingRetry
from prefect.transactions import transaction

from pipeline import config, files, page, report, results, tasks
from pipeline.endpoint import Endpoint
from pipeline.errors import EvaluationError, InterruptedTrainingError, PipelineError
from pipeline.last_words import LastWords
from pipeline.records import Published, Trained
from service import bundle
from service.errors import ServiceError

log = logging.getLogger("pipeline.flow")  # a deployment loads this file under another name
STDERR = 2
# How Prefect words it.
STOPPING = "Stopping temporary server"
FAILED = re.compile(r"(Finished in state \w+\(.* encountered an exception:? \w+): .*", re.DOTALL)
STAGES = ("evaluate", "export", "promote", "publish", "train", "verify")
PUBLISHED = "published.json"  # what came of it, beside
CURVES = "curves.png"


def go_on_later(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Schedule a deployment's run again whose training was stopped by SIGTERM and saved."""
    error = state.result(raise_on_failure=False)
    if flow_run.deployment_id and isinstance(error, InterruptedTrainingError):
        log.info("scheduled again: training goes on where it was stopped")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, AwaitingRetry(message=str(error)))


@flow(name="train-export", on_failure=[go_on_later])
def train_export(  # noqa: PLR0913  one parameter an option of the deployment
    preset: str = "quick",
    settings: dict[str, Any] | None = None,
    data: str | None = None,
    models: str = "models",
    runs: str = "runs",
    epochs: int | None = None,
    seed: int | None = None,
    fresh: bool = False,
    endpoints: list[str] | None = None,
    tls: bool = False,
    tls_ca: str | None = None,
    token_file: str | None = None,
) -> str:
    """Train a model, export it, prove parity, serve it once, and publish it; or publish nothing.

    Args:
        preset: Settings to start from, such as smoke (seconds) or quick (minutes).
        settings: Any other ones over the preset's, as tables: {"training": {"engine": "tape"}}.
        data: What to learn from, a folder or an .npz; by default Fashion-MNIST in its usual places.
        models: Folder to publish into.
        runs: Folder for checkpoints, exports and what stages returned.
        epochs: Instead of the preset's.
        seed: Instead of the preset's.
        fresh: Train anew even where checkpoints of the same settings are found.
        endpoints: HOST:PORT of what serves the models; asked before the alias champion moves there.
        tls: The endpoints speak TLS.
        tls_ca: PEM of who may have signed for the endpoints, which then speak TLS.
        token_file: File with our token for the endpoints; else the variable SERVE_EXPORT_TOKEN.

    Returns:
        The path of the published bundle.
    """
    chosen = config.build(
        preset,
        config.options(data__source=os.environ.get("TRAIN_EXPORT_DATA") or None),
        settings or {},
        config.options(
            runs=runs,
            data__source=data,
            training__epochs=epochs,
            training__seed=seed,
            training__fresh=fresh or None,
            publishing__models=models,
        ),
    )
    servers = [
        Endpoint(one, tls, as_path(tls_ca), token_file=as_path(token_file))
        for one in endpoints or []
    ]
    tell_of_absent(servers, chosen.publishing.models)
    from pipeline import (  # noqa: PLC0415  TensorFlow
        curves,
        dataset,
        device,
        evaluate,
        export,
        parity,
        promote,
        publish,
        train,
        verify,
    )
    from pipeline.models import find  # noqa: PLC0415  the same

    # Also where training is not run again: classes of a user's module are needed to load the model.
    find(chosen.training.architecture, chosen.training.architecture_settings)
    stages = tasks.Stages(chosen.runs / results.FOLDER, device.prepare())
    prepared = dataset.told(stages.kept(dataset.prepare, apart=["cache"])(chosen.data))
    stages.once(dataset.write_examples)(prepared, chosen.runs / "examples")
    folder = train.run_folder(chosen.runs, preset, prepared, chosen.training)
    with (
        files.locked(folder / "lock", wait=False),
        publish.staging(chosen.publishing) as hidden,
    ):
        begin(folder, chosen)
        trained = stages.kept(
            train.fit, places=["run"], apart=["share"], anew=chosen.training.fresh
        )(prepared, chosen.training, folder, tasks.Progress())
        stages.once(curves.draw)(
            trained.history,
            folder / CURVES,
            f"{preset}: {chosen.training.architecture} on {prepared.name}",
        )
        champion = evaluate.champion(chosen.publishing.models, chosen.publishing.name)
        with linking_refused(folder):
            scores = stages.kept(evaluate.score)(
                trained, prepared, chosen.gate, another(champion, trained), folder
            )
        with transaction():  # what fails in it leaves no result behind, and no bundle
            convert = stages.kept(export.convert, apart=["run"])
            exports = convert(trained, prepared, folder / "exports", run_id(), chosen.export)
            check = stages.kept(parity.check, apart=["measure_cost"])
            checked = check(
                trained, exports, prepared, folder / "parity", scores, chosen.export.serve
            )
            staged = stages.once(publish.stage)(
                hidden, run_id(), chosen, prepared, trained, scores, exports, checked
            )
            served = stages.once(verify.ask)(staged, checked, prepared, folder / "parity")
            published = stages.once(publish.publish)(staged, served, chosen.publishing)
    show(published, folder)
    tasks.record_lineage(
        [(prepared.folder, "data"), (trained.path, "model"), (published.path, "bundle")]
    )
    if servers:
        stages.once(promote.promote)(published.path, prepared, servers)
    return str(published.path)


def prepare(errors: int) -> None:
    """Import TensorFlow and every stage while Prefect's temporary server starts, if it needs one.

    Both take ten seconds.

    Args:
        errors: descriptor that the server writes its errors to, as long as it runs.

    Raises:
        RuntimeError: the server does not start; none is left behind.
    """
    shield_server(errors)
    failed: list[Exception] = []
    starting = Thread(target=_start_server, args=(failed,), daemon=True)
    if not PREFECT_API_URL.value() and PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        starting.start()
    for name in ("tensorflow", *(f"pipeline.{stage}" for stage in STAGES)):
        import_module(name)
    if starting.ident:
        starting.join()  # to Prefect it runs from the first moment
    for error in failed:
        raise error


def _start_server(failed: list[Exception]) -> None:
    try:
        SubprocessASGIServer().start()
    except Exception as error:  # noqa: BLE001  raised again where it is waited for
        failed.append(error)
        SubprocessASGIServer().stop()


def shield_server(errors: int | None = None) -> None:
    """Have the temporary server that Prefect starts here live in a session of its own.

    Prefect's and its server's words of what they end with are kept off the terminal: the command's
    are the last.

    Ctrl-C in a terminal reaches every process of its group; without the server Prefect would wait
    for minutes to tell it that the run has ended.

    Args:
        errors: descriptor that the server writes its errors to; None: standard error.
    """
    stock = SubprocessASGIServer._run_uvicorn_command
    if getattr(stock, "apart", False):
        return
    # The last line of a run is its error, which is read once, or how to ask the model.
    logging.getLogger("prefect").addFilter(lambda record: STOPPING not in str(record.msg))
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(shorten)

    stop = SubprocessASGIServer.stop
    words: list[LastWords] = []  # of each that was started

    def start(server: SubprocessASGIServer) -> Any:  # noqa: ANN401  as Prefect has it
        words.append(LastWords(STDERR if errors is None else errors))
        written = words[-1].descriptor
        popen = partial(subprocess.Popen, start_new_session=True, stderr=written)
        # Prefect's module alone: others are imported meanwhile.
        apart = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
        vars(prefect_server)["subprocess"] = apart
        try:
            return stock(server)
        finally:
            vars(prefect_server)["subprocess"] = subprocess
            os.close(written)

    def stop_silently(server: SubprocessASGIServer) -> None:
        for one in words:
            one.drop()
        stop(server)

    start.apart = True  # type: ignore[attr-defined]
    SubprocessASGIServer._run_uvicorn_command = start  # type: ignore[method-assign, assignment]
    SubprocessASGIServer.stop = stop_silently  # type: ignore[method-assign, assignment]


def tell_of_absent(servers: Sequence[Endpoint], models: Path) -> None:
    """Say at once which servers do not answer yet: they are only asked once all else is done."""
    for one in servers:
        if not one.listens():
            log.warning(
                "nothing listens on %s: the run goes on, but a server of %s must be there by the "
                "time the model is published, or it will not become the champion",
                one.address, models,
            )  # fmt: skip


def run_id() -> str:
    """Return how Prefect calls this run."""
    return str(runtime.flow_run.id)


def another(champion: Path | None, trained: Trained) -> Path | None:
    """Return the champion if it is another model than the trained one; else there is no contest."""
    if champion is None:
        return None
    if bundle.read_manifest(champion).provenance.parent_sha256 == trained.sha256:
        log.info("version %s is this very model: no comparison", champion.name)
        return None
    return champion


def begin(folder: Path, chosen: config.Config) -> None:
    """Write every setting into the folder of a run; what came of it is not known yet."""
    (folder / PUBLISHED).unlink(missing_ok=True)
    files.write_whole(folder / config.FILE, json.dumps(config.as_tables(chosen), indent=1).encode())


@contextmanager
def linking_refused(folder: Path) -> Iterator[None]:
    """Leave a link to the page of a model that the block refuses among Prefect's artifacts."""
    try:
        yield
    except EvaluationError as error:
        if (folder / page.FILE).is_file():
            link(folder / page.FILE, "report", f"refused: {error}")
        raise


def link(path: Path, key: str, title: str) -> None:
    """Leave a link to a file or folder of this host among Prefect's artifacts."""
    create_link_artifact(path.absolute().as_uri(), link_text=str(path), key=key, description=title)


def show(published: Published, folder: Path) -> None:
    """Leave what was published among Prefect's artifacts, and a word of it in the run's folder."""
    what = {"name": published.name, "version": published.version}
    files.write_whole(folder / PUBLISHED, json.dumps(what).encode())
    manifest = bundle.read_manifest(published.path)
    title = f"{published.name} version {published.version}"
    create_markdown_artifact(
        report.markdown(manifest, published.path), key="bundle", description=title
    )
    variants = report.formats(manifest)
    create_table_artifact(
        [dict(zip(variants.columns, row, strict=True)) for row in variants.rows],
        key="variants",
        description=title,
    )
    link(published.path, "bundle-folder", title)
    link(folder, "run-folder", title)
    if (published.path / page.FILE).is_file():
        link(published.path / page.FILE, "report", title)


def as_path(text: str | None) -> Path | None:
    """Return a parameter as a path."""
    return Path(text) if text else None


def shorten(record: logging.LogRecord) -> bool:
    """Leave the error out of the state that a run or a task has ended in; the command says it."""
    if found := FAILED.match(str(record.msg)):
        record.msg = f"{found[1]}')"
    return True


class _OneSentence(logging.Filter):
    """Say once what the pipeline refused on purpose, without a traceback or word of our hook."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, PipelineError | ServiceError):
            return False  # the state that the run ends in has the sentence
        return repr(go_on_later.__name__) not in str(record.msg)


logging.getLogger("pipeline").setLevel(logging.INFO)  # Prefect gives it handlers, not a level
for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
    logging.getLogger(_name).addFilter(_OneSentence())
