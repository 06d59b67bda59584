"""Decide whether two ways of running one model give the same answers.

The statistics and the verdict only, on arrays: nothing here runs a model or reads a file. The
original TensorFlow model is the *reference*, what is held against it the *candidate*.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos import bundle_pb2, parity_pb2

Logits = NDArray[np.float32]  # (rows, classes)
Labels = NDArray[np.integer]  # (rows,), the index of the true class

# Allowed difference of a logit as a share of the reference's typical largest logit. float32: two
# orders above the rounding that reordered sums cause, an order below what a wrong layer causes.
COEFFICIENT = {"float32": 1e-5, "float16": 2e-3, "int8": 5e-2}
INT8_MIN_AGREEMENT = 0.99
INT8_MAX_ACCURACY_DROP = 0.003
MIN_SHARE_ROWS = 1000  # below it a share says too little to be held to a limit of 1 %
TAIL = 0.001  # of the differences of an int8 candidate may be over its budget
# Allowed distance of probabilities from the softmax of the logits beside them: rounding is far
# below it, another order of the classes or another temperature far above.
PROBABILITY_ERROR = {"float32": 1e-3, "float16": 5e-3, "int8": 5e-2}
PIXEL_BINS = 16  # of images by their mean pixel
MIN_SHARE = 1e-4  # of a bin in a stability index, which is infinite where one is empty
WILSON_Z = 1.959964  # 97.5th percentile of the normal distribution: a 95 % interval


@dataclass(frozen=True, slots=True)
class Budget:
    """How far the logits of one class of candidates may be from the reference's."""

    precision: str
    scale: float

    @property
    def max_logit(self) -> float:
        """Largest allowed absolute difference of a logit."""
        return COEFFICIENT[self.precision] * self.scale

    def message(self) -> bundle_pb2.Budget:
        """Return the budget as it is stored and sent."""
        return bundle_pb2.Budget(
            precision=self.precision,
            coefficient=COEFFICIENT[self.precision],
            scale=self.scale,
            max_logit=self.max_logit,
        )


def budget(precision: str, reference: NDArray[np.floating]) -> Budget:
    """Fix the budget from the reference alone, before any candidate is measured.

    Args:
        precision: `float32`, `float16` or `int8`.
        reference: logits, or other outputs (rows, ...), over the whole test set.

    Raises:
        ValueError: the precision has no coefficient, or there are no rows.
    """
    if precision not in COEFFICIENT:
        raise ValueError(f"precision is {precision!r}, expected one of {sorted(COEFFICIENT)}")
    if not len(reference):
        raise ValueError("reference has no rows, expected the logits of the test set")
    return Budget(precision, scale(reference))


def scale(outputs: NDArray[np.floating]) -> float:
    """Return how large outputs are: the median over the rows of the largest absolute one.

    Where that is 0, as of a model that is silent on most rows, the median over the other rows; 1
    where there are none. A budget of 0 would forbid rounding.

    Args:
        outputs: (rows, ...), at least one row.
    """
    largest = _largest(outputs)
    (typical,) = percentiles(largest, 50)
    if typical:
        return typical
    others = largest[largest != 0]
    return percentiles(others, 50)[0] if len(others) else 1.0


def hostile_limits(allowed: Budget, reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the largest allowed difference on each hostile row: by its own size where larger.

    Rounding grows with what is added up, and the logits of a white image may be many times those
    of the test set. Seen: a sum over 28 x 28 equal values, 4e-6 of it off in one runtime.

    Args:
        allowed: over the test set.
        reference: (rows, ...), which no candidate can change.

    Returns:
        (rows,).
    """
    sizes = np.maximum(allowed.scale, _largest(reference).astype(np.float64))
    limits: NDArray[np.float64] = COEFFICIENT[allowed.precision] * sizes
    return limits


def compare(
    reference: Logits,
    candidate: Logits,
    labels: Labels,
    *,
    allowed: Budget,
    class_names: list[str],
) -> bundle_pb2.ParityReport:
    """Measure the candidate against the reference on the same rows and give the verdict.

    A top-1 flip is explained if and only if the reference's margin between its two highest logits
    is at most twice the budget: two logits that may each move by the budget can then change
    places. It is never measured against the row's own difference, which would explain every flip.

    Args:
        reference: logits, float32 (rows, classes).
        candidate: logits of the same rows.
        labels: true classes of the same rows.
        allowed: the candidate's budget.
        class_names: name of each class, in the order of the logits.

    Returns:
        Everything that follows from the logits, `passed` and `failure` included. A candidate with
        a logit that is not finite does not pass.

    Raises:
        ValueError: the arrays do not describe the same rows and classes.
    """
    _check_shapes(reference, candidate, labels, class_names)
    truth = labels.astype(np.int64)
    reference_top, candidate_top = reference.argmax(axis=1), candidate.argmax(axis=1)
    flipped = reference_top != candidate_top
    explained = flipped & (margins(reference) <= 2 * allowed.max_logit)
    reference_right, right = reference_top == truth, candidate_top == truth
    with np.errstate(invalid="ignore"):  # what is not finite is reported, not warned about
        reference_probabilities, probabilities = softmax(reference), softmax(candidate)
        report = bundle_pb2.ParityReport(
            budget=allowed.message(),
            reference_accuracy=accuracy(reference_right),
            accuracy=accuracy(right),
            mcnemar_p=mcnemar(
                int((reference_right & ~right).sum()), int((right & ~reference_right).sum())
            ),
            agreement=float((~flipped).mean()),
            flips_explained=int(explained.sum()),
            flips_unexplained=int((flipped & ~explained).sum()),
            logits=difference(reference, candidate),
            probabilities=difference(reference_probabilities, probabilities),
            kl_divergence=_kl_divergence(reference, candidate),
        )
    for index, name in enumerate(class_names):
        mine = truth == index
        report.classes.add(
            label=name,
            rows=int(mine.sum()),
            reference_correct=int(reference_right[mine].sum()),
            correct=int(right[mine].sum()),
            same=int((~flipped)[mine].sum()),
        )
    judge(report)
    return report


def compare_outputs(
    reference: NDArray[np.floating], candidate: NDArray[np.floating], *, allowed: Budget
) -> bundle_pb2.ParityReport:
    """Measure outputs that are no classes, by their differences alone, and give the verdict.

    Args:
        reference: (rows, ...).
        candidate: the same rows.
        allowed: the candidate's budget, for elements instead of logits.

    Raises:
        ValueError: the arrays do not have the same shape, or no rows.
    """
    if reference.shape != candidate.shape or not len(reference):
        raise ValueError(
            f"the outputs are {candidate.shape}, expected {reference.shape}, with rows"
        )
    report = bundle_pb2.ParityReport(
        budget=allowed.message(),
        accuracy=bundle_pb2.Accuracy(rows=len(reference)),
        agreement=1.0,
        logits=difference(reference, candidate),
    )
    judge(report)
    return report


def compare_by_kind(
    reference: NDArray[np.floating],
    candidate: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    allowed: Budget,
    class_names: list[str],
) -> bundle_pb2.ParityReport:
    """Do `compare` where classes have names, else `compare_outputs`; in float32.

    Raises:
        ValueError: as these do.
    """
    first, second = (one.astype(np.float32, copy=False) for one in (reference, candidate))
    if not class_names:
        return compare_outputs(first, second, allowed=allowed)
    return compare(first, second, labels, allowed=allowed, class_names=class_names)


def add_hostile(
    report: bundle_pb2.ParityReport,
    reference: NDArray[np.floating],
    candidate: NDArray[np.floating],
) -> None:
    """Add what was answered to hostile inputs to a report, and judge it again.

    Args:
        report: of the test set, with its budget.
        reference: (rows, ...), at least one row.
        candidate: the same rows.

    Raises:
        ValueError: the arrays do not have the same shape, where numpy would repeat rows instead.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"hostile outputs have shape {reference.shape}, expected {candidate.shape}"
        )
    report.hostile.rows = len(candidate)
    report.hostile.max_logit = difference(reference, candidate).max
    limits = hostile_limits(Budget(report.budget.precision, report.budget.scale), reference)
    with np.errstate(invalid="ignore"):  # what is not finite is refused by the largest
        apart = _largest(reference.astype(np.float64) - candidate.astype(np.float64))
        worst = int(np.argmax(apart / limits))
    judge(report, (float(apart[worst]), float(limits[worst])))


def judge(report: bundle_pb2.ParityReport, hostile: tuple[float, float] | None = None) -> None:
    """Set `passed` and `failure` of a report from its figures and its budget.

    To be called again when a figure was added.

    Args:
        report: of a candidate.
        hostile: difference and limit of the hostile row that is worst by its own limit; None: the
            largest difference, and the budget's limit.
    """
    report.failure = _failure(
        report, hostile or (report.hostile.max_logit, report.budget.max_logit)
    )
    report.passed = not report.failure


def judged(report: bundle_pb2.ParityReport) -> float:
    """Return which difference of a report is held against its budget."""
    return decisive(report.logits, report.budget.precision, report.accuracy.rows)


def decisive(logits: bundle_pb2.Difference, precision: str, rows: int) -> float:
    """Return which of some differences is held against a budget.

    The largest; of int8 the 99.9th percentile, below `MIN_SHARE_ROWS` rows the lower end of its
    interval: of 100 rows it is nearly the largest itself.
    """
    if precision != "int8":
        return logits.max
    return logits.p999_low if _are_few(rows) and logits.HasField("p999_low") else logits.p999


def figures(
    reference: NDArray[np.floating],
    served: NDArray[np.floating],
    inputs: NDArray[np.generic],
    *,
    allowed: Budget,
    classes: bool = True,
) -> parity_pb2.ShadowFigures:
    """Count what rows that were served have in common with the original's answers to them.

    Args:
        reference: the original's logits, or other outputs, (rows, ...); at least one row.
        served: the same rows as they were answered.
        inputs: the same rows as they were asked.
        allowed: the budget that tells explained flips from others.
        classes: whether the outputs are logits.

    Raises:
        ValueError: the outputs do not have the same shape, or no rows.
    """
    if reference.shape != served.shape or not len(reference) or len(inputs) != len(reference):
        raise ValueError(
            f"{len(inputs)} rows were served {served.shape}, the original says {reference.shape}"
        )
    rows = len(reference)
    with np.errstate(all="ignore"):  # what is not finite is counted as infinite
        apart = np.abs(reference.astype(np.float64) - served.astype(np.float64)).reshape(rows, -1)
        apart = np.where(np.isfinite(apart), apart, np.inf)
        found = parity_pb2.ShadowFigures(
            rows=rows,
            agreed=rows,
            max_logit=float(apart.max()),
            sum_logit=float(apart.mean(axis=1).sum()),
            pixel_mean=pixel_histogram(inputs),
        )
        if classes:
            top = served.argmax(axis=1)
            flipped = reference.argmax(axis=1) != top
            explained = flipped & (margins(reference) <= 2 * allowed.max_logit)
            found.agreed = rows - int(flipped.sum())
            found.flips_explained = int(explained.sum())
            found.flips_unexplained = int((flipped & ~explained).sum())
            found.sum_confidence = float(np.nan_to_num(softmax(served).max(axis=1)).sum())
            found.predicted.extend(np.bincount(top, minlength=served.shape[1]).tolist())
    return found


def add(total: parity_pb2.ShadowFigures, more: parity_pb2.ShadowFigures) -> None:
    """Add figures of other rows to a total.

    Raises:
        ValueError: they have another number of classes or bins.
    """
    counts = ((total.predicted, more.predicted), (total.pixel_mean, more.pixel_mean))
    for mine, theirs in counts:
        if total.rows and more.rows and len(mine) != len(theirs):
            raise ValueError(f"the figures have {len(theirs)} classes or bins, not {len(mine)}")
    for mine, theirs in counts:
        mine[:] = [one + other for one, other in itertools.zip_longest(mine, theirs, fillvalue=0)]
    total.rows += more.rows
    total.agreed += more.agreed
    total.flips_explained += more.flips_explained
    total.flips_unexplained += more.flips_unexplained
    total.max_logit = max(total.max_logit, more.max_logit)
    total.sum_logit += more.sum_logit
    total.sum_confidence += more.sum_confidence


def distribution(reference: Logits, inputs: NDArray[np.generic]) -> bundle_pb2.TestDistribution:
    """Return what live traffic is to be held against, from the original's test logits."""
    return bundle_pb2.TestDistribution(
        predicted=np.bincount(reference.argmax(axis=1), minlength=reference.shape[1]).tolist(),
        pixel_mean=pixel_histogram(inputs),
        confidence=float(softmax(reference).max(axis=1).mean()),
    )


def pixel_histogram(inputs: NDArray[np.generic]) -> list[int]:
    """Count images by their mean pixel, in `PIXEL_BINS` bins; nothing for other inputs.

    Args:
        inputs: uint8 (rows, height, width, channels) for images.
    """
    if inputs.dtype != np.uint8 or inputs.ndim < 3:  # noqa: PLR2004  rows and a picture
        return []
    means = inputs.reshape(len(inputs), -1).mean(axis=1)
    bins = np.minimum((means * PIXEL_BINS / 256).astype(np.int64), PIXEL_BINS - 1)
    counts: list[int] = np.bincount(bins, minlength=PIXEL_BINS).tolist()
    return counts


def stability_index(expected: Sequence[int], found: Sequence[int]) -> float:
    """Return the population stability index of two histograms with the same bins.

    The sum over the bins of (q - p) ln(q / p), shares below `MIN_SHARE` taken as that: symmetric
    relative entropy (S. Kullback, R. A. Leibler, Ann. Math. Stat. 22, 1951), in nats.

    Raises:
        ValueError: they have different bins, or one of them is empty.
    """
    p, q = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if p.shape != q.shape or not p.sum() or not q.sum():
        raise ValueError(f"histograms have {p.size} and {q.size} bins, expected counts in the same")
    p, q = (np.maximum(counts / counts.sum(), MIN_SHARE) for counts in (p, q))
    return float(((q - p) * np.log(q / p)).sum())


def judge_probabilities(
    report: bundle_pb2.ParityReport, logits: Logits, probabilities: NDArray[np.floating]
) -> None:
    """Fail a report that passed, of a model whose probabilities are not those of its logits.

    Clients read the one, parity is measured on the other.

    Args:
        report: whose budget says how precise the model is.
        logits: (rows, classes).
        probabilities: the same rows and classes.
    """
    limit = PROBABILITY_ERROR[report.budget.precision]
    apart = math.inf
    if probabilities.shape == logits.shape:
        with np.errstate(all="ignore"):  # what is not finite is refused, not warned about
            apart = float(np.abs(softmax(logits) - probabilities).max())
    if report.passed and not apart <= limit:
        report.passed = False
        report.failure = (
            f"probabilities are {apart:.2g} from the softmax of the logits, allowed are {limit:g}"
        )


def margins(logits: Logits) -> NDArray[np.float64]:
    """Return how far each row's highest logit is above its second, float64 (rows,).

    In float64, exactly: against an array of float32 numpy would round a budget first.
    """
    top_two = np.partition(logits, -2, axis=1)[:, -2:].astype(np.float64)
    return top_two[:, 1] - top_two[:, 0]


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the probabilities of each row in float64, shifted by its maximum first."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def difference(
    reference: NDArray[np.floating], candidate: NDArray[np.floating]
) -> bundle_pb2.Difference:
    """Return max, mean and 99.9th percentile of the absolute differences of all elements.

    The percentile has an interval: the shares of elements above it that are no evidence against
    one in a thousand (score interval, Wilson 1927). It counts rows: elements of one move together.

    Args:
        reference: (rows, ...), at least one row.
        candidate: the same rows.
    """
    above = TAIL + WILSON_Z * math.sqrt(TAIL * (1 - TAIL) / len(reference))
    with np.errstate(invalid="ignore"):  # what is not finite is reported, not warned about
        apart = np.abs(reference.astype(np.float64) - candidate.astype(np.float64))
        p999, low = percentiles(apart, 100 * (1 - TAIL), 100 * (1 - min(above, 1)))
        return bundle_pb2.Difference(
            max=float(apart.max()), mean=float(apart.mean()), p999=p999, p999_low=low
        )


def percentiles(values: NDArray[np.floating], *percents: float) -> list[float]:
    """Return percentiles of all elements, with linear interpolation; NaN where an element is NaN.

    As `numpy.percentile` (definition 7 of Hyndman and Fan, The American Statistician 50, 1996), but
    between a number and an infinity they are the infinity, and `numpy.ma` is not imported, which
    that does when it is first called: 4 % of a server's launch.

    Args:
        values: at least one, of any shape.
        percents: 0 to 100.
    """
    last = values.size - 1
    places = [last * percent / 100 for percent in percents]
    needed = sorted({last, *map(math.floor, places), *map(math.ceil, places)})
    found = np.partition(values, needed, axis=None)[needed].astype(np.float64)
    if math.isnan(found[-1]):  # they are sorted behind all others
        return [math.nan] * len(percents)
    return [float(value) for value in np.interp(places, needed, found)]


def accuracy(right: NDArray[np.bool_]) -> bundle_pb2.Accuracy:
    """Count what is right, with a 95 % Wilson score interval (E. B. Wilson, JASA 22, 1927)."""
    rows, correct = len(right), int(right.sum())
    low, high = _wilson(correct / rows, rows)
    return bundle_pb2.Accuracy(rows=rows, correct=correct, value=correct / rows, low=low, high=high)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    z2 = WILSON_Z**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = WILSON_Z * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_reference: int, only_candidate: int) -> float:
    """Return the two-sided exact p-value of McNemar's test (Q. McNemar, Psychometrika 12, 1947).

    Args:
        only_reference: rows that only the reference got right.
        only_candidate: rows that only the candidate got right.
    """
    discordant = only_reference + only_candidate
    fewer = min(only_reference, only_candidate)
    log_half = discordant * math.log(0.5)
    tail = sum(math.exp(_log_choose(discordant, k) + log_half) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _kl_divergence(reference: Logits, candidate: Logits) -> float:
    log_reference, log_candidate = _log_softmax(reference), _log_softmax(candidate)
    return float((np.exp(log_reference) * (log_reference - log_candidate)).sum(axis=1).mean())


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(
        np.exp(shifted).sum(axis=1, keepdims=True)
    )
    return log_probabilities


def _largest(outputs: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the largest absolute element of each row."""
    largest: NDArray[np.floating] = np.abs(outputs.reshape(len(outputs), -1)).max(axis=1)
    return largest


def _failure(report: bundle_pb2.ParityReport, hostile: tuple[float, float]) -> str:
    """Return why a report does not pass, or nothing. Written so that NaN never passes."""
    limit = report.budget.max_logit
    name = f"the {report.budget.precision} budget of {limit:.3g}"
    is_int8 = report.budget.precision == "int8"
    # A percentile does not see a lone infinity, and an infinite budget would allow one.
    if not (math.isfinite(report.logits.max) and math.isfinite(report.hostile.max_logit)):
        return "a logit is not finite"
    apart = judged(report)
    if not apart <= limit:
        which = "99.9th percentile of |Δlogit|" if is_int8 else "max |Δlogit|"
        least = "at least " if is_int8 and apart != report.logits.p999 else ""
        return f"{which} is {least}{apart:.3g}, over {name}"
    if report.HasField("hostile") and not is_int8 and not hostile[0] <= hostile[1]:
        name = f"the {report.budget.precision} budget of {hostile[1]:.3g}"
        return f"max |Δlogit| on hostile inputs is {hostile[0]:.3g}, over {name}"
    if report.flips_unexplained:
        return (
            f"{report.flips_unexplained} rows change their top-1 class although the reference's "
            f"margin is wider than twice {name}"
        )
    return _int8_failure(report) if is_int8 else ""


def _are_few(rows: int) -> bool:
    return 0 < rows < MIN_SHARE_ROWS


def _int8_failure(report: bundle_pb2.ParityReport) -> str:
    """Return why a report does not pass the rules that int8 has on top of the others.

    Below `MIN_SHARE_ROWS` rows, as in a golden set, a share fails once its 95 % interval does: of
    200 rows a model that agrees on 99.3 % misses more than 1 % every sixth time.
    """
    agreed, right, rows = report.agreement, report.accuracy.value, report.accuracy.rows
    if _are_few(rows):
        agreed, right = _wilson(report.agreement, rows)[1], report.accuracy.high
    if not agreed >= INT8_MIN_AGREEMENT:
        return f"top-1 agreement is {report.agreement:.4f}, expected {INT8_MIN_AGREEMENT}"
    if not report.reference_accuracy.value - right <= INT8_MAX_ACCURACY_DROP:
        drop = report.reference_accuracy.value - report.accuracy.value
        return f"accuracy drops by {drop:.4f}, allowed are {INT8_MAX_ACCURACY_DROP}"
    return ""


def _check_shapes(
    reference: Logits, candidate: Logits, labels: Labels, class_names: list[str]
) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape}, expected one label a row")
    expected = (len(labels), len(class_names))
    if not len(labels) or len(class_names) < 2:  # noqa: PLR2004  a margin needs two classes
        raise ValueError(f"rows and classes are {expected}, expected at least (1, 2)")
    for name, logits in (("reference", reference), ("candidate", candidate)):
        if logits.shape != expected:
            raise ValueError(f"{name} has shape {logits.shape}, expected {expected}")
