import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import Settings


@pytest.mark.parametrize(
    ("name", "smallest", "below"),
    [
        ("max_batch_rows", 1, 0),
        ("threads", 0, -1),
        ("drain_s", 0.0, math.nextafter(0, -1)),
        ("drain_s", 0.0, math.nan),
    ],
)
def test_number_at_its_smallest_is_taken_and_below_it_is_refused(name, smallest, below):
    taken = Settings(repository=Path("models"), **{name: smallest})

    assert getattr(taken, name) == smallest
    with pytest.raises(SettingsError) as caught:
        Settings(repository=Path("models"), **{name: below})
    assert str(caught.value) == f"{name} is {below}, expected {int(smallest)} or more"


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
