from dataclasses import fields, replace

import pytest

from pipeline import messages
from pipeline.config import GateConfig
from pipeline.records import ClassScore, Comparison, Confused, Epoch, Mistake, Scores, Trained
from protos import bundle_pb2

EPOCHS = (Epoch(1, 0.9, 0.6, 0.7, 0.7, 3.5), Epoch(2, 0.5, 0.8, 0.6, 0.75, 3.25))


@pytest.fixture
def learnt(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"12345")
    return Trained(
        path=path, sha256="ab", parameters=1_101_526, optimizer="adam", device="CPU",
        history=EPOCHS, best_epoch=2, multiply_adds=14_000_000,
    )  # fmt: skip


@pytest.fixture
def scored():
    return Scores(
        correct=80, rows=100, loss=0.6, sha256="ab", images_per_second=900.0, batch_rows=256,
        classes=(ClassScore("a", 0.75, 0.6, 50), ClassScore("b", 0.5, 1.0, 50)),
        confusion=((30, 20), (0, 50)), calibration_error=0.03,
        hardest=(Mistake(7, "a", "b", 0.99),), confused=(Confused("a", "b", 20),),
        champion=Comparison(version=4, correct=78, only_new=5, only_champion=3, mcnemar_p=0.7),
    )  # fmt: skip


def test_a_training_is_told_whole(learnt):
    message = messages.training(learnt)

    assert (message.parameters, message.multiply_adds, message.best_epoch) == (
        1_101_526, 14_000_000, 2,
    )  # fmt: skip
    assert (message.optimizer, message.device) == ("adam", "CPU")
    for told, epoch in zip(message.history, EPOCHS, strict=True):
        assert [getattr(told, one.name) for one in fields(Epoch)] == [
            getattr(epoch, one.name) for one in fields(Epoch)
        ]


def test_an_evaluation_is_told_whole(learnt, scored):
    message = messages.evaluation(learnt, scored, GateConfig(min_accuracy=0.7))

    for field in bundle_pb2.Evaluation.DESCRIPTOR.fields:
        assert getattr(message, field.name), field.name
    assert (message.accuracy.correct, message.accuracy.rows, message.size_bytes) == (80, 100, 5)
    assert message.accuracy.low < 0.8 < message.accuracy.high
    assert message.classes[0].f1 == pytest.approx(2 / 3)
    assert [row.predicted for row in message.confusion] == [[30, 20], [0, 50]]
    for told, record in (
        (message.hardest[0], scored.hardest[0]),
        (message.confused[0], scored.confused[0]),
        (message.champion, scored.champion),
    ):
        for one in fields(record):
            assert getattr(told, one.name) == getattr(record, one.name)


def test_without_a_champion_none_is_told(learnt, scored):
    message = messages.evaluation(learnt, replace(scored, champion=None), GateConfig())

    assert not message.HasField("champion")


def test_a_model_without_classes_has_rows_and_no_accuracy(learnt):
    scores = Scores(
        correct=0, rows=6, loss=1e-9, classes=(), confusion=(), sha256="ab",
        images_per_second=900.0, batch_rows=256,
    )  # fmt: skip

    message = messages.evaluation(learnt, scores, GateConfig(min_accuracy=0.9))

    assert message.accuracy == bundle_pb2.Accuracy(rows=6)
    assert message.min_accuracy == 0
    assert message.loss == 1e-9
