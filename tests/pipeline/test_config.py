from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", config.PRESETS)
def test_a_preset_carries_its_name(name):
    assert config.from_preset(name).preset == name


def test_only_what_is_named_differs_from_the_preset():
    changed = config.from_preset("quick", epochs=3, seed=7)

    assert (changed.training.epochs, changed.training.seed) == (3, 7)
    assert changed.training.batch_rows == config.quick().training.batch_rows
    assert changed.gate == config.quick().gate


def test_folders_do_not_depend_on_where_a_later_stage_runs():
    settings = config.from_preset("smoke", models=Path("models"), runs=Path("runs"))

    assert settings.publishing.models.is_absolute()
    assert settings.runs.is_absolute()


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="preset is 'huge', expected one of smoke, quick"):
        config.from_preset("huge")


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("epochs", -1), ("seed", -1)])
def test_a_number_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is {value}, expected"):
        config.from_preset("quick", **{setting: value})


def test_the_smallest_numbers_in_range_are_taken():
    settings = config.from_preset("quick", epochs=1, seed=0)

    assert (settings.training.epochs, settings.training.seed) == (1, 0)
