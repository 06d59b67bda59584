import hashlib
import io
import logging
import os
import re
from datetime import datetime

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from onnx import TensorProto, helper

from protos import bundle_pb2
from service.errors import (
    BundleError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
)
from service.repository import Repository, cpu_name, load_version, scan
from service.session import RUNTIME


def refusal(path):
    with pytest.raises(BundleError) as caught:
        load_version(path, threads=1, max_batch_rows=8)
    return str(caught.value)


def resign(path, file, content):
    """Replace a file of a bundle and sign it again."""
    (path / file).write_bytes(content)
    manifest = bundle_pb2.BundleManifest()
    json_format.Parse((path / "manifest.json").read_text(), manifest)
    entry = next(entry for entry in manifest.files if entry.path == file)
    entry.sha256, entry.size_bytes = hashlib.sha256(content).hexdigest(), len(content)
    (path / "manifest.json").write_text(json_format.MessageToJson(manifest))


def change_golden(path, **changes):
    with np.load(path / "golden.npz") as arrays:
        changed = {**arrays, **changes}
    file = io.BytesIO()
    np.savez(file, **changed)
    resign(path, "golden.npz", file.getvalue())


def corrupt(path):
    """Change a byte of a bundle's model after it was published."""
    content = bytearray((path / "model.onnx").read_bytes())
    content[-1] ^= 1
    (path / "model.onnx").write_bytes(content)


def test_versions_are_found_by_name_and_rising_number(tmp_path):
    for version in ("b/10", "b/9", "a/1", "b/999999999"):
        (tmp_path / version).mkdir(parents=True)

    assert [(found.name, found.number, found.path) for found in scan(tmp_path)] == [
        ("a", 1, tmp_path / "a/1"),
        ("b", 9, tmp_path / "b/9"),
        ("b", 10, tmp_path / "b/10"),
        ("b", 999999999, tmp_path / "b/999999999"),
    ]


def test_hidden_padded_non_numeric_and_linked_folders_and_files_are_passed_over(tmp_path):
    for folder in (
        "m/01",
        "m/0",
        "m/.2",
        "m/latest",
        "m/-1",
        "m/1.0",
        "m/1234567890",
        ".m/1",
        "a b/1",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "m/7").write_text("a file")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "m/8").symlink_to(tmp_path / "m/01")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    (tmp_path / "m/3").mkdir()

    assert [(found.name, found.number) for found in scan(tmp_path)] == [("m", 3)]


def test_repository_that_is_not_there_or_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    for name, reason in (("none", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(RepositoryError) as caught:
            scan(tmp_path / name)
        assert str(caught.value) == (
            f"repository {tmp_path / name} cannot be read: {reason}; "
            "publish into it with: train-export run, or name another with --repository"
        )


def test_empty_repository_is_refused(tmp_path):
    with pytest.raises(RepositoryError) as caught:
        Repository(tmp_path, threads=1, max_batch_rows=8).load()

    assert str(caught.value) == (
        f"{tmp_path} holds no bundle (NAME/VERSION/manifest.json); "
        "publish one with: train-export run"
    )


def test_repository_in_which_everything_is_refused_is_refused_with_the_reasons(make_bundle, load):
    path = make_bundle()
    (path / "model.onnx").unlink()
    make_bundle(version=2).joinpath("model.onnx").unlink()

    with pytest.raises(RepositoryError) as caught:
        load(path)

    assert str(caught.value) == (
        f"nothing in {path.parents[1]} can be served: "
        "tiny/1/model.onnx is missing, or not a plain file; publish it again; "
        "tiny/2/model.onnx is missing, or not a plain file; publish it again"
    )


def test_highest_version_that_is_ready_answers_by_default(make_bundle, load):
    for version in (9, 10, 2):
        make_bundle(version=version)
    corrupt(path := make_bundle(version=11))

    repository = load(path)

    assert repository.get("tiny", "").number == 10
    assert [repository.get("tiny", number).number for number in ("2", "9", "09")] == [2, 9, 9]
    assert [version.number for version in repository.versions()] == [2, 9, 10]
    assert list(repository.refused()) == [("tiny", 11)]
    assert repository.loading() == []


def test_unknown_refused_and_malformed_versions_each_have_their_error(make_bundle, load):
    make_bundle()
    corrupt(make_bundle(version=2))
    corrupt(path := make_bundle(name="broken"))
    repository = load(path)

    for name, version, kind, message in (
        ("none", "", ModelNotFoundError, "Request for unknown model: 'none' is not found"),
        ("none", "1", ModelNotFoundError, "Request for unknown model: 'none' is not found"),
        ("", "", ModelNotFoundError, "Request for unknown model: '' is not found"),
        (
            "tiny",
            "3",
            ModelNotFoundError,
            "Request for unknown model: 'tiny' version 3 is not found",
        ),
        (
            "tiny",
            "2",
            ModelNotReadyError,
            "Request for unknown model: 'tiny' version 2 is not at ready state",
        ),
        (
            "broken",
            "",
            ModelNotReadyError,
            "Request for unknown model: 'broken' has no available versions",
        ),
    ):
        with pytest.raises(kind) as caught:
            repository.get(name, version)
        assert str(caught.value) == message


@pytest.mark.parametrize("version", ["x", "-1", "1.0", " 1", "1\n", "٣", "1" * 19])
def test_version_that_is_not_a_number_is_refused(repository, version):
    with pytest.raises(InvalidRequestError) as caught:
        repository.get("tiny", version)

    assert str(caught.value) == (
        f"failed to get model version from specified version string '{version}'; "
        "expected a whole number"
    )


def test_longest_version_that_is_a_number_is_merely_not_found(repository):
    with pytest.raises(ModelNotFoundError):
        repository.get("tiny", "1" * 18)


def test_server_is_ready_when_every_model_has_a_version_that_answers(make_bundle, load):
    corrupt(path := make_bundle(version=2))
    make_bundle()
    repository = Repository(path.parents[1], threads=1, max_batch_rows=8)
    assert not repository.is_ready()

    assert load(path).is_ready()

    corrupt(make_bundle(name="broken"))
    assert not load(path).is_ready()


def test_version_that_is_still_loading_is_listed_and_not_ready(make_bundle):
    make_bundle()
    path = make_bundle(version=2)
    repository = Repository(path.parents[1], threads=1, max_batch_rows=8)
    seen = []

    class Watch(logging.Handler):
        def emit(self, record):
            seen.append((repository.loading(), repository.is_ready()))
            with pytest.raises(ModelNotReadyError):
                repository.get("tiny", "2")

    logger = logging.getLogger("service.repository")
    watch = Watch(logging.INFO)
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    try:
        repository.load()
    finally:
        logger.removeHandler(watch)
        logger.setLevel(level)

    assert seen[0] == ([("tiny", 1), ("tiny", 2)], False)
    assert repository.is_ready()


def test_ready_version_carries_its_manifest_and_self_check(make_bundle):
    version = load_version(make_bundle(version=3), threads=2, max_batch_rows=5)

    check = version.self_check
    assert (version.name, version.number) == ("tiny", 3)
    assert check.report.passed
    assert (check.report.variant, check.report.runtime) == ("self-check", RUNTIME)
    assert check.report.path == "model.onnx"
    assert check.report.accuracy.rows == 12
    assert check.report.hostile.rows == 5
    assert check.threads == 2
    assert check.seconds > 0
    assert check.cpu == cpu_name() != ""
    assert datetime.fromisoformat(check.checked).utcoffset() is not None


def test_model_that_does_not_agree_with_its_golden_set_is_refused(make_bundle, tiny):
    path = make_bundle(model=tiny.model(np.array([127, -127, 0.1], np.float32)))

    message = refusal(path)

    assert re.fullmatch(
        r"tiny/1 fails its self-check on this host: "
        r"max \|Δlogit\| is 0\.1, over the float32 budget of [0-9.e-]+",
        message,
    )


def test_model_that_does_not_agree_on_hostile_inputs_is_refused(make_bundle):
    path = make_bundle()
    change_golden(path, hostile_logits=np.zeros((5, 3), np.float32))

    assert "max |Δlogit| on hostile inputs is" in refusal(path)


def test_golden_set_that_is_not_finite_is_refused_without_a_warning(make_bundle):
    path = make_bundle()
    change_golden(path, hostile_logits=np.full((5, 3), np.inf, np.float32))

    assert refusal(path) == "tiny/1 fails its self-check on this host: a logit is not finite"


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((0, 2, 2, 1), np.uint8)},
        {"images": np.zeros((), np.uint8)},
        {"hostile_images": np.zeros((0, 2, 2, 1), np.uint8)},
        {"labels": np.zeros(3, np.int64)},
        {"labels": np.zeros((12, 1), np.int64)},
        {"labels": np.zeros((), np.int64)},
        {"labels": np.array(["x"] * 12)},
        {"logits": np.zeros((12, 2), np.float32)},
        {"logits": np.zeros((), np.float32)},
        {"hostile_logits": np.zeros((4, 3), np.float32)},
        {"hostile_logits": np.array([["x"] * 3] * 5)},
    ],
    ids=str,
)
def test_golden_set_of_the_wrong_shape_is_refused(make_bundle, changes):
    path = make_bundle()
    change_golden(path, **changes)

    assert "golden set" in refusal(path)


def test_golden_images_of_another_datatype_are_refused(make_bundle, load, caplog):
    path = make_bundle()
    change_golden(path, images=np.zeros((12, 2, 2, 1), np.float32))
    make_bundle(version=2)

    assert "cannot run the model" in load(path).refused()["tiny", 1]


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: setattr(manifest, "served_variant", "onnx-int8"),
        lambda manifest: setattr(manifest.parity[0].budget, "precision", "int4"),
        lambda manifest: manifest.ClearField("parity"),
    ],
)
def test_bundle_without_a_report_of_its_served_variant_is_refused(make_bundle, edit):
    message = refusal(make_bundle(edit=edit))

    assert re.fullmatch(
        "tiny/1 has no parity report of its served variant 'onnx-[a-z0-9]+'; publish it again",
        message,
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: setattr(manifest.input, "name", "pixels"),
        lambda manifest: setattr(manifest.input, "datatype", "FP32"),
        lambda manifest: manifest.input.shape.append(1),
        lambda manifest: setattr(manifest.outputs[0], "name", "scores"),
        lambda manifest: manifest.outputs.pop(),
    ],
)
def test_model_whose_tensors_are_not_the_manifests_is_refused(make_bundle, edit):
    assert refusal(make_bundle(edit=edit)).startswith("tiny/1/model.onnx has the tensors [(")


def identity(shape, name="logits"):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], [name])],
        "identity",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def with_shape(shape, name="logits"):
    def edit(manifest):
        del manifest.outputs[:]
        wire = [size if isinstance(size, int) else -1 for size in shape]
        manifest.input.CopyFrom(bundle_pb2.TensorSpec(name="image", datatype="FP32", shape=wire))
        manifest.outputs.add(name=name, datatype="FP32", shape=wire)

    return edit


@pytest.mark.parametrize("shape", [[4, 3], ["batch", "classes"], []])
def test_model_whose_only_open_size_is_not_the_batch_is_refused(make_bundle, shape):
    message = refusal(make_bundle(model=identity(shape), edit=with_shape(shape)))

    assert message.endswith("expected -1 for the batch, and every other size fixed")


def test_model_without_logits_is_refused(make_bundle):
    shape = ["batch", 3]
    path = make_bundle(model=identity(shape, "answer"), edit=with_shape(shape, "answer"))

    assert refusal(path) == "tiny/1 has no output 'logits' to be checked by"


def test_refused_bundles_do_not_stop_the_rest_and_their_reasons_name_no_path(
    make_bundle, load, tiny
):
    corrupt(make_bundle(name="digest"))
    make_bundle(name="missing").joinpath("golden.npz").unlink()
    make_bundle(name="manifest").joinpath("manifest.json").write_text("{")
    make_bundle(name="unread").joinpath("manifest.json").unlink()
    make_bundle(name="leaves", edit=lambda manifest: manifest.files.add(path="../../x"))
    make_bundle(name="long", edit=lambda manifest: manifest.files.add(path="x" * 300))
    make_bundle(name="format", edit=lambda manifest: setattr(manifest, "format", 2))
    make_bundle(name="model", model=b"not a model")
    make_bundle(name="parity", model=tiny.model(np.zeros(3, np.float32)))
    make_bundle(name="lone").rename(make_bundle(name="renamed").parent / "2")
    path = make_bundle()

    repository = load(path)

    reasons = repository.refused()
    assert [version.name for version in repository.versions()] == ["renamed", "tiny"]
    assert {name for name, _ in reasons} == {
        *("digest", "missing", "manifest", "unread", "leaves", "long", "format", "model"),
        *("parity", "renamed"),
    }
    for reason in reasons.values():
        assert str(path.parents[1]) not in reason
        assert "\n" not in reason.strip()
        assert reason
    assert not repository.is_ready()


def test_cpu_has_a_name():
    assert cpu_name()


def test_versions_still_to_be_loaded_are_named_and_refused_as_not_ready(make_bundle):
    root = make_bundle().parents[1]
    make_bundle(version=2)
    repository = Repository(root, threads=1, max_batch_rows=8)
    seen = []

    def look():
        with pytest.raises(ModelNotReadyError, match="version 2 is not at ready state"):
            repository.get("tiny", "2")
        seen.append((repository.loading(), repository.is_ready()))
        return False

    repository.load(until=look)

    assert seen == [([("tiny", 1), ("tiny", 2)], False), ([("tiny", 2)], False)]
    assert repository.is_ready()


def test_loading_ends_when_it_is_told_to(make_bundle):
    make_bundle(version=2)
    repository = Repository(make_bundle().parents[1], threads=1, max_batch_rows=8)

    repository.load(until=lambda: bool(repository.versions()))

    assert [version.number for version in repository.versions()] == [1]


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_manifest_that_is_not_a_plain_file_is_refused_without_waiting_for_it(make_bundle, kind):
    path = make_bundle()
    manifest = path / "manifest.json"
    moved = manifest.rename(path.parents[1] / "elsewhere.json")
    if kind == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.symlink_to(moved)

    with pytest.raises(BundleError, match=r"tiny/1/manifest.json is missing, or not a plain file"):
        load_version(path, threads=1, max_batch_rows=8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_model_folder_that_cannot_be_read_is_passed_over_and_the_rest_is_served(
    make_bundle, load, caplog
):
    path = make_bundle()
    closed = make_bundle(name="closed").parent
    closed.chmod(0)

    assert [version.name for version in load(path).versions()] == ["tiny"]
    assert "model passed over" in caplog.text
    closed.chmod(0o700)
