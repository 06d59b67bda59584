"""Score the original model on every test image, and refuse one below the gate."""

import logging
import time

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline import dataset, device
from pipeline.config import GateConfig
from pipeline.errors import EvaluationError
from pipeline.records import ClassScore, Dataset, Scores, Trained
from service import bundle

log = logging.getLogger(__name__)
BATCH_ROWS = 256


def score(trained: Trained, data: Dataset, gate: GateConfig) -> Scores:
    """Measure accuracy, loss, per-class figures and the confusion matrix on the test images.

    Raises:
        EvaluationError: the accuracy is below the gate.
    """
    device.prepare()
    model = keras.models.load_model(trained.path)
    test = dataset.load(data).test
    model.predict(test.inputs[:BATCH_ROWS], batch_size=BATCH_ROWS, verbose=0)  # traces
    _check_averages(model, trained)
    started_s = time.monotonic()
    logits = model.predict(test.inputs, batch_size=BATCH_ROWS, verbose=0)
    seconds = time.monotonic() - started_s
    confusion = confusion_matrix(test.targets, logits.argmax(axis=1), len(data.labels))
    scores = Scores(
        correct=int(np.trace(confusion)),
        rows=len(test.targets),
        loss=cross_entropy(logits, test.targets),
        classes=tuple(
            _class_score(label, index, confusion) for index, label in enumerate(data.labels)
        ),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        sha256=bundle.file_sha256(trained.path),
        images_per_second=len(test.inputs) / seconds,
        batch_rows=BATCH_ROWS,
    )
    log.info("test accuracy %.2f %%, loss %.4f", 100 * scores.accuracy, scores.loss)
    if scores.accuracy < gate.min_accuracy:
        raise EvaluationError(
            f"test accuracy is {scores.accuracy:.2%}, the gate is {gate.min_accuracy:.2%}; "
            "nothing is published: train longer, or look at the data"
        )
    return scores


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


def confusion_matrix(
    labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """Count how often each true class (row) was given each label (column)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels.astype(np.int64), predicted), 1)
    return matrix


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """Return the mean cross-entropy of the labels under the softmax of the logits, in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    of_label = shifted[np.arange(len(labels)), labels.astype(np.int64)]
    return float((np.log(np.exp(shifted).sum(axis=1)) - of_label).mean())


def _class_score(label: str, index: int, confusion: NDArray[np.int64]) -> ClassScore:
    right = int(confusion[index, index])
    called, there = int(confusion[:, index].sum()), int(confusion[index].sum())
    return ClassScore(
        label=label,
        precision=right / called if called else 0.0,
        recall=right / there if there else 0.0,
        rows=there,
    )
