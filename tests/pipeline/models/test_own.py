import sys
from pathlib import Path

import pytest

from pipeline import models
from pipeline.errors import ConfigError
from pipeline.models import own

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "networks.md"
NET = """
import keras

def net(shape, outputs):
    flatten, dense = keras.layers.Flatten(), keras.layers.Dense(outputs)
    return keras.Sequential([keras.Input(shape), flatten, dense])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mine", "nets", "broken"):
            del sys.modules[name]


def test_a_module_of_the_current_folder_is_found_and_the_path_is_left_as_it_was(here):
    (here / "mine.py").write_text(NET)
    path = list(sys.path)

    model = models.build("mine:net", (4, 4, 1), 3)

    assert model.output_shape == (None, 3)
    assert sys.path == path
    assert own.file("mine:net") == (here / "mine.py",)


def test_the_network_in_the_documentation_is_built(here):
    code = DOCUMENTATION.read_text().partition("```python\n")[2].partition("```")[0]
    (here / "mine.py").write_text(code)

    model = models.build("mine:net", (9, 9, 3), 4, width=5)

    assert model.get_layer("conv").filters == 5


def test_a_module_of_a_package_is_found(here):
    (here / "nets").mkdir()
    (here / "nets" / "mine.py").write_text(NET)

    assert models.build("nets.mine:net", (4, 4, 1), 3).output_shape == (None, 3)


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("nowhere:net", "there is no module nowhere in .* or among the installed packages"),
        ("tests.nowhere.nets:net", "there is no module tests.nowhere.nets in "),
        ("keras:net", "module keras has no function 'net'; expected module:function"),
        ("keras:", "module keras has no function ''"),
        (":net", "module  cannot be imported: ValueError: Empty module name"),
        (
            "tests.pipeline.models.odd_nets:NOT_CALLABLE",
            r"NOT_CALLABLE is a int, expected a function \(shape, outputs, \*\*settings\)",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(reference, told):
    with pytest.raises(ConfigError, match=told):
        models.build(reference, (4, 4, 1), 3)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import absent_package", "ModuleNotFoundError: No module named 'absent_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def net(:", "SyntaxError: "),
    ],
)
def test_what_fails_while_a_module_is_imported_is_told(here, code, told):
    (here / "broken.py").write_text(code)

    with pytest.raises(ConfigError, match=f"module broken cannot be imported: {told}"):
        models.build("broken:net", (4, 4, 1), 3)
