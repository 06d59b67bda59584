import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from pipeline import models, train
from pipeline.config import TrainingConfig
from pipeline.errors import ConfigError
from pipeline.models import own
from pipeline.records import Dataset

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "networks.md"
NET = """
import keras

def net(shape, outputs):
    flatten, dense = keras.layers.Flatten(), keras.layers.Dense(outputs)
    return keras.Sequential([keras.Input(shape), flatten, dense])
"""

LATE = """
import keras

@keras.saving.register_keras_serializable("late")
class Late(keras.layers.Layer):
    def call(self, x):
        import helper
        return x * helper.FACTOR

def net(shape, outputs):
    image = keras.Input(shape)
    x = keras.layers.Flatten()(Late()(image))
    return keras.Model(image, keras.layers.Dense(outputs)(x))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mine", "nets", "broken", "helper"):
            del sys.modules[name]


def test_a_module_of_the_current_folder_is_found_and_later_imports_find_installed_ones_first(here):
    (here / "mine.py").write_text(NET)
    path = list(sys.path)

    for _ in range(2):
        assert models.build("mine:net", (4, 4, 1), 3).output_shape == (None, 3)

    assert sys.path == [*path, str(here)]
    assert own.files("mine:net") == {"mine.py": here / "mine.py"}


def test_what_a_module_imports_of_the_users_is_among_its_files_and_nothing_installed(here):
    (here / "helper.py").write_text("import numpy, json, pipeline.errors")
    (here / "mine.py").write_text(f"import helper\n{NET}")
    (here / "unrelated.py").write_text("")

    assert set(own.files("mine:net")) == {"mine.py", "helper.py"}


@pytest.mark.parametrize("name", ["helper", "train", "dense"])  # two that we have ourselves
def test_other_code_in_what_a_module_imports_trains_in_another_folder(here, name):
    data = Dataset("two", here, "ab" * 32, "", ("a", "b"), 8, 2, 2, 0.2, 1)
    own_net = TrainingConfig(architecture="nets.mine:net")
    (here / "nets").mkdir()
    (here / "nets" / "mine.py").write_text(f"from . import {name}\n{NET}")
    (here / "nets" / f"{name}.py").write_text("WIDTH = 9")
    before = train.run_folder(here, "quick", data, own_net)

    (here / "nets" / f"{name}.py").write_text("WIDTH = 8")

    assert train.run_folder(here, "quick", data, own_net) != before


def test_what_is_below_the_current_folder_on_the_path_is_the_users_too(here):
    for name in ("src", "beside"):
        (here / name).mkdir()
        sys.path.append(str(here / name))
    (here / "src" / "helper.py").write_text("")
    (here / "beside" / "mine.py").write_text(f"import helper\n{NET}")

    assert set(own.files("mine:net").values()) == {
        here / "beside" / "mine.py",
        here / "src" / "helper.py",
    }


def test_of_an_installed_module_only_its_own_package_counts(here):
    found = own.files("fsspec.core:open")

    assert "fsspec/core.py" in found
    assert all(name.startswith("fsspec/") for name in found)


def test_a_function_may_import_from_the_current_folder_when_it_is_called(here):
    (here / "helper.py").write_text("UNITS = 5")
    late = NET.replace("    flatten", "    import helper\n    flatten")
    (here / "mine.py").write_text(late)

    assert models.build("mine:net", (4, 4, 1), 3).output_shape == (None, 3)
    assert set(own.files("mine:net")) == {"mine.py", "helper.py"}


def test_a_layer_may_import_from_the_current_folder_when_its_model_is_loaded(here):
    (here / "helper.py").write_text("FACTOR = 2")
    (here / "mine.py").write_text(LATE)
    models.build("mine:net", (4, 4, 1), 3).save(here / "model.keras")
    del sys.modules["helper"]

    loaded = keras.models.load_model(here / "model.keras")

    assert loaded(np.zeros((2, 4, 4, 1), np.float32)).shape == (2, 3)


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
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_what_fails_while_a_module_is_imported_is_told(here, code, told):
    (here / "broken.py").write_text(code)

    with pytest.raises(ConfigError, match=f"module broken cannot be imported: {told}"):
        models.build("broken:net", (4, 4, 1), 3)
