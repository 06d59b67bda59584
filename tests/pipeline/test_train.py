"""Training that survives: real kills, real signals, real images."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import checkpoint, dataset, device, progress, train
from pipeline.config import Augmentation, DataConfig, TrainingConfig
from pipeline.errors import ConfigError, InterruptedTrainingError, TrainingError

KILLS = int(os.environ.get("KILLS", "4"))  # at random moments, in a row
ROWS = 1_200
CONFIG = TrainingConfig(epochs=3, batch_rows=200)
# Everything that a step may depend on, kept after every step.
WHOLE = TrainingConfig(
    epochs=3,
    batch_rows=100,
    schedule="cosine",
    warmup_share=0.1,
    label_smoothing=0.1,
    ema=0.9,
    augmentation=Augmentation(shift=0.1, flip=True, rotate=0.02, zoom=0.1, erase=0.2),
    checkpoint_every_s=1e-6,
)
PROCESS = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from pipeline import dataset, files, train
from pipeline.config import *

def die(call, number):
    calls = iter(range(1, 10**6))
    def dying(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return dying

where, number = sys.argv[2], int(sys.argv[3])
if where == "write":
    np.savez = die(np.savez, number)
elif where == "sync":
    files.sync = die(files.sync, number)
elif where == "rename":
    Path.replace = die(Path.replace, number)
elif where == "remove":
    Path.unlink = die(Path.unlink, number)
data = dataset.prepare(DataConfig(max_train_rows={ROWS}))
print("training", flush=True)
train.fit(data, {WHOLE!r}, Path(sys.argv[1]))
"""


def weights(trained):
    return keras.models.load_model(trained.path).get_weights()


def assert_same(found, expected):
    for one, other in zip(weights(found), weights(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    for mine, its in zip(found.history, expected.history, strict=True):
        assert replace(mine, seconds=0) == replace(its, seconds=0)
    assert found.best_epoch == expected.best_epoch


def process(folder, where="", number=0):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder), where, str(number)],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def few():
    """Six steps an epoch, or twelve, in the process that is killed as well."""
    return dataset.prepare(DataConfig(max_train_rows=ROWS))


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    """The same training without an interruption."""
    return train.fit(few, CONFIG, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_whole(few, tmp_path_factory):
    return train.fit(few, WHOLE, tmp_path_factory.mktemp("whole"))


def test_every_epoch_is_recorded_and_the_best_one_is_exported(undisturbed):
    losses = [epoch.validation_loss for epoch in undisturbed.history]

    assert [epoch.number for epoch in undisturbed.history] == [1, 2, 3]
    assert losses[undisturbed.best_epoch - 1] == min(losses)
    assert undisturbed.path.name == f"model-{undisturbed.best_epoch:04}.keras"


def test_a_few_steps_on_real_images_beat_chance_by_far(undisturbed):
    assert undisturbed.history[-1].validation_accuracy > 0.4


def test_both_engines_end_with_the_same_weights_and_records(few, undisturbed, tmp_path):
    assert_same(train.fit(few, replace(CONFIG, engine="tape"), tmp_path), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    few, undisturbed_whole, tmp_path
):
    with process(tmp_path / "another") as running:
        running.stdout.readline()
        began = time.monotonic()
        running.communicate()
        lasts = time.monotonic() - began  # on this machine, compilation included
    moments = random.Random(20)
    shares = [0.25, *(moments.uniform(0.1, 0.9) for _ in range(KILLS - 1))]  # one surely in time
    killed = 0
    for share in shares:
        with process(tmp_path / "run") as running:
            running.stdout.readline()
            time.sleep(share * lasts)
            running.kill()
        killed += running.returncode == -signal.SIGKILL

    assert killed
    assert_same(train.fit(few, WHOLE, tmp_path / "run"), undisturbed_whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"), [("write", 5), ("sync", 28), ("rename", 29), ("remove", 12)]
)
def test_a_run_that_is_killed_within_a_checkpoints_write_ends_as_if_it_had_not_been(
    few, undisturbed_whole, tmp_path, where, number
):
    with process(tmp_path, where, number) as running:
        _, said = running.communicate()

    assert running.returncode == -signal.SIGKILL, said
    assert_same(train.fit(few, WHOLE, tmp_path), undisturbed_whole)


@pytest.mark.slow
def test_sigterm_saves_the_state_and_the_next_run_goes_on_there(
    few, undisturbed_whole, tmp_path, caplog
):
    with process(tmp_path) as running:
        running.stdout.readline()
        while not list(tmp_path.rglob("state-*.json")):
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate()
    caplog.set_level("INFO")
    resumed = train.fit(few, WHOLE, tmp_path)

    assert "InterruptedTrainingError: training was stopped by SIGTERM" in said
    assert "resuming from" in caplog.text
    assert_same(resumed, undisturbed_whole)


@pytest.mark.parametrize("engine", ["fit", "tape"])
def test_a_signal_within_an_epoch_loses_no_step(few, undisturbed, tmp_path, monkeypatch, engine):
    config = replace(CONFIG, engine=engine, steps_per_execution=2)
    saved = checkpoint.write
    positions = []

    def write(folder, settings, position, *rest):
        positions.append((len(position.history), position.step))
        saved(folder, settings, position, *rest)

    def move(_, epoch, step):
        if (epoch, step) == (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "write", write)
    with monkeypatch.context() as patched:
        patched.setattr(progress.Bar, "move", move)
        with pytest.raises(InterruptedTrainingError):
            train.fit(few, config, tmp_path)
    resumed = train.fit(few, config, tmp_path)

    assert positions == [(1, 0), (1, 4), (2, 0), (3, 0)]
    assert_same(resumed, undisturbed)


def test_a_finished_run_is_not_trained_again_and_the_log_says_so(few, undisturbed, caplog):
    caplog.set_level("INFO")

    again = train.fit(few, CONFIG, undisturbed.path.parent.parent)

    assert again == undisturbed
    assert "nothing to train" in caplog.text
    best = min(again.history, key=lambda epoch: epoch.validation_loss)
    assert (
        f"epoch {best.number} of 3 has the lowest validation loss, {best.validation_loss:.4g}: its "
        "weights are kept" in caplog.text
    )


def test_fewer_epochs_than_there_are_do_not_pass_for_what_was_asked_for(few, undisturbed):
    with pytest.raises(TrainingError, match="has 3 epochs of this very run, 1 are asked for"):
        train.fit(few, replace(CONFIG, epochs=1), undisturbed.path.parent.parent)


def test_more_epochs_go_on_where_fewer_ended(few, undisturbed, tmp_path):
    train.fit(few, replace(CONFIG, epochs=1), tmp_path)

    assert_same(train.fit(few, CONFIG, tmp_path), undisturbed)


def test_fresh_training_forgets_what_was_there(few, undisturbed, tmp_path, caplog):
    config = replace(CONFIG, epochs=1)
    caplog.set_level("INFO")

    train.fit(few, config, tmp_path)
    again = train.fit(few, replace(config, fresh=True), tmp_path)

    assert caplog.text.count("training conv10-dropout") == 2
    assert again.history[0].loss == undisturbed.history[0].loss


def test_checkpoints_of_other_settings_are_refused(few, undisturbed):
    with pytest.raises(TrainingError, match=r"with training\.seed 42, expected 1; train with --fr"):
        train.fit(few, replace(CONFIG, seed=1), undisturbed.path.parent.parent)


def test_checkpoints_of_another_network_are_refused(few, tmp_path, monkeypatch):
    train.fit(few, replace(CONFIG, epochs=1), tmp_path)
    found = checkpoint.read_arrays
    monkeypatch.setattr(checkpoint, "read_arrays", lambda one: found(one)[1:])

    with pytest.raises(TrainingError, match="other variables than conv10-dropout"):
        train.fit(few, CONFIG, tmp_path)


def test_a_loss_that_is_no_number_stops_training(few, tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train.fit(few, replace(CONFIG, learning_rate=1e38), tmp_path)


def test_an_unknown_network_is_refused_with_the_known_ones(few, tmp_path):
    with pytest.raises(ConfigError, match="architecture is 'resnet', expected one of"):
        train.fit(few, replace(CONFIG, architecture="resnet"), tmp_path)


def test_training_ends_when_the_validation_loss_stays(few, tmp_path):
    config = replace(CONFIG, epochs=20, learning_rate=1e-9, early_stopping=2, optimizer="sgd")
    grows = iter(np.linspace(1.0, 2.0, 20))

    def validate(self):
        return float(next(grows)), 0.5

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train._Training, "_validate", validate)
        trained = train.fit(few, config, tmp_path)

    assert len(trained.history) == 3
    assert trained.best_epoch == 1


def test_averaged_weights_are_validated_and_exported_but_not_trained_on(few, tmp_path):
    config = replace(CONFIG, epochs=2, ema=0.99)
    averaged = train.fit(few, config, tmp_path / "averaged")
    plain = train.fit(few, replace(config, ema=0.0), tmp_path / "plain")

    assert [one.loss for one in averaged.history] == [one.loss for one in plain.history]
    assert averaged.history[-1].validation_loss != plain.history[-1].validation_loss
    split = dataset.load(few).validation
    model = keras.models.load_model(averaged.path)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = float(loss(split.targets, model.predict(split.inputs, verbose=0)))
    best = averaged.history[averaged.best_epoch - 1]
    assert found == pytest.approx(best.validation_loss, rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_trained_in_mixed_precision_is_validated_and_saved_in_float32(
    few, tmp_path, monkeypatch, caplog, policy
):
    caplog.set_level("INFO")
    monkeypatch.setattr(device, "mixed_policy", lambda: policy)
    trained = train.fit(few, replace(CONFIG, epochs=1, mixed_precision=True), tmp_path)
    model = keras.models.load_model(trained.path)

    assert {layer.compute_dtype for layer in model.layers if layer.weights} == {"float32"}
    assert trained.history[0].validation_accuracy > 0.3
    split = dataset.load(few).validation
    right = model.predict(split.inputs, verbose=0).argmax(axis=1) == split.targets
    assert trained.history[0].validation_accuracy == right.mean()
    assert keras.config.dtype_policy().name == "float32"
    assert f"training in {policy}: products are rounded to 16 bits while training" in caplog.text


def test_mixed_precision_is_left_out_where_nothing_is_faster_in_it(
    few, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(device, "mixed_policy", lambda: None)
    found = train.fit(few, replace(CONFIG, mixed_precision=True), tmp_path)

    assert_same(found, undisturbed)


def test_figures_are_written_for_tensorboard_on_demand(few, tmp_path):
    train.fit(few, replace(CONFIG, epochs=1, tensorboard=True), tmp_path)

    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"validation_accuracy" in written
    assert b"scalars" in written


def test_several_workers_are_refused_with_the_reason(few, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}}')

    with pytest.raises(ConfigError, match="several workers, which Keras 3 cannot do"):
        train.fit(few, CONFIG, tmp_path)


@pytest.mark.slow
def test_two_devices_share_every_batch_and_come_to_what_one_comes_to(undisturbed, tmp_path):
    script = f"""
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from pathlib import Path
from pipeline import dataset, device, train
from pipeline.config import *
both = [one.name for one in tf.config.list_logical_devices("CPU")]
device.strategy = lambda: device.mirrored(both)
trained = train.fit(
    dataset.prepare(DataConfig(max_train_rows={ROWS})),
    {replace(CONFIG, steps_per_execution=4, ema=0.9)!r},
    Path({str(tmp_path)!r}),
)
print(trained.history[-1].loss)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    # Not equal: each device draws its own dropout.
    assert float(done.stdout) == pytest.approx(undisturbed.history[-1].loss, rel=0.1)


def test_other_settings_train_in_another_folder(few, tmp_path):
    def folder(data=few, **changes):
        return train.run_folder(tmp_path, "quick", data, replace(CONFIG, **changes))

    assert folder() != folder(seed=1)
    assert folder() != folder(data=replace(few, train_rows=1))
    assert folder() == folder(fresh=True, keep=5, tensorboard=True)


def test_the_number_of_epochs_names_the_folder_only_where_steps_depend_on_it(few, tmp_path):
    def folder(**changes):
        return train.run_folder(tmp_path, "quick", few, replace(CONFIG, **changes))

    assert folder() == folder(epochs=9)
    assert folder(schedule="cosine") != folder(schedule="cosine", epochs=9)
    assert folder(warmup_share=0.1) != folder(warmup_share=0.1, epochs=9)
