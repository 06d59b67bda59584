"""The report that a refused model leaves in its run's folder, in the place of a bundle."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from pipeline import config, curves, files, messages, report
from pipeline.config import GateConfig
from pipeline.records import Dataset, Scores, Trained
from protos import bundle_pb2

log = logging.getLogger(__name__)
PAGE, FIGURES, CURVES = "refused.md", "refused.json", "refused.png"
APART = 0.1  # how much more of the training rows are right where they are learnt by heart
TIMES = 2  # the same of losses, where there is no accuracy
LOOK = "look at the data, or at another network"
TOOLS = ("train-export", "tensorflow", "keras", "numpy")  # that had a part in it until here


def write(
    folder: Path,
    why: Sequence[str],
    trained: Trained,
    data: Dataset,
    gate: GateConfig,
    scores: Scores,
) -> Path:
    """Write the curves, the figures as JSON, and last the page that shows both.

    The JSON has the fields of a manifest, as far as they are known, and `why`, `advice`, `gate`.

    Args:
        folder: of the run; the settings are those of its `config.json`, where there is one.
        why: what the model did not reach, a part of a sentence each.
        trained: the model.
        data: what it was tested on.
        gate: what it should have reached.
        scores: what it did reach.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = bundle_pb2.BundleManifest(
        kind=bundle_pb2.KIND_CLASSIFIER if data.classifies else bundle_pb2.KIND_GENERIC,
        labels=data.labels,
        dataset=messages.dataset(data),
        training=messages.training(trained),
        evaluation=messages.evaluation(trained, scores, gate),
        provenance=bundle_pb2.Provenance(
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            parent_sha256=trained.sha256,
            tools={tool: version(tool) for tool in TOOLS},
            dataset_license=data.license,
        ),
    )
    _add_settings(known, folder / config.FILE)
    if trained.history:
        curves.draw(trained.history, folder / CURVES, f"{data.name}, refused")
    fields = json_format.MessageToDict(known, preserving_proto_field_name=True)
    told = advice(trained, classifies=data.classifies)
    verdict = {"why": list(why), "advice": told, "gate": asdict(gate), "model": str(trained.path)}
    content = {**verdict, **fields}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_whole(folder / FIGURES, f"{text}\n".encode())
    page = "\n".join(_page(known, why, told, trained.path))
    files.write_whole(folder / PAGE, f"{page}\n".encode())
    return folder / PAGE


def advice(trained: Trained, *, classifies: bool) -> str:
    """Say what is likeliest to help a model that was refused, by how its training went.

    Args:
        trained: the model.
        classifies: it has accuracies; else its losses are compared.
    """
    if not trained.history:
        return LOOK
    last, best = trained.history[-1], trained.best_epoch
    if best == last.number:
        return f"the last epoch, {best}, was the best: train with more epochs, or look at the data"
    by_heart = (
        last.accuracy - last.validation_accuracy > APART
        if classifies
        else last.validation_loss > TIMES * last.loss
    )
    if not by_heart:
        return f"epoch {best} of {last.number} was the best: {LOOK}"
    figures = (
        f"{last.accuracy:.2%} of the training rows are right and {last.validation_accuracy:.2%} of "
        "the validation rows"
        if classifies
        else f"the loss is {last.loss:.4g} on training rows and {last.validation_loss:.4g} on "
        "validation rows"
    )
    return (
        f"the network learns its training rows by heart ({figures}, the best epoch was {best} of "
        f"{last.number}): take more data, training.augmentation.*, another network or dropout, or "
        "a lower training.learning_rate"
    )


def remove(folder: Path) -> None:
    """Remove the report of a model that was refused before, if there is one."""
    for name in (PAGE, FIGURES, CURVES):
        (folder / name).unlink(missing_ok=True)


def _add_settings(known: bundle_pb2.BundleManifest, path: Path) -> None:
    """Add what the run was told; without it the report stands."""
    try:
        tables: dict[str, Any] = json.loads(path.read_bytes())
        name = str(tables["publishing"]["name"])
        told = messages.settings(tables)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read, the report has no settings: %s", path, error)
        return
    known.name = name
    known.training.MergeFrom(told)


def _page(
    known: bundle_pb2.BundleManifest, why: Sequence[str], told: str, model: Path
) -> Iterator[str]:
    yield from (
        f"# Refused: a model of {report.cell(known.dataset.name)}",
        "",
        "Nothing was published:",
    )
    yield from ("", *(f"- {report.cell(one)}" for one in why))
    yield from ("", f"What may help: {report.cell(told)}.")
    yield from ("", f"The model is `{model}`; `{FIGURES}` has all figures.", "")
    yield from (f"- {name}: {report.cell(value)}" for name, value in report.facts(known))
    if known.training.history:
        yield from ("", f"![loss and accuracy]({CURVES})")
    yield from report.sections(report.evaluated(known.evaluation))
