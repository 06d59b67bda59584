import keras
import pytest

from pipeline import checkpoint
from pipeline.records import Epoch


def history(*validation_losses):
    return tuple(
        Epoch(number, 1.0, 0.5, loss, 0.5, 2.0) for number, loss in enumerate(validation_losses, 1)
    )


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def test_there_is_no_checkpoint_before_the_first(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_the_last_epoch_is_found_again_with_its_history(model, tmp_path):
    for epochs in (history(0.9), history(0.9, 0.8)):
        checkpoint.save(tmp_path, model, epochs)

    state = checkpoint.latest(tmp_path)

    assert state is not None
    assert state.history == history(0.9, 0.8)
    assert keras.models.load_model(state.path).count_params() == 3


def test_the_last_and_the_best_are_kept_and_no_more(model, tmp_path):
    losses = (0.9, 0.5, 0.7, 0.8)
    for epochs in range(1, 5):
        checkpoint.save(tmp_path, model, history(*losses[:epochs]))

    assert kept(tmp_path) == [
        "epoch-0002.json",
        "epoch-0002.keras",
        "epoch-0004.json",
        "epoch-0004.keras",
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "record cut", "record of another"])
def test_a_damaged_epoch_is_named_and_the_one_before_is_taken(model, tmp_path, caplog, damage):
    checkpoint.save(tmp_path, model, history(0.5))
    checkpoint.save(tmp_path, model, history(0.5, 0.6))
    weights, record = tmp_path / "epoch-0002.keras", tmp_path / "epoch-0002.json"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "gone":
        weights.unlink()
    elif damage == "record cut":
        record.write_bytes(record.read_bytes()[:-9])
    else:
        record.write_bytes((tmp_path / "epoch-0001.json").read_bytes())

    state = checkpoint.latest(tmp_path)

    assert state is not None
    assert len(state.history) == 1
    assert "epoch-0002.keras" in caplog.text


def test_weights_without_their_record_never_happened(model, tmp_path):
    checkpoint.save(tmp_path, model, history(0.5))
    (tmp_path / "epoch-0001.json").unlink()

    assert checkpoint.latest(tmp_path) is None


def test_the_earliest_of_equally_good_epochs_is_the_best():
    assert checkpoint.best(history(0.9, 0.5, 0.5)).number == 2
