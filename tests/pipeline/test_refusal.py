import json
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format
from PIL import Image

from pipeline import refusal
from pipeline.config import GateConfig, as_tables, build
from pipeline.records import ClassScore, Confused, Dataset, Epoch, Mistake, Scores, Trained
from protos import bundle_pb2

GATE = GateConfig(min_accuracy=0.9)
WHY = ["test accuracy is 80.00%, the gate is 90.00%", "test loss is 0.6, the gate is 0.5"]
ODD = "T-shirt | [red]top"


@pytest.fixture
def learnt(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"12345")
    history = (Epoch(1, 0.9, 0.6, 0.7, 0.7, 3.5), Epoch(2, 0.5, 0.8, 0.6, 0.75, 3.25))
    return Trained(
        path=path, sha256="ab", parameters=99, optimizer="adam", device="CPU",
        history=history, best_epoch=2,
    )  # fmt: skip


@pytest.fixture
def data():
    return Dataset(
        name="my clothes", folder=Path(), sha256="cd", license="", labels=(ODD, "Trouser"),
        train_rows=0, validation_rows=0, test_rows=100, validation_share=0.1, split_seed=1,
        findings=("two images are in both parts",),
    )  # fmt: skip


@pytest.fixture
def scored():
    return Scores(
        correct=80, rows=100, loss=0.6, sha256="ab", images_per_second=900.0, batch_rows=256,
        classes=(ClassScore(ODD, 1.0, 0.6, 50), ClassScore("Trouser", 0.7143, 1.0, 50)),
        confusion=((30, 20), (0, 50)), calibration_error=0.03,
        hardest=(Mistake(7, ODD, "Trouser", 0.98765),), confused=(Confused(ODD, "Trouser", 20),),
    )  # fmt: skip


@pytest.fixture
def write(tmp_path, learnt, data, scored):
    def write(**changed):
        given = {"trained": learnt, "data": data, "scores": scored, "gate": GATE} | changed
        return refusal.write(tmp_path / "run", WHY, **given)

    return write


def test_the_page_says_why_and_has_every_figure_and_the_curves(write):
    page = write().read_text()

    for one in (
        *WHY, "80.00%, 95 % interval 71.12% to 86.66%", "0.0300", "2 epochs in 7 s on CPU",
        r"| T-shirt \| [red]top | 50 | 1.0000 | 0.6000 | 0.7500 |",
        r"| T-shirt \| [red]top | 30 | 20 |",
        r"| 7 | T-shirt \| [red]top | Trouser | 0.9877 |", "![loss and accuracy](refused.png)",
    ):  # fmt: skip
        assert one in page


def history(*epochs):
    return tuple(
        Epoch(number, loss, accuracy, validation_loss, validation_accuracy, seconds=1.0)
        for number, (loss, accuracy, validation_loss, validation_accuracy) in enumerate(epochs, 1)
    )


@pytest.mark.parametrize(
    ("epochs", "best", "advice"),
    [
        ([(1.5, 0.3, 1.55, 0.25), (0.1, 1.0, 5.0, 0.38)], 1, "learns its training rows by heart"),
        ([(1.5, 0.3, 1.4, 0.4), (0.1, 1.0, 1.2, 0.5)], 2, "train with more epochs"),
        ([(1.5, 0.3, 1.4, 0.4), (1.4, 0.35, 1.5, 0.38)], 1, "epoch 1 of 2 was the best: look at"),
        ([], 1, "look at the data"),
    ],
)
def test_the_advice_follows_from_the_history(write, learnt, epochs, best, advice):
    trained = replace(learnt, history=history(*epochs), best_epoch=best)

    assert advice in refusal.advice(trained, classifies=True)
    assert f"What may help: {refusal.advice(trained, classifies=True)}." in (
        write(trained=trained).read_text()
    )


def test_a_model_without_classes_has_its_losses_compared(learnt):
    heart = replace(learnt, history=history((1, 0, 0.9, 0), (0.1, 0, 2.5, 0)), best_epoch=1)
    other = replace(learnt, history=history((1, 0, 0.9, 0), (0.9, 0, 1.1, 0)), best_epoch=1)

    assert "0.1 on training rows and 2.5 on" in refusal.advice(heart, classifies=False)
    assert "look at the data" in refusal.advice(other, classifies=False)


def test_the_picture_is_whole(write):
    with Image.open(write().with_name("refused.png")) as image:
        image.load()
        assert image.size == (1200, 500)


def test_the_json_has_why_the_gate_and_the_fields_of_a_manifest(write, learnt):
    content = json.loads(write().with_name("refused.json").read_text())

    assert content.pop("why") == WHY
    assert content.pop("advice").startswith("the last epoch, 2, was the best")
    assert content.pop("gate") == {
        "min_accuracy": 0.9, "max_loss": None, "champion": True, "champion_p": 0.05,
    }  # fmt: skip
    assert content.pop("model") == str(learnt.path)
    known = json_format.ParseDict(content, bundle_pb2.BundleManifest())
    assert known.evaluation.accuracy.correct == 80
    assert known.training.best_epoch == 2
    assert list(known.dataset.findings) == ["two images are in both parts"]


def test_a_model_without_classes_has_its_loss(write, data, scored):
    scores = replace(
        scored, correct=0, classes=(), confusion=(), hardest=(), confused=(), calibration_error=0.0
    )

    page = write(data=replace(data, labels=()), scores=scores).read_text()

    assert "mean squared error: 0.6" in page
    assert "ccuracy:" not in page
    assert "| --- |" not in page


def test_a_model_whose_training_is_not_known_has_no_curves(write, learnt):
    page = write(trained=replace(learnt, history=()))

    assert "refused.png" not in page.read_text()
    assert not page.with_name("refused.png").exists()


def test_the_page_is_written_last_and_nothing_is_left_half(write, tmp_path):
    folder = tmp_path / "run"
    (folder / ".refused.json.partial").mkdir(parents=True)  # stands where it is written first

    with pytest.raises(OSError, match=r"refused\.json"):
        write()

    assert not (folder / "refused.md").exists()
    (folder / ".refused.json.partial").rmdir()
    write()
    assert sorted(path.name for path in folder.iterdir()) == [
        "refused.json", "refused.md", "refused.png",
    ]  # fmt: skip


def test_what_is_removed_is_the_report_and_nothing_else(write, tmp_path):
    write()
    (tmp_path / "run" / "lock").touch()

    refusal.remove(tmp_path / "run")
    refusal.remove(tmp_path / "run")

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_the_figures_have_the_settings_of_the_run_and_nothing_of_this_machine(write, tmp_path):
    chosen = build("smoke", {"training": {"seed": 0}, "publishing": {"name": "mine"}})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(as_tables(chosen)))

    write()

    found = json.loads((folder / "refused.json").read_bytes())
    training, settings = found["training"], json.loads(found["training"]["config"])
    assert (found["name"], training["preset"]) == ("mine", "smoke")
    assert training["architecture"] == chosen.training.architecture
    assert training["learning_rate"] == chosen.training.learning_rate
    assert training["parameters"] == 99
    assert settings["training"]["seed"] == 0
    assert "runs" not in settings
    assert "models" not in settings["publishing"]
    assert found["provenance"]["tools"]["keras"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"preset": "smoke"}'])
def test_settings_that_cannot_be_read_hide_no_report(write, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(content)

    assert write().is_file()
