import pytest

from pipeline import imports


def closure(folder, module="mine", tops=("mine", "helper", "nets")):
    return imports.closure(module, lambda top: folder if top in tops else None)


def write(folder, sources):
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def test_a_stage_s_code_is_all_of_ours_that_it_imports_directly_or_not():
    found = imports.closure("pipeline.parity", imports.root_of_ours)

    assert {"pipeline/parity.py", "service/session.py", "service/errors.py"} <= set(found)
    assert "pipeline/flow.py" not in found
    assert all(path == imports.ROOT / name for name, path in found.items())


def test_of_a_package_that_may_choose_by_name_every_module_counts():
    assert "pipeline/models/conv10.py" in imports.closure("pipeline.models", imports.root_of_ours)


@pytest.mark.parametrize(
    "source",
    [
        "import helper",
        "import helper as other",
        "from helper import block",
        "def net(shape, outputs):\n    import helper",
        "class Layer:\n    def call(self, x):\n        from helper import block",
        "try:\n    import helper\nexcept ImportError:\n    pass",
    ],
)
def test_a_module_beside_it_counts_wherever_it_is_imported(tmp_path, source):
    write(tmp_path, {"mine": source, "helper": "import json", "unrelated": ""})

    assert closure(tmp_path) == {name: tmp_path / name for name in ("mine.py", "helper.py")}


def test_what_an_imported_module_imports_counts_and_a_circle_ends(tmp_path):
    write(tmp_path, {"mine": "import helper", "helper": "import nets.deep, mine", "nets/deep": ""})

    assert set(closure(tmp_path)) == {"mine.py", "helper.py", "nets/deep.py"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import blocks", {"nets/blocks.py"}),
        ("from .blocks import block", {"nets/blocks.py"}),
        ("from .parts import deep", {"nets/parts/deep.py", "nets/parts/other.py"}),
        ("from .parts.deep import x", {"nets/parts/deep.py"}),
        ("from nets import blocks", {"nets/blocks.py"}),
        ("from .. import helper", set()),
    ],
)
def test_relative_imports_count_and_the_packages_above(tmp_path, source, expected):
    write(
        tmp_path, {"nets/__init__": "", "nets/mine": source, "nets/blocks": "", "nets/unused": ""}
    )
    write(tmp_path, {"nets/parts/deep": "", "nets/parts/other": ""})

    assert set(closure(tmp_path, "nets.mine")) == {"nets/__init__.py", "nets/mine.py", *expected}


def test_a_package_above_brings_what_it_imports(tmp_path):
    write(tmp_path, {"nets/__init__": "import helper", "nets/mine": "", "helper": ""})

    assert "helper.py" in closure(tmp_path, "nets.mine")


@pytest.mark.parametrize("source", ["print 'an older Python'", "a\0b"])
def test_a_file_that_is_no_python_counts_itself(tmp_path, source):
    write(tmp_path, {"mine": "import helper", "helper": source})

    assert "helper.py" in closure(tmp_path)
