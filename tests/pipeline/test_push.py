"""A number in a store has one bundle, whoever else publishes and whatever is lost meanwhile."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from typer.testing import CliRunner

from pipeline import push
from pipeline.__main__ import app
from pipeline.errors import PublishError
from service import bundle, remote
from service.command_line import size as shown_size
from service.errors import BundleError
from service.mirror import Mirror


@pytest.fixture
def store(store_folder):
    return remote.connect(store_folder.url)


@pytest.fixture
def another(make_bundle, tmp_path):
    """Return a function that makes a bundle of the same name, with another model."""
    return lambda version=1: make_bundle(tmp_path / "others", version=version, striped=2)


def in_store(folder, below="tiny/1"):
    """Return the files of a version in a store, but not its claim."""
    return {
        path.removeprefix(f"{below}/"): folder.read(path)
        for path in folder.list()
        if path.startswith(f"{below}/") and not path.endswith("/claim")
    }


def content(bundle):
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


def puts(object_store, name):
    return sum(method == "PUT" and path.endswith(name) for method, path in object_store.asked)


def test_what_is_pushed_is_what_readers_copy(make_bundle, store_folder, store, tmp_path):
    made = make_bundle()
    (made.parent / "config.pbtxt").write_text('name: "tiny"')
    (made / "not-listed").touch()

    pushed = push.push(made, store)

    (made / "not-listed").unlink()
    assert in_store(store_folder) == content(made)
    assert store_folder.read("tiny/config.pbtxt") == b'name: "tiny"'
    assert pushed == push.Pushed(
        url=f"{store_folder.url}/tiny/1",
        already=False,
        files=2,
        size_bytes=sum((made / name).stat().st_size for name in ("model.onnx", "golden.npz")),
    )

    Mirror(store, tmp_path / "copies").look()

    assert content(tmp_path / "copies/tiny/1") == content(made)


def test_same_bundle_is_pushed_once(make_bundle, store_folder, store):
    made = make_bundle()
    push.push(made, store)
    store_folder.write("tiny/config.pbtxt", b"changed there")
    (made.parent / "config.pbtxt").write_text('name: "tiny"')

    assert push.push(made, store).already
    assert store_folder.read("tiny/config.pbtxt") == b"changed there"


def test_number_of_another_bundle_is_refused(make_bundle, another, store_folder, store):
    made = make_bundle()
    push.push(made, store)

    with pytest.raises(PublishError, match=r"is another bundle already, manifest sha256 \w+"):
        push.push(another(), store)

    assert in_store(store_folder) == content(made)


def test_bundle_that_was_changed_is_not_pushed(make_bundle, store_folder, store):
    made = make_bundle()
    (made / "model.onnx").write_bytes(b"changed")

    with pytest.raises(BundleError, match=r"tiny/1/model\.onnx has 7 bytes"):
        push.push(made, store)

    assert store_folder.list() == []


def test_number_that_is_claimed_for_another_bundle_is_refused_with_who_did(
    make_bundle, store_folder, store
):
    claim = {"manifest_sha256": "0" * 64, "host": "training-7", "at": "2026-01-02T03:04:05+00:00"}
    store_folder.write("tiny/1/claim", json.dumps(claim).encode())

    with pytest.raises(
        PublishError, match="claimed for another bundle, from training-7 at 2026-01-02T03:04:05"
    ):
        push.push(make_bundle(), store)

    assert store_folder.list() == ["tiny/1/claim"]


@pytest.mark.parametrize("claim", [b"", b"[]", b"{", b"\xff"], ids=repr)
def test_claim_that_cannot_be_read_is_somebody_elses(make_bundle, store_folder, store, claim):
    store_folder.write("tiny/1/claim", claim)

    with pytest.raises(PublishError, match="is claimed for another bundle"):
        push.push(make_bundle(), store)


def test_push_that_was_cut_off_shows_nothing_and_is_ended_by_the_same(
    make_bundle, object_store, tmp_path
):
    folder, made = object_store.folder(), make_bundle()
    store = remote.connect(folder.url)
    object_store.loses_request = lambda method, path: path.endswith("model.onnx")

    with pytest.raises(PublishError, match="the same command goes on where this one ended"):
        push.push(made, store)

    Mirror(store, tmp_path / "copies").look()
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [".lock"]

    object_store.reset()
    push.push(made, remote.connect(folder.url))

    assert in_store(folder) == content(made)
    assert puts(object_store, "golden.npz") == 0  # it is there
    assert puts(object_store, "model.onnx") == 1


def test_store_that_is_away_is_said_and_what_was_begun_is_ended_when_it_is_back(
    make_bundle, object_store
):
    folder, made = object_store.folder(), make_bundle()
    store = remote.connect(folder.url)
    object_store.stop()
    try:
        with pytest.raises(PublishError, match=r"cannot be read: Could not connect.*goes on"):
            push.push(made, store)
    finally:
        object_store.start()

    assert not push.push(made, store).already


@pytest.mark.parametrize("lost", ["claim", "manifest.json", "model.onnx"])
def test_answer_that_was_lost_is_no_other_publisher(make_bundle, object_store, lost):
    folder, made, left = object_store.folder(), make_bundle(), [True]

    def loses(method, path):
        return method == "PUT" and path.endswith(lost) and bool(left) and left.pop()

    object_store.loses_answer = loses

    push.push(made, remote.connect(folder.url))

    assert left == []
    assert in_store(folder) == content(made)


def test_files_that_are_older_than_the_claim_are_uploaded_again(
    make_bundle, another, store_folder, store
):
    """A claim was removed by hand, and the files of its bundle are still there."""
    made = make_bundle()
    store_folder.copy(another(), without=("manifest.json",))

    push.push(made, store)

    assert in_store(store_folder) == content(made)


def test_files_that_are_older_than_the_claim_are_uploaded_again_by_who_goes_on(
    make_bundle, another, tmp_path
):
    made = make_bundle()
    url = f"file://{tmp_path}/store"
    old = shutil.copytree(another(), tmp_path / "store/tiny/1")
    (old / "manifest.json").unlink()
    for path in old.iterdir():
        os.utime(path, (1, 1))
    claim = {"manifest_sha256": bundle.sha256((made / "manifest.json").read_bytes())}
    (old / "claim").write_text(json.dumps(claim))

    push.push(made, remote.connect(url))

    (old / "claim").unlink()
    assert content(old) == content(made)


def test_store_that_writes_over_what_is_there_is_refused(make_bundle, object_store):
    folder = object_store.folder()
    object_store.ignores_conditions = True

    with pytest.raises(PublishError, match="without conditional writes"):
        push.push(make_bundle(), remote.connect(folder.url))

    assert folder.list() == ["tiny/1/claim"]


def test_of_two_publishers_of_a_number_one_wins_and_its_bundle_is_whole(
    make_bundle, another, store_folder
):
    for version in range(1, 7):
        pair = [make_bundle(version=version), another(version)]
        start = Barrier(len(pair))

        def publish(made, start=start):
            store = remote.connect(store_folder.url)
            start.wait(60)
            try:
                return push.push(made, store).already
            except PublishError as error:
                return str(error)

        with ThreadPoolExecutor(len(pair)) as pool:
            results = list(pool.map(publish, pair))

        won = results.index(False)
        assert re.search("claimed for another bundle|is another bundle already", results[1 - won])
        assert in_store(store_folder, f"tiny/{version}") == content(pair[won])


def test_two_who_push_the_same_bundle_at_once_both_succeed(make_bundle, store_folder):
    made = make_bundle()
    stores = [remote.connect(store_folder.url) for _ in range(2)]

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(lambda store: push.push(made, store), stores))

    assert in_store(store_folder) == content(made)


def test_alias_is_set_and_set_back_beside_others(make_bundle, store_folder, store):
    for version in (1, 2):
        push.push(make_bundle(version=version), store)
    store_folder.write("tiny/aliases.json", b'{"candidate": 2}')

    assert push.set_alias(store, "tiny", "champion", 2) is None
    assert push.set_alias(store, "tiny", "champion", 1) == 2
    assert json.loads(store_folder.read("tiny/aliases.json")) == {"candidate": 2, "champion": 1}


@pytest.mark.parametrize(
    ("alias", "number", "reason"),
    [("Champion", 1, "'Champion' is not an alias"), ("champion", 2, "has no version 2 for champ")],
)
def test_alias_that_would_mean_nothing_is_refused(
    make_bundle, store_folder, store, alias, number, reason
):
    push.push(make_bundle(), store)
    store_folder.copy(make_bundle(version=2), without=("manifest.json",))

    with pytest.raises(PublishError, match=reason):
        push.set_alias(store, "tiny", alias, number)

    assert "tiny/aliases.json" not in store_folder.list()


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"champion": "1"}', b'{"UP": 1}'], ids=repr)
def test_aliases_that_are_none_are_not_written_over(make_bundle, store_folder, store, text):
    push.push(make_bundle(), store)
    store_folder.write("tiny/aliases.json", text)

    with pytest.raises(PublishError, match=r"tiny/aliases\.json is not a set of aliases"):
        push.set_alias(store, "tiny", "champion", 1)

    assert store_folder.read("tiny/aliases.json") == text


def test_command_pushes_and_says_what_came_of_it(make_bundle, store_folder):
    made = make_bundle()

    def run(*words):
        words = ("push", "tiny", *words, "--models", str(made.parents[1]))
        return CliRunner().invoke(app, words)

    first = run("1", "--to", store_folder.url)
    second = run("1", "--to", store_folder.url, "--alias", "champion")
    size = shown_size(sum((made / name).stat().st_size for name in ("model.onnx", "golden.npz")))

    url = f"{store_folder.url}/tiny/1"
    assert first.stdout == f"pushed: {url}\nfiles: 2, {size}\n"
    assert second.stdout == (
        f"already there: {url}\nfiles: 2, {size}\nchampion: tiny 1 (was not set)\n"
    )
    assert run("2", "--to", store_folder.url).exit_code == 2
    assert run("1", "--to", "models").exit_code == 2
