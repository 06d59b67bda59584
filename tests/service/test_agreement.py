import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos import bundle_pb2, parity_pb2
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


def judged(*, precision="float32", apart=0.0, **fields):
    """A report that passes, with some of its figures replaced."""
    report = bundle_pb2.ParityReport(
        budget=agreement.Budget(precision, 20.0).message(),
        accuracy=bundle_pb2.Accuracy(rows=agreement.MIN_SHARE_ROWS),
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
    assert report.logits == bundle_pb2.Difference(p999_low=0)
    assert report.probabilities == bundle_pb2.Difference(p999_low=0)
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

    assert judged(precision=precision, apart=limit).passed
    report = judged(precision=precision, apart=math.nextafter(limit, 1))
    assert not report.passed
    assert report.failure.startswith("max |Δlogit| is")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_hostile_difference_at_the_budget_passes_and_beyond_it_fails(precision):
    limit = agreement.Budget(precision, 20.0).max_logit

    assert judged(precision=precision, hostile=bundle_pb2.Hostile(max_logit=limit)).passed
    report = judged(
        precision=precision, hostile=bundle_pb2.Hostile(max_logit=math.nextafter(limit, 1))
    )
    assert not report.passed
    assert report.failure.startswith("max |Δlogit| on hostile inputs is")


def test_int8_is_judged_by_its_percentile_and_not_by_its_largest_difference():
    far = bundle_pb2.Difference(max=50)

    assert judged(precision="int8", logits=far, apart=1.0).passed
    report = judged(precision="int8", logits=far, apart=math.nextafter(1.0, 2))
    assert report.failure.startswith("99.9th percentile of |Δlogit| is 1, over the int8 budget")


def test_int8_may_be_apart_on_hostile_inputs():
    assert judged(precision="int8", hostile=bundle_pb2.Hostile(max_logit=99)).passed


def test_int8_needs_99_percent_agreement():
    assert judged(precision="int8", agreement=0.99).passed
    report = judged(precision="int8", agreement=math.nextafter(0.99, 0))
    assert report.failure == "top-1 agreement is 0.9900, expected 0.99"
    assert judged(precision="float32", agreement=0.5).passed


def test_int8_may_lose_three_thousandths_of_accuracy_and_no_more():
    def dropped(drop, precision="int8"):
        return judged(
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


def test_int8_is_held_to_its_shares_from_1000_rows_on_and_to_their_intervals_below():
    def of(rows, agreed, right=0.9):
        accuracy = agreement.accuracy(np.arange(rows) < round(right * rows))
        return judged(
            precision="int8",
            agreement=agreed,
            accuracy=accuracy,
            reference_accuracy=bundle_pb2.Accuracy(value=0.905),
        )

    assert of(1000, 0.989, 0.905).failure == "top-1 agreement is 0.9890, expected 0.99"
    assert of(999, 0.989, 0.905).passed
    assert of(200, 0.9, 0.905).failure == "top-1 agreement is 0.9000, expected 0.99"
    assert of(1000, 1.0).failure == "accuracy drops by 0.0050, allowed are 0.003"
    assert of(990, 1.0).passed
    assert of(200, 1.0, 0.5).failure == "accuracy drops by 0.4050, allowed are 0.003"


def test_judge_takes_a_failure_back_when_the_figures_are_mended():
    report = judged(apart=1.0)
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
    report = judged(precision=precision, hostile=bundle_pb2.Hostile(max_logit=value))

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


PRECISIONS = st.sampled_from(sorted(agreement.COEFFICIENT))
BUDGETS = st.builds(agreement.Budget, PRECISIONS, st.floats(1e-3, 1e6))


def one_flip(margin, allowed):
    """Rows of which the first has this margin, and a candidate whose first row has none.

    With a tie the first column wins, so that the row flips although no logit moves by more than
    half its margin. No row is right, before or after, and so no accuracy is lost.
    """
    reference = np.zeros((3000, 3), np.float32)
    reference[:, 1] = 8 * allowed.max_logit
    reference[0, 1] = margin
    candidate = reference.copy()
    candidate[0, :2] = margin / 2
    return compared(
        candidate,
        precision=allowed.precision,
        scale=allowed.scale,
        reference=reference,
        labels=np.full(len(reference), 2),
    )


def at_most(value):
    """The largest float32 that is not above a value."""
    nearest = np.float32(value)
    return nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf))


@given(BUDGETS, st.floats(1e-6, 1))
def test_a_flip_whose_margin_is_within_twice_the_budget_passes(allowed, share):
    report = one_flip(at_most(share * 2 * allowed.max_logit), allowed)

    assert (report.flips_explained, report.flips_unexplained) == (1, 0)
    assert report.passed, report.failure


@given(BUDGETS)
def test_a_flip_passes_up_to_the_last_float_within_twice_the_budget(allowed):
    report = one_flip(at_most(2 * allowed.max_logit), allowed)

    assert (report.flips_explained, report.flips_unexplained) == (1, 0)
    assert report.passed, report.failure


@given(BUDGETS)
def test_a_flip_fails_from_the_next_float_above_twice_the_budget(allowed):
    margin = np.nextafter(at_most(2 * allowed.max_logit), np.float32(np.inf))

    report = one_flip(margin, allowed)

    assert (report.flips_explained, report.flips_unexplained) == (0, 1)
    assert not report.passed


@given(BUDGETS, st.floats(2.001, 1e6))
def test_a_flip_whose_margin_is_above_twice_the_budget_fails(allowed, budgets):
    report = one_flip(np.float32(budgets * allowed.max_logit), allowed)

    assert (report.flips_explained, report.flips_unexplained) == (0, 1)
    assert not report.passed


@pytest.mark.parametrize("precision", sorted(agreement.COEFFICIENT))
def test_one_unexplained_flip_fails_alone_and_explained_ones_do_not(precision):
    assert judged(precision=precision, flips_explained=7).passed
    report = judged(precision=precision, flips_unexplained=1)
    assert report.failure.startswith("1 rows change their top-1 class although the reference's")


ROWS, SIZE = 12, 3
FINITE = hnp.arrays(np.float32, (ROWS, SIZE), elements=st.floats(-50, 50, width=32))
PIXELS = hnp.arrays(np.uint8, (ROWS, 2, 2, 1))


@given(FINITE, FINITE, BUDGETS)
def test_what_is_live_tells_flips_as_the_report_does(reference, served, allowed):
    live = agreement.figures(reference, served, np.zeros((ROWS, 4), np.uint8), allowed=allowed)

    report = compared(
        served,
        precision=allowed.precision,
        scale=allowed.scale,
        reference=reference,
        labels=np.zeros(ROWS, np.int64),
    )
    assert (live.flips_explained, live.flips_unexplained, live.max_logit) == (
        report.flips_explained,
        report.flips_unexplained,
        report.logits.max,
    )
    assert live.rows == live.agreed + live.flips_explained + live.flips_unexplained == ROWS
    assert live.agreed == pytest.approx(report.agreement * ROWS)
    assert live.sum_logit == pytest.approx(report.logits.mean * ROWS)
    assert list(live.predicted) == np.bincount(served.argmax(axis=1), minlength=SIZE).tolist()
    assert live.sum_confidence == pytest.approx(agreement.softmax(served).max(axis=1).sum())


@given(FINITE, FINITE, PIXELS, BUDGETS, st.sets(st.integers(1, ROWS - 1)))
def test_figures_of_parts_add_up_to_those_of_the_whole(reference, served, images, allowed, cuts):
    whole = agreement.figures(reference, served, images, allowed=allowed)
    total = parity_pb2.ShadowFigures()

    parts = (np.split(array, sorted(cuts)) for array in (reference, served, images))
    for part in zip(*parts, strict=True):
        agreement.add(total, agreement.figures(*part, allowed=allowed))

    for name in ("sum_logit", "sum_confidence"):  # in another order
        assert getattr(total, name) == pytest.approx(getattr(whole, name))
        setattr(total, name, getattr(whole, name))
    assert total == whole


@given(FINITE, st.integers(0, ROWS * SIZE - 1), st.booleans(), BUDGETS, st.data())
def test_one_live_logit_that_is_not_finite_is_infinitely_far(logits, place, swap, allowed, data):
    odd = logits.copy()
    odd.flat[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    sides = (odd, logits) if swap else (logits, odd)

    live = agreement.figures(*sides, np.zeros((ROWS, 4), np.uint8), allowed=allowed)

    assert live.max_logit == live.sum_logit == math.inf > allowed.max_logit
    near = agreement.figures(logits, logits, np.zeros((ROWS, 4), np.uint8), allowed=allowed)
    total = parity_pb2.ShadowFigures()
    for more in (near, live, near):
        agreement.add(total, more)
    assert total.max_logit == math.inf


def test_infinities_on_both_sides_are_infinitely_far():
    infinite = np.full((2, 3), np.inf, np.float32)

    live = agreement.figures(
        infinite, infinite, np.zeros((2, 4), np.uint8), allowed=agreement.Budget("int8", 20.0)
    )

    assert live.max_logit == math.inf


def test_figures_of_what_has_no_classes_are_differences_alone():
    reference = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    served = reference + np.array([[[0.5, 0.0]], [[0.0, 0.25]]])

    live = agreement.figures(
        reference,
        served,
        np.zeros((2, 1)),
        allowed=agreement.Budget("float32", 1.0),
        classes=False,
    )

    assert live == parity_pb2.ShadowFigures(rows=2, agreed=2, max_logit=0.5, sum_logit=0.375)


@pytest.mark.parametrize(
    ("reference", "served", "inputs"),
    [
        (REFERENCE, REFERENCE[:2], np.zeros((3, 4))),
        (REFERENCE, REFERENCE[:, :2], np.zeros((3, 4))),
        (REFERENCE, REFERENCE, np.zeros((2, 4))),
        (REFERENCE[:0], REFERENCE[:0], np.zeros((0, 4))),
    ],
)
def test_figures_of_other_rows_are_refused(reference, served, inputs):
    with pytest.raises(
        ValueError, match=r"rows were served \(\d, \d\), the original says \(\d, \d"
    ):
        agreement.figures(reference, served, inputs, allowed=agreement.Budget("int8", 1.0))


@pytest.mark.parametrize("field", ["predicted", "pixel_mean"])
def test_figures_that_cannot_be_added_leave_the_total_as_it_was(field):
    total = parity_pb2.ShadowFigures(rows=3, predicted=[1, 2], pixel_mean=[0, 3])
    before = parity_pb2.ShadowFigures.FromString(total.SerializeToString())
    more = parity_pb2.ShadowFigures(rows=3, predicted=[2, 1], pixel_mean=[3, 0])
    getattr(more, field).append(1)

    with pytest.raises(ValueError, match="the figures have 3 classes or bins, not 2"):
        agreement.add(total, more)

    assert total == before


@given(FINITE, PIXELS)
def test_distribution_counts_every_test_image_once_in_each_histogram(reference, images):
    found = agreement.distribution(reference, images)

    assert list(found.predicted) == np.bincount(reference.argmax(axis=1), minlength=SIZE).tolist()
    assert list(found.pixel_mean) == agreement.pixel_histogram(images)
    assert sum(found.predicted) == sum(found.pixel_mean) == ROWS
    assert 1 / SIZE <= found.confidence <= 1


@given(FINITE, PIXELS)
def test_the_test_set_itself_is_no_drift(reference, images):
    expected = agreement.distribution(reference, images)
    live = agreement.figures(reference, reference, images, allowed=agreement.Budget("float32", 1.0))

    assert agreement.stability_index(expected.predicted, live.predicted) == 0
    assert agreement.stability_index(expected.pixel_mean, live.pixel_mean) == 0
    assert live.sum_confidence / live.rows == pytest.approx(expected.confidence)


@given(hnp.arrays(np.uint8, (ROWS, 3, 2, 1)))
def test_images_are_counted_by_their_exact_mean_pixel(images):
    counted = agreement.pixel_histogram(images)

    wanted = [0] * agreement.PIXEL_BINS
    for image in images:
        mean = Fraction(int(image.astype(int).sum()), image.size)
        wanted[int(mean * agreement.PIXEL_BINS / 256)] += 1
    assert counted == wanted


def test_black_is_in_the_first_bin_and_white_in_the_last():
    images = np.stack([np.zeros((2, 2, 1)), np.full((2, 2, 1), 255)]).astype(np.uint8)

    assert agreement.pixel_histogram(images) == [1, *[0] * 14, 1]
    assert agreement.pixel_histogram(np.full((1, 2, 2, 1), 15, np.uint8))[:2] == [1, 0]
    assert agreement.pixel_histogram(np.full((1, 2, 2, 1), 16, np.uint8))[:2] == [0, 1]


@pytest.mark.parametrize(
    "inputs", [np.zeros((3, 2, 2, 1), np.float32), np.zeros((3, 4), np.uint8), np.zeros((3, 5))]
)
def test_what_is_no_image_has_no_pixels_to_count(inputs):
    assert agreement.pixel_histogram(inputs) == []


# So few that every share that is not 0 is above agreement.MIN_SHARE.
COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any)


@given(COUNTS, st.data())
def test_stability_index_is_symmetric_never_negative_and_nothing_only_for_equal_shares(one, data):
    other = data.draw(
        st.lists(st.integers(0, 1000), min_size=len(one), max_size=len(one)).filter(any)
    )
    shares = [[Fraction(count, sum(counts)) for count in counts] for counts in (one, other)]

    index = agreement.stability_index(one, other)

    assert index == pytest.approx(agreement.stability_index(other, one))
    assert math.isfinite(index)
    assert (index == 0) == (shares[0] == shares[1])
    assert index >= 0


@given(COUNTS, st.integers(1, 1000))
def test_stability_index_sees_shares_and_not_how_many_there_are(counts, times):
    many_more = [count * times for count in counts]

    assert agreement.stability_index(counts, many_more) == pytest.approx(0, abs=1e-12)


@given(COUNTS, st.data())
def test_stability_index_does_not_depend_on_the_order_of_the_bins(one, data):
    assume(len(one) > 1)
    other = data.draw(st.permutations(one))
    order = data.draw(st.permutations(range(len(one))))

    moved_alike = agreement.stability_index([one[i] for i in order], [other[i] for i in order])

    assert moved_alike == pytest.approx(agreement.stability_index(one, other))


def test_stability_index_by_hand():
    assert agreement.stability_index([1, 3], [3, 1]) == pytest.approx(math.log(3))
    empty = (1 - 1e-4) * math.log(1e4)  # the share of an empty bin is taken as 1e-4
    assert agreement.stability_index([5, 0], [0, 5]) == pytest.approx(2 * empty)


@pytest.mark.parametrize(
    ("expected", "found"), [([1, 2], [1, 2, 3]), ([0, 0], [1, 2]), ([1, 2], [0, 0]), ([], [])]
)
def test_histograms_that_cannot_be_compared_are_refused(expected, found):
    with pytest.raises(ValueError, match="bins, expected counts in the same"):
        agreement.stability_index(expected, found)


@pytest.mark.parametrize(
    ("rows", "flips", "passes"),
    [(200, 4, True), (200, 5, False), (2_000, 20, True), (2_000, 21, False)],
)
def test_a_share_of_few_rows_fails_int8_only_once_its_interval_does(rows, flips, passes):
    reference = np.tile(np.array([[10.0, 9.9, 0.0]], np.float32), (rows, 1))
    candidate = reference.copy()
    candidate[:flips, 1] = 10.1
    labels = np.arange(rows) % 3  # so that flips cost as much accuracy as they gain

    report = compared(candidate, precision="int8", scale=10.0, reference=reference, labels=labels)

    assert report.flips_explained == flips
    assert report.passed is passes, report.failure


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("share", "rows", "least", "most"),
    [(0.0005, 100, 0.0, 0.08), (0.0005, 284, 0.0, 0.08), (0.03, 100, 0.9, 1), (0.03, 284, 0.99, 1)],
)
def test_a_right_int8_file_fails_on_few_of_its_rows_or_a_wrong_one_passes(
    share, rows, least, most, together
):
    """Differences over the budget, alone or a whole row at a time, in draws from a test set."""
    rng = np.random.default_rng(0)
    whole = np.tile(np.array([[20.0, 0.0, -20.0]], np.float32), (20_000, 1))
    over = rng.random((20_000, 1 if together else 3)) < share
    candidate = np.where(over, whole + 1.3, whole).astype(np.float32)  # no class changes

    def fails(places):
        reference, labels = whole[places], np.zeros(len(places), np.int64)
        return not compared(candidate[places], reference=reference, labels=labels).passed

    assert fails(np.arange(20_000)) is (share > 0.001)
    draws = [rng.choice(20_000, rows, replace=False) for _ in range(300)]
    assert least <= np.mean([fails(one) for one in draws]) <= most


def test_the_figure_that_is_judged_is_told():
    reference, labels = many(100)
    candidate = moved(7, 2, 5.0, reference)

    report = compared(candidate, reference=reference, labels=labels)

    assert report.logits.max == 5
    assert report.logits.p999 > report.budget.max_logit > agreement.judged(report) == 0
    assert report.passed
    few = compared(candidate, precision="float32", reference=reference, labels=labels)
    assert agreement.judged(few) == 5
    report.logits.ClearField("p999_low")  # as a manifest of before has it
    agreement.judge(report)
    assert report.failure.startswith("99.9th percentile of |Δlogit| is 3")


@given(
    values=hnp.arrays(
        st.sampled_from((np.float16, np.float32, np.float64)),
        st.tuples(st.integers(1, 30), st.integers(1, 3)),
        elements=st.floats(-1000, 1000, width=16),
    ),
    percents=st.lists(st.floats(0, 100), min_size=1, max_size=3),
)
def test_percentiles_are_those_of_numpy(values, percents):
    np.testing.assert_allclose(
        agreement.percentiles(values, *percents),
        np.percentile(values.astype(np.float64), percents),
        rtol=1e-9,
        atol=1e-9,
    )


def test_percentiles_of_what_is_no_number_somewhere_are_none():
    assert np.isnan(agreement.percentiles(np.array([1, np.nan, 2]), 0, 50)).all()


def test_percentiles_are_infinite_only_beyond_the_last_number():
    assert agreement.percentiles(np.array([1, np.inf, 2]), 50, 75, 100) == [2, np.inf, np.inf]


def test_scale_is_the_median_of_the_rows_largest_and_never_zero():
    rows = np.array([[[1, -4]], [[2, 3]], [[0, -9]]], np.float32)

    assert agreement.scale(rows) == 4
    assert agreement.scale(np.array([0, 0, 0, -6, 2], np.float32)) == 4  # of those that are not 0
    assert agreement.scale(np.zeros((3, 2), np.float32)) == 1


def test_a_hostile_row_is_judged_by_its_own_size_where_that_is_larger():
    allowed = agreement.Budget("float32", 10)
    reference = np.array([[1, 2], [-50, 3]], np.float32)
    limits = [1e-5 * 10, 1e-5 * 50]

    assert agreement.hostile_limits(allowed, reference).tolist() == pytest.approx(limits)
    for row, limit in enumerate(limits):
        for share, passes in ((0.99, True), (1.01, False)):
            wide = reference.astype(np.float64)
            candidate = wide.copy()
            candidate[row, 1] += share * limit
            report = agreement.compare_outputs(wide, wide, allowed=allowed)
            agreement.add_hostile(report, wide, candidate)
            assert report.passed is passes
            assert report.hostile.rows == 2
            assert report.hostile.max_logit == pytest.approx(share * limit)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hostile_answer_that_is_not_finite_fails_wherever_it_is(value):
    allowed = agreement.Budget("float32", 10)
    reference = np.ones((3, 2), np.float32)
    candidate = reference.copy()
    candidate[1, 1] = value
    report = agreement.compare_outputs(reference, reference, allowed=allowed)

    agreement.add_hostile(report, reference, candidate)

    assert report.failure == "a logit is not finite"


def test_hostile_answers_of_another_shape_are_refused():
    report = agreement.compare_outputs(
        np.ones((2, 2)), np.ones((2, 2)), allowed=agreement.Budget("float32", 1)
    )

    with pytest.raises(ValueError, match=r"hostile outputs have shape \(3, 2\), expected \(1, 2\)"):
        agreement.add_hostile(report, np.ones((3, 2)), np.ones((1, 2)))


def test_rows_without_classes_are_judged_by_their_differences_alone():
    outputs = np.array([[1], [2]], np.float32)

    report = agreement.compare_by_kind(
        outputs, outputs, np.empty(0, np.int64), allowed=agreement.Budget("float32", 1),
        class_names=[],
    )  # fmt: skip

    assert report.passed
    assert not report.classes
