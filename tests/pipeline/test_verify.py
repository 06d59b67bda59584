import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import config, parity, publish, verify
from pipeline.errors import ParityError, PublishError
from service import bundle

ASKER = """
import sys, time
from pathlib import Path
from pipeline import verify
with verify.server(Path(sys.argv[1])) as address:
    print(address, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory, data, trained, scores, exports, checked):
    """A staged bundle of the real model; not to be changed."""
    settings = config.build("smoke", {"publishing": {"models": tmp_path_factory.mktemp("models")}})
    folder = tmp_path_factory.mktemp("staged")
    return publish.stage(folder, "run-1", settings, data, trained, scores, exports, checked)


@pytest.fixture
def staged(original, tmp_path):
    repository = shutil.copytree(original.repository, tmp_path / "staged")
    return replace(original, repository=repository, path=repository / "fashion-mnist-smoke" / "1")


def report_of(checked, variant):
    return next(path for path in checked.reports if path.stem == variant)


def rewrite(staged, name, content):
    """Change a file of a staged bundle and its entry in the manifest, as a wrong stage would."""
    (staged.path / name).write_bytes(content)
    manifest = bundle.read_manifest(staged.path)
    entry = next(file for file in manifest.files if file.path == name)
    entry.sha256, entry.size_bytes = bundle.sha256(content), len(content)
    publish.write_manifest(staged.path, manifest)


def test_the_served_model_answers_like_the_file_it_loaded(staged, checked, data, tmp_path):
    report = parity.read_report(verify.ask(staged, checked, data, tmp_path))
    unserved = parity.read_report(report_of(checked, "onnx-float32"))

    assert report.passed
    assert report.accuracy.rows == 10_000
    assert report.accuracy == unserved.accuracy
    assert report.agreement == unserved.agreement
    assert report.logits.max == pytest.approx(unserved.logits.max, abs=1e-6)


def test_float16_can_be_served_within_its_own_budget(
    tmp_path, data, trained, scores, exports, checked
):
    settings = config.build("smoke", {"publishing": {"models": tmp_path / "models"}})
    other = replace(checked, served_variant="onnx-float16", precision="float16")
    staged = publish.stage(
        tmp_path / "staged", "run-1", settings, data, trained, scores, exports, other
    )

    report = parity.read_report(verify.ask(staged, other, data, tmp_path))

    assert report.passed
    assert report.budget.precision == "float16"
    assert report.accuracy == parity.read_report(report_of(checked, "onnx-float16")).accuracy


def test_a_server_that_answers_otherwise_than_its_file_is_refused(staged, checked, data, tmp_path):
    with np.load(checked.answers) as arrays:
        answers = dict(arrays)
    answers["onnx-float32"] = answers["onnx-float32"] + np.float32(1e-5)
    np.savez(tmp_path / "answers.npz", **answers)

    with pytest.raises(ParityError, match=r"1e-05 from those of the file it loaded, expected"):
        verify.ask(staged, replace(checked, answers=tmp_path / "answers.npz"), data, tmp_path)


def test_a_reference_of_another_model_is_refused(staged, checked, data, tmp_path):
    with np.load(checked.answers) as arrays:
        answers = dict(arrays)
    answers["reference"] = answers["reference"][:, ::-1]
    np.savez(tmp_path / "answers.npz", **answers)

    with pytest.raises(ParityError, match=r"nothing is published, as served: max .Δlogit. is"):
        verify.ask(staged, replace(checked, answers=tmp_path / "answers.npz"), data, tmp_path)


def test_a_bundle_that_the_server_refuses_is_refused_with_the_servers_reason(
    staged, checked, data, tmp_path
):
    rewrite(staged, "model.onnx", (staged.path / "model.onnx").read_bytes()[:1_000])

    with pytest.raises(
        PublishError, match=r"the server did not start: .*model.onnx is not an ONNX model"
    ):
        verify.ask(staged, checked, data, tmp_path)


def test_a_damaged_file_is_refused_by_name(staged, checked, data, tmp_path):
    (staged.path / "variants" / "model.float32.tflite").write_bytes(b"cut")

    with pytest.raises(
        PublishError, match=r"fashion-mnist-smoke/1/variants/model.float32.tflite has 3"
    ):
        verify.ask(staged, checked, data, tmp_path)


def test_the_server_is_another_process_on_a_port_of_its_own(staged):
    with verify.server(staged.repository) as first, verify.server(staged.repository) as second:
        assert first != second
        assert first.startswith("127.0.0.1:")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_no_server_outlives_a_run_that_was_killed(staged):
    with subprocess.Popen(
        [sys.executable, "-c", ASKER, str(staged.repository)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as asker:
        assert asker.stdout.readline().startswith("127.0.0.1:")
        servers = Path(f"/proc/{asker.pid}/task/{asker.pid}/children").read_text().split()
        asker.send_signal(signal.SIGKILL)
        asker.wait()
        until = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in servers) and time.monotonic() < until:
            time.sleep(0.05)

    assert len(servers) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers)
