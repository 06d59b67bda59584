import numpy as np
import pytest

from pipeline import measures

LABELS = ("coat", "dress", "shirt")


def logits_of(probabilities):
    """Return logits whose softmax these are."""
    return np.log(np.array(probabilities, np.float64))


def test_rows_of_the_confusion_matrix_are_the_true_classes():
    matrix = measures.confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2)

    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_cross_entropy_of_certainty_is_nothing_and_of_doubt_one_bit():
    logits = np.array([[50, 0], [0, 0]], np.float32)

    assert measures.cross_entropy(logits[:1], np.array([0])) == pytest.approx(0, abs=1e-9)
    assert measures.cross_entropy(logits[1:], np.array([0])) == pytest.approx(np.log(2))


def test_huge_logits_do_not_overflow():
    logits = np.array([[3e4, -3e4]], np.float32)

    assert measures.cross_entropy(logits, np.array([1])) == pytest.approx(6e4)


def test_the_squared_error_is_the_mean_over_rows_and_outputs():
    outputs = np.array([[1, 2], [3, 4]], np.float32)

    assert measures.squared_error(outputs, np.array([[1, 2], [3, 2]], np.float32)) == 1.0


def test_a_squared_error_beyond_float32_is_a_number():
    outputs = np.array([[3e38]], np.float32)

    assert measures.squared_error(outputs, -outputs) == pytest.approx(3.6e77)


def test_a_class_has_precision_of_its_column_and_recall_of_its_row():
    matrix = np.array([[8, 2, 0], [4, 6, 0], [0, 0, 0]])

    coat, dress, shirt = measures.class_scores(matrix, LABELS)

    assert (coat.precision, coat.recall, coat.rows) == (8 / 12, 0.8, 10)
    assert coat.f1 == pytest.approx(2 * 8 / (12 + 10))  # twice the right over called and there
    assert (dress.precision, dress.recall) == (0.75, 0.6)
    assert (shirt.precision, shirt.recall, shirt.f1, shirt.rows) == (0, 0, 0, 0)


def test_pairs_are_confused_in_the_order_of_their_rows_each_way_for_itself():
    matrix = np.array([[9, 2, 0], [5, 9, 2], [0, 0, 9]])

    pairs = measures.most_confused(matrix, LABELS)

    assert [(one.label, one.predicted, one.rows) for one in pairs] == [
        ("dress", "coat", 5),
        ("coat", "dress", 2),
        ("dress", "shirt", 2),
    ]


def test_no_more_than_ten_pairs_are_kept():
    matrix = np.ones((5, 5), np.int64)

    assert len(measures.most_confused(matrix, tuple("abcde"))) == 10


def test_the_hardest_rows_are_the_most_confident_mistakes():
    logits = logits_of([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])

    found = measures.hardest(logits, np.array([0, 0, 1, 2]), LABELS)

    assert [(one.row, one.label, one.predicted) for one in found] == [
        (1, "coat", "dress"),
        (2, "dress", "shirt"),
        (3, "shirt", "dress"),
    ]
    assert [one.probability for one in found] == pytest.approx([0.8, 0.7, 0.6])


def test_no_more_than_twelve_mistakes_are_kept_and_equals_stay_in_order():
    logits = np.tile(logits_of([0.2, 0.8, 0.0001]), (20, 1))

    found = measures.hardest(logits, np.zeros(20, np.uint8), LABELS)

    assert [one.row for one in found] == list(range(12))


def guo(logits, targets):
    """The definition, bin by bin: the mean over the bins of |accuracy - confidence|, weighted."""
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == targets
    error = 0.0
    for place in range(15):
        mine = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        if mine.any():
            error += mine.mean() * abs(right[mine].mean() - confidence[mine].mean())
    return error


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_calibration_error_is_that_of_its_definition(classes):
    random = np.random.default_rng(classes)
    logits = random.normal(0, 3, (5_000, classes))
    targets = np.where(random.random(5_000) < 0.5, logits.argmax(axis=1), 0)

    assert measures.calibration_error(logits, targets) == pytest.approx(guo(logits, targets))


def test_the_calibration_error_can_be_worked_out_by_hand():
    # Three rows at 0.8, of which two are right; one at 0.6, which is: 3/4 · 2/15 + 1/4 · 4/10.
    logits = logits_of([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.4, 0.6]])
    targets = np.array([0, 1, 1, 1])

    expected = 3 / 4 * (0.8 - 2 / 3) + 1 / 4 * 0.4
    assert measures.calibration_error(logits, targets) == pytest.approx(expected)


def test_who_is_certain_and_right_is_calibrated_and_who_is_certain_and_wrong_is_not():
    logits = np.array([[200, 0], [0, 200]], np.float32)

    assert measures.calibration_error(logits, np.array([0, 1])) == 0
    assert measures.calibration_error(logits, np.array([1, 0])) == 1


def test_targets_may_be_bytes():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    targets = np.array([0, 1, 2, 0], np.uint8)

    assert measures.hardest(logits, targets, LABELS)[0].label == "coat"
    assert measures.confusion_matrix(targets, logits.argmax(axis=1), 3)[0, 2] == 1
