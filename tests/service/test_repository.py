import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos import inference_pb2
from service import aliases, version
from service.errors import (
    BundleError,
    InvalidRequestError,
    LoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
    ServiceError,
)
from service.model_config import VersionPolicy
from service.repository import fingerprint, scan
from service.rpc import INFER, Rpc
from service.statistics import Figure

WAIT_S = 60


def until(condition):
    """Wait for what another thread does."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def damage(path):
    """Change a byte of a bundle's model after it was published; return the bundle's folder."""
    content = bytearray((path / "model.onnx").read_bytes())
    content[-1] ^= 1
    (path / "model.onnx").write_bytes(content)
    return path


def touch(path):
    """Give a file another time, as a change of its content would."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def ready(repository):
    return [(served.name, served.number) for served in repository.versions()]


def states(repository):
    return {(name, number): state for name, number, state, _ in repository.states()}


def reasons(repository):
    return {(name, number): reason for name, number, _, reason in repository.states() if reason}


def figures(repository):
    return {(one.name, one.version): one for one in repository.statistics.snapshots()}


class Loads:
    """`version.load` that remembers what it was asked for; may be held, and may go wrong."""

    def __init__(self):
        self.asked = []
        self.error: Exception | None = None
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.during = lambda: None

    def __call__(self, path, options):
        self.asked.append((path.parent.name, int(path.name)))
        self.entered.release()
        self.during()
        assert self.open.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return version.load(path, options)


class Held:
    """The session of a version whose answers are held back."""

    def __init__(self, session):
        self._session = session
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def run(self, batch):
        self.entered.release()
        assert self.open.wait(WAIT_S)
        return self._session.run(batch)


@pytest.fixture
def loads():
    return Loads()


@pytest.fixture
def held():
    """Return the held sessions by name and number, and a function that loads a version with one."""
    sessions = {}

    def load(path, options):
        loaded = version.load(path, options)
        session: Any = Held(loaded.session)
        sessions[f"{path.parent.name} {path.name}"] = session
        return replace(loaded, session=session)

    yield sessions, load
    for session in sessions.values():
        session.open.set()


@pytest.fixture
def begin(infer, tiny, asked):
    """Return a function that begins a call of ModelInfer on a repository's only model."""

    def begin(rpc, model_version="", rows=1):
        request = infer(tiny.images(rows), model_version=model_version)
        call = asked(INFER, request.SerializeToString())
        rpc.begin(call)
        return call

    return begin


def answered(call):
    return inference_pb2.ModelInferResponse.FromString(call.result()).model_version


# What is in the folder


def test_versions_are_found_by_name_and_number(tmp_path):
    for number in ("b/10", "b/9", "a/1", "b/999999999"):
        (tmp_path / number).mkdir(parents=True)

    assert scan(tmp_path) == {
        "a": {1: tmp_path / "a/1"},
        "b": {number: tmp_path / "b" / str(number) for number in (9, 10, 999999999)},
    }


def test_hidden_padded_non_numeric_and_linked_folders_and_files_are_passed_over(tmp_path):
    for folder in (
        *("m/01", "m/0", "m/.2", "m/latest", "m/-1", "m/1.0", "m/1234567890", "m/\u0663"),
        *(".m/1", "a b/1", "n\n/1", "empty"),
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "m/7").write_text("a file")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "m/8").symlink_to(tmp_path / "m/01")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    (tmp_path / "m/3").mkdir()

    assert scan(tmp_path) == {"m": {3: tmp_path / "m/3"}}


def test_repository_that_is_not_there_or_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    for name, reason in (("none", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(RepositoryError) as caught:
            scan(tmp_path / name)
        assert str(caught.value) == (
            f"repository {tmp_path / name} cannot be read: {reason}; "
            "publish into it with: train-export run, or name another with --repository"
        )


def test_fingerprint_changes_with_any_file_and_with_nothing_else(make_bundle):
    path = make_bundle()
    (path / "variants").mkdir()
    (path / "variants/model.tflite").write_bytes(b"1234")
    seen = [fingerprint(path)]

    assert fingerprint(path) == seen[0]
    (path / "model.onnx").read_bytes()
    assert fingerprint(path) == seen[0]
    touch(path / "variants/model.tflite")
    seen.append(fingerprint(path))
    (path / "more").write_bytes(b"")
    seen.append(fingerprint(path))
    (path / "golden.npz").unlink()
    seen.append(fingerprint(path))
    assert len(set(seen)) == 4


# Which versions are served


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        (VersionPolicy(latest=1), [10]),
        (VersionPolicy(latest=2), [9, 10]),
        (VersionPolicy(latest=9), [2, 9, 10]),
        (VersionPolicy(), [2, 9, 10]),
        (VersionPolicy(specific=(2, 7)), [2]),
        (VersionPolicy(specific=(7,)), []),
    ],
)
def test_policy_says_which_versions_are_served(make_bundle, open_repository, policy, served):
    path = [make_bundle(version=number) for number in (9, 10, 2)][-1]

    repository = open_repository(path.parents[1], policy=policy)

    assert ready(repository) == [("tiny", number) for number in served]
    others = {number: "UNAVAILABLE" for number in (2, 9, 10) if number not in served}
    assert {number: state for (_, number), state in states(repository).items()} == {
        **dict.fromkeys(served, "READY"),
        **others,
    }
    assert all(reason == "unloaded" for reason in reasons(repository).values())


def test_latest_are_the_highest_that_pass_their_checks(make_bundle, open_repository):
    path = [make_bundle(version=number) for number in (1, 2, 3, 4, 5)][-1]
    damage(path)
    damage(path.parent / "3")

    repository = open_repository(path.parents[1], policy=VersionPolicy(latest=2))

    assert ready(repository) == [("tiny", 2), ("tiny", 4)]
    assert {number for _, number in repository.refused()} == {3, 5}


def test_models_own_policy_wins(make_bundle, open_repository):
    path = [make_bundle(version=number) for number in (1, 2, 3)][-1]
    (path.parent / "config.pbtxt").write_text("version_policy { specific { versions: [1, 2] } }")

    assert ready(open_repository(path.parents[1])) == [("tiny", 1), ("tiny", 2)]


def test_empty_version_means_the_highest_that_is_ready(make_bundle, open_repository):
    for number in (9, 10, 2):
        make_bundle(version=number)
    path = damage(make_bundle(version=11))

    repository = open_repository(path.parents[1], policy=VersionPolicy())

    assert repository.get("tiny", "").number == 10
    assert [repository.get("tiny", number).number for number in ("2", "9", "09")] == [2, 9, 9]


def test_unknown_refused_unloaded_and_malformed_versions_each_have_their_error(
    make_bundle, open_repository
):
    make_bundle()
    make_bundle(version=2)
    damage(make_bundle(version=3))
    path = damage(make_bundle(name="broken"))
    repository = open_repository(path.parents[1])

    unknown = "Request for unknown model: "
    for name, number, kind, message in (
        ("none", "", ModelNotFoundError, f"{unknown}'none' is not found"),
        ("none", "1", ModelNotFoundError, f"{unknown}'none' is not found"),
        ("", "", ModelNotFoundError, f"{unknown}'' is not found"),
        ("tiny", "4", ModelNotFoundError, f"{unknown}'tiny' version 4 is not found"),
        ("tiny", "3", ModelNotReadyError, f"{unknown}'tiny' version 3 is not at ready state"),
        ("tiny", "1", ModelNotReadyError, f"{unknown}'tiny' version 1 is not at ready state"),
        ("broken", "", ModelNotReadyError, f"{unknown}'broken' has no available versions"),
    ):
        with pytest.raises(kind) as caught:
            repository.get(name, number)
        assert str(caught.value) == message


@pytest.mark.parametrize("number", ["x", "-1", "1.0", " 1", "1\n", "\u0663", "1" * 19, "champion"])
def test_version_that_is_neither_a_number_nor_an_alias_is_refused(repository, number):
    with pytest.raises(InvalidRequestError) as caught:
        repository.get("tiny", number)

    assert str(caught.value) == (
        f"failed to get model version from specified version string '{number}'; "
        "expected a whole number, or an alias"
    )


def test_longest_version_that_is_a_number_is_merely_not_found(repository):
    with pytest.raises(ModelNotFoundError):
        repository.get("tiny", "1" * 18)


def test_several_models_of_both_kinds_are_served_side_by_side(
    make_bundle, make_generic_bundle, open_repository, tiny
):
    make_bundle(name="other", version=7)
    make_generic_bundle()
    repository = open_repository(make_bundle().parents[1])

    assert ready(repository) == [("line", 1), ("other", 7), ("tiny", 1)]
    x = np.ones((2, 3), np.float32)
    line = repository.get("line", "").version.session.run(x)
    np.testing.assert_array_equal(line["y"], x)
    images = tiny.images(2)
    logits = repository.get("other", "").version.session.run(images)["logits"]
    np.testing.assert_array_equal(logits, tiny.logits(images))


def test_served_version_tells_what_it_is(repository):
    served = repository.get("tiny", "")

    assert (served.name, served.number, served.manifest.name) == ("tiny", 1, "tiny")
    assert served.self_check.report.passed
    assert served.options.max_batch_rows == 8


def test_ready_version_shows_its_check_in_the_figures(make_bundle, open_repository):
    repository = open_repository(make_bundle(version=3).parents[1])

    (one,) = repository.statistics.snapshots()
    assert (one.name, one.version, one[Figure.READY], one[Figure.REFUSED]) == ("tiny", 3, 1, 0)
    assert one[Figure.LOAD_S] > 0
    assert 0 <= one[Figure.MAX_LOGIT_DIFFERENCE] <= one[Figure.MAX_LOGIT_ALLOWED]
    assert one[Figure.AGREEMENT] == 1


# What is refused


def test_refused_bundles_do_not_stop_the_rest_and_their_reasons_name_no_path(
    make_bundle, open_repository, tiny
):
    damage(make_bundle(name="digest"))
    (make_bundle(name="missing") / "golden.npz").unlink()
    (make_bundle(name="manifest") / "manifest.json").write_text("{")
    (make_bundle(name="unread") / "manifest.json").unlink()
    make_bundle(name="leaves", edit=lambda manifest: manifest.files.add(path="../../x"))
    make_bundle(name="long", edit=lambda manifest: manifest.files.add(path="x" * 300))
    make_bundle(name="format", edit=lambda manifest: setattr(manifest, "format", 2))
    make_bundle(name="model", model=b"not a model")
    make_bundle(name="parity", model=tiny.model(np.zeros(3, np.float32)))
    make_bundle(name="lone").rename(make_bundle(name="renamed").parent / "2")
    path = make_bundle()
    (path.parents[1] / "empty" / "1").mkdir(parents=True)

    repository = open_repository(path.parents[1])

    refused = repository.refused()
    assert ready(repository) == [("renamed", 1), ("tiny", 1)]
    assert {name for name, _ in refused} == {
        *("digest", "missing", "manifest", "unread", "leaves", "long", "format", "model"),
        *("parity", "renamed", "empty"),
    }
    for reason in refused.values():
        assert reason
        assert str(path.parents[1]) not in reason
        assert "\n" not in reason.strip()
    assert {key: reasons(repository)[key] for key in refused} == refused


def test_refused_version_is_counted_logged_and_listed_with_its_reason(
    make_bundle, open_repository, caplog
):
    make_bundle()
    repository = open_repository(damage(make_bundle(version=2)).parents[1])

    reason = repository.refused()["tiny", 2]
    assert reason.startswith("tiny/2/model.onnx has sha256 ")
    assert states(repository) == {("tiny", 1): "READY", ("tiny", 2): "UNAVAILABLE"}
    assert reasons(repository) == {("tiny", 2): reason}
    assert f"version refused: {reason}" in caplog.text
    counted = figures(repository)
    assert counted["tiny", 2][Figure.REFUSED] == 1
    assert counted["tiny", 2][Figure.READY] == counted["tiny", 1][Figure.REFUSED] == 0


def test_refused_version_is_tried_again_only_when_its_files_change(
    make_bundle, open_repository, loads
):
    make_bundle()
    path = damage(make_bundle(version=2))
    repository = open_repository(path.parents[1], load=loads)
    tried = list(loads.asked)

    for _ in range(3):
        repository.reconcile()
    assert loads.asked == tried == [("tiny", 2), ("tiny", 1)]

    touch(path / "model.onnx")
    repository.reconcile()
    assert loads.asked == [*tried, ("tiny", 2)]
    assert figures(repository)["tiny", 2][Figure.REFUSED] == 2

    damage(path)  # back to what was published
    repository.reconcile()
    assert ready(repository) == [("tiny", 2)]
    assert repository.refused() == {}


def test_refused_version_is_tried_again_when_its_configuration_changes(
    make_bundle, open_repository, loads
):
    path = make_bundle()
    loads.error = BundleError("too large a batch")
    repository = open_repository(path.parents[1], load=loads)
    repository.reconcile()
    assert len(loads.asked) == 1

    loads.error = None
    (path.parent / "config.pbtxt").write_text("max_batch_size: 4")
    repository.reconcile()

    assert repository.get("tiny", "").options.max_batch_rows == 4


def test_refused_version_that_was_taken_away_is_forgotten(make_bundle, open_repository):
    make_bundle()
    path = damage(make_bundle(version=2))
    repository = open_repository(path.parents[1])

    shutil.rmtree(path)
    repository.reconcile()

    assert states(repository) == {("tiny", 1): "READY"}
    assert set(figures(repository)) == {("tiny", 1)}


def test_what_nobody_foresaw_in_loading_is_a_refusal_and_the_rest_is_served(
    make_bundle, open_repository, caplog
):
    make_bundle(name="odd")

    def load(path, options):
        if path.parent.name == "odd":
            raise RuntimeError("something of onnxruntime, at /secret/path")
        return version.load(path, options)

    repository = open_repository(make_bundle().parents[1], load=load)

    assert ready(repository) == [("tiny", 1)]
    assert repository.refused() == {("odd", 1): "odd/1 cannot be loaded; the server's log says why"}
    assert "/secret/path" in caplog.text


# What changes while it serves


def test_new_version_takes_the_place_of_the_old_once_it_has_passed(
    make_bundle, open_repository, loads
):
    path = make_bundle()
    repository = open_repository(path.parents[1], load=loads)
    make_bundle(version=2)
    loads.open.clear()

    thread = threading.Thread(target=repository.reconcile)
    thread.start()
    until(lambda: states(repository).get(("tiny", 2)) == "LOADING")
    assert repository.get("tiny", "").number == 1
    with pytest.raises(ModelNotReadyError):
        repository.get("tiny", "2")
    loads.open.set()
    thread.join(WAIT_S)

    assert repository.get("tiny", "").number == 2
    until(lambda: states(repository) == {("tiny", 1): "UNAVAILABLE", ("tiny", 2): "READY"})
    until(lambda: set(figures(repository)) == {("tiny", 2)})


def test_old_version_answers_what_it_had_accepted_while_the_new_one_serves(
    make_bundle, open_repository, held, begin
):
    sessions, load = held
    path = make_bundle()
    repository = open_repository(path.parents[1], load=load)
    rpc = Rpc(repository)
    old = [begin(rpc, rows=8) for _ in range(3)]  # one runs, two wait
    assert sessions["tiny 1"].entered.acquire(timeout=WAIT_S)
    make_bundle(version=2)

    repository.reconcile()

    sessions["tiny 2"].open.set()
    assert answered(begin(rpc)) == "2"
    assert states(repository) == {("tiny", 1): "UNLOADING", ("tiny", 2): "READY"}
    assert not any(call.outcome.done() for call in old)
    sessions["tiny 1"].open.set()
    assert [answered(call) for call in old] == ["1"] * 3
    until(lambda: states(repository)["tiny", 1] == "UNAVAILABLE")
    rpc.close()


def test_bad_candidate_never_takes_the_place_of_what_works(
    make_bundle, open_repository, begin, tiny
):
    path = make_bundle()
    repository = open_repository(path.parents[1])
    rpc = Rpc(repository)

    damage(make_bundle(version=2))
    make_bundle(version=3, model=tiny.model(np.array([127, -127, 0.1], np.float32)))
    repository.reconcile()

    assert ready(repository) == [("tiny", 1)]
    assert answered(begin(rpc)) == "1"
    assert reasons(repository)["tiny", 3].startswith("tiny/3 fails its self-check on this host")
    rpc.close()


def test_changed_files_are_loaded_again_and_bad_ones_leave_what_was_loaded(
    make_bundle, open_repository
):
    path = make_bundle()
    repository = open_repository(path.parents[1])
    first = repository.get("tiny", "")

    repository.reconcile()
    assert repository.get("tiny", "") is first
    touch(path / "model.onnx")
    repository.reconcile()
    second = repository.get("tiny", "")
    assert second is not first
    damage(path)
    for _ in range(2):
        repository.reconcile()

    assert repository.get("tiny", "") is second
    assert states(repository) == {("tiny", 1): "READY"}
    assert repository.refused()["tiny", 1].startswith("tiny/1/model.onnx has sha256 ")
    counted = figures(repository)["tiny", 1]
    assert (counted[Figure.REFUSED], counted[Figure.READY]) == (1, 1)


def test_configuration_that_changes_is_served_so_and_a_bad_one_changes_nothing(
    make_bundle, open_repository
):
    path = make_bundle()
    repository = open_repository(path.parents[1])
    config = path.parent / "config.pbtxt"

    config.write_text("max_batch_size: 4\ninstance_group [{ count: 2 }]")
    repository.reconcile()
    options = repository.get("tiny", "").options
    assert (options.max_batch_rows, options.instances) == (4, 2)
    config.write_text("max_batch_size: many")
    make_bundle(version=2)
    repository.reconcile()
    assert repository.get("tiny", "").options == options
    assert reasons(repository)["tiny", 2].startswith("tiny/config.pbtxt is not a ModelConfig: ")
    config.unlink()
    repository.reconcile()

    assert repository.get("tiny", "").number == 2
    assert repository.get("tiny", "").options.max_batch_rows == 8
    assert repository.refused() == {}


def test_configuration_that_was_mended_leaves_no_reason_behind(make_bundle, open_repository):
    path = [make_bundle(version=number) for number in (1, 2)][-1]
    (path.parent / "config.pbtxt").write_text("max_batch_size: many")
    repository = open_repository(path.parents[1])
    assert {number for _, number in repository.refused()} == {1, 2}
    assert not repository.is_ready()

    (path.parent / "config.pbtxt").unlink()
    repository.reconcile()

    assert states(repository) == {("tiny", 1): "UNAVAILABLE", ("tiny", 2): "READY"}
    assert reasons(repository) == {("tiny", 1): "unloaded"}
    assert repository.is_ready()


def test_version_that_was_taken_away_is_unloaded_for_the_next_one(make_bundle, open_repository):
    make_bundle()
    path = make_bundle(version=2)
    repository = open_repository(path.parents[1])

    shutil.rmtree(path)
    repository.reconcile()

    assert repository.get("tiny", "").number == 1
    until(lambda: states(repository) == {("tiny", 1): "READY"})


def test_model_that_was_taken_away_is_unloaded_and_forgotten(make_bundle, open_repository):
    path = make_bundle(name="other")
    repository = open_repository(make_bundle().parents[1])

    shutil.rmtree(path.parent)
    repository.reconcile()

    assert ready(repository) == [("tiny", 1)]
    assert repository.answering().get("other", False) is False
    until(lambda: set(states(repository)) == {("tiny", 1)})
    repository.reconcile()
    assert set(repository.answering()) == {"tiny"}
    with pytest.raises(ModelNotFoundError):
        repository.get("other", "")


def test_lost_mount_takes_nothing_out_of_service_and_is_logged_once(
    make_bundle, open_repository, caplog
):
    path = make_bundle()
    root = path.parents[1]
    repository = open_repository(root)

    path.parent.rename(root.parent / "elsewhere")
    for _ in range(3):
        repository.reconcile()
    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()
    assert caplog.text.count(f"{root} is empty; what was loaded is still served") == 1
    root.rmdir()
    with pytest.raises(RepositoryError):
        repository.reconcile()
    assert repository.is_ready()

    root.mkdir()
    (root.parent / "elsewhere").rename(root / "tiny")
    make_bundle(version=2)
    repository.reconcile()

    assert repository.get("tiny", "").number == 2


def test_model_folder_that_cannot_be_read_keeps_what_was_loaded(
    make_bundle, open_repository, monkeypatch, caplog
):
    closed = make_bundle(name="closed").parent
    repository = open_repository(make_bundle().parents[1])
    iterdir = Path.iterdir

    def refuse(path):
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for _ in range(2):
        repository.reconcile()

    assert ready(repository) == [("closed", 1), ("tiny", 1)]
    assert caplog.text.count("closed/ cannot be read") == 1


def test_whoever_watches_is_told_of_every_change(make_bundle, open_repository):
    repository = open_repository(make_bundle().parents[1], look=False)
    seen = []
    repository.watch(lambda: seen.append((repository.answering(), repository.is_ready())))

    repository.reconcile()

    assert seen[-1] == ({"tiny": True}, True)


def test_look_ends_when_it_is_told_to_and_the_next_goes_on(make_bundle, open_repository):
    path = [make_bundle(version=number) for number in (1, 2, 3)][-1]
    repository = open_repository(path.parents[1], look=False, policy=VersionPolicy())

    repository.reconcile(until=lambda: bool(repository.versions()))
    assert ready(repository) == [("tiny", 3)]
    assert not repository.is_ready()
    repository.reconcile()

    assert [number for _, number in ready(repository)] == [1, 2, 3]
    assert repository.is_ready()


def test_look_that_is_told_to_end_unloads_nothing(make_bundle, open_repository):
    repository = open_repository(make_bundle().parents[1])
    make_bundle(version=2)

    repository.reconcile(until=lambda: True)

    assert ready(repository) == [("tiny", 1)]
    assert repository.is_ready()


# Readiness


def test_server_is_ready_when_every_model_it_found_first_answers(make_bundle, open_repository):
    damage(make_bundle(version=2))
    path = make_bundle()
    repository = open_repository(path.parents[1], look=False)
    assert not repository.is_ready()

    repository.reconcile()
    assert repository.is_ready()

    damage(make_bundle(name="broken"))
    assert not open_repository(path.parents[1]).is_ready()


def test_server_without_a_model_is_not_ready(tmp_path, open_repository):
    assert not open_repository(tmp_path).is_ready()


def test_readiness_never_flickers_while_other_models_come_load_fail_and_go(
    make_bundle, make_generic_bundle, open_repository, loads
):
    path = make_bundle()
    root = path.parents[1]
    repository = open_repository(root, load=loads)
    seen: Counter[tuple[bool, bool]] = Counter()
    over = threading.Event()

    def note():
        seen[repository.is_ready(), repository.answering()["tiny"]] += 1

    def look():
        while not over.is_set():
            note()

    repository.watch(note)
    loads.during = note
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for step in (
            lambda: damage(make_bundle(name="bad")),
            make_generic_bundle,
            lambda: make_bundle(version=2),
            lambda: damage(make_bundle(version=3)),
            lambda: make_generic_bundle(version=2),
            lambda: damage(make_generic_bundle(version=3)),
            lambda: touch(path.parent / "2/model.onnx"),
            lambda: (root / "line/config.pbtxt").write_text("nonsense"),
            lambda: shutil.rmtree(root / "bad"),
            lambda: shutil.rmtree(root / "line"),
        ):
            step()
            repository.reconcile()
    finally:
        over.set()
        thread.join(WAIT_S)

    assert set(seen) == {(True, True)}
    assert repository.get("tiny", "").number == 2


def test_model_that_came_later_counts_from_when_it_was_first_ready(make_bundle, open_repository):
    repository = open_repository(make_bundle().parents[1])
    path = make_bundle(name="later")
    repository.reconcile()
    assert repository.is_ready()

    damage(make_bundle(name="later", version=2))
    shutil.rmtree(path)
    repository.reconcile()

    assert not repository.is_ready()
    assert repository.answering() == {"later": False, "tiny": True}


# Aliases


def test_champion_answers_an_empty_version_and_every_alias_is_a_version(
    make_bundle, open_repository
):
    path = [make_bundle(version=number) for number in (1, 2, 3)][-1]
    aliases.write(path.parent, {"champion": 1, "candidate": 2})

    repository = open_repository(path.parents[1])

    assert repository.get("tiny", "").number == 1
    assert repository.get("tiny", "champion").number == 1
    assert repository.get("tiny", "candidate").number == 2
    assert repository.get("tiny", "3").number == 3
    assert ready(repository) == [("tiny", 1), ("tiny", 2), ("tiny", 3)]


def test_moving_the_champion_back_is_a_rollback(make_bundle, open_repository, begin):
    path = [make_bundle(version=number) for number in (1, 2)][-1]
    repository = open_repository(path.parents[1])
    rpc = Rpc(repository)
    assert answered(begin(rpc)) == "2"

    aliases.write(path.parent, {"champion": 1})
    repository.reconcile()
    assert answered(begin(rpc)) == "1"
    aliases.write(path.parent, {"champion": 2})
    repository.reconcile()
    assert answered(begin(rpc)) == "2"
    aliases.write(path.parent, {})
    repository.reconcile()

    assert answered(begin(rpc)) == "2"
    assert ready(repository) == [("tiny", 2)]
    with pytest.raises(InvalidRequestError):
        repository.get("tiny", "champion")
    rpc.close()


def test_new_version_does_not_answer_an_empty_version_while_a_champion_is_set(
    make_bundle, open_repository
):
    path = make_bundle()
    aliases.write(path.parent, {"champion": 1})
    repository = open_repository(path.parents[1])

    make_bundle(version=2)
    repository.reconcile()

    assert repository.get("tiny", "").number == 1
    assert repository.get("tiny", "2").number == 2


@pytest.mark.parametrize("kind", ["bad", "absent"])
def test_alias_that_is_moved_to_a_version_that_is_not_ready_stays_where_it_was(
    make_bundle, open_repository, caplog, kind
):
    path = make_bundle()
    aliases.write(path.parent, {"champion": 1})
    repository = open_repository(path.parents[1])

    if kind == "bad":
        damage(make_bundle(version=2))
    (path.parent / "aliases.json").write_text('{"champion": 2}')
    for _ in range(2):
        repository.reconcile()

    assert repository.get("tiny", "").number == repository.get("tiny", "champion").number == 1
    assert repository.is_ready()
    trouble = "tiny champion is to be version 2, which is not ready; it stays version 1"
    assert caplog.text.count(trouble) == 1

    shutil.rmtree(path.parent / "2", ignore_errors=True)
    make_bundle(version=2)
    repository.reconcile()
    assert repository.get("tiny", "").number == 2


@pytest.mark.parametrize("kind", ["bad", "absent"])
def test_first_champion_that_is_not_ready_takes_nothing_from_who_answers(
    make_bundle, open_repository, caplog, kind
):
    path = make_bundle()
    repository = open_repository(path.parents[1])
    if kind == "bad":
        damage(make_bundle(version=2))

    (path.parent / "aliases.json").write_text('{"champion": 2, "candidate": 2}')
    for _ in range(2):
        repository.reconcile()

    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()
    with pytest.raises(ServiceError):
        repository.get("tiny", "candidate")
    trouble = "tiny champion is to be version 2, which is not ready; it stays unset"
    assert caplog.text.count(trouble) == 1

    shutil.rmtree(path.parent / "2", ignore_errors=True)
    make_bundle(version=2)
    make_bundle(version=3)
    repository.reconcile()
    assert repository.get("tiny", "").number == 2


def test_no_other_version_answers_for_the_champion_while_it_is_loaded(make_bundle, open_repository):
    path = make_bundle()
    make_bundle(version=2)
    (path.parent / "config.pbtxt").write_text("version_policy { all {} }")
    aliases.write(path.parent, {"champion": 1})
    answered: list[int | None] = []

    def load(path, options):
        try:
            answered.append(repository.get("tiny", "").number)
        except ServiceError:
            answered.append(None)
        return version.load(path, options)

    repository = open_repository(path.parents[1], load=load, look=False)
    repository.reconcile()

    assert answered == [None, None]
    assert repository.get("tiny", "").number == 1


def test_policy_that_chooses_no_version_changes_nothing(make_bundle, open_repository, caplog):
    path = make_bundle()
    repository = open_repository(path.parents[1])

    (path.parent / "config.pbtxt").write_text("version_policy { specific { versions: [7] } }")
    for _ in range(2):
        repository.reconcile()

    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()
    assert caplog.text.count("tiny: its version policy chooses none of [1]") == 1


def test_served_version_whose_files_were_changed_says_so(make_bundle, open_repository):
    path = make_bundle()
    repository = open_repository(path.parents[1])

    damage(path)
    repository.reconcile()

    assert states(repository) == {("tiny", 1): "READY"}
    assert reasons(repository)["tiny", 1].startswith("changed since it was loaded: tiny/1/model.o")


def test_champion_that_was_never_ready_is_not_replaced_by_another_version(
    make_bundle, open_repository
):
    path = make_bundle()
    damage(make_bundle(version=2))
    (path.parent / "aliases.json").write_text('{"champion": 2}')

    repository = open_repository(path.parents[1])

    with pytest.raises(ModelNotReadyError) as caught:
        repository.get("tiny", "")
    assert str(caught.value) == (
        "Request for unknown model: 'tiny' has no available versions: "
        "its champion, version 2, is not at ready state"
    )
    with pytest.raises(ModelNotReadyError):
        repository.get("tiny", "champion")
    assert repository.get("tiny", "1").number == 1
    assert not repository.is_ready()
    assert repository.answering() == {"tiny": False}


def test_aliases_that_cannot_be_read_leave_those_in_force(make_bundle, open_repository, caplog):
    path = [make_bundle(version=number) for number in (1, 2)][-1]
    aliases.write(path.parent, {"champion": 1})
    repository = open_repository(path.parents[1])

    (path.parent / "aliases.json").write_text("{")
    make_bundle(version=3)
    for _ in range(2):
        repository.reconcile()

    assert repository.get("tiny", "").number == 1
    assert reasons(repository)["tiny", 3].startswith("tiny/aliases.json is not JSON")
    assert caplog.text.count("tiny/aliases.json is not JSON") == 1


def test_champion_that_is_set_again_while_it_drains_keeps_its_figures(
    make_bundle, open_repository, held, begin
):
    sessions, load = held
    path = [make_bundle(version=number) for number in (1, 2)][-1]
    aliases.write(path.parent, {"champion": 1})
    repository = open_repository(path.parents[1], load=load)
    rpc = Rpc(repository)
    old, first = begin(rpc), sessions["tiny 1"]
    assert first.entered.acquire(timeout=WAIT_S)
    aliases.write(path.parent, {})
    repository.reconcile()
    assert states(repository)["tiny", 1] == "UNLOADING"
    aliases.write(path.parent, {"champion": 1})
    repository.reconcile()
    told = threading.Semaphore(0)
    repository.watch(told.release)

    first.open.set()
    assert answered(old) == "1"
    assert told.acquire(timeout=WAIT_S)  # the old one has ended
    sessions["tiny 1"].open.set()
    assert answered(begin(rpc)) == "1"

    counted = figures(repository)["tiny", 1]
    assert (counted[Figure.SUCCESS], counted[Figure.READY]) == (2, 1)
    rpc.close()


# Explicit control


@pytest.fixture
def controlled(open_repository):
    """Return a function that makes a repository that waits for orders."""

    def controlled(root, **options):
        repository = open_repository(root, look=False, **options)
        repository.wait_for_orders()
        return repository

    return controlled


def test_nothing_is_loaded_before_it_is_asked_for_though_all_is_listed(
    make_bundle, controlled, loads
):
    make_bundle(name="other")
    repository = controlled(make_bundle().parents[1], load=loads)

    assert loads.asked == []
    assert states(repository) == {("other", 1): "UNAVAILABLE", ("tiny", 1): "UNAVAILABLE"}
    assert set(reasons(repository).values()) == {"unloaded"}
    assert repository.is_ready()  # for orders
    with pytest.raises(ModelNotReadyError):
        repository.get("tiny", "")


def test_loading_and_unloading_follow_orders(make_bundle, controlled):
    make_bundle(name="other")
    repository = controlled(make_bundle().parents[1])

    repository.load("tiny")
    assert ready(repository) == [("tiny", 1)]
    assert repository.is_ready()
    repository.load("other")
    repository.unload("other")
    assert ready(repository) == [("tiny", 1)]
    assert repository.is_ready()
    until(lambda: states(repository)["other", 1] == "UNAVAILABLE")
    repository.unload("tiny")

    assert repository.is_ready()  # to be told what to load
    with pytest.raises(ModelNotReadyError):
        repository.get("tiny", "")
    repository.load("tiny")
    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()


def test_what_was_published_meanwhile_is_loaded_and_takes_the_place_of_the_old(
    make_bundle, controlled, held, begin
):
    sessions, load = held
    path = make_bundle()
    repository = controlled(path.parents[1], load=load)
    repository.load("tiny")
    rpc = Rpc(repository)
    old = begin(rpc)
    assert sessions["tiny 1"].entered.acquire(timeout=WAIT_S)
    make_bundle(version=2)
    make_bundle(name="new")

    repository.load("tiny")
    repository.load("new")

    sessions["tiny 2"].open.set()
    assert answered(begin(rpc)) == "2"
    sessions["tiny 1"].open.set()
    assert answered(old) == "1"
    assert ready(repository) == [("new", 1), ("tiny", 2)]
    rpc.close()


def test_unloaded_model_answers_what_it_had_accepted(make_bundle, controlled, held, begin):
    sessions, load = held
    repository = controlled(make_bundle().parents[1], load=load)
    repository.load("tiny")
    rpc = Rpc(repository)
    calls = [begin(rpc, rows=8) for _ in range(2)]
    assert sessions["tiny 1"].entered.acquire(timeout=WAIT_S)

    repository.unload("tiny")

    assert states(repository) == {("tiny", 1): "UNLOADING"}
    sessions["tiny 1"].open.set()
    assert [answered(call) for call in calls] == ["1"] * 2
    rpc.close()


def test_load_that_fails_says_why_and_leaves_what_was_served(make_bundle, controlled):
    path = make_bundle()
    repository = controlled(path.parents[1])
    repository.load("tiny")
    damage(make_bundle(version=2))

    for _ in range(2):  # it is tried again each time it is asked for
        with pytest.raises(LoadError) as caught:
            repository.load("tiny")
        assert str(caught.value).startswith("failed to load 'tiny', tiny/2/model.onnx has sha256 ")

    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()
    assert figures(repository)["tiny", 2][Figure.REFUSED] == 2


def test_load_whose_policy_chooses_no_version_fails_and_leaves_what_was_served(
    make_bundle, controlled
):
    repository = controlled(make_bundle().parents[1])
    repository.load("tiny")

    with pytest.raises(LoadError) as caught:
        repository.load("tiny", '{"version_policy": {"specific": {"versions": [9]}}}')

    assert str(caught.value) == "failed to load 'tiny', its version policy chooses none of [1]"
    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()


def test_load_that_fails_for_one_version_counts_and_names_the_one_that_is_served(
    make_bundle, controlled
):
    path = make_bundle()
    damage(make_bundle(version=2))
    repository = controlled(path.parents[1])

    with pytest.raises(LoadError, match=r"; version 1 is served$"):
        repository.load("tiny")

    assert repository.get("tiny", "").number == 1
    assert repository.is_ready()


def test_load_with_a_configuration_in_the_folder_that_is_none_fails(make_bundle, controlled):
    path = make_bundle()
    repository = controlled(path.parents[1])
    repository.load("tiny")

    (path.parent / "config.pbtxt").write_text("nonsense")
    with pytest.raises(LoadError, match=r"^failed to load 'tiny', tiny/config\.pbtxt is not"):
        repository.load("tiny")

    assert repository.get("tiny", "").number == 1


def test_load_of_what_is_not_there_fails_without_naming_a_path(make_bundle, controlled, tmp_path):
    repository = controlled(make_bundle().parents[1])

    with pytest.raises(LoadError) as caught:
        repository.load("none")
    assert str(caught.value) == "failed to load 'none', no version is available"
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(LoadError) as caught:
        repository.load("tiny")
    assert str(caught.value) == "failed to load 'tiny', the repository cannot be read"


def test_unload_of_what_is_not_there_is_refused(repository):
    with pytest.raises(ModelNotFoundError) as caught:
        repository.unload("none")

    assert str(caught.value) == "Request for unknown model: 'none' is not found"


def test_configuration_that_comes_with_the_order_stands_in_for_the_file(make_bundle, controlled):
    path = [make_bundle(version=number) for number in (1, 2)][-1]
    (path.parent / "config.pbtxt").write_text("max_batch_size: 4")
    repository = controlled(path.parents[1])
    override = {"max_batch_size": 2, "version_policy": {"specific": {"versions": [1]}}}

    repository.load("tiny", json.dumps(override))
    assert repository.get("tiny", "").number == 1
    assert repository.get("tiny", "").options.max_batch_rows == 2
    with pytest.raises(InvalidRequestError):
        repository.load("tiny", "nonsense")
    assert repository.get("tiny", "").options.max_batch_rows == 2
    repository.load("tiny")

    assert repository.get("tiny", "").number == 2
    assert repository.get("tiny", "").options.max_batch_rows == 4


def test_unloaded_refusals_are_listed_as_unloaded(make_bundle, controlled):
    make_bundle()
    repository = controlled(damage(make_bundle(version=2)).parents[1])
    with pytest.raises(LoadError):
        repository.load("tiny")

    repository.unload("tiny")

    until(lambda: set(reasons(repository).values()) == {"unloaded"})
    assert set(states(repository)) == {("tiny", 1), ("tiny", 2)}


# The end


def test_closed_repository_answers_what_waits_and_takes_nothing_new(
    make_bundle, open_repository, held, begin
):
    sessions, load = held
    repository = open_repository(make_bundle().parents[1], load=load)
    rpc = Rpc(repository)
    waiting = [begin(rpc, rows=8) for _ in range(2)]
    assert sessions["tiny 1"].entered.acquire(timeout=WAIT_S)
    assert not repository.is_idle()

    repository.close()

    with pytest.raises(Exception, match="is not at ready state"):
        begin(rpc).result()
    sessions["tiny 1"].open.set()
    assert [answered(call) for call in waiting] == ["1"] * 2
    until(repository.is_idle)
    rpc.close()


def test_events_name_the_model_and_the_version_for_machines(make_bundle, open_repository, caplog):
    caplog.set_level(logging.INFO)
    path = make_bundle()
    repository = open_repository(path.parents[1])
    make_bundle(version=2)
    damage(make_bundle(version=3))
    repository.reconcile()

    events = {
        (record.getMessage().partition(":")[0], record.model, record.version)
        for record in caplog.records
        if hasattr(record, "model")
    }
    assert events == {
        ("version ready", "tiny", 1),
        ("version ready", "tiny", 2),
        ("version refused", "tiny", 3),
        ("version retired", "tiny", 1),
    }
    assert "version ready: tiny 1 on CPUExecutionProvider, self-check max" in caplog.text
