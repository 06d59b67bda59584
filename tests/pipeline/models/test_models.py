import keras
import numpy as np
import pytest

from pipeline import config, models
from pipeline.errors import ConfigError
from tests.pipeline.models import odd_nets

CLASSIFIERS = [name for name in models.ARCHITECTURES if name != "linear"]
ODD = "tests.pipeline.models.odd_nets"


def build_odd(name, shape=(28, 28, 1), outputs=10, **settings):
    return models.build(f"{ODD}:{name}", shape, outputs, **settings)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_takes_pixels_and_gives_one_logit_a_class(name):
    model = (
        models.build(name, (32, 30, 3), 7) if name != "rps" else models.build(name, (96, 90, 3), 7)
    )

    answers = model(np.full((3, *model.inputs[0].shape[1:]), 255, np.uint8))

    assert (model.inputs[0].name, model.inputs[0].dtype) == ("image", "uint8")
    assert model.layers[-1].name == "logits"
    assert (answers.shape, answers.dtype) == ((3, 7), "float32")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scaling_to_one_is_inside_every_classifier(name):
    model = models.ARCHITECTURES[name]()

    scaled = keras.Model(model.input, model.get_layer("scale").output)(
        np.full((1, *model.inputs[0].shape[1:]), 255, np.uint8)
    )

    assert float(scaled[0, 0, 0, 0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "parameters"),
    [
        ("dense", (28, 28, 1), 10, 101_770),
        ("conv10", (28, 28, 1), 10, 197_210),
        ("conv10-dropout", (28, 28, 1), 10, 197_210),
        ("conv64", (28, 28, 1), 10, 1_386_506),
        ("conv64x2", (28, 28, 1), 10, 243_786),
        ("conv32-64", (28, 28, 1), 10, 1_101_526),
        ("rps", (150, 150, 3), 3, 3_473_475),
    ],
)
def test_the_textbooks_networks_have_the_textbooks_parameters(name, shape, outputs, parameters):
    assert models.count(models.build(name, shape, outputs))[0] == parameters


def test_the_default_network_keeps_its_layers_and_their_names():
    model = models.build("conv10-dropout", (28, 28, 1), 10)

    names = ["image", "scale", "conv", "pool", "flatten", "dropout", "dense", "logits"]
    assert [layer.name for layer in model.layers] == names
    assert model.get_layer("dropout").rate == 0.5


def test_hidden_layers_of_dense_can_be_chosen():
    model = models.build("dense", (28, 28, 1), 10, hidden=[512, 256])

    assert [layer.units for layer in model.layers[3:]] == [512, 256, 10]
    assert models.build("dense", (28, 28, 1), 10, hidden=[]).count_params() == 7850


def test_linear_learns_a_straight_line_from_six_points():
    keras.utils.set_random_seed(1)
    model = models.build("linear", (1,), 1, "float32")
    x = np.arange(-1, 5, dtype=np.float32)[:, None]
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for _ in range(300):
        model.train_on_batch(x, 2 * x - 1)

    assert (model.inputs[0].name, model.inputs[0].dtype) == ("x", "float32")
    assert float(model(np.full((1, 1), 10, np.float32))[0, 0]) == pytest.approx(19, abs=0.1)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("x", {}, "architecture is 'x', expected one of dense, conv10, .*, or module:function"),
        ("conv10", {"width": 3}, "conv10 has no setting width; it has no settings"),
        ("dense", {"hiden": [3]}, "dense has no setting hiden; its settings are hidden"),
        ("dense", {"hidden": [3, 0]}, r"hidden of dense is \[3, 0\], expected units a layer"),
        ("dense", {"hidden": 128}, "hidden of dense is 128, expected units a layer"),
        ("conv10-dropout", {"dropout": 2}, "conv10-dropout raised ValueError: .*rate"),
    ],
)
def test_what_a_named_network_cannot_be_is_refused(name, settings, told):
    with pytest.raises(ConfigError, match=told):
        models.build(name, (28, 28, 1), 10, **settings)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "told"),
    [
        ("linear", (28, 28, 1), "uint8", r"linear gives \(28, 28, 1\) for a row, expected \(1,\)"),
        ("dense", (3,), "float32", "dense takes uint8, the data are float32"),
        ("dense", (3,), "float64", "the data are float64, networks take uint8 or float32"),
        ("rps", (28, 28, 3), "uint8", "rps cannot be built: layer conv4 .Conv2D. leaves nothing"),
    ],
)
def test_data_that_a_named_network_cannot_learn_are_refused(name, shape, dtype, told):
    with pytest.raises(ConfigError, match=told):
        models.build(name, shape, 1, dtype)


@pytest.mark.parametrize(("name", "shape"), odd_nets.SOUND.items())
def test_a_users_network_is_built_and_answers(name, shape):
    model = build_odd(name, shape, 4)

    answers = model(np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8))

    assert (tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)) == (
        (None, *shape),
        (None, 4),
    )
    assert answers.shape == (3, 4)
    assert np.isfinite(answers).all()


def test_a_users_network_of_numbers_keeps_its_own_names():
    model = build_odd("numbers", (5,), 2, dtype="float32")

    assert (model.inputs[0].name, model.layers[-1].name) == ("measured", "estimate")
    assert build_odd("subclassed", (5, 5, 1), 2, dtype="float32").inputs[0].name == "x"


def test_settings_reach_a_users_network():
    assert build_odd("colour", (150, 150, 3), 2, width=5).layers[1].filters == 5
    assert build_odd("subclassed", times=2).layers[-1].times == 2


def test_a_users_network_with_classes_of_its_own_is_saved_and_loaded(tmp_path):
    model = build_odd("subclassed", (8, 8, 1), 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    np.testing.assert_array_equal(loaded(images), model(images))


def test_the_files_of_a_network_are_ours_and_a_users_module():
    ours, users = models.files("dense"), models.files(f"{ODD}:strided")

    assert {"pipeline/models/__init__.py", "pipeline/models/own.py"} <= set(ours)
    assert set(users) - set(ours) == {"tests/pipeline/models/odd_nets.py"}


def test_multiply_adds_of_nested_and_repeated_layers_are_counted():
    convolutions, last = 2 * 9 * 9 * 9, 81 * 10

    assert models.count(build_odd("nested", (9, 9, 1)))[1] == convolutions + last
    assert models.count(models.build("conv32-64", (28, 28, 1), 10))[1] == 13_768_424


def test_settings_know_the_networks_without_importing_them():
    assert set(config.NETWORKS) == set(models.ARCHITECTURES)
