"""The flow `train-export`, read from top to bottom. With the plugin, all that knows Prefect."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from pipeline import (
    config,
    dataset,
    evaluate,
    export,
    files,
    parity,
    promote,
    publish,
    report,
    train,
    verify,
)
from pipeline.endpoint import Endpoint
from pipeline.errors import PipelineError
from service import bundle
from service.errors import ServiceError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@flow(name="train-export")
def train_export(  # noqa: PLR0913  one parameter an option of the deployment
    preset: str = "quick",
    data: str | None = None,
    models: str = "models",
    runs: str = "runs",
    epochs: int | None = None,
    seed: int | None = None,
    fresh: bool = False,
    settings: dict[str, Any] | None = None,
    endpoints: list[str] | None = None,
    tls_ca: str | None = None,
) -> str:
    """Train a model, export it, prove parity, serve it once, and publish it; or publish nothing.

    Args:
        preset: smoke (seconds) or quick (minutes).
        data: folder of the Fashion-MNIST files; by default the usual places are tried.
        models: folder to publish into.
        runs: folder for checkpoints and exports.
        epochs: instead of the preset's.
        seed: instead of the preset's.
        fresh: train anew even where checkpoints of the same settings are found.
        settings: any other ones over the preset's, as tables: {"training": {"engine": "tape"}}.
        endpoints: HOST:PORT of what serves `models`; asked before `champion` moves there. A token
            is taken from the variable SERVE_EXPORT_TOKEN, and never shown.
        tls_ca: PEM of who may have signed for the endpoints, which then speak TLS.

    Returns:
        The path of the published bundle.
    """
    given = data or os.environ.get("TRAIN_EXPORT_DATA")
    chosen = config.build(
        preset,
        settings or {},
        config.options(
            runs=runs,
            data__source=given,
            training__epochs=epochs,
            training__seed=seed,
            training__fresh=fresh or None,
            publishing__models=models,
        ),
    )
    run_id = str(flow_run.id)
    prepared = stage(dataset.prepare)(chosen.data)
    stage(dataset.write_examples)(prepared, chosen.runs / "examples")
    folder = train.run_folder(chosen.runs, preset, prepared, chosen.training)
    with (
        files.locked(folder / "lock", wait=False),
        publish.staging(chosen.publishing) as hidden,
    ):
        trained = stage(train.fit)(prepared, chosen.training, folder)
        scores = stage(evaluate.score)(trained, prepared, chosen.gate)
        exports = stage(export.convert)(trained, prepared, folder / "exports", run_id)
        checked = stage(parity.check)(trained, exports, prepared, folder / "parity", scores)
        staged = stage(publish.stage)(
            hidden, run_id, chosen, prepared, trained, scores, exports, checked
        )
        served = stage(verify.ask)(staged, checked, prepared, folder / "parity")
        published = stage(publish.publish)(staged, served, chosen.publishing)
    create_markdown_artifact(
        report.markdown(bundle.read_manifest(published.path), published.path),
        key="bundle",
        description=f"{published.name} version {published.version}",
    )
    if endpoints:
        servers = [Endpoint(one, tls_ca=Path(tls_ca) if tls_ca else None) for one in endpoints]
        stage(promote.promote)(published.path, prepared, servers)
    return str(published.path)


def stage(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a task of a plain function: its module names it, its records are not hashed."""
    words = function.__module__.removeprefix("pipeline.").split(".")
    return task(name=f"{words[0]}.{function.__name__}", cache_policy=NO_CACHE)(function)


class _OneSentence(logging.Filter):
    """Leave the traceback out of the log when the pipeline refused something on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], PipelineError | ServiceError):
            record.exc_info = None
        return True


logging.getLogger("pipeline").setLevel(logging.INFO)  # Prefect gives it handlers, not a level
for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_OneSentence())
