import logging
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import dataset, evaluate
from pipeline.config import GateConfig
from pipeline.errors import EvaluationError
from pipeline.records import Comparison, Trained
from service import agreement, aliases, bundle

ROWS = 400
ANY = GateConfig(min_accuracy=0.0)


@pytest.fixture
def small(tiny, tmp_path):
    """Images of which the tiny model knows every class."""
    images, others = tiny.images(ROWS), tiny.images(40, seed=1)
    rows, learnt = ((one, tiny.logits(one).argmax(axis=1)) for one in (images, others))
    return dataset.from_arrays(learnt, rows, labels=tiny.labels, cache=tmp_path / "cache")


@pytest.fixture
def keep(tmp_path):
    """Return a function that saves a model as training does."""

    def save(model):
        path = tmp_path / "model.keras"
        model.save(path)
        return Trained(
            path=path, sha256=bundle.file_sha256(path), parameters=model.count_params(),
            optimizer="", device="CPU", history=(), best_epoch=1,
        )  # fmt: skip

    return save


@pytest.fixture
def tiny_trained(tiny, keep):
    """Return a function that saves the tiny model in Keras, with a bias on one class."""

    def save(striped=0.0, classes=3):
        image = keras.Input(tiny.shape, dtype="uint8", name="image")
        flat = keras.layers.Flatten()(keras.layers.Rescaling(1.0)(image))
        layer = keras.layers.Dense(classes, name="logits")
        model = keras.Model(image, layer(flat))
        bias = tiny.logits(np.zeros((1, *tiny.shape), np.uint8))[0]
        weights = tiny.logits(np.eye(4, dtype=np.uint8).reshape(4, *tiny.shape)) - bias
        more = np.array([0, 0, striped], np.float32)
        layer.set_weights([weights[:, :classes], (bias + more)[:classes]])
        return keep(model)

    return save


@pytest.fixture
def crown(make_bundle, small):
    """Return a function that publishes the tiny model of the same data, with a bias."""

    def publish(striped=0.0, edit=lambda manifest: None):
        def described(manifest):
            manifest.dataset.sha256 = small.sha256
            edit(manifest)

        return make_bundle(striped=striped, version=3, edit=described)

    return publish


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "pipeline.evaluate")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_every_test_image_is_scored_once(scores):
    assert scores.rows == sum(map(sum, scores.confusion)) == 10_000
    assert [one.rows for one in scores.classes] == [1_000] * 10


def test_accuracy_is_what_keras_says_it_is(scores, trained, data):
    test = dataset.load(data).test
    loss, accuracy = keras.models.load_model(trained.path).evaluate(
        test.inputs, test.targets, batch_size=1_000, verbose=0
    )

    assert scores.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert scores.loss == pytest.approx(loss, rel=1e-4)


def test_what_is_hard_and_confused_agrees_with_the_confusion_matrix(scores, data):
    matrix = np.array(scores.confusion)
    place = {label: index for index, label in enumerate(data.labels)}

    worst = scores.confused[0]
    assert worst.rows == (matrix - np.diag(np.diag(matrix))).max()
    assert matrix[place[worst.label], place[worst.predicted]] == worst.rows
    assert len(scores.confused) == 10
    assert len(scores.hardest) == 12
    assert all(matrix[place[one.label], place[one.predicted]] for one in scores.hardest)
    assert 0 < scores.calibration_error < 0.2


def test_precision_and_recall_follow_from_the_confusion_matrix(scores):
    matrix = np.array(scores.confusion)

    for index, one in enumerate(scores.classes):
        assert one.recall == matrix[index, index] / 1_000
        called = matrix[:, index].sum()
        assert one.precision == (matrix[index, index] / called if called else 0)


def test_the_scores_say_which_file_they_are_of(scores, trained):
    assert scores.sha256 == trained.sha256


def test_a_model_below_the_accuracy_is_refused_with_both_figures(tiny_trained, small):
    trained = tiny_trained(striped=30)
    accuracy = evaluate.score(trained, small, ANY).accuracy

    assert 0.5 < accuracy < 1
    assert evaluate.score(trained, small, GateConfig(min_accuracy=accuracy)).rows == ROWS
    over = accuracy + 1e-4
    with pytest.raises(EvaluationError, match=f"is {accuracy:.2%}, the gate is {over:.2%}; noth"):
        evaluate.score(trained, small, GateConfig(min_accuracy=over))


def test_a_model_above_the_loss_is_refused_with_both_figures(tiny_trained, small):
    trained = tiny_trained(striped=30)
    loss = evaluate.score(trained, small, ANY).loss

    assert evaluate.score(trained, small, replace(ANY, max_loss=loss)).loss == loss
    with pytest.raises(EvaluationError, match=f"test loss is {loss:.4g}, the gate is 0.001; noth"):
        evaluate.score(trained, small, replace(ANY, max_loss=0.001))


def test_a_model_that_is_worse_than_the_champion_by_more_than_chance_is_refused(
    tiny_trained, small, crown, lines
):
    with pytest.raises(EvaluationError, match="of version 3, which is published, 400: chance"):
        evaluate.score(tiny_trained(striped=30), small, ANY, champion=crown())

    assert any("only there, p" in line for _, line in lines())


def test_what_could_be_chance_is_no_refusal(tiny_trained, small, crown):
    trained, champion = tiny_trained(striped=1), crown()

    found = evaluate.score(trained, small, ANY, champion=champion).champion

    assert found.mcnemar_p == pytest.approx(2 * 0.5**5)  # five heads in a row, or five tails
    assert found == Comparison(3, ROWS, 0, 5, found.mcnemar_p)
    strict = replace(ANY, champion_p=found.mcnemar_p)
    assert evaluate.score(trained, small, strict, champion=champion).rows == ROWS
    with pytest.raises(EvaluationError, match="chance would"):
        evaluate.score(
            trained, small, replace(ANY, champion_p=found.mcnemar_p + 1e-6), champion=champion
        )


def test_a_better_model_takes_the_place_of_the_champion(tiny_trained, small, crown):
    found = evaluate.score(tiny_trained(), small, ANY, champion=crown(striped=30)).champion

    assert found.correct + found.only_new == ROWS
    assert found.only_champion == 0
    assert found.mcnemar_p == agreement.mcnemar(0, found.only_new) < 1e-6


def test_the_gate_can_leave_the_champion_out(tiny_trained, small, crown):
    gate = replace(ANY, champion=False)

    assert evaluate.score(tiny_trained(striped=30), small, gate, champion=crown()).champion is None


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ("other classes", lambda manifest: manifest.labels.__setitem__(0, "night")),
        ("an input of [-1, 2, 3, 1]", lambda manifest: manifest.input.shape.__setitem__(2, 3)),
        ("other data", lambda manifest: setattr(manifest.dataset, "sha256", "0" * 64)),
    ],
)
def test_a_champion_of_something_else_is_named_and_not_compared(
    tiny_trained, small, crown, lines, what, edit
):
    scores = evaluate.score(tiny_trained(striped=30), small, ANY, champion=crown(edit=edit))

    assert scores.champion is None
    assert ("INFO", f"not compared with version 3: it has {what}") in lines()


@pytest.mark.parametrize("harm", ["gone", "changed", "of another kind"])
def test_a_champion_that_cannot_be_asked_is_a_warning(
    tiny_trained, small, crown, lines, harm, tiny
):
    path = crown()
    if harm == "gone":
        path = path.with_name("9")
    elif harm == "changed":
        (path / "model.onnx").write_bytes(tiny.model() + b" ")
    else:
        (path / "golden.npz").unlink()

    scores = evaluate.score(tiny_trained(), small, ANY, champion=path)

    assert scores.champion is None
    assert next(line for level, line in lines() if level == "WARNING").startswith(
        f"not compared with version {path.name}, which cannot be asked: tiny/"
    )


def test_that_nothing_is_published_yet_is_said(tmp_path, lines):
    assert evaluate.champion(tmp_path, "tiny") is None

    assert any("nothing is published yet under this name" in line for _, line in lines())


def test_the_champion_is_what_the_alias_names_else_the_highest_version(make_bundle, tmp_path):
    models = tmp_path / "models"
    assert evaluate.champion(models, "tiny") is None
    for version in (2, 10, 9):
        make_bundle(version=version)
    (models / "tiny" / "records").mkdir()
    (models / "tiny" / "11").write_text("no bundle")

    assert evaluate.champion(models, "tiny") == models / "tiny" / "10"
    aliases.write(models / "tiny", {"candidate": 10, "champion": 2})
    assert evaluate.champion(models, "tiny") == models / "tiny" / "2"
    aliases.write(models / "tiny", {"candidate": 9})
    assert evaluate.champion(models, "tiny") == models / "tiny" / "10"


def test_aliases_that_cannot_be_read_are_a_warning(make_bundle, lines):
    home = make_bundle().parent
    (home / "aliases.json").write_text("[")

    assert evaluate.champion(home.parent, "tiny") is None
    assert [level for level, _ in lines()] == ["WARNING"]


def test_a_refused_model_leaves_a_report_that_the_refusal_names(tiny_trained, small, tmp_path):
    folder = tmp_path / "run"

    with pytest.raises(EvaluationError) as refused:
        evaluate.score(
            tiny_trained(striped=30), small, GateConfig(min_accuracy=0.99), folder=folder
        )

    assert (
        f"nothing is published, {folder / 'refused.md'} has all figures and "
        f"{folder / 'report.html'} shows them" in str(refused.value)
    )
    for page in ("refused.md", "report.html"):
        assert "test accuracy is" in (folder / page).read_text()
        assert "hat may help: look at the data" in (folder / page).read_text()
    assert "The most confident mistakes" in (folder / "report.html").read_text()

    evaluate.score(tiny_trained(), small, ANY, folder=folder)
    assert list(folder.iterdir()) == []


def test_a_report_that_cannot_be_written_hides_no_refusal(tiny_trained, small, tmp_path, lines):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".refused.json.partial").mkdir()

    with pytest.raises(EvaluationError, match="nothing is published; look at the data"):
        evaluate.score(
            tiny_trained(striped=30), small, GateConfig(min_accuracy=0.99), folder=folder
        )

    assert any(level == "WARNING" for level, _ in lines())


def test_another_number_of_outputs_is_refused(tiny_trained, small):
    with pytest.raises(EvaluationError, match=r"with \(400, 2\), expected \(400, 3\)"):
        evaluate.score(tiny_trained(classes=2), small, ANY)


def test_answers_that_are_not_finite_are_refused(tiny_trained, small):
    with pytest.raises(EvaluationError, match="answers to 400 of 400 test rows are not finite"):
        evaluate.score(tiny_trained(striped=np.nan), small, ANY)


def line(slope, keep):
    model = keras.Sequential([keras.Input((1,), name="x"), keras.layers.Dense(1, name="y")])
    model.set_weights([np.array([[slope]], np.float32), np.array([-1], np.float32)])
    return keep(model)


def test_what_does_not_classify_is_judged_by_its_squared_error(keep, tmp_path):
    inputs = np.linspace(-1, 4, 6, dtype=np.float32)[:, np.newaxis]
    rows = (inputs, 2 * inputs - 1)
    data = dataset.from_arrays(rows, rows, cache=tmp_path / "cache")
    trained = line(3.0, keep)
    loss = float((inputs.astype(float) ** 2).mean())  # what one more of x is wrong by, squared

    scores = evaluate.score(
        trained,
        data,
        GateConfig(min_accuracy=0.88, max_loss=loss),
        champion=tmp_path / "none" / "1",
    )

    assert scores.loss == pytest.approx(loss)
    assert (scores.rows, scores.correct, scores.classes, scores.confusion) == (6, 0, (), ())
    with pytest.raises(EvaluationError, match=r"test loss is 5\.167, the gate is 5;"):
        evaluate.score(trained, data, GateConfig(max_loss=5.0), folder=tmp_path / "run")
    assert "mean squared error: 5.167" in (tmp_path / "run" / "refused.md").read_text()
    assert "Least close" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_averaged_weights_that_were_not_put_in_place_are_refused(data, keep, swapped):
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
    trained = keep(model)

    if swapped:
        assert evaluate.score(trained, data, ANY).rows == 10_000
    else:
        with pytest.raises(EvaluationError, match="last/kernel is not its average: save the model"):
            evaluate.score(trained, data, ANY)
