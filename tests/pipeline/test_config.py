import contextlib
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", config.PRESETS)
def test_every_preset_can_be_built_and_says_its_name(name):
    assert config.build(name).preset == name


@pytest.mark.parametrize("name", config.PRESETS)
def test_a_configuration_survives_json(name):
    built = config.build(name)
    tables = json.loads(json.dumps(config.as_tables(built)))

    assert config.build(tables.pop("preset"), tables) == built


def test_later_layers_win_and_the_rest_stays_the_presets():
    built = config.build(
        "quick",
        {"training": {"epochs": 3, "seed": 7, "augmentation": {"flip": True}}},
        config.options(training__seed=8, runs="elsewhere", data__source=None),
    )

    assert (built.training.epochs, built.training.seed) == (3, 8)
    assert built.training.augmentation.flip
    assert built.training.optimizer == config.PRESETS["quick"]().training.optimizer
    assert built.runs == Path("elsewhere").absolute()


def test_paths_are_absolute_so_that_a_worker_elsewhere_finds_them():
    built = config.build("smoke", {"data": {"source": "here"}})

    assert all(
        path.is_absolute() for path in (built.runs, built.publishing.models, built.data.source)
    )


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        config.build("smoke").training.epochs = 3  # type: ignore[misc]


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="preset is 'huge', expected one of smoke, quick, acc"):
        config.build("huge")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("training.epochs=0", "training.epochs is 0: input should be greater than or equal to 1"),
        ("training.seed=-1", "training.seed is -1: input should be greater than or equal to 0"),
        ("training.epoch=2", "there is no setting training.epoch; see docs/training.md"),
        ("training.engine=keras", "training.engine is 'keras': input should be 'fit' or 'tape'"),
        ("training.ema=1.0", "training.ema is 1.0: input should be less than 1"),
        ("data.size=[0, 1]", "data.size.0 is 0: input should be greater than or equal to 1"),
        ("publishing.name=../x", "publishing.name is '../x': string should match"),
        ("training.architecture=conv11", "training.architecture is 'conv11': string should match"),
        ("export.serve=int8", "export.serve is 'int8': string should match pattern"),
        ("export.serve=tflite-int8", "export.serve is 'tflite-int8': "),
        ('export.required=["int8"]', "export.required.0 is 'int8': "),
        ("speed=3", "there is no setting speed"),
        ("training=3", "training is 3: "),
        ("training.epochs=true", "training.epochs is True: input should be a valid integer"),
        ("training.learning_rate=true", "training.learning_rate is True: input should be a valid"),
        ("training.augmentation.rotate=false", "training.augmentation.rotate is False: "),
        ("data.size=[true, 28]", "data.size.0 is True: input should be a valid integer"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(assignment, sentence):
    with pytest.raises(ConfigError) as refused:
        config.build("quick", config.single(assignment))

    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("assignment", "tables"),
    [
        ("training.epochs=2", {"training": {"epochs": 2}}),
        ("training.augmentation.shift=0.1", {"training": {"augmentation": {"shift": 0.1}}}),
        ("training.engine=tape", {"training": {"engine": "tape"}}),
        ("training.engine='tape'", {"training": {"engine": "tape"}}),
        ("data.size=[28, 28]", {"data": {"size": [28, 28]}}),
        ("gate.champion=false", {"gate": {"champion": False}}),
        ("data.name=a=b", {"data": {"name": "a=b"}}),
    ],
)
def test_one_setting_is_read_as_a_file_would_say_it(assignment, tables):
    assert config.single(assignment) == tables


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("training.learning_rate=inf", "training.learning_rate is inf: "),
        ("gate.max_loss=nan", "gate.max_loss is nan: "),
        ("training.seed=4294967296", "training.seed is 4294967296: "),
        (f"publishing.name={'n' * 101}", "publishing.name is "),
        ("training.architecture_settings.width=1979-05-27", "training.architecture_settings"),
    ],
)
def test_what_would_fail_only_later_is_refused(assignment, sentence):
    with pytest.raises(ConfigError) as caught:
        config.build("smoke", config.single(assignment))

    assert str(caught.value).startswith(sentence)


def test_the_last_file_or_value_that_names_a_preset_chooses_it():
    layers = [{"preset": "line"}, {"preset": "accurate", "runs": "/elsewhere"}]

    assert config.preset_of([]) == "quick"
    assert config.preset_of(layers) == "accurate"
    assert config.build("accurate", *layers).preset == "accurate"
    assert config.build("accurate", *layers).runs == Path("/elsewhere")


def test_depth_without_end_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    file = tmp_path / "deep.toml"
    file.write_text(f"x = {'[' * 5000}")

    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        config.read(file)
    assert config.single(f"x={'[' * 5000}") == {"x": "[" * 5000}
    file.write_bytes(b"\xef\xbb\xbfruns = 'here'")
    assert config.read(file) == {"runs": "here"}


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(
        ConfigError, match=r"'training\.epochs' has no =, expected SECTION.NAME=VALUE"
    ):
        config.single("training.epochs")


def test_a_file_gives_its_tables(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nepochs = 4\n[training.architecture_settings]\nhidden = [512, 256]")

    built = config.build("quick", config.read(path))

    assert built.training.epochs == 4
    assert built.training.architecture_settings == {"hidden": [512, 256]}


@pytest.mark.parametrize("content", ["epochs = ", None, "\udcff"])
def test_a_file_that_is_no_toml_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))

    with pytest.raises(ConfigError, match=r"run\.toml cannot be read as TOML"):
        config.read(path)


def test_a_bundle_says_what_it_was_trained_on():
    then = config.build("line", {"data": {"split_seed": 7}})
    text = json.dumps(config.as_tables(then))

    assert config.learnt_from(text, None) == then.data
    assert config.learnt_from(text, Path("moved")).source == Path("moved").absolute()
    assert config.learnt_from("", None) == config.DataConfig()


def test_no_setting_takes_true_for_a_number():
    """Every field that is a number, found by what it takes."""
    taken = []
    for section, fields in config.as_tables(config.PRESETS["quick"]()).items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if isinstance(value, bool):
                continue
            with contextlib.suppress(ConfigError):
                config.build("quick", {section: {name: True}})
                taken.append(name)

    assert taken == []


def test_whole_numbers_are_numbers_where_shares_are_asked_for():
    built = config.build("quick", config.single("training.weight_decay=1"))

    assert built.training.weight_decay == 1
