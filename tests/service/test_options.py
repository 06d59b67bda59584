import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from service import commands, options
from service.settings import ENVIRONMENT_PREFIX, Settings

KINDS: dict[str, Any] = {one.name: one.type for one in fields(Settings)}
TEXTS: dict[Any, Any] = {
    str: st.sampled_from(["a", "a b", "127.0.0.1:0", "x=y", "é"]),
    bool: st.sampled_from(["1", "True", "yes", "off", "FALSE", "n", "maybe", "2", " "]),
    int: st.sampled_from(["0", "7", "-3", "12345", "007", "1_000", " 5", "5.0", "many", "1e3"]),
    float: st.sampled_from(["0", "0.5", "-2.25", "30", "1e3", "nan", ".5", "5.", "x"]),
    Path: st.sampled_from(["models", "/a/b", "a b", "."]),
    Path | str: st.sampled_from(["models", "/a/b", ".", "s3://bucket/models", "file:///a//b"]),
    Path | None: st.sampled_from(["models", "/a/b", "a b", "."]),
}


@pytest.fixture(scope="module")
def explained():
    """Return a function that reads arguments as `serve` explains them; None if they are wrong."""
    app = typer.Typer()
    seen = {}

    def capture(**given):
        seen.update(given)

    capture.__signature__ = inspect.Signature(commands._options())  # type: ignore[attr-defined]
    app.command()(capture)

    def explained(arguments, environment):
        seen.clear()
        result = CliRunner().invoke(app, arguments, env=environment)
        return dict(seen) if result.exit_code == 0 else None

    return explained


def flag(name):
    return f"--{name.replace('_', '-')}"


@given(data=st.data())
def test_what_is_read_at_once_is_what_would_be_explained(explained, data):
    names = data.draw(st.lists(st.sampled_from(sorted(KINDS)), unique=True, max_size=5))
    arguments, environment = ["--repository", "models"], {}
    for name in names:
        text = data.draw(TEXTS[KINDS[name]], label=name)
        way = data.draw(st.sampled_from(["apart", "joined", "variable"]), label="way")
        if way == "variable":
            environment[f"{ENVIRONMENT_PREFIX}{name.upper()}"] = text
        elif KINDS[name] is bool:
            arguments.append(flag(name))
        else:
            arguments += [flag(name), text] if way == "apart" else [f"{flag(name)}={text}"]

    found = options.read(arguments, environment)

    expected = explained(arguments, environment)
    if found is not None:
        assert expected is not None
        given = {name: expected[name] for name in found}
        assert found == given
        assert all(type(found[name]) is type(given[name]) for name in found)
        defaults = {one.name: one.default for one in fields(Settings) if one.default is not MISSING}
        assert {**defaults, **found} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--nonsense"],
        ["--nonsense", "1"],
        ["models"],
        ["--"],
        ["--address"],
        ["--address", "--access-log"],
        ["--access-log=1"],
        ["--no-access-log"],
        ["--threads", "many"],
        ["--threads", "1.5"],
        ["--thread", "1"],  # no abbreviations
    ],
)
def test_what_is_not_plainly_right_is_left_to_be_explained(arguments):
    assert options.read(["--repository", "models", *arguments], {}) is None


def test_option_that_must_be_given_is_missed(tmp_path):
    assert options.read([], {}) is None
    assert options.read([], {"SERVE_EXPORT_REPOSITORY": "models"}) == {"repository": Path("models")}
    more = {"index": int, "statistics": Path}
    arguments = ["--index", "3", "--repository", "models"]
    assert options.read(arguments, {}, more) is None
    assert options.read([*arguments, "--statistics", "a"], {}, more) == {
        "index": 3,
        "repository": Path("models"),
        "statistics": Path("a"),
    }


def test_option_wins_over_its_variable_and_an_empty_variable_is_none():
    environment = {"SERVE_EXPORT_THREADS": "2", "SERVE_EXPORT_ADDRESS": ""}

    found = options.read(["--repository", "a", "--threads", "3", "--threads", "4"], environment)

    assert found == {"repository": Path("a"), "threads": 4}


def test_settings_survive_the_way_through_the_environment(tmp_path):
    settings = Settings(
        repository=tmp_path, access_log=True, threads=3, drain_s=2.5, tls_cert=None, address="x:0"
    )

    found = options.read([], settings.environment())

    assert found is not None
    assert Settings(**found) == settings


def test_every_kind_of_setting_can_be_read():
    assert set(KINDS.values()) <= set(options._READ)


def test_reading_imports_nothing_that_takes_long():
    code = "import sys, service.__main__; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    assert "'service.launch'" in modules
    for slow in ("typer", "pydantic", "rich", "numpy", "grpc", "onnxruntime", "google.protobuf"):
        assert f"'{slow}'" not in modules
