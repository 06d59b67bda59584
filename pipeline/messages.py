"""A run's records as the messages that a manifest, or the report of a refused model, is made of."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config import GateConfig
from pipeline.records import Dataset, Scores, Trained
from protos import bundle_pb2
from service import agreement


def dataset(data: Dataset) -> bundle_pb2.Dataset:
    """Return what a model has learnt from and was tested on."""
    return bundle_pb2.Dataset(
        name=data.name,
        sha256=data.sha256,
        train_rows=data.train_rows,
        validation_rows=data.validation_rows,
        test_rows=data.test_rows,
        split_seed=data.split_seed,
        findings=data.findings,
    )


def settings(tables: Mapping[str, Any]) -> bundle_pb2.Training:
    """Return what a run was told of its training.

    Args:
        tables: of all settings, as `config.as_tables` gives them.

    Raises:
        KeyError, TypeError, ValueError: they are no such tables.
    """
    told = tables["training"]
    publishing = {name: value for name, value in tables["publishing"].items() if name != "models"}
    kept = {name: value for name, value in tables.items() if name != "runs"}  # this machine's
    return bundle_pb2.Training(
        preset=tables["preset"],
        architecture=told["architecture"],
        seed=told["seed"],
        batch_rows=told["batch_rows"],
        learning_rate=told["learning_rate"],
        config=json.dumps({**kept, "publishing": publishing}, sort_keys=True),
    )


def training(trained: Trained) -> bundle_pb2.Training:
    """Return what is known of a training without its settings."""
    message = bundle_pb2.Training(
        parameters=trained.parameters,
        multiply_adds=trained.multiply_adds,
        optimizer=trained.optimizer,
        device=trained.device,
        best_epoch=trained.best_epoch,
    )
    for epoch in trained.history:
        message.history.add(
            number=epoch.number,
            loss=epoch.loss,
            accuracy=epoch.accuracy,
            validation_loss=epoch.validation_loss,
            validation_accuracy=epoch.validation_accuracy,
            seconds=epoch.seconds,
        )
    return message


def evaluation(trained: Trained, scores: Scores, gate: GateConfig) -> bundle_pb2.Evaluation:
    """Return all scores; of a model that does not classify, accuracy has its rows and no more."""
    message = bundle_pb2.Evaluation(
        accuracy=bundle_pb2.Accuracy(rows=scores.rows),
        loss=scores.loss,
        confusion=[bundle_pb2.Evaluation.ConfusionRow(predicted=row) for row in scores.confusion],
        size_bytes=trained.path.stat().st_size,
        images_per_second=scores.images_per_second,
        batch_rows=scores.batch_rows,
        calibration_error=scores.calibration_error,
    )
    if scores.classes:
        message.accuracy.CopyFrom(agreement.accuracy(np.arange(scores.rows) < scores.correct))
        message.min_accuracy = gate.min_accuracy
    for one in scores.classes:
        message.classes.add(
            label=one.label, precision=one.precision, recall=one.recall, rows=one.rows, f1=one.f1
        )
    for mistake in scores.hardest:
        message.hardest.add(
            row=mistake.row,
            label=mistake.label,
            predicted=mistake.predicted,
            probability=mistake.probability,
        )
    for pair in scores.confused:
        message.confused.add(label=pair.label, predicted=pair.predicted, rows=pair.rows)
    if scores.champion is not None:
        message.champion.CopyFrom(
            bundle_pb2.Evaluation.Champion(
                version=scores.champion.version,
                correct=scores.champion.correct,
                only_new=scores.champion.only_new,
                only_champion=scores.champion.only_champion,
                mcnemar_p=scores.champion.mcnemar_p,
            )
        )
    return message
