import json
import os
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.answering import answers
from pipeline.errors import CheckError
from service import bundle
from service.errors import BundleError


def ask(path, *questions):
    """Return what is said to some questions."""
    said: list[dict[str, Any]] = []
    lines = [one if isinstance(one, str) else json.dumps(one) for one in questions]
    answers.answer(path, lines, said.append)
    return said


def test_every_question_is_answered_by_every_variant(make_bundle, tiny):
    images = tiny.images(3)
    questions = [{"id": place, "rows": images[place:].tolist()} for place in (0, 2)]

    names, *said = ask(make_bundle(), *questions)

    assert names == {"variants": ["onnx-float32"]}
    assert [(one["id"], one["variant"]) for one in said] == [
        (0, "onnx-float32"),
        (2, "onnx-float32"),
    ]
    assert [one["outputs"] for one in said] == [
        tiny.logits(images[place:]).tolist() for place in (0, 2)
    ]
    assert all(one["seconds"] > 0 for one in said)


def test_the_time_is_the_best_of_several_calls(make_bundle, tiny, monkeypatch):
    times_s = iter([0, 5, 10, 12, 20, 29])  # 5 s, 2 s and 9 s
    clock = SimpleNamespace(monotonic=lambda: next(times_s))
    monkeypatch.setattr(answers, "time", clock)
    path = make_bundle()
    (variant,) = answers._variants(path, bundle.read_manifest(path))
    group = answers._Group([], "logits", lambda _: None)

    assert group._answer(variant, tiny.images(1))["seconds"] == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("hello", "Expecting value"),
        ("3", "not subscriptable"),
        ("{}", "'rows'"),
        ('{"rows": [[1, 2]]}', r"have the shape [1, 2], expected [rows, 2, 2, 1]"),
        ('{"rows": []}', "have the shape [0]"),
        ('{"rows": [[[[1], [2]], [[3], [256]]]]}', "have values that are no uint8"),
        ('{"rows": [[[[1], [2]], [[3], [0.5]]]]}', "have values that are no uint8"),
    ],
)
def test_what_is_no_question_is_said_and_the_next_is_answered(make_bundle, tiny, line, why):
    _, refused, answered = ask(make_bundle(), line, {"rows": tiny.images(1).tolist()})

    assert why in refused["error"]
    assert answered["id"] is None
    assert "outputs" in answered


def test_a_variant_that_cannot_be_run_answers_why(make_bundle, tiny, tmp_path):
    def edit(manifest):
        content = (tmp_path / "models/tiny/1/model.onnx").read_bytes()
        (tmp_path / "models/tiny/1/broken.onnx").write_bytes(b"no model")
        assert content
        manifest.files.add(
            path="broken.onnx", sha256=bundle.sha256(b"no model"), size_bytes=len(b"no model")
        )
        report = manifest.parity.add()
        report.CopyFrom(manifest.parity[0])
        report.variant, report.path = "onnx-int8", "broken.onnx"

    _, *said = ask(make_bundle(edit=edit), {"id": 1, "rows": tiny.images(1).tolist()})

    by_variant = {one["variant"]: one for one in said}
    assert "cannot be loaded" in by_variant["onnx-int8"]["error"]
    assert "outputs" in by_variant["onnx-float32"]


def test_only_what_was_published_and_has_a_digest_is_asked(make_bundle):
    def edit(manifest):
        for name, path, passed in (
            ("refused", "model.onnx", False),
            ("gone", "gone.onnx", True),
            ("nowhere", "", True),
            ("unlisted", "folder", True),
        ):
            report = manifest.parity.add()
            report.CopyFrom(manifest.parity[0])
            report.variant, report.path, report.passed = name, path, passed

    path = make_bundle(edit=edit)
    (path / "folder").mkdir()
    (path / "folder" / "more").write_bytes(b"")

    assert ask(path) == [{"variants": ["onnx-float32"]}]


def test_a_bundle_that_is_not_whole_is_refused(make_bundle):
    path = make_bundle()
    (path / "model.onnx").write_bytes(b"")

    with pytest.raises(BundleError, match=r"model\.onnx has 0 bytes"):
        ask(path)


def test_nobody_waits_for_answers_that_nobody_wants(make_bundle, tiny):
    begun, go_on = threading.Event(), threading.Event()

    def say(message):
        begun.set()
        go_on.wait(60)

    variant = answers._variants(path := make_bundle(), bundle.read_manifest(path))
    group = answers._Group(variant, "logits", say)
    group.ask(answers.Question(1, tiny.images(1)))
    begun.wait(60)

    group.finish(wanted=lambda: False)

    go_on.set()
    group.finish(wanted=lambda: True)


def test_the_runtime_of_tflite_is_started_again_after_a_crash(tiny, tmp_path):
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    lite = answers._LiteProcess([broken])

    with pytest.raises(CheckError, match="TFLite's runtime says"):
        lite.run(0, tiny.images(1))
    lite._process.kill()
    with pytest.raises(CheckError, match="TFLite's runtime ended with status -9"):
        lite.run(0, tiny.images(1))
    with pytest.raises(CheckError, match="TFLite's runtime says"):
        lite.run(0, tiny.images(1))

    assert lite.close() == lite.close() == 0


def test_the_command_keeps_standard_output_for_answers(make_bundle, tiny):
    command = [sys.executable, "-m", "pipeline", "answer", "--bundle"]
    run = partial(
        subprocess.run, capture_output=True, text=True, env={**os.environ, "COLUMNS": "99"}
    )
    question = json.dumps({"id": "a", "rows": tiny.images(1).tolist()})

    done = run([*command, str(make_bundle())], input=f"{question}\n")
    refused = run([*command, "nothing/1"], input="")

    names, answer = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, names) == (0, {"variants": ["onnx-float32"]})
    assert answer["outputs"] == tiny.logits(tiny.images(1)).tolist()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there is no bundle nothing/1" in refused.stderr


def test_every_runtime_answers_as_the_original(exports, data):
    """The real variants; TFLite in the process beside, TensorFlow in a thread."""
    from pipeline import dataset
    from pipeline.answering.answers import Variant

    images = dataset.load(data).test.inputs[:2]
    variants = [Variant(one.name, one.path, None) for one in exports.variants]
    said: list[dict[str, Any]] = []
    groups = [
        answers._Group(alike, "logits", said.append) for alike in answers._by_runtime(variants)
    ]
    for group in groups:
        for turn in range(2):
            group.ask(answers.Question(turn, images))
    for group in groups:
        group.finish(wanted=lambda: True)

    assert len(groups) == 3
    assert len(said) == 2 * len(variants)
    found = {one["variant"]: np.array(one["outputs"]) for one in said if one["id"] == 1}
    classes = {tuple(one.argmax(axis=1)) for one in found.values()}
    assert len(classes) == 1
    assert np.abs(found["tflite-float32"] - found["saved-model"]).max() < 1e-3
