import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos import bundle_pb2
from service import agreement

NAMES = ["a", "b", "c"]
# Three rows whose figures can be worked out by hand; tops are a, b, c with margins 4, 2 and 6.
REFERENCE = np.array([[20, 16, 0], [18, 20, 0], [0, 14, 20]], np.float32)
LABELS = np.array([0, 1, 1])  # the reference has two right


def compared(candidate, *, precision="int8", scale=20.0, reference=REFERENCE, labels=LABELS):
    return agreement.compare(
        reference,
        candidate,
        labels,
        allowed=agreement.Budget(precision, scale),
        class_names=NAMES,
    )


def moved(row, column, to, base=REFERENCE):
    candidate = base.copy()
    candidate[row, column] = to
    return candidate


def many(rows=3000):
    """Logits whose every top-1 margin is 1, most absolute logit 20."""
    reference = np.tile(np.array([20, 19, 0], np.float32), (rows, 1))
    return reference, np.zeros(rows, np.int64)


def figures(*, precision="float32", apart=0.0, **fields):
    """A report that passes, with some of its figures replaced."""
    report = bundle_pb2.ParityReport(
        budget=agreement.Budget(precision, 20.0).message(),
        agreement=1.0,
        logits=bundle_pb2.Difference(max=apart, mean=apart, p999=apart),
    )
    report.MergeFrom(bundle_pb2.ParityReport(**fields))
    agreement.judge(report)
    return report


def test_budget_is_the_coefficient_times_the_median_of_the_rows_largest_logits():
    reference = np.array([[1, -10], [30, 2], [-20, 3]], np.float32)

    assert agreement.budget("float32", reference).max_logit == pytest.approx(1e-5 * 20)
    assert agreement.budget("float16", reference).max_logit == pytest.approx(2e-3 * 20)
    assert agreement.budget("int8", reference).max_logit == pytest.approx(5e-2 * 20)
    assert agreement.budget("int8", reference).message() == bundle_pb2.Budget(
        precision="int8", coefficient=0.05, scale=20, max_logit=1
    )


def test_budget_without_a_coefficient_or_without_rows_is_refused():
    with pytest.raises(ValueError, match="precision is 'int4', expected one of"):
        agreement.budget("int4", REFERENCE)
    with pytest.raises(ValueError, match="has no rows"):
        agreement.budget("int8", REFERENCE[:0])


def test_equal_logits_pass_and_every_figure_says_so():
    report = compared(REFERENCE.copy(), precision="float32")

    assert report.passed
    assert report.failure == ""
    assert (report.accuracy.correct, report.accuracy.rows) == (2, 3)
    assert report.reference_accuracy == report.accuracy
    assert report.mcnemar_p == 1
    assert report.agreement == 1
    assert (report.flips_explained, report.flips_unexplained) == (0, 0)
    assert report.logits == bundle_pb2.Difference()
    assert report.probabilities == bundle_pb2.Difference()
    assert report.kl_divergence == 0


def test_figures_of_a_flip_are_those_worked_out_by_hand():
    report = compared(moved(1, 0, 20.5))  # a overtakes b in the row whose margin is 2

    assert report.agreement == pytest.approx(2 / 3)
    assert (report.flips_explained, report.flips_unexplained) == (1, 0)
    assert report.logits.max == 2.5
    assert report.logits.mean == pytest.approx(2.5 / 9)
    assert report.logits.p999 == pytest.approx(2.5 * (1 - 0.001 * 8))
    assert (report.reference_accuracy.correct, report.accuracy.correct) == (2, 1)
    assert report.mcnemar_p == 1  # one discordant row says nothing
    assert [(c.label, c.rows, c.reference_correct, c.correct, c.same) for c in report.classes] == [
        ("a", 1, 1, 1, 1),
        ("b", 2, 1, 0, 1),
        ("c", 0, 0, 0, 0),
    ]


def test_probabilities_and_divergence_are_those_worked_out_by_hand():
    reference = np.array([[0, math.log(3)]], np.float32)  # 1/4 and 3/4
    candidate = np.array([[0, 0]], np.float32)  # 1/2 and 1/2

    report = agreement.compare(
        reference,
        candidate,
        np.array([1]),
        allowed=agreement.Budget("float32", 1.0),
        class_names=["a", "b"],
    )

    assert agreement.softmax(reference) == pytest.approx(np.array([[0.25, 0.75]]))
    assert report.probabilities.max == pytest.approx(0.25)
    assert report.kl_divergence == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_softmax_of_huge_logits_is_finite():
    assert agreement.softmax(np.array([[3e38, 0], [-3e38, 0]], np.float32)).tolist() == [
        [1, 0],
        [0, 1],
    ]


def test_margin_is_between_the_two_highest_logits():
    logits = np.array([[1, 5, 3], [-1, -1, -9], [0, -4, -2]], np.float32)

    assert agreement.margins(logits).tolist() == [2, 0, 2]


def test_flip_is_explained_up_to_twice_the_budget_and_not_beyond():
    explained = moved(0, 1, np.float32(18), REFERENCE)  # margin 2, the budget is 1
    beyond = moved(0, 1, np.nextafter(np.float32(18), np.float32(0)), REFERENCE)

    for reference, counts in ((explained, (1, 0)), (beyond, (0, 1))):
        report = compared(moved(0, 0, 0, reference), reference=reference)
        assert (report.flips_explained, report.flips_unexplained) == counts


def test_flip_within_the_budget_passes():
    reference = moved(0, 1, 19.9)
    candidate = moved(0, 1, 20.05, moved(0, 0, 19.95, reference))

    report = agreement.compare(
        reference, candidate, LABELS, allowed=agreement.Budget("float16", 50.0), class_names=NAMES
    )

    assert (report.flips_explained, report.flips_unexplained) == (1, 0)
    assert report.logits.max == pytest.approx(0.15, rel=1e-3)
    assert report.budget.max_logit == pytest.approx(0.1)
    assert report.failure.startswith("max |Δlogit| is 0.15, over the float16 budget of 0.1")
    wider = agreement.Budget("float16", 100.0)
    assert agreement.compare(reference, candidate, LABELS, allowed=wider, class_names=NAMES).passed


def test_flip_with_a_margin_above_twice_the_budget_fails_even_when_the_percentile_does_not_see_it():
    reference, labels = many()
    reference[0] = [20, 17, 0]
    candidate = moved(0, 1, 20.5, reference)

    report = compared(candidate, reference=reference, labels=labels)

    assert report.logits.p999 < report.budget.max_logit
    assert report.flips_unexplained == 1
    assert not report.passed
    assert report.failure == (
        "1 rows change their top-1 class although the reference's margin is wider than twice "
        "the int8 budget of 1"
    )


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_largest_difference_at_the_budget_passes_and_beyond_it_fails(precision):
    limit = agreement.Budget(precision, 20.0).max_logit

    assert figures(precision=precision, apart=limit).passed
    report = figures(precision=precision, apart=math.nextafter(limit, 1))
    assert not report.passed
    assert report.failure.startswith("max |Δlogit| is")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_hostile_difference_at_the_budget_passes_and_beyond_it_fails(precision):
    limit = agreement.Budget(precision, 20.0).max_logit

    assert figures(precision=precision, hostile=bundle_pb2.Hostile(max_logit=limit)).passed
    report = figures(
        precision=precision, hostile=bundle_pb2.Hostile(max_logit=math.nextafter(limit, 1))
    )
    assert not report.passed
    assert report.failure.startswith("max |Δlogit| on hostile inputs is")


def test_int8_is_judged_by_its_percentile_and_not_by_its_largest_difference():
    far = bundle_pb2.Difference(max=50)

    assert figures(precision="int8", logits=far, apart=1.0).passed
    report = figures(precision="int8", logits=far, apart=math.nextafter(1.0, 2))
    assert report.failure.startswith("99.9th percentile of |Δlogit| is 1, over the int8 budget")


def test_int8_may_be_apart_on_hostile_inputs():
    assert figures(precision="int8", hostile=bundle_pb2.Hostile(max_logit=99)).passed


def test_int8_needs_99_percent_agreement():
    assert figures(precision="int8", agreement=0.99).passed
    report = figures(precision="int8", agreement=math.nextafter(0.99, 0))
    assert report.failure == "top-1 agreement is 0.9900, expected 0.99"
    assert figures(precision="float32", agreement=0.5).passed


def test_int8_may_lose_three_thousandths_of_accuracy_and_no_more():
    def dropped(drop, precision="int8"):
        return figures(
            precision=precision,
            reference_accuracy=bundle_pb2.Accuracy(value=drop),
            accuracy=bundle_pb2.Accuracy(value=0),
        )

    assert dropped(0.003).passed
    assert (
        dropped(math.nextafter(0.003, 1)).failure == "accuracy drops by 0.0030, allowed are 0.003"
    )
    assert dropped(-0.5).passed
    assert dropped(0.5, "float32").passed


def test_judge_takes_a_failure_back_when_the_figures_are_mended():
    report = figures(apart=1.0)
    report.logits.Clear()

    agreement.judge(report)

    assert (report.passed, report.failure) == (True, "")


@pytest.mark.parametrize("precision", sorted(agreement.COEFFICIENT))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 2])
def test_one_logit_that_is_not_finite_never_passes(precision, value, column):
    reference, labels = many()  # so many that no percentile sees one of them

    report = compared(
        moved(7, column, value, reference), precision=precision, reference=reference, labels=labels
    )

    assert not report.passed
    assert report.failure == "a logit is not finite"


@pytest.mark.parametrize("precision", sorted(agreement.COEFFICIENT))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hostile_answer_that_is_not_finite_never_passes(precision, value):
    report = figures(precision=precision, hostile=bundle_pb2.Hostile(max_logit=value))

    assert report.failure == "a logit is not finite"


def test_reference_that_is_not_finite_does_not_make_a_budget_that_all_fit():
    reference = REFERENCE.copy()
    reference[:, 0] = np.inf
    with np.errstate(invalid="ignore"):
        allowed = agreement.budget("float32", reference)

        report = agreement.compare(reference, REFERENCE, LABELS, allowed=allowed, class_names=NAMES)

    assert not report.passed


def test_difference_of_infinities_is_reported_and_not_warned_about():
    infinite = np.full((2, 2), np.inf)

    assert math.isnan(agreement.difference(infinite, infinite).max)
    assert agreement.difference(np.zeros((2, 2)), infinite).max == math.inf


def test_both_sides_of_a_comparison_have_the_same_difference():
    other = moved(1, 0, 20.5)

    there, back = compared(other), compared(REFERENCE, reference=other)

    assert there.logits == back.logits
    assert there.probabilities == back.probabilities
    assert there.agreement == back.agreement
    assert there.mcnemar_p == back.mcnemar_p


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": REFERENCE[:2]}, r"candidate has shape \(2, 3\), expected \(3, 3\)"),
        ({"candidate": REFERENCE[:, :2]}, r"candidate has shape \(3, 2\), expected \(3, 3\)"),
        ({"reference": REFERENCE[:1]}, r"reference has shape \(1, 3\), expected \(3, 3\)"),
        ({"labels": LABELS[:0]}, r"rows and classes are \(0, 3\), expected at least \(1, 2\)"),
        ({"labels": LABELS[:, None]}, r"labels have shape \(3, 1\), expected one label a row"),
        ({"labels": np.array(1)}, r"labels have shape \(\), expected one label a row"),
        ({"class_names": ["a"]}, r"rows and classes are \(3, 1\), expected at least \(1, 2\)"),
    ],
)
def test_arrays_of_other_rows_or_classes_are_refused(change, message):
    arguments = {
        "reference": REFERENCE,
        "candidate": REFERENCE,
        "labels": LABELS,
        "class_names": NAMES,
        **change,
    }

    with pytest.raises(ValueError, match=message):
        agreement.compare(**arguments, allowed=agreement.Budget("int8", 20.0))


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3, and the closed form at the ends
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(correct, rows, low, high):
    accuracy = agreement.accuracy(np.arange(rows) < correct)

    assert (accuracy.rows, accuracy.correct, accuracy.value) == (rows, correct, correct / rows)
    assert accuracy.low == pytest.approx(low, abs=5e-5)
    assert accuracy.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_interval_holds_the_share_and_mirrors_its_complement(rows, data):
    correct = data.draw(st.integers(0, rows))

    one = agreement.accuracy(np.arange(rows) < correct)
    other = agreement.accuracy(np.arange(rows) >= correct)

    assert 0 <= one.low <= one.value + 1e-12
    assert one.value - 1e-12 <= one.high <= 1
    assert one.low < one.high
    assert other.low == pytest.approx(1 - one.high)
    assert other.high == pytest.approx(1 - one.low)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_of_binomial_terms(only_reference, only_candidate):
    n, fewer = only_reference + only_candidate, min(only_reference, only_candidate)
    exact = min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(fewer + 1)), 2**n))

    assert agreement.mcnemar(only_reference, only_candidate) == pytest.approx(float(exact))
    assert agreement.mcnemar(only_candidate, only_reference) == agreement.mcnemar(
        only_reference, only_candidate
    )


def test_mcnemar_by_hand():
    assert agreement.mcnemar(0, 0) == 1
    assert agreement.mcnemar(1, 0) == 1
    assert agreement.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert agreement.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert agreement.mcnemar(40_000, 40_000) == pytest.approx(1)


@given(
    hnp.arrays(np.float32, (6, 3), elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.float32, (6, 3), elements=st.floats(width=32)),
    st.sampled_from(sorted(agreement.COEFFICIENT)),
)
def test_what_passes_is_finite_within_budget_and_without_an_unexplained_flip(
    reference, candidate, precision
):
    labels = np.arange(6) % 3
    report = compared(
        candidate,
        precision=precision,
        scale=agreement.budget(precision, reference).scale,
        reference=reference,
        labels=labels,
    )

    flipped = int((reference.argmax(axis=1) != candidate.argmax(axis=1)).sum())
    assert report.flips_explained + report.flips_unexplained == flipped
    assert report.passed == (not report.failure)
    if report.passed:
        assert np.isfinite(candidate).all()
        assert report.flips_unexplained == 0
    if precision == "float32" and report.passed:
        assert np.abs(candidate.astype(float) - reference).max() <= report.budget.max_logit


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-50, 50, width=32)), st.integers(0, 2**32))
def test_no_move_within_the_budget_makes_an_unexplained_flip(reference, seed):
    allowed = agreement.budget("int8", reference)
    moves = np.random.default_rng(seed).uniform(-1, 1, reference.shape) * allowed.max_logit * 0.999
    candidate = (reference + moves).astype(np.float32)

    report = compared(
        candidate, scale=allowed.scale, reference=reference, labels=np.zeros(6, np.int64)
    )

    assert report.flips_unexplained == 0
