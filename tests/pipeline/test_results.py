import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import results
from pipeline.config import TrainingConfig
from pipeline.records import Checked, Epoch, Trained, Variant


def fit(trained, config, folder):
    """Stand for a stage."""


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"weights")
    history = (Epoch(1, 0.5, 0.8, 0.4, 0.9, 1.5),)
    return Trained(path, "ab" * 32, 10, "adam", "CPU", history, best_epoch=1)


@pytest.fixture
def variant(tmp_path):
    folder = tmp_path / "saved_model"
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "data").write_bytes(b"numbers")
    (folder / ".lock").write_bytes(b"")
    return Variant("saved-model", "saved_model", "float32", folder, session=(("a", "b"),))


CONFIG = TrainingConfig()


def key(trained, config=CONFIG, folder=Path("runs"), device="CPU"):
    given = {"trained": trained, "config": config, "folder": folder}
    return results.key(fit, given, device=device, places=frozenset({"folder"}))


def through_json(record):
    text = json.dumps(record, default=results.encode)
    return json.loads(text, object_hook=results.decode)


def test_a_key_names_its_stage_and_one_digest_for_each_thing_that_a_result_follows_from(trained):
    name, *digests = key(trained).split("-")

    assert name.endswith(".fit")
    assert len(digests) == len(results.PARTS)


def test_the_same_arguments_have_the_same_key_and_others_another(trained):
    assert key(trained) == key(trained)
    assert key(trained, TrainingConfig(epochs=3)) != key(trained)
    assert key(trained, device="GPU") != key(trained)
    assert key(trained, folder=Path("elsewhere")) != key(trained)


def test_a_setting_that_changes_no_result_changes_no_key(trained):
    assert key(trained, TrainingConfig(fresh=True, keep=5, tensorboard=True)) == key(trained)


def test_the_content_of_a_file_that_an_argument_names_is_part_of_the_key(trained):
    before = key(trained)
    trained.path.write_bytes(b"other weights")

    assert key(trained) != before


def test_what_is_in_a_folder_to_write_into_is_not_part_of_the_key(trained, tmp_path):
    folder = tmp_path / "run"
    before = key(trained, folder=folder)
    folder.mkdir()
    (folder / "written").write_bytes(b"by an earlier run")

    assert key(trained, folder=folder) == before


def test_stages_that_import_different_code_of_ours_have_different_digests_of_code():
    assert results.code_sha256("pipeline.parity") != results.code_sha256("pipeline.publish")


def test_a_record_comes_back_equal_with_every_path_and_tuple(trained, variant):
    checked = Checked((trained.path,), trained.path, "onnx-float32", "float32", 1.5)

    assert through_json(trained) == trained
    assert through_json(variant) == variant
    assert through_json(checked) == checked


def test_a_result_whose_file_changed_does_not_hold_and_the_log_says_which(trained, caplog):
    text = json.dumps(trained, default=results.encode)
    trained.path.write_bytes(b"WEIGHTS")

    with pytest.raises(results.StaleError, match=r"model\.keras is not what it was"):
        json.loads(text, object_hook=results.decode)
    assert "model.keras is not what it was" in caplog.text


def test_a_result_with_a_file_missing_in_a_folder_does_not_hold(variant):
    text = json.dumps(variant, default=results.encode)
    (variant.path / "variables" / "data").unlink()

    with pytest.raises(results.StaleError, match="data is gone"):
        json.loads(text, object_hook=results.decode)


def test_hidden_files_are_not_part_of_a_result(variant):
    text = json.dumps(variant, default=results.encode)
    (variant.path / ".lock").unlink()

    assert json.loads(text, object_hook=results.decode) == variant


def test_a_kept_result_is_whole_while_its_files_are_there_whatever_they_are(trained):
    kept = json.dumps({"result": json.dumps(trained, default=results.encode)}).encode()
    trained.path.write_bytes(b"other")

    assert results.is_whole(kept)
    trained.path.unlink()
    assert not results.is_whole(kept)
    assert not results.is_whole(b"no JSON")


def test_what_changed_since_the_last_run_is_said_in_words(trained, tmp_path):
    kept = tmp_path / "results"
    kept.mkdir()
    wanted = key(trained)
    name, *digests = wanted.split("-")

    assert results.why_anew(kept, wanted) == "nothing is kept of an earlier run"
    other = [name, "0" * 16, digests[1], "0" * 16, digests[3]]
    (kept / "-".join(other)).touch()
    assert results.why_anew(kept, wanted) == (
        "since the last run there are other data or settings and packages"
    )
    (kept / wanted).touch()
    assert results.why_anew(kept, wanted) == ""


def test_scores_that_differ_in_a_measured_speed_only_are_the_same_to_what_follows(trained):
    from pipeline.records import Scores

    scores = Scores(9, 10, 0.1, (), ((9, 1),), "ab", images_per_second=1000.0, batch_rows=256)

    def of(scores):
        return results.key(fit, {"scores": scores}, device="CPU")

    assert of(replace(scores, images_per_second=2000.0)) == of(scores)
    assert of(replace(scores, correct=8)) != of(scores)


def test_of_an_error_only_the_text_is_kept():
    assert through_json(ValueError("what is wrong")) == {"error": "what is wrong"}


def test_numpy_numbers_among_arguments_do_not_stop_a_key():
    assert results.key(fit, {"config": np.float32(1)}, device="CPU")
