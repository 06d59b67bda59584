import json
import logging
import re
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import fields
from subprocess import PIPE

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from protos import bundle_pb2, inference_pb2
from service import aliases
from service.access import Access
from service.commands import app
from service.model_config import VersionPolicy
from service.rpc import Rpc
from service.settings import ENVIRONMENT_PREFIX, Settings
from tests.service.test_command_line import check_help

NOBODY = "127.0.0.1:1"


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs the command line in this process."""
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # which `serve` would set for good
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def keep_logging():
    """Put logging and warnings back to what they were before `serve` has set them up."""
    root, access = logging.getLogger(), logging.getLogger("watchfiles")
    before = root.level, list(root.handlers), access.level
    with warnings.catch_warnings():
        yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    access.setLevel(before[2])


@pytest.fixture
def address(listen, rpc):
    return listen(rpc)


@pytest.fixture
def picture(tmp_path):
    """Return a function that writes a 2 x 2 picture of one shade."""

    def picture(shade, name="picture.png"):
        Image.fromarray(np.full((2, 2), shade, np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return picture


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def sentence(result, status=1):
    """Return the one sentence of a command that was refused."""
    assert result.exit_code == status
    assert result.stdout == ""
    return plain(result.stderr).removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_help_names_every_setting_with_its_variable_and_default(run, command):
    result = run(command, "--help")
    shown = " ".join(plain(result.stdout).replace("│", " ").split())

    assert result.exit_code == 0
    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert f"{ENVIRONMENT_PREFIX}{field.name.upper()}" in shown.replace(" ", "")
    assert "127.0.0.1:8001" in shown


def test_help_of_serve_stands_in_panels_one_a_subject(run):
    lines = plain(run("serve", "--help").stdout).splitlines()

    panels = [re.match(r"╭─ (\w+) ─", line) for line in lines]
    assert [panel[1] for panel in panels if panel] == [
        "Options", "Models", "Network", "Batching", "Parity", "Security", "Operation",
    ]  # fmt: skip


def test_help_of_every_command_is_whole_and_its_examples_can_be_given():
    check_help(app, "serve-export")


def test_help_of_serve_says_how_it_ends_and_that_no_secret_is_an_option(run):
    shown = " ".join(plain(run("serve", "--help").stdout).split())

    assert "Exit status: 0 stopped cleanly, 1 could not start, 2 wrong options." in shown
    assert "SERVE_EXPORT_TOKEN and SERVE_EXPORT_ADMIN_TOKEN" in shown
    assert run("serve", "--repository", "x", "--token", "secret").exit_code == 2


def test_doctor_ends_with_1_and_one_sentence_where_something_is_to_be_mended(run, tmp_path):
    result = run("doctor", "--repository", tmp_path / "none", "--json")

    wrong = {one["area"] for one in json.loads(result.stdout) if not one["ok"]}
    assert result.exit_code == 1
    assert wrong
    assert result.stderr.startswith("error: mend ")
    assert all(area in result.stderr for area in wrong)


def test_what_only_workers_are_started_with_is_not_shown(run):
    shown = plain(run("--help").stdout)

    assert all(name in shown for name in ("serve", "alias", "doctor", "predict", "parity"))
    assert "worker" not in shown


def test_no_command_shows_the_help(run):
    result = run()

    assert result.exit_code == 2
    assert all(name in result.output for name in ("serve", "predict", "parity"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "--repository", "x", "--threads", "many"),
        ("serve", "--repository", "x", "--nonsense"),
        ("serve", "--repository", "x", "--access-log", "maybe"),
        ("worker", "--repository", "x"),
        ("alias", "tiny"),
        ("alias", "tiny", "champion", "first"),
        ("predict",),
        ("predict", "a.png", "--top", "0"),
        ("health", "--timeout-s", "soon"),
        ("nonsense",),
    ],
)
def test_wrong_options_end_with_status_2(run, arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max-batch-rows", "0"), "max_batch_rows is 0, expected 1 to 1048576"),
        (("--poll-s", "nan"), "poll_s is nan, expected 0.05 to 86400"),
        (
            ("--model-control", "sometimes"),
            "model_control is 'sometimes', expected one of poll, explicit, none",
        ),
        (
            ("--version-policy", "newest"),
            "version_policy is 'newest', expected all, latest:N or specific:N,N,…",
        ),
        (("--providers", "gpu"), "providers is 'gpu', expected cpu and cuda, by commas"),
        (
            ("--tls-cert", "c.pem"),
            "tls_cert and tls_key need each other; give both or neither",
        ),
    ],
)
def test_setting_that_cannot_work_is_said_to_be_so(run, tmp_path, options, reason):
    assert sentence(run("serve", "--repository", tmp_path, *options), 2) == reason


@pytest.mark.parametrize("option", ["token", "admin-token"])
def test_file_of_tokens_that_cannot_be_used_is_said_to_be_so(run, tmp_path, option, keep_logging):
    path = tmp_path / "tokens"
    command = ("serve", "--repository", tmp_path, f"--{option}-file", path)

    assert sentence(run(*command), 2).startswith(f"token file {path} cannot be read: ")
    path.write_text("\n \n")
    assert sentence(run(*command), 2) == f"token file {path} has no token; expected one a line"
    path.write_text("short\n")
    assert sentence(run(*command), 2) == (
        "a token has fewer than 16 characters; make one with: openssl rand -hex 32"
    )


@pytest.mark.parametrize("variable", ["SERVE_EXPORT_TOKEN", "SERVE_EXPORT_ADMIN_TOKEN"])
def test_token_of_the_environment_that_can_be_guessed_is_refused_and_not_shown(
    run, tmp_path, monkeypatch, keep_logging, variable
):
    monkeypatch.setenv(variable, "secret")

    refused = sentence(run("serve", "--repository", tmp_path), 2)

    assert refused.startswith("a token has fewer than 16 characters")
    assert "secret" not in refused


# Aliases


@pytest.fixture
def alias(run, make_bundle):
    """Return a function that runs `alias` on a repository of three versions, and the model."""
    model = [make_bundle(version=number).parent for number in (1, 2, 3)][-1]
    return lambda *words: run("alias", *words, "--repository", model.parent), model


@pytest.mark.parametrize("name", ["../tiny", "..", "/tmp/tiny", ""])
def test_alias_of_what_is_no_models_name_is_refused(alias, name):
    alias, model = alias

    assert sentence(alias(name, "champion", 1), 2) == f"{name!r} is not the name of a model"
    assert not (model / "aliases.json").exists()


def test_alias_is_set_moved_and_removed_and_says_what_it_was(alias):
    alias, model = alias

    for words, said in (
        (("champion", 2), "tiny champion: version 2 (was not set)\n"),
        (("champion", 3), "tiny champion: version 3 (was version 2)\n"),
        (("candidate", 1), "tiny candidate: version 1 (was not set)\n"),
        (("champion",), "tiny champion: not set (was version 3)\n"),
        (("champion",), "tiny champion: not set (was not set)\n"),
    ):
        result = alias("tiny", *words)
        assert (result.exit_code, result.stdout) == (0, said)
    assert aliases.read(model) == {"candidate": 1}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("tiny", "champion", 4), "tiny has no version 4 for champion to point at"),
        (("none", "champion", 1), "there is no model 'none' in {}; name one that was published"),
        (
            ("tiny", "Champion", 1),
            "'Champion' is not an alias; expected lower-case letters and digits",
        ),
    ],
)
def test_alias_that_cannot_be_is_refused_and_nothing_is_changed(alias, words, reason):
    alias, model = alias

    assert sentence(alias(*words), 2) == reason.format(model.parent)
    assert aliases.read(model) == {}


@pytest.mark.parametrize("url", ["s3://bucket/models", "gs://bucket/models", "file:///models"])
def test_alias_behind_a_url_is_refused_with_the_command_that_can(run, url):
    assert sentence(run("alias", "tiny", "champion", 3, "--repository", url), 2) == (
        f"{url} is an address, and alias changes folders of this host; to point one at a version "
        f"there: train-export push tiny 3 --to {url} --alias champion"
    )


def test_alias_as_json_says_what_it_is_and_was(alias):
    alias, _ = alias
    alias("tiny", "champion", 2)

    assert json.loads(alias("tiny", "champion", 3, "--json").stdout) == {
        "model": "tiny", "alias": "champion", "version": 3, "before": 2,
    }  # fmt: skip


def test_aliases_that_cannot_be_read_are_not_written_over(alias):
    alias, model = alias
    (model / "aliases.json").write_text("{")

    assert sentence(alias("tiny", "champion", 1)).startswith("tiny/aliases.json is not JSON: ")
    assert (model / "aliases.json").read_text() == "{"


def test_repository_of_an_alias_may_come_from_the_environment(run, make_bundle, monkeypatch):
    model = make_bundle().parent
    monkeypatch.setenv("SERVE_EXPORT_REPOSITORY", str(model.parent))

    assert run("alias", "tiny", "champion", 1).exit_code == 0
    assert aliases.read(model) == {"champion": 1}


# Asking a server


def test_labels_come_with_the_likeliest_first(run, address, picture):
    result = run("predict", picture(250), "--address", address)

    assert result.exit_code == 0
    lines = [line.strip(" │┃") for line in result.stdout.splitlines()]
    assert "tiny version 1" in result.stdout
    order = [
        next(i for i, line in enumerate(lines) if label in line) for label in ("light", "striped")
    ]
    assert order == sorted(order)
    assert "100.00%" in result.stdout
    assert "add --invert" in result.stdout


def test_top_limits_the_labels(run, address, picture):
    shown = run("predict", picture(250), "--address", address, "--top", 1).stdout

    assert "light" in shown.split("light border")[0]
    assert "striped" not in shown


def test_dark_or_inverted_picture_brings_no_advice(run, address, picture):
    dark = run("predict", picture(5), "--address", address)
    inverted = run("predict", picture(250), "--address", address, "--invert")

    assert "dark" in dark.stdout
    assert "--invert" not in dark.stdout + inverted.stdout


def test_prediction_as_json_has_every_label_of_every_picture(run, address, picture):
    paths = [picture(250, "a.png"), picture(5, "b.png")]

    result = run("predict", *paths, "--address", address, "--json", "--model", "tiny")

    answers = json.loads(result.stdout)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    assert [(answer["model"], answer["version"]) for answer in answers] == [("tiny", "1")] * 2
    assert [next(iter(answer["probabilities"])) for answer in answers] == ["light", "dark"]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_more_pictures_than_a_request_may_have_are_all_answered_in_order(run, rpc, listen, picture):
    paths = [picture(5 if number % 3 else 250, f"{number}.png") for number in range(130)]

    answers = json.loads(run("predict", *paths, "--address", listen(rpc), "--json").stdout)

    assert [one["image"] for one in answers] == [str(path) for path in paths]
    assert [next(iter(one["probabilities"])) for one in answers] == [
        "dark" if number % 3 else "light" for number in range(130)
    ]


def test_token_of_a_file_or_of_the_environment_is_shown_to_the_server(
    run, rpc, listen, picture, tmp_path, monkeypatch
):
    token = "a token of many letters".replace(" ", "-")
    address = listen(rpc, access=Access((token,), ()))
    path = tmp_path / "token"
    path.write_text(token)
    ask = ("--address", address, "--json")

    assert run("predict", picture(250), *ask).exit_code == 1
    assert run("predict", picture(250), *ask, "--token-file", path).exit_code == 0
    assert run("parity", *ask, "--token-file", path).exit_code == 0
    monkeypatch.setenv("SERVE_EXPORT_TOKEN", token)
    assert run("predict", picture(250), *ask).exit_code == 0
    assert run("parity", *ask).exit_code == 0


@pytest.mark.parametrize("command", [("predict", __file__), ("parity",)])
def test_tls_files_that_cannot_be_used_are_named(run, tmp_path, command):
    missing = tmp_path / "ca.pem"

    assert "ca.pem cannot be read" in sentence(run(*command, "--tls-ca", missing), 2)
    assert "need each other" in sentence(run(*command, "--tls-cert", missing), 2)


def test_invert_is_what_the_model_sees(run, address, picture):
    result = run("predict", picture(250), "--address", address, "--json", "--invert")

    assert next(iter(json.loads(result.stdout)[0]["probabilities"])) == "dark"


def test_named_version_answers(run, make_bundle, open_repository, listen, picture):
    make_bundle(version=2)
    repository = open_repository(make_bundle().parents[1], policy=VersionPolicy())
    address = listen(Rpc(repository))

    for options, version in (((), "2"), (("--version", "1"), "1")):
        result = run("predict", picture(5), "--address", address, "--json", *options)
        assert json.loads(result.stdout)[0]["version"] == version


def test_one_of_several_models_must_be_chosen(run, make_bundle, open_repository, listen, picture):
    make_bundle(name="other")
    address = listen(Rpc(open_repository(make_bundle().parents[1])))

    assert sentence(run("predict", picture(5), "--address", address)) == (
        "the server has the models other, tiny; choose one with --model"
    )
    assert run("predict", picture(5), "--address", address, "--model", "other").exit_code == 0


def test_server_without_a_model_is_said_to_have_none(run, serve, picture):
    address = serve(RepositoryIndex=lambda *_: inference_pb2.RepositoryIndexResponse())

    assert sentence(run("predict", picture(5), "--address", address)) == (
        "the server has the models none; choose one with --model"
    )


def test_model_that_takes_no_pictures_is_said_to_be_so(
    run, make_generic_bundle, open_repository, listen, picture
):
    address = listen(Rpc(open_repository(make_generic_bundle().parents[1])))

    result = run("predict", picture(5), "--address", address, "--model", "line")

    assert sentence(result) == "line takes tensors of shape (-1,), not pictures"


def test_file_that_is_no_picture_is_said_to_be_so(run, address, tmp_path):
    (tmp_path / "a[b].png").write_text("hello")

    assert sentence(run("predict", tmp_path / "a[b].png", "--address", address)) == (
        f"{tmp_path}/a[b].png is not a PNG or JPEG picture"
    )


@pytest.mark.parametrize("command", [("predict", __file__), ("parity",)])
def test_server_that_is_not_there_is_said_to_be_so(run, command):
    assert sentence(run(*command, "--address", NOBODY)) == (
        f"no server answers at {NOBODY}; start one with: serve-export serve --repository models"
    )


def test_address_is_taken_from_the_environment_and_the_option_wins(run, address, monkeypatch):
    monkeypatch.setenv("SERVE_EXPORT_ADDRESS", NOBODY)

    assert NOBODY in sentence(run("parity"))
    assert run("parity", "--address", address).exit_code == 0


def test_parity_shows_every_report_and_the_hosts_self_check(
    run, make_bundle, open_repository, listen
):
    def edit(manifest):
        manifest.served.CopyFrom(manifest.parity[0])
        manifest.served.variant = "served"
        failed = bundle_pb2.ParityReport(variant="tflite-int8", failure="it is far off")
        manifest.parity.append(failed)

    address = listen(Rpc(open_repository(make_bundle(edit=edit).parents[1])))

    shown = run("parity", "--address", address).stdout

    assert "tiny version 1: parity with the original" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert {"onnx-float32", "tflite-int8", "served", "self-check"} <= set(rows)
    assert "passed" in rows["onnx-float32"]
    assert "failed: it is far off" in rows["tflite-int8"]
    assert "self-check on " in shown


def test_parity_as_json_is_the_message(run, address):
    answer = json.loads(run("parity", "--address", address, "--json").stdout)

    (one,) = answer["versions"]
    assert (one["model"], one["version"]) == ("tiny", "1")
    assert one["self_check"]["report"]["passed"] is True


def test_parity_of_an_unknown_model_is_refused(run, address):
    assert sentence(run("parity", "--address", address, "--model", "none")) == (
        "Request for unknown model: 'none' is not found"
    )


@pytest.mark.parametrize(
    ("ready", "words", "status", "said"),
    [
        (True, ("--ready", "--service", "tiny"), 0, "ready"),
        (False, (), 0, "live"),
        (False, ("--ready",), 1, "is live, and takes no requests now"),
        (False, ("--service", "other"), 1, "'other' is no service or model of this server"),
    ],
)
def test_health_is_told_by_status_and_a_word_or_a_sentence(
    run, rpc, listen, ready, words, status, said
):
    result = run("health", "--address", listen(rpc, ready=ready), *words)

    assert result.exit_code == status
    assert said in (sentence(result) if status else result.stdout)


@pytest.mark.parametrize("words", [("parity",), ("health",), ("predict", __file__)])
def test_where_json_was_asked_for_a_refusal_leaves_standard_output_empty(run, words):
    assert f"no server answers at {NOBODY}" in sentence(run(*words, "--address", NOBODY, "--json"))


def test_a_picture_that_is_not_there_is_status_2_before_anybody_is_asked(run, picture):
    refused = run("predict", picture(5), "nowhere.png", "--address", NOBODY)

    assert sentence(refused, 2) == "nowhere.png is not there; name PNG or JPEG files"


def test_health_as_json_says_who_and_how(run, address):
    found = json.loads(run("health", "--address", address, "--json").stdout)

    assert found == {"address": address, "state": "ready"}


def test_health_of_a_server_that_is_not_there_is_a_sentence(run, tmp_path):
    assert f"no server answers at {NOBODY}" in sentence(run("health", "--address", NOBODY))
    assert "cannot be read" in sentence(run("health", "--tls-ca", tmp_path / "none"), 2)
    assert "need each other" in sentence(run("health", "--tls-cert", tmp_path / "none"), 2)


def test_health_is_asked_where_the_environment_says_that_the_server_listens(
    run, address, monkeypatch
):
    port = address.rpartition(":")[2]
    monkeypatch.setenv("SERVE_EXPORT_ADDRESS", f"0.0.0.0:{port}")

    assert run("health").stdout == "ready\n"


@pytest.mark.parametrize("watch", [(), ("--watch",)])
def test_parity_that_is_refused_or_cannot_be_asked_for_ends_with_a_sentence(
    run, address, tmp_path, watch
):
    unknown = run("parity", *watch, "--address", address, "--model", "none")
    unread = run("parity", *watch, "--address", address, "--tls-ca", tmp_path / "none")

    assert "unknown model: 'none' is not found" in sentence(unknown)
    assert "cannot be read" in sentence(unread, 2)


INTERRUPTED = [("predict", __file__, "--model", "tiny"), ("parity",), ("parity", "--watch")]


@pytest.mark.parametrize("words", INTERRUPTED)
def test_ctrl_c_ends_whoever_waits_for_a_server_with_one_line_and_130(words):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "service", *words, "--address", address]
        with (
            subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process,
            silent.accept()[0],  # it is there, and waits for an answer that does not come
        ):
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate(timeout=60)

    assert (process.returncode, said, errors) == (130, "", "error: stopped\n")


def test_help_imports_neither_grpc_nor_onnxruntime():
    code = (
        "import sys; from service.commands import app; app(['--help'], standalone_mode=False); "
        "assert not {'grpc', 'onnxruntime', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "service", "parity", "--address", NOBODY],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "no server answers" in done.stderr
    assert "Traceback" not in done.stderr
