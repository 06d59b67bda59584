import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import CHOICES, ENVIRONMENT_PREFIX, LIMITS, PROVIDERS, Settings


def settings(**values):
    return Settings(repository=Path("models"), **values)


def refusal(**values):
    with pytest.raises(SettingsError) as caught:
        settings(**values)
    return str(caught.value)


@pytest.mark.parametrize("name", LIMITS)
def test_number_within_its_limits_is_taken_and_one_beyond_is_refused_with_both(name):
    (smallest, largest) = LIMITS[name]

    for value in (float(smallest), float(largest)):
        assert getattr(settings(**{name: value}), name) == value
    for value in (smallest - 1.0, largest + 1.0, math.nan, math.inf, -math.inf):
        assert refusal(**{name: value}) == f"{name} is {value}, expected {smallest} to {largest}"


def test_every_number_has_its_limits_and_no_others_are_kept():
    numbers = {field.name for field in fields(Settings) if type(field.default) in (int, float)}

    assert set(LIMITS) == numbers


def test_every_default_is_allowed():
    assert settings() == settings(**{field.name: field.default for field in fields(Settings)[1:]})


@pytest.mark.parametrize("name", CHOICES)
def test_word_that_is_no_choice_is_refused_with_those_there_are(name):
    for choice in CHOICES[name]:
        assert getattr(settings(**{name: choice}), name) == choice
    assert refusal(**{name: "other"}) == (
        f"{name} is 'other', expected one of {', '.join(CHOICES[name])}"
    )


@pytest.mark.parametrize("policy", ["all", "latest", "latest:1", "latest:9999", "specific:1,30"])
def test_version_policy_is_taken(policy):
    assert settings(version_policy=policy).version_policy == policy


@pytest.mark.parametrize(
    "policy",
    [
        *["", "none", "latest:0", "latest:-1", "latest:", "latest:10000", "all:1"],
        *["specific", "specific:", "specific:0", "specific:1,", "specific:1,,2", "specific:1\n"],
    ],
)
def test_version_policy_that_cannot_work_is_refused(policy):
    assert refusal(version_policy=policy) == (
        f"version_policy is {policy!r}, expected all, latest:N or specific:N,N,…"
    )


@pytest.mark.parametrize("providers", ["cpu", "cuda", "cuda,cpu"])
def test_providers_are_taken_by_their_short_names(providers):
    assert settings(providers=providers).providers == providers


@pytest.mark.parametrize("providers", ["", "gpu", "cpu,", "cuda cpu", *PROVIDERS.values()])
def test_provider_that_is_not_known_is_refused(providers):
    assert refusal(providers=providers) == (
        f"providers is {providers!r}, expected cpu and cuda, by commas"
    )


@pytest.mark.parametrize(
    ("listed", "numbers"), [("", ()), ("0", (0,)), ("3,0-2", (0, 1, 2, 3)), ("5-5,0012", (5, 12))]
)
def test_cpus_are_taken_as_a_list_of_numbers_and_ranges(listed, numbers):
    assert settings(io_cpus=listed).io_cpu_numbers == frozenset(numbers)


@pytest.mark.parametrize("listed", ["x", "-1", "1-", "2-1", "0,", "0 1", "0,3-2", "10000", "0-3:2"])
def test_list_of_cpus_that_cannot_be_is_refused_with_what_one_looks_like(listed):
    assert refusal(io_cpus=listed) == (f"io_cpus is {listed!r}, expected a list such as 0 or 0,2-3")


def test_certificate_and_key_need_each_other_and_an_authority_needs_both():
    both = {"tls_cert": Path("c"), "tls_key": Path("k")}
    settings(**both)
    settings(**both, tls_client_ca=Path("a"))

    for name in both:
        assert refusal(**{name: Path("x")}) == (
            "tls_cert and tls_key need each other; give both or neither"
        )
    assert refusal(tls_client_ca=Path("a")) == "tls_client_ca needs tls_cert and tls_key"


def test_every_setting_says_what_it_means_and_stands_in_a_group():
    groups = {field.metadata["group"] for field in fields(Settings)}

    assert all(field.metadata["help"].endswith(".") for field in fields(Settings))
    assert groups == {"Models", "Network", "Batching", "Parity", "Security", "Operation"}


def test_no_setting_is_a_secret():
    """A command line is seen by everybody on the host."""
    words = ("token", "key", "password", "secret")
    secrets = [field for field in fields(Settings) if any(word in field.name for word in words)]

    assert {field.name for field in secrets} == {"token_file", "admin_token_file", "tls_key"}
    assert all(field.type == Path | None for field in secrets)


def test_server_listens_on_this_machine_alone_by_default():
    assert settings().address == "127.0.0.1:8001"
    assert settings().metrics_address == ""


def test_settings_cannot_be_changed_and_are_named():
    with pytest.raises(FrozenInstanceError):
        settings().threads = 4
    with pytest.raises(TypeError):
        Settings(Path("models"))  # type: ignore[call-arg]


MADE = """
import sys
import typer
from service.commands import app
from service.settings import Settings
import service.workers

async def show(settings, announce, environment):
    print(repr(settings))

service.workers.serve = show
app(["serve"])
"""


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "model_control": "none",
            "version_policy": "specific:1,3",
            "poll_s": 0.25,
            "address": "[::1]:0",
            "max_batch_rows": 7,
            "token_file": Path("a b/tokens"),
            "tls_cert": Path("c"),
            "tls_key": Path("k"),
            "access_log": True,
            "io_cpus": "0,2-3",
            "log_format": "json",
            "stop_with_stdin": True,
        },
    ],
)
def test_environment_made_of_settings_makes_the_same_settings_in_another_process(values):
    """How a server's workers get theirs."""
    wanted = settings(workers=2, **values)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)
    }

    made = subprocess.run(
        [sys.executable, "-c", MADE],
        env={**inherited, **wanted.environment()},
        capture_output=True,
        text=True,
        check=True,
    )

    assert made.stdout.strip() == repr(wanted)
