"""How good answers are: arrays in, figures out.

Knows no model, no file and no gate; `pipeline.evaluate` asks the model and judges.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.records import ClassScore, Confused, Mistake
from service import agreement

BINS = 15  # of confidence, as in Guo et al.
HARDEST = 12  # mistakes that are kept
CONFUSED = 10  # pairs of classes that are kept
Logits = NDArray[np.floating]  # (rows, classes)
Targets = NDArray[np.integer]  # (rows,), classes
Matrix = NDArray[np.int64]  # (classes, classes), a row a true class


def cross_entropy(logits: Logits, targets: Targets) -> float:
    """Return the mean cross-entropy of the targets under the softmax of the logits, in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    of_target = shifted[np.arange(len(targets)), targets.astype(np.int64)]
    return float((np.log(np.exp(shifted).sum(axis=1)) - of_target).mean())


def squared_error(outputs: NDArray[np.floating], targets: NDArray[np.floating]) -> float:
    """Return the mean squared difference of all elements; both are (rows, …)."""
    return float(((outputs.astype(np.float64) - targets) ** 2).mean())


def confusion_matrix(targets: Targets, predicted: Targets, classes: int) -> Matrix:
    """Count how often each true class (row) was given each label (column)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (targets.astype(np.int64), predicted), 1)
    return matrix


def class_scores(matrix: Matrix, labels: Sequence[str]) -> tuple[ClassScore, ...]:
    """Return precision and recall of every class; 0 where there is nothing to divide by."""
    right, called, there = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    return tuple(
        ClassScore(
            label=label,
            precision=float(right[one] / called[one]) if called[one] else 0.0,
            recall=float(right[one] / there[one]) if there[one] else 0.0,
            rows=int(there[one]),
        )
        for one, label in enumerate(labels)
    )


def most_confused(matrix: Matrix, labels: Sequence[str]) -> tuple[Confused, ...]:
    """Return at most `CONFUSED` pairs of a class and what it was taken for, most rows first.

    A pair and its reverse are two. Equals stand in the order of the labels.
    """
    off = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-off, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(place), len(labels)) for place in order]
    return tuple(
        Confused(label=labels[true], predicted=labels[other], rows=int(off[true, other]))
        for true, other in pairs
        if off[true, other]
    )


def hardest(logits: Logits, targets: Targets, labels: Sequence[str]) -> tuple[Mistake, ...]:
    """Return at most `HARDEST` rows that got another class than their own, most confident first."""
    predicted = logits.argmax(axis=1)
    confidence = agreement.softmax(logits).max(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:HARDEST]
    return tuple(
        Mistake(
            row=int(row),
            label=labels[targets[row]],
            predicted=labels[predicted[row]],
            probability=float(confidence[row]),
        )
        for row in order
    )


def calibration_error(logits: Logits, targets: Targets) -> float:
    """Return the expected calibration error (C. Guo et al., ICML 2017), 0 to 1.

    How far confidence, the highest probability, is from the share that is right: the mean over
    `BINS` bins of equal width, each closed above, weighted by their rows. Within a bin the two
    means are divided by the same number of rows, which the weight takes out again.
    """
    confidence = agreement.softmax(logits).max(axis=1)
    right = logits.argmax(axis=1) == targets
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    apart = np.bincount(bins, weights=right - confidence)
    return float(np.abs(apart).sum() / len(targets))
