import keras
import numpy as np
import pytest

from pipeline import recipe
from pipeline.config import TrainingConfig

STEPS = 1000


def rates(**settings):
    """The learning rate before each step."""
    schedule = recipe.schedule(TrainingConfig(learning_rate=0.1, **settings), STEPS)
    if isinstance(schedule, float):
        return np.full(STEPS, schedule)
    return np.array([float(schedule(step)) for step in range(STEPS + 1)])


def test_a_constant_rate_is_a_number():
    assert recipe.schedule(TrainingConfig(learning_rate=0.1), STEPS) == 0.1


def test_a_warm_up_rises_in_a_line_and_then_stays():
    found = rates(warmup_share=0.1)

    np.testing.assert_allclose(found[:100], np.arange(100) / 100 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(found[100:], 0.1, rtol=1e-6)


def test_cosine_falls_from_the_rate_to_nothing():
    expected = 0.1 * (1 + np.cos(np.pi * np.arange(STEPS + 1) / STEPS)) / 2

    np.testing.assert_allclose(rates(schedule="cosine"), expected, atol=1e-7)


def test_one_cycle_rises_for_three_tenths_and_ends_far_below_its_beginning():
    found = rates(schedule="one-cycle")

    assert found.argmax() == 300
    assert found.max() == pytest.approx(0.1)
    assert found[0] == pytest.approx(0.1 / 25)
    assert found[-1] == pytest.approx(0.1 * recipe.LAST_RATE)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
def test_an_optimizer_has_the_settings_that_were_asked_for(name):
    config = TrainingConfig(
        optimizer=name, learning_rate=0.02, momentum=0.9, weight_decay=0.01, ema=0.999
    )

    optimizer = recipe.optimizer(config, STEPS)
    found = optimizer.get_config()

    assert type(optimizer).__name__.lower() == name
    assert found["learning_rate"] == pytest.approx(0.02)
    assert found["weight_decay"] == 0.01
    assert (found["use_ema"], found["ema_momentum"]) == (True, 0.999)
    if name in {"sgd", "rmsprop"}:
        assert found["momentum"] == 0.9


def test_no_average_and_no_decay_unless_they_are_asked_for():
    found = recipe.optimizer(TrainingConfig(), STEPS).get_config()

    assert not found["use_ema"]
    assert not found["weight_decay"]


def test_smoothed_labels_cost_what_their_definition_says():
    logits = np.array([[2.0, 0.0, -1.0]], np.float32)
    objective = recipe.objective(TrainingConfig(label_smoothing=0.3), 3)
    log_softmax = logits - np.log(np.exp(logits).sum())

    found = objective.loss(np.array([[1.0, 0.0, 0.0]], np.float32), logits)

    assert objective.one_hot == 3
    assert float(found) == pytest.approx(-(log_softmax[0] @ [0.8, 0.1, 0.1]), rel=1e-5)


def test_plain_labels_stay_numbers():
    objective = recipe.objective(TrainingConfig(), 3)

    assert objective.one_hot == 0
    assert isinstance(objective.loss, keras.losses.SparseCategoricalCrossentropy)


def test_without_classes_the_squared_error_is_made_small_and_there_is_no_accuracy():
    objective = recipe.objective(TrainingConfig(), 0)

    assert float(objective.loss(np.array([[1.0]]), np.array([[3.0]]))) == pytest.approx(4.0)
    assert objective.accuracy is None
