import os
import signal
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import dataset, train
from pipeline.config import DataConfig, TrainingConfig
from pipeline.errors import ConfigError, TrainingError

CONFIG = TrainingConfig(epochs=3, batch_rows=500)
KILLED = """
import os, signal, sys
from pathlib import Path
import keras
from pipeline import dataset, train
from pipeline.config import DataConfig, TrainingConfig

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

fit = keras.Model.fit
keras.Model.fit = lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, Kill()], **k)
train.fit(
    dataset.prepare(DataConfig(max_train_rows=2_000)),
    TrainingConfig(epochs=3, batch_rows=500),
    Path(sys.argv[1]),
)
"""


def weights(trained):
    return keras.models.load_model(trained.path).get_weights()


@pytest.fixture(scope="module")
def few():
    """Four steps an epoch, in the process that is killed as well."""
    return dataset.prepare(DataConfig(max_train_rows=2_000))


@pytest.fixture(scope="module")
def straight(few, tmp_path_factory):
    """The same training without an interruption."""
    return train.fit(few, CONFIG, tmp_path_factory.mktemp("straight"))


def test_every_epoch_is_recorded_and_the_best_one_is_exported(straight):
    losses = [epoch.validation_loss for epoch in straight.history]

    assert [epoch.number for epoch in straight.history] == [1, 2, 3]
    assert losses[straight.best_epoch - 1] == min(losses)
    assert straight.path.name == f"epoch-{straight.best_epoch:04}.keras"


def test_a_few_steps_on_real_images_beat_chance_by_far(straight):
    assert straight.history[-1].validation_accuracy > 0.4


@pytest.mark.parametrize(
    "step", [4, 7]
)  # of four an epoch: at its end, before it is kept, and within
def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(
    few, straight, tmp_path, step
):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
    killed = subprocess.run(command, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}, check=False)
    resumed = train.fit(few, CONFIG, tmp_path)

    assert killed.returncode == -signal.SIGKILL
    for expected, found in zip(weights(straight), weights(resumed), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [epoch.loss for epoch in resumed.history] == [epoch.loss for epoch in straight.history]


def test_a_finished_run_is_not_trained_again_and_the_log_says_so(data, trained, caplog):
    caplog.set_level("INFO")

    again = train.fit(data, TrainingConfig(epochs=1), trained.path.parent.parent)

    assert again == trained
    assert "nothing to train" in caplog.text


@pytest.mark.slow
def test_fresh_training_forgets_what_was_there(data, tmp_path, caplog):
    caplog.set_level("INFO")
    config = TrainingConfig(epochs=1, batch_rows=1_000)

    first = train.fit(data, config, tmp_path)
    second = train.fit(data, replace(config, fresh=True), tmp_path)

    assert caplog.text.count("training conv10-dropout") == 2
    assert second.history[0].loss == first.history[0].loss


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_training(data, tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train.fit(data, TrainingConfig(epochs=1, learning_rate=float("inf")), tmp_path)


def test_an_unknown_network_is_refused_with_the_known_ones(data, tmp_path):
    with pytest.raises(ConfigError, match="architecture is 'resnet', expected one of conv10-drop"):
        train.fit(data, TrainingConfig(architecture="resnet"), tmp_path)


def test_other_settings_train_in_another_folder(data, tmp_path):
    folder = train.run_folder(tmp_path, "quick", data, CONFIG)

    assert folder != train.run_folder(tmp_path, "quick", data, replace(CONFIG, seed=1))
    assert folder != train.run_folder(tmp_path, "quick", replace(data, train_rows=1), CONFIG)
    assert folder == train.run_folder(tmp_path, "quick", data, replace(CONFIG, fresh=True))


def test_more_epochs_go_on_in_the_same_folder(data, tmp_path):
    folder = train.run_folder(tmp_path, "quick", data, CONFIG)

    assert folder == train.run_folder(tmp_path, "quick", data, replace(CONFIG, epochs=9))
