"""The command line `train-export run`, whole: what it prints, leaves, and survives."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline import config
from service import aliases, bundle

pytestmark = pytest.mark.slow
STAGES = ("dataset.prepare", "train.fit", "evaluate.score", "export.convert", "parity.check")
RUN = ("train-export", "run", "--preset", "smoke")


def run(environment, folder, *words, stop_at=None, signal_number=signal.SIGKILL):
    """Run the flow in a folder; send a signal once its log says `stop_at`."""
    with subprocess.Popen(
        [*RUN, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if stop_at and stop_at in line:
                process.send_signal(signal_number)
                stop_at = None
    return process.returncode, "".join(lines)


def artifacts(environment):
    """Return the latest of each of Prefect's artifacts."""
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/artifacts/latest/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def published(folder):
    """Read every bundle that can be seen in a folder's models, so that each is proven whole."""
    versions = (folder / "models").glob("*/*")
    found = sorted(path for path in versions if bundle.VERSION.fullmatch(path.name))
    return [bundle.read(path).manifest for path in found]


@pytest.fixture(scope="module")
def first(environment, tmp_path_factory):
    """A run with Prefect's embedded server, as `make run` does it."""
    folder = tmp_path_factory.mktemp("clone")
    return folder, *run(environment, folder)


def test_a_run_ends_well_with_a_table_the_bundle_and_the_two_commands(first):
    folder, status, output = first

    assert status == 0, output
    rows = re.findall(
        r"^ (original|saved-model|(?:tflite|onnx)-\S+|served \(gRPC\))  ", output, re.MULTILINE
    )
    assert rows[:11] == [  # then what each costs
        "original", "saved-model", "tflite-float32", "tflite-float16", "tflite-dynamic-range",
        "tflite-int8", "tflite-int16x8", "onnx-float32", "onnx-float16", "onnx-int8",
        "served (gRPC)",
    ]  # fmt: skip
    assert "fully_quantize" not in output
    assert f"bundle: {folder}/models/fashion-mnist-smoke/1" in output
    assert "serve:  serve-export serve --repository models" in output
    assert (
        "ask:    serve-export predict runs/examples/trouser.png --model fashion-mnist-smoke"
        in output
    )


def test_the_published_bundle_was_served_over_the_whole_test_set(first):
    manifest = published(first[0])[0]
    onnx = next(one for one in manifest.parity if one.variant == manifest.served_variant)

    assert manifest.served.passed
    assert manifest.served.accuracy.rows == 10_000
    assert manifest.served.logits.max == pytest.approx(onnx.logits.max, abs=1e-6)


def test_a_second_run_does_nothing_again_says_why_and_publishes_the_next_version(
    first, prefect_server
):
    folder = first[0]

    status, output = run(prefect_server, folder)

    assert status == 0, output
    for stage in STAGES:
        assert f"{stage}: nothing to do, data, settings, code, packages and hardware" in output
    assert "training conv10" not in output
    assert "asking the server" in output
    assert [manifest.version for manifest in published(folder)] == [1, 2]


def test_a_run_leaves_its_settings_and_artifacts(first, prefect_server):
    folder = first[0]
    (settings,) = (folder / "runs").glob("smoke-*/config.json")
    found = config.build("smoke", json.loads(settings.read_text()))

    assert found.preset == "smoke"
    assert found.publishing.models == folder / "models"
    assert {one["key"]: one["type"] for one in artifacts(prefect_server)} == {
        "bundle": "markdown",
        "variants": "table",
        "training": "progress",  # of the first run, whose server had the same database
        "bundle-folder": "markdown",  # as Prefect keeps links
        "run-folder": "markdown",
        "report": "markdown",
    }


def test_a_server_that_does_not_start_leaves_no_bundle_and_the_alias_where_it_was(
    first, prefect_server
):
    folder = first[0]
    home = folder / "models" / "fashion-mnist-smoke"
    aliases.write(home, {aliases.CHAMPION: 1})
    before = sorted(path.name for path in home.iterdir())

    broken = {"SERVE_EXPORT_TLS_CERT": str(folder / "nowhere.pem")}
    status, output = run(prefect_server | broken, folder)

    assert status == 1, output
    assert output.strip().splitlines()[-1].startswith("error: the server did not start: ")
    assert sorted(path.name for path in home.iterdir()) == before
    assert aliases.read(home) == {aliases.CHAMPION: 1}
    assert not list((folder / "models").glob(".staging-*"))


def test_what_changed_on_disk_or_failed_in_a_transaction_is_done_again(prefect_server, tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("reuse.py")), str(tmp_path)],
        env=prefect_server, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    assert done.stdout.splitlines() == [
        "first: made",
        "again: ",
        "changed on disk: made",
        "another argument: made",
        "in a transaction that fails: made",
        "after it: made",
        "a disk behind a network: tried, tried",
        "a full disk: tried",
    ]
    assert "is not what it was: what an earlier run made of it is made again" in done.stderr


def test_the_published_model_names_a_real_picture(first, environment):
    folder = first[0]
    serve = ("serve-export", "serve", "--repository", "models", "--address", "127.0.0.1:0")
    with subprocess.Popen(
        serve, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        address = server.stdout.readline().removeprefix("serving on ").strip()
        asked = subprocess.run(
            ["serve-export", "predict", "runs/examples/trouser.png", "--address", address],
            cwd=folder, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        server.terminate()

    assert server.returncode == 0
    assert "Trouser" in asked.stdout


@pytest.mark.timeout(1500)
def test_a_run_stopped_at_any_stage_leaves_whole_bundles_only_and_the_next_works(
    prefect_server, tmp_path
):
    status, output = run(
        prefect_server, tmp_path, stop_at="epoch 1 of 2", signal_number=signal.SIGINT
    )
    assert status == 130, output
    assert "stopped; nothing was published" in output
    assert "Traceback" not in output
    assert published(tmp_path) == []

    killed, ended = (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)
    for stage, proof, (number, expected) in (
        ("resuming from", "resuming from", killed),  # training, after the epoch that was kept
        ("exported SavedModel", "resuming from", killed),  # parity
        ("onnx-float32: max", "train.fit: nothing to do", ended),  # staging
        ("asking the server", "train.fit: nothing to do", killed),  # serving
    ):
        status, output = run(prefect_server, tmp_path, stop_at=stage, signal_number=number)
        assert status == expected, output
        assert proof in output
        assert published(tmp_path) == []

    status, output = run(prefect_server, tmp_path)
    assert status == 0, output
    assert [manifest.version for manifest in published(tmp_path)] == [1]
    assert not list((tmp_path / "models").glob(".staging-*"))


def test_a_model_below_the_gate_is_not_published_and_one_sentence_says_so(prefect_server, tmp_path):
    status, output = run(prefect_server, tmp_path, "--set", "gate.min_accuracy=0.99")

    last = output.strip().splitlines()[-1]
    assert status == 1
    assert re.fullmatch(r"error: test accuracy is \d\d\.\d\d%, the gate is 99\.00%; .*", last)
    assert "Traceback" not in output
    assert output.count("the gate is 99.00%") == 1
    assert output.count("has the lowest validation loss") == 1
    assert published(tmp_path) == []


def test_a_prefect_server_that_is_not_there_is_one_sentence(environment, tmp_path):
    status, output = run(environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, tmp_path)

    assert status == 1
    assert "start that Prefect server, or unset PREFECT_API_URL" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_ctrl_c_in_a_terminal_ends_a_run_at_once_though_it_reaches_prefects_server_too(
    environment, tmp_path
):
    with subprocess.Popen(
        RUN, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "epoch 1 of 2" in line and process.returncode is None:  # it may be said twice
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)
    output = "".join(lines)

    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "stopped; nothing was published" in output
