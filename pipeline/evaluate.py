"""Score the original model on every test row, and refuse one that is not good enough.

Good enough is what the gate's limits say, and not worse than the champion: the published version
that serves now, asked for the same rows.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, device, measures, page, refusal
from pipeline.config import GateConfig
from pipeline.errors import EvaluationError
from pipeline.page import evidence, first_layer
from pipeline.records import Comparison, Dataset, Scores, Trained
from protos import bundle_pb2
from service import agreement, aliases, bundle
from service.errors import ServiceError
from service.host import cores
from service.session import Session

log = logging.getLogger(__name__)
BATCH_ROWS = 256


def score(
    trained: Trained,
    data: Dataset,
    gate: GateConfig,
    champion: Path | None = None,
    folder: Path | None = None,
) -> Scores:
    """Measure how good the original is on the test rows, and judge it.

    Args:
        trained: the original.
        data: whose test rows are asked; what does not classify is scored by its loss alone.
        gate: what must be reached.
        champion: the bundle of the version to compare with, as `champion` finds it.
        folder: of the run; a refused model leaves its report there, `refused.md`, and its page,
            `report.html`.

    Raises:
        EvaluationError: the model is below the gate, less accurate than the champion by more than
            chance, or gives answers that cannot be scored.
    """
    device.prepare()
    model = keras.models.load_model(trained.path)
    model.steps_per_execution = 1  # of training: with more, every remainder is traced anew
    test = dataset.load(data).test
    model.predict(test.inputs[:BATCH_ROWS], batch_size=BATCH_ROWS, verbose=0)  # traces
    _check_averages(model, trained)
    started_s = time.monotonic()
    outputs = model.predict(test.inputs, batch_size=BATCH_ROWS, verbose=0)
    seconds = time.monotonic() - started_s
    _check_outputs(outputs, test, data)
    loss = measures.cross_entropy if data.classifies else measures.squared_error
    scores = Scores(
        correct=0,
        rows=len(test.targets),
        loss=loss(outputs, test.targets),
        classes=(),
        confusion=(),
        sha256=bundle.file_sha256(trained.path),
        images_per_second=len(test.inputs) / seconds,
        batch_rows=BATCH_ROWS,
    )
    if data.classifies:
        scores = _classified(scores, outputs, test.targets, data.labels)
        log.info("test accuracy %.2f %%, loss %.4f", 100 * scores.accuracy, scores.loss)
    else:
        log.info("mean squared error on the test rows %.4g", scores.loss)
    if data.classifies and gate.champion:
        scores = replace(scores, champion=_compared(champion, data, test, outputs))
    _judge(trained, data, gate, scores, folder, partial(_evidence, model, test, outputs, scores))
    return scores


def champion(models: Path, name: str) -> Path | None:
    """Return the bundle that `champion` names, else the highest version; None if there is none.

    Args:
        models: where bundles are published.
        name: of the model.
    """
    home = models / name
    try:
        named = aliases.read(home).get(aliases.CHAMPION)
    except ServiceError as error:
        log.warning("%s; there is no version to compare with", error)
        return None
    if named is not None:
        return home / str(named)
    there = [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    versions = [int(path.name) for path in there if bundle.VERSION.fullmatch(path.name)]
    if not versions:
        log.info("nothing is published yet under this name, to compare with")
        return None
    return home / str(max(versions))


def _check_averages(model: keras.Model, trained: Trained) -> None:
    """Refuse weights that have averages beside them which were never put in their place.

    Keras does so at the end of `fit`; a file that was saved in a callback holds the others, and
    every export would answer like it.
    """
    optimizer = getattr(model, "optimizer", None)
    averages = getattr(optimizer, "_model_variables_moving_average", None) or ()
    for variable, average in zip(model.trainable_variables, averages, strict=False):
        if average is not None and not np.array_equal(variable, average):
            raise EvaluationError(
                f"{trained.path.name} was trained with averaged weights (EMA), and {variable.path} "
                "is not its average: save the model after optimizer.finalize_variable_values"
            )


def _check_outputs(outputs: NDArray[np.floating], test: dataset.Split, data: Dataset) -> None:
    """Refuse answers that no figure can be made of."""
    expected = (len(test.targets), len(data.labels)) if data.classifies else test.targets.shape
    if outputs.shape != expected:
        raise EvaluationError(
            f"the model answers the test rows with {outputs.shape}, expected {expected}; "
            "give the network the outputs that the data have"
        )
    broken = int((~np.isfinite(outputs)).reshape(len(outputs), -1).any(axis=1).sum())
    if broken:
        raise EvaluationError(
            f"the model's answers to {broken:,} of {len(outputs):,} test rows are not finite; "
            "nothing is published: lower the learning rate"
        )


def _classified(
    scores: Scores,
    logits: NDArray[np.floating],
    targets: NDArray[np.integer],
    labels: tuple[str, ...],
) -> Scores:
    """Add what is known of classes."""
    matrix = measures.confusion_matrix(targets, logits.argmax(axis=1), len(labels))
    return replace(
        scores,
        correct=int(np.trace(matrix)),
        classes=measures.class_scores(matrix, labels),
        confusion=tuple(tuple(map(int, row)) for row in matrix),
        calibration_error=measures.calibration_error(logits, targets),
        hardest=measures.hardest(logits, targets, labels),
        confused=measures.most_confused(matrix, labels),
    )


def _compared(
    path: Path | None, data: Dataset, test: dataset.Split, logits: NDArray[np.floating]
) -> Comparison | None:
    """Hold the new model against a published one, on the same rows; None if that cannot be done."""
    if path is None:
        return None
    try:
        published = bundle.read(path)
        differs = _difference(published.manifest, data, test)
        if differs:
            log.info("not compared with version %s: it has %s", path.name, differs)
            return None
        answers = _answers(published, test)
    except (ServiceError, EvaluationError) as error:
        log.warning("not compared with version %s, which cannot be asked: %s", path.name, error)
        return None
    new = logits.argmax(axis=1) == test.targets
    old = answers.argmax(axis=1) == test.targets
    only_new, only_champion = int((new & ~old).sum()), int((old & ~new).sum())
    found = Comparison(
        version=published.manifest.version,
        correct=int(old.sum()),
        only_new=only_new,
        only_champion=only_champion,
        mcnemar_p=agreement.mcnemar(only_champion, only_new),
    )
    log.info(
        "version %d on the same rows: accuracy %.2f %%; %d rows right only now, %d only there, "
        "p %.2g",
        found.version, 100 * found.correct / len(old), only_new, only_champion, found.mcnemar_p,
    )  # fmt: skip
    return found


def _difference(
    manifest: bundle_pb2.BundleManifest, data: Dataset, test: dataset.Split
) -> str | None:
    """Return why a published model is not to be asked for these rows; None where it is."""
    if tuple(manifest.labels) != data.labels:
        return "other classes"
    if tuple(manifest.input.shape[1:]) != test.inputs.shape[1:]:
        return f"an input of {list(manifest.input.shape)}"
    return "other data" if manifest.dataset.sha256 != data.sha256 else None


def _answers(published: bundle.Bundle, test: dataset.Split) -> NDArray[np.generic]:
    """Return the logits of a published model, run as it is served."""
    session = Session(published.model, published.manifest.session, threads=cores())
    answers = session.run(test.inputs)
    expected = (len(test.targets), len(published.manifest.labels))
    if "logits" not in answers or answers["logits"].shape != expected:
        raise EvaluationError(f"{bundle.shown(published.path)} gives no logits of {expected}")
    return answers["logits"]


def _evidence(
    model: keras.Model, test: dataset.Split, outputs: NDArray[np.floating], scores: Scores
) -> evidence.Evidence:
    """Gather what the page of a refused model shows besides its figures."""
    if not scores.classes:
        return evidence.of_numbers(test.targets, outputs)
    return evidence.of_classifier(
        test.inputs,
        test.targets,
        outputs,
        mistakes=[one.row for one in scores.hardest],
        first=first_layer.find(model, test.inputs[evidence.example_rows(test.targets)]),
    )


def _judge(
    trained: Trained,
    data: Dataset,
    gate: GateConfig,
    scores: Scores,
    folder: Path | None,
    gather: Callable[[], evidence.Evidence],
) -> None:
    """Refuse a model, and leave its report; remove that of an earlier one that was refused."""
    why = _failures(data, gate, scores)
    if folder is not None:
        refusal.remove(folder)
        (folder / page.FILE).unlink(missing_ok=True)
    if not why:
        return
    advice = refusal.advice(trained, classifies=data.classifies)
    report = ""
    if folder is not None:
        try:
            path = refusal.write(folder, why, trained, data, gate, scores)
            report = f", {path} has all figures"
            shown = _write_page(folder, [*why, f"what may help: {advice}"], gather)
            report += f" and {shown} shows them" if shown else ""
        except OSError as error:
            log.warning("the report of what was refused cannot be written: %s", error)
    raise EvaluationError(f"{'; '.join(why)}; nothing is published{report}; {advice}")


def _write_page(
    folder: Path, why: list[str], gather: Callable[[], evidence.Evidence]
) -> Path | None:
    """Write the page of a refused model, whose report is there; without it the refusal stands."""
    known = bundle_pb2.BundleManifest()
    figures = json.loads((folder / refusal.FIGURES).read_bytes())
    json_format.ParseDict(figures, known, ignore_unknown_fields=True)
    try:
        shown = page.write_refused(folder, known, gather(), why)
    except OSError:
        raise
    except Exception:
        log.exception("the page of the refused model cannot be made")
        return None
    return shown


def _failures(data: Dataset, gate: GateConfig, scores: Scores) -> list[str]:
    failures = []
    if data.classifies and scores.accuracy < gate.min_accuracy:
        failures.append(
            f"test accuracy is {scores.accuracy:.2%}, the gate is {gate.min_accuracy:.2%}"
        )
    if gate.max_loss is not None and scores.loss > gate.max_loss:
        failures.append(f"test loss is {scores.loss:.4g}, the gate is {gate.max_loss:g}")
    old = scores.champion
    if old and scores.correct < old.correct and old.mcnemar_p < gate.champion_p:
        failures.append(
            f"{scores.correct:,} of {scores.rows:,} test rows are right, of version {old.version}, "
            f"which is published, {old.correct:,}: chance would do that with p "
            f"{old.mcnemar_p:.2g}, below {gate.champion_p:g}"
        )
    return failures
