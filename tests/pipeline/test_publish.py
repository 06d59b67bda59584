import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from pipeline import config, dataset, parity, publish
from pipeline.errors import PublishError
from service import agreement, bundle, model_config
from service.settings import Settings

STAGER = """
import os, signal, sys
from pathlib import Path
from pipeline import publish
from pipeline.config import PublishConfig
with publish.staging(PublishConfig(models=Path(sys.argv[1]))) as folder:
    (folder / "half").write_bytes(b"written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def settings(tmp_path):
    return config.build("smoke", {"publishing": {"models": tmp_path / "models"}})


@pytest.fixture
def stage(settings, data, trained, scores, exports, checked):
    """Return a function that stages the real model."""

    def stage_into(folder):
        return publish.stage(folder, "run-1", settings, data, trained, scores, exports, checked)

    return stage_into


@pytest.fixture
def served(checked):
    """A served report that passed."""
    return next(report for report in checked.reports if report.stem == "onnx-float32")


@pytest.fixture
def publish_once(stage, served, settings):
    def once():
        with publish.staging(settings.publishing) as folder:
            return publish.publish(stage(folder), served, settings.publishing)

    return once


def visible(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if not path.name.startswith("."))


def test_the_published_bundle_is_read_by_the_code_that_serves(publish_once):
    published = publish_once()

    content = bundle.read(published.path)

    assert (content.manifest.name, content.manifest.version) == ("fashion-mnist-smoke", 1)
    assert content.manifest.served.passed
    assert len(content.golden.inputs) == 200
    assert np.bincount(content.golden.labels).tolist() == [20] * 10


def test_the_manifest_lists_every_file_there_is(publish_once):
    path = publish_once().path

    listed = {file.path for file in bundle.read_manifest(path).files}
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}

    assert listed == there - {"manifest.json"}
    assert {"model.onnx", "golden.npz", "variants/model.float32.tflite"} < listed


def test_the_page_is_of_the_version_it_is_in_and_shows_what_was_measured(publish_once):
    pages = [(publish_once().path / "report.html").read_text() for _ in range(2)]

    for number, text in enumerate(pages, start=1):
        assert f"version {number}</small>" in text
        for section in ("classes", "calibration", "first-layer", "mistakes", "parity", "serving"):
            assert f'<section id="{section}">' in text
        assert "onnx-float32 over gRPC" in text  # the fixture gives its report as the served one


def test_a_second_try_to_publish_lists_the_page_once(stage, served, settings):
    in_the_way = settings.publishing.models / settings.publishing.name / "config.pbtxt"
    with publish.staging(settings.publishing) as folder:
        staged = stage(folder)
        in_the_way.mkdir(parents=True)
        with pytest.raises(PublishError):
            publish.publish(staged, served, settings.publishing)
        in_the_way.rmdir()
        path = publish.publish(staged, served, settings.publishing).path

    listed = [file.path for file in bundle.read(path).manifest.files]
    assert listed.count("report.html") == 1
    assert listed == sorted(listed, key=lambda file: Path(file).parts)


def test_a_page_that_cannot_be_made_keeps_no_proven_model_back(stage, served, settings):
    with publish.staging(settings.publishing) as folder:
        staged = stage(folder)
        (staged.path / "report.npz").write_bytes(b"damaged")
        manifest = bundle.read_manifest(staged.path)
        (listed,) = [file for file in manifest.files if file.path == "report.npz"]
        listed.sha256, listed.size_bytes = bundle.sha256(b"damaged"), 7
        publish.write_manifest(staged.path, manifest)
        path = publish.publish(staged, served, settings.publishing).path

    assert "report.html" not in {file.path for file in bundle.read(path).manifest.files}


def test_every_report_says_where_its_file_is(publish_once):
    path = publish_once().path

    reports = bundle.read_manifest(path).parity

    assert len(reports) == 9
    for report in reports:
        assert parity.size_bytes(path / report.path) == report.size_bytes


def test_what_failed_is_in_the_manifest_and_its_file_is_not_in_the_bundle(
    overflowing, settings, data
):
    trained, scores, exports, checked = overflowing

    with publish.staging(settings.publishing) as folder:
        staged = publish.stage(folder, "run-1", settings, data, trained, scores, exports, checked)
        manifest = bundle.read(staged.path).manifest

    reports = {report.variant: report for report in manifest.parity}
    failed = {name for name, report in reports.items() if not report.passed}
    listed = {file.path for file in manifest.files}
    assert {"tflite-float16", "onnx-float16"} <= failed
    assert {(reports[name].path, bool(reports[name].failure)) for name in failed} == {("", True)}
    for name in reports:
        path = exports.named(name).path
        there = any(file.startswith(f"variants/{path.name}") for file in listed)
        assert there == (name not in failed)


def test_the_bundle_says_which_images_it_was_calibrated_with(publish_once, exports):
    path = publish_once().path

    assert (path / "variants/calibration.json").read_bytes() == exports.calibration.read_bytes()


def test_the_manifest_tells_how_the_test_images_are_distributed(publish_once, checked, data):
    found = bundle.read_manifest(publish_once().path).test_distribution

    with np.load(checked.answers) as answers:
        images = dataset.load(data).test.inputs
        assert found == agreement.distribution(answers["reference"], images)
    assert sum(found.predicted) == sum(found.pixel_mean) == 10_000


def test_another_variant_can_be_served_with_its_own_options(
    settings, data, trained, scores, exports, checked
):
    config_of_int8 = (("session.x64quantprecision", "1"),)
    other = replace(exports.named("onnx-int8"), session=config_of_int8)
    changed = replace(exports, variants=(*exports.variants[:-1], other))

    with publish.staging(settings.publishing) as folder:
        staged = publish.stage(
            folder, "run-1", settings, data, trained, scores, changed,
            replace(checked, served_variant="onnx-int8", precision="int8"),
        )  # fmt: skip
        manifest = bundle.read(staged.path).manifest
        model = (staged.path / "model.onnx").read_bytes()

    assert manifest.served_variant == "onnx-int8"
    assert dict(manifest.session.config) == dict(config_of_int8)
    assert model == other.path.read_bytes()


def test_the_manifest_records_what_was_trained_on_what(publish_once, data, trained, settings):
    manifest = bundle.read_manifest(publish_once().path)

    assert manifest.dataset.sha256 == data.sha256
    assert manifest.provenance.parent_sha256 == trained.sha256
    assert manifest.training.history[0].loss == trained.history[0].loss
    assert sum(sum(row.predicted) for row in manifest.evaluation.confusion) == 10_000
    here = {"publishing": {"models": settings.publishing.models}}
    assert config.build("smoke", json.loads(manifest.training.config), here) == settings
    assert str(settings.publishing.models) not in manifest.training.config
    assert manifest.evaluation.classes[0].f1 > 0
    assert re.fullmatch(r"([0-9a-f]{40}\+?)?", manifest.provenance.git_commit)


def test_versions_only_grow(publish_once, settings):
    first, second = publish_once(), publish_once()
    (settings.publishing.models / "fashion-mnist-smoke" / "40").mkdir()

    assert (first.version, second.version, publish_once().version) == (1, 2, 41)


def test_a_version_that_was_removed_is_not_used_again(publish_once):
    first = publish_once()
    shutil.rmtree(first.path)

    assert publish_once().version == 2


def test_two_runs_that_stage_at_once_publish_two_whole_versions(stage, served, settings):
    with (
        publish.staging(settings.publishing) as mine,
        publish.staging(settings.publishing) as theirs,
    ):
        staged = [stage(mine), stage(theirs)]
        published = [publish.publish(one, served, settings.publishing) for one in staged]

    assert [one.version for one in published] == [1, 2]
    for one in published:
        assert bundle.read(one.path).manifest.version == one.version


def test_nothing_is_seen_before_it_is_published(stage, settings):
    with publish.staging(settings.publishing) as folder:
        stage(folder)

        assert visible(settings.publishing.models) == []
    assert not list(settings.publishing.models.glob(".staging-*"))


def test_a_run_that_fails_leaves_nothing(stage, settings):
    with pytest.raises(RuntimeError), publish.staging(settings.publishing) as folder:
        stage(folder)
        raise RuntimeError

    assert not list(settings.publishing.models.glob(".staging-*"))


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_by_the_next(settings):
    models = settings.publishing.models
    done = subprocess.run(
        [sys.executable, "-c", STAGER, str(models)],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    left = list(models.glob(".staging-*/half"))

    with publish.staging(settings.publishing) as folder:
        assert list(models.glob(".staging-*")) == [folder]

    assert done.returncode == -signal.SIGKILL
    assert len(left) == 1


def test_what_a_living_run_stages_is_left_alone(settings):
    with publish.staging(settings.publishing) as mine:
        with publish.staging(settings.publishing):
            pass

        assert mine.is_dir()


def test_a_model_that_was_served_wrongly_is_not_published(stage, served, settings, tmp_path):
    report = parity.read_report(served)
    report.passed, report.failure = False, "max |Δlogit| is 3"
    wrong = tmp_path / "served.json"
    wrong.write_text(json_format.MessageToJson(report))

    with (
        publish.staging(settings.publishing) as folder,
        pytest.raises(PublishError, match=r"is not to be published: max .Δlogit. is 3"),
    ):
        publish.publish(stage(folder), wrong, settings.publishing)

    assert visible(settings.publishing.models) == []


def test_a_models_folder_that_is_a_file_is_refused_with_the_option_to_change(settings):
    settings.publishing.models.write_text("a file")

    with (
        pytest.raises(
            PublishError, match=r"models cannot be written to: .*name another with --mod"
        ),
        publish.staging(settings.publishing),
    ):
        pass


def test_a_home_that_is_a_file_is_refused_and_kept(stage, served, settings):
    with publish.staging(settings.publishing) as folder:
        staged = stage(folder)
        (settings.publishing.models / "fashion-mnist-smoke").write_text("a file")

        with pytest.raises(PublishError, match="fashion-mnist-smoke cannot be written to"):
            publish.publish(staged, served, settings.publishing)


def test_triton_is_told_the_same_tensors(publish_once):
    path = publish_once().path

    text = (path.parent / "config.pbtxt").read_text()

    assert 'name: "fashion-mnist-smoke"' in text
    assert '{ name: "image", data_type: TYPE_UINT8, dims: [ 28, 28, 1 ] }' in text
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ 10 ] }' in text


@pytest.mark.parametrize("policy", ["latest:1", "latest:3", "all"])
def test_what_triton_is_told_changes_nothing_for_our_own_server(publish_once, policy):
    usual = model_config.of_server(Settings(repository=Path(), version_policy=policy), cores=2)

    assert model_config.read(publish_once().path.parent, usual) == usual


def test_what_somebody_has_edited_for_triton_is_kept(publish_once):
    path = publish_once().path.parent / "config.pbtxt"
    path.write_text("max_batch_size: 8\n")

    assert publish_once().version == 2
    assert path.read_text() == "max_batch_size: 8\n"


def test_what_nobody_has_edited_for_triton_follows_the_model(publish_once):
    first = publish_once().path
    path, now = first.parent / "config.pbtxt", (first.parent / "config.pbtxt").read_text()
    manifest = bundle.read_manifest(first)
    manifest.outputs[0].name = "scores"  # as the network was then
    publish.write_manifest(first, manifest)
    path.write_text(publish.triton_config(manifest))

    publish_once()

    assert "scores" not in path.read_text()
    assert path.read_text() == now


def test_outside_a_git_checkout_the_commit_is_left_empty(tmp_path):
    assert publish.git_commit(tmp_path) == ""


def test_a_changed_checkout_is_marked(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = publish.git_commit(tmp_path)
    (tmp_path / "new").write_text("")

    assert re.fullmatch("[0-9a-f]{40}", clean)
    assert publish.git_commit(tmp_path) == f"{clean}+"


def test_a_disk_that_is_full_while_staging_is_one_sentence(stage, settings, monkeypatch):
    copied = shutil.copyfile

    def full(source, target, **options):
        copied(source, target, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with publish.staging(settings.publishing) as folder, pytest.raises(PublishError) as caught:
        stage(folder)

    said = str(caught.value)
    assert said.startswith(f"{settings.publishing.models} cannot be written to: No space left on")


def test_of_a_folder_that_cannot_be_copied_the_first_reason_is_told(tmp_path):
    failed = shutil.Error([("a", "b", "No space left on device"), ("c", "d", "another")])

    with (
        pytest.raises(PublishError, match=r"cannot be written to: No space left on device$"),
        publish._writing(tmp_path),
    ):
        raise failed
