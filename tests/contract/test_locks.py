"""The locks are what pyproject.toml asks for, whole, and tell no registry's address."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.dependency_groups import resolve_dependency_groups
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
SERVICE = EXTRAS["service"] + EXTRAS["serving"]
PIPELINE = EXTRAS["pipeline"] + EXTRAS["playground"] + SERVICE
DEVELOPMENT = map(str, resolve_dependency_groups(PROJECT["dependency-groups"], "dev"))
WANTED = {
    "service": SERVICE,
    "pipeline": PIPELINE,
    "dev": [*PIPELINE, *EXTRAS["telemetry"], *DEVELOPMENT],
}


def pins(name):
    """Return the versions a lock pins, by package; more than one where a marker divides them."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    found: dict[str, list[Requirement]] = {}
    for line in text.splitlines():
        pinned, _, hashes = line.partition("--hash=")
        assert hashes, f"{line} has no hash"
        requirement = Requirement(pinned.strip())
        found.setdefault(requirement.name.lower(), []).append(requirement)
    return found


def versions(pinned):
    return {str(pin.specifier) for pin in pinned}


@pytest.mark.parametrize("name", WANTED)
def test_everything_asked_for_is_pinned_to_a_version_that_will_do(name):
    pinned = pins(name)

    for text in [*PROJECT["project"]["dependencies"], *WANTED[name]]:
        wanted = Requirement(text)
        if wanted.name == "train-export":
            continue
        for pin in pinned[wanted.name.lower()]:
            (version,) = pin.specifier
            assert version.operator == "=="
            assert wanted.specifier.contains(version.version, prereleases=True), f"{pin}: {text}"


@pytest.mark.parametrize("name", ["service", "pipeline", "uv"])
def test_a_part_has_the_versions_that_the_whole_was_tested_with(name):
    whole = {package: versions(pin) for package, pin in pins("dev").items()}

    for package, pin in pins(name).items():
        assert versions(pin) <= whole[package]


def test_the_service_needs_no_training_software():
    assert not {"tensorflow", "keras", "prefect", "onnx", "tf2onnx"} & pins("service").keys()


@pytest.mark.parametrize("path", [*ROOT.glob("requirements/*.txt"), *ROOT.glob("*/*/*.txt")])
def test_no_lock_names_an_address(path):
    text = path.read_text()

    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links", text)
