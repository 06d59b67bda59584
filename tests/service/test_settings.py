import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import LIMITS, Settings


@pytest.mark.parametrize("name", LIMITS)
def test_number_within_its_limits_is_taken_and_one_beyond_is_refused_with_both(name):
    (smallest, largest) = LIMITS[name]

    def settings(value):
        return Settings(repository=Path("models"), **{name: value})

    for value in (float(smallest), float(largest)):
        assert getattr(settings(value), name) == value
    for value in (smallest - 1.0, largest + 1.0, math.nan):
        with pytest.raises(SettingsError) as caught:
            settings(value)
        assert str(caught.value) == f"{name} is {value}, expected {smallest} to {largest}"


def test_every_setting_says_what_it_means():
    assert all(field.metadata["help"].endswith(".") for field in fields(Settings))


def test_server_listens_on_this_machine_alone_by_default():
    assert Settings(repository=Path("models")).address == "127.0.0.1:8001"


def test_settings_cannot_be_changed_and_are_named():
    settings = Settings(repository=Path("models"))

    with pytest.raises(FrozenInstanceError):
        settings.threads = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(Path("models"))  # type: ignore[call-arg]
