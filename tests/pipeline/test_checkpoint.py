import numpy as np
import pytest

from pipeline import checkpoint
from pipeline.checkpoint import Position
from pipeline.errors import TrainingError
from pipeline.records import Epoch

SETTINGS = {"training": {"seed": 42, "sizes": (1, 2)}, "data": ["abc", 10]}


def history(*validation_losses):
    return tuple(
        Epoch(number, 1.0, 0.5, loss, 0.5, 2.0) for number, loss in enumerate(validation_losses, 1)
    )


def save(folder, *losses, step=0, keep=2, settings=SETTINGS):
    """Keep what training keeps at the end of an epoch, or `step` steps after it."""
    epochs = history(*losses)
    if epochs and checkpoint.best(epochs) is epochs[-1] and not step:
        number = epochs[-1].number
        checkpoint.write_model(folder, number, lambda path: path.write_bytes(b"%d" % number))
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3) + len(epochs), np.array(step)]
    checkpoint.write(folder, settings, Position(epochs, step, 1.5), arrays, keep)


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def test_there_is_no_checkpoint_before_the_first(tmp_path):
    assert checkpoint.latest(tmp_path, SETTINGS) is None


def test_the_last_state_is_found_again_whole(tmp_path):
    save(tmp_path, 0.9)
    save(tmp_path, 0.9, step=120)

    found = checkpoint.latest(tmp_path, SETTINGS)

    assert found is not None
    assert (found.history, found.step, found.seconds) == (history(0.9), 120, 1.5)
    assert found.model == tmp_path / "model-0001.keras"
    weights, step = checkpoint.read_arrays(found)
    np.testing.assert_array_equal(weights, np.arange(6).reshape(2, 3) + 1)
    assert (str(weights.dtype), str(step.dtype), int(step)) == ("float32", "int64", 120)


def test_a_state_within_the_first_epoch_has_no_model_yet(tmp_path):
    save(tmp_path, step=7)

    found = checkpoint.latest(tmp_path, SETTINGS)

    assert found is not None
    assert (found.history, found.step, found.model) == ((), 7, None)


def test_many_arrays_come_back_in_their_order(tmp_path):
    arrays = [np.full(2, place) for place in range(25)]
    checkpoint.write(tmp_path, SETTINGS, Position((), 1, 0.0), arrays, 2)

    found = checkpoint.latest(tmp_path, SETTINGS)

    assert found is not None
    assert [one[0] for one in checkpoint.read_arrays(found)] == list(range(25))


def test_the_last_states_and_the_best_model_are_kept_and_no_more(tmp_path):
    for epochs in range(1, 5):
        save(tmp_path, *(0.9, 0.5, 0.7, 0.8)[:epochs])
    save(tmp_path, 0.9, 0.5, 0.7, 0.8, step=3)

    assert kept(tmp_path) == [
        "model-0002.keras",
        "state-0004-000000.json",
        "state-0004-000000.npz",
        "state-0004-000003.json",
        "state-0004-000003.npz",
    ]


def test_a_best_model_stays_while_an_older_state_needs_it(tmp_path):
    save(tmp_path, 0.9)
    save(tmp_path, 0.9, 0.5)

    assert {"model-0001.keras", "model-0002.keras"} <= set(kept(tmp_path))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state-0002-000000.npz", "cut"),
        ("state-0002-000000.npz", "flipped"),
        ("state-0002-000000.npz", "gone"),
        ("state-0002-000000.json", "cut"),
        ("state-0002-000000.json", "another"),
        ("model-0002.keras", "flipped"),
        ("model-0002.keras", "gone"),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(tmp_path, caplog, name, damage):
    save(tmp_path, 0.6)
    save(tmp_path, 0.6, 0.5)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "state-0001-000000.json").read_bytes())

    found = checkpoint.latest(tmp_path, SETTINGS)

    assert found is not None
    assert len(found.history) == 1
    assert "state-0002-000000.npz" in caplog.text


def test_a_damaged_record_does_not_stop_the_next_from_being_written(tmp_path):
    save(tmp_path, 0.9)
    (tmp_path / "state-0001-000000.json").write_text("{")

    save(tmp_path, 0.9, 0.8)

    assert checkpoint.latest(tmp_path, SETTINGS) is not None


def test_arrays_without_their_record_never_happened(tmp_path):
    save(tmp_path, 0.5)
    (tmp_path / "state-0001-000000.json").unlink()

    assert checkpoint.latest(tmp_path, SETTINGS) is None


def test_what_a_dead_run_was_writing_is_removed(tmp_path):
    save(tmp_path, 0.5)
    (tmp_path / ".partial-state-0001-000007.npz").write_bytes(b"half")
    (tmp_path / ".partial-model-0002.keras").write_bytes(b"half")

    checkpoint.latest(tmp_path, SETTINGS)

    assert not [name for name in kept(tmp_path) if name.startswith(".")]


def test_a_state_of_other_settings_is_refused_by_what_differs(tmp_path):
    save(tmp_path, 0.5)
    other = SETTINGS | {"training": {"seed": 43, "sizes": (1, 2)}}

    with pytest.raises(TrainingError, match=r"with training \{'seed': 42.*, expected \{'seed': 43"):
        checkpoint.latest(tmp_path, other)


def test_the_earliest_of_equally_good_epochs_is_the_best():
    assert checkpoint.best(history(0.9, 0.5, 0.5)).number == 2


def test_a_full_disk_is_told_with_the_state_that_did_not_fit(tmp_path):
    (tmp_path / ".partial-state-0000-000007.npz").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device: '.*/state-0000-000007\.npz'"):
        save(tmp_path, step=7)


def test_a_full_disk_is_told_with_the_model_that_did_not_fit(tmp_path):
    (tmp_path / ".partial-model-0001.keras").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device: '.*/model-0001\.keras'"):
        save(tmp_path, 0.9)
