import keras
import numpy as np
import pytest

from pipeline import evaluate
from pipeline.config import GateConfig
from pipeline.errors import EvaluationError
from pipeline.records import Trained


def test_every_test_image_is_scored_once(scores):
    assert scores.rows == sum(map(sum, scores.confusion)) == 10_000
    assert [one.rows for one in scores.classes] == [1_000] * 10


def test_accuracy_is_what_keras_says_it_is(scores, trained, data):
    from pipeline import dataset

    test = dataset.load(data).test
    loss, accuracy = keras.models.load_model(trained.path).evaluate(
        test.inputs, test.targets, batch_size=1_000, verbose=0
    )

    assert scores.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert scores.loss == pytest.approx(loss, rel=1e-4)


def test_precision_and_recall_follow_from_the_confusion_matrix(scores):
    matrix = np.array(scores.confusion)

    for index, one in enumerate(scores.classes):
        assert one.recall == matrix[index, index] / 1_000
        called = matrix[:, index].sum()
        assert one.precision == (matrix[index, index] / called if called else 0)


def test_a_model_below_the_gate_is_refused_with_both_figures(trained, data, scores):
    gate = scores.accuracy + 1e-4

    with pytest.raises(EvaluationError, match=f"{scores.accuracy:.2%}, the gate is {gate:.2%}"):
        evaluate.score(trained, data, GateConfig(min_accuracy=gate))


def test_a_model_at_the_gate_is_let_through(trained, data, scores):
    assert evaluate.score(trained, data, GateConfig(min_accuracy=scores.accuracy)).rows == 10_000


def test_the_scores_say_which_file_they_are_of(scores, trained):
    assert scores.sha256 == trained.sha256


def test_rows_of_the_confusion_matrix_are_the_true_classes():
    matrix = evaluate.confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2)

    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_cross_entropy_of_certainty_is_nothing_and_of_doubt_one_bit():
    logits = np.array([[50, 0], [0, 0]], np.float32)

    assert evaluate.cross_entropy(logits[:1], np.array([0])) == pytest.approx(0, abs=1e-9)
    assert evaluate.cross_entropy(logits[1:], np.array([0])) == pytest.approx(np.log(2))


def test_huge_logits_do_not_overflow():
    logits = np.array([[3e4, -3e4]], np.float32)

    assert evaluate.cross_entropy(logits, np.array([1])) == pytest.approx(6e4)


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_averaged_weights_that_were_not_put_in_place_are_refused(data, tmp_path, swapped):
    model = keras.Sequential(
        [keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10, name="last")]
    )
    optimizer = keras.optimizers.Adam(0.01, use_ema=True)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rows = np.random.default_rng(1).uniform(0, 1, (64, 28, 28, 1)).astype(np.float32)
    for _ in range(3):
        model.train_on_batch(rows, np.arange(64) % 10)
    if swapped:
        optimizer.finalize_variable_values(model.trainable_variables)
    path = tmp_path / "averaged.keras"
    model.save(path)
    trained = Trained(
        path=path, sha256="", parameters=0, optimizer="", device="", history=(), best_epoch=1
    )

    if swapped:
        assert evaluate.score(trained, data, GateConfig(min_accuracy=0.0)).rows == 10_000
    else:
        with pytest.raises(EvaluationError, match="last/kernel is not its average: save the model"):
            evaluate.score(trained, data, GateConfig(min_accuracy=0.0))
