import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from service import doctor, mirror, remote
from service.client import Client
from service.errors import RepositoryError, SettingsError
from service.mirror import Mirror
from service.settings import Settings, place

WAIT_S = 60


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "copies"


@pytest.fixture
def look(store_folder, folder):
    """Return a function that looks once, and says which files of which models are here."""
    kept = Mirror(remote.connect(store_folder.url), folder)

    def look():
        kept.look()
        return copies(folder)

    return look


def copies(folder):
    """Return what a reader sees; nothing else is left behind."""
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden in ([], [mirror.LOCK])
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent != folder
    }


def content(bundle):
    home = bundle.parents[1]
    return {
        path.relative_to(home).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file()
    }


def listing(*paths):
    """Return an edit of a manifest that lists more files, of one byte each."""

    def edit(manifest):
        for path in paths:
            manifest.files.add(path=path, sha256="0" * 64, size_bytes=1)

    return edit


def test_version_is_copied_whole_once_its_manifest_is_there(make_bundle, store_folder, look):
    made = make_bundle()
    store_folder.write("tiny/aliases.json", b"{}")
    store_folder.copy(made, without=("manifest.json",))
    store_folder.write("tiny/1/claim", b"{}")

    assert look() == {}

    store_folder.copy(made)
    store_folder.write("tiny/1/not-listed", b"nobody's")

    assert look() == {**content(made), "tiny/aliases.json": b"{}"}


def test_nothing_is_asked_for_twice(make_bundle, object_store, folder):
    store = object_store.folder()
    store.copy(make_bundle())
    store.write("tiny/aliases.json", b"{}")
    kept = Mirror(remote.connect(store.url), folder)
    kept.look()
    object_store.asked.clear()

    kept.look()

    assert len(object_store.asked) == 1  # for the list


def test_version_with_a_missing_file_is_not_copied_until_it_is_there(
    make_bundle, store_folder, look, caplog
):
    made = make_bundle()
    store_folder.copy(made, without=("golden.npz",))

    assert look() == look() == {}
    assert [one.message for one in caplog.records if one.levelno == logging.WARNING] == [
        f"version not copied: tiny/1/golden.npz is missing, expected "
        f"{(made / 'golden.npz').stat().st_size} bytes"
    ]

    store_folder.copy(made)

    assert look() == content(made)


def test_file_that_differs_from_its_manifest_is_never_copied(
    make_bundle, store_folder, look, caplog
):
    made = make_bundle()
    store_folder.copy(made)
    right = (made / "model.onnx").read_bytes()
    store_folder.write("tiny/1/model.onnx", right[:-1] + bytes([right[-1] ^ 1]))

    assert look() == look() == {}
    assert "tiny/1/model.onnx" in caplog.text
    assert caplog.text.count("is not what manifest.json says") == 1

    store_folder.write("tiny/1/model.onnx", right[:-1])

    assert look() == {}
    assert f"has {len(right) - 1} bytes, expected {len(right)} bytes" in caplog.text

    store_folder.write("tiny/1/model.onnx", right)

    assert look() == content(made)


def test_version_that_was_changed_wrongly_leaves_the_copy_of_the_right_one(
    make_bundle, store_folder, look
):
    made = make_bundle()
    store_folder.copy(made)
    look()
    store_folder.write("tiny/1/model.onnx", b"another")
    store_folder.write("tiny/1/manifest.json", b"{}")

    assert look() == content(made)


def test_version_that_is_another_now_takes_the_place_of_its_copy(
    make_bundle, store_folder, look, tmp_path
):
    store_folder.copy(make_bundle())
    look()
    another = make_bundle(tmp_path / "others", striped=2)
    store_folder.copy(another)

    assert look() == content(another)


NO_FILES = (
    ("../../outside",),
    ("/outside",),
    ("variants/../../../outside",),
    ("variants//outside",),
    ("./outside",),
    (".",),
    ("",),
    ("out\nside",),
    ("a" * 256,),
    ("manifest.json",),
    ("twice", "twice"),
    ("inside", "inside/another"),
)


def test_manifest_that_lists_what_is_no_file_of_the_bundle_is_refused(
    make_bundle, store_folder, look, tmp_path, caplog
):
    good = make_bundle(version=100)
    store_folder.copy(good)
    for number, paths in enumerate(NO_FILES, 1):
        store_folder.copy(make_bundle(version=number, edit=listing(*paths)))
    before = set(tmp_path.rglob("*outside*"))

    assert look() == content(good)
    assert set(tmp_path.rglob("*outside*")) == before
    for number in range(1, len(NO_FILES) + 1):
        assert f"version not copied: tiny/{number}/manifest.json lists" in caplog.text


NO_MANIFESTS = (
    *(b"", b"{", b"\xff", b"[]", b'{"format": 9}', b" " * ((8 << 20) + 1)),
    b'{"format": 1, "name": "other", "version": 7}',
    b'{"format": 1, "name": "tiny", "version": 1}',
)


def test_what_is_no_manifest_of_that_version_is_refused(make_bundle, store_folder, look, caplog):
    good = make_bundle(version=100)
    store_folder.copy(good)
    for number, manifest in enumerate(NO_MANIFESTS, 1):
        store_folder.write(f"tiny/{number}/manifest.json", manifest)

    assert look() == content(good)
    for number in range(1, len(NO_MANIFESTS) + 1):
        assert f"version not copied: tiny/{number}/manifest.json" in caplog.text


def test_names_that_are_no_names_are_passed_over(make_bundle, store_folder, look):
    made = make_bundle()
    for path in ("..tiny/1", ".tiny/1", "tiny/01", "tiny/0", "tiny/x", "ti ny/1", "manifest.json"):
        store_folder.write(f"{path}/manifest.json", (made / "manifest.json").read_bytes())

    assert look() == {}


def test_models_own_files_follow_the_stores(make_bundle, store_folder, look):
    made = content(make_bundle())
    store_folder.copy(make_bundle(version=2))
    made.update(content(make_bundle(version=3).parent / "2"))
    store_folder.copy(make_bundle(name="other").parents[1] / "tiny/1")
    own = {"tiny/aliases.json": b'{"champion": 1}', "tiny/config.pbtxt": b'name: "tiny"'}
    for path, text in own.items():
        store_folder.write(path, text)

    assert look() == {**made, **own}

    own["tiny/aliases.json"] = b'{"champion": 2}'
    store_folder.write("tiny/aliases.json", own["tiny/aliases.json"])
    store_folder.remove("tiny/config.pbtxt")
    del own["tiny/config.pbtxt"]

    assert look() == {**made, **own}


def test_files_of_a_model_that_are_too_large_are_left_as_they_are(
    make_bundle, store_folder, look, caplog
):
    store_folder.copy(make_bundle())
    store_folder.write("tiny/aliases.json", b'{"champion": 1}')
    look()
    store_folder.write("tiny/aliases.json", b" " * ((1 << 16) + 1))

    assert look()["tiny/aliases.json"] == look()["tiny/aliases.json"] == b'{"champion": 1}'
    assert caplog.text.count("tiny/aliases.json has over 65536 bytes; it is not copied") == 1


def test_champion_is_here_before_its_alias_and_the_rest_from_the_highest(
    make_bundle, object_store, folder
):
    store = object_store.folder()
    for number in (1, 2, 3):
        store.copy(make_bundle(version=number))
    store.write("tiny/aliases.json", b'{"champion": 2}')
    here: dict[str, set[str]] = {}  # when a version was first asked for

    def asked(method, path):
        if path.endswith("/manifest.json"):
            here.setdefault(path.split("/")[-2], {one.name for one in folder.glob("tiny/*")})
        return False

    object_store.loses_request = asked

    Mirror(remote.connect(store.url), folder).look()

    assert list(here.items()) == [
        ("2", set()),
        ("3", {"2", "aliases.json"}),
        ("1", {"3", "2", "aliases.json"}),
    ]


def test_copies_of_what_is_gone_are_removed_but_an_empty_store_changes_nothing(
    make_bundle, store_folder, look, caplog
):
    first, second = make_bundle(), make_bundle(version=2)
    for made in (first, second, make_bundle(name="other")):
        store_folder.copy(made)
    store_folder.write("other/aliases.json", b"{}")
    look()
    store_folder.remove("tiny/1")
    store_folder.remove("other")

    assert look() == content(second)

    store_folder.remove("tiny/2/manifest.json")

    assert look() == look() == content(second)
    assert caplog.text.count(f"{store_folder.url} is empty; the copies of it stay") == 1


def test_copy_that_was_damaged_is_made_again_by_the_next_process(
    make_bundle, store_folder, look, folder
):
    made = make_bundle()
    store_folder.copy(made)
    look()
    (folder / "tiny/1/model.onnx").write_bytes(b"damaged")
    (folder / ".copy-left" / "new").mkdir(parents=True)

    Mirror(remote.connect(store_folder.url), folder).look()

    assert copies(folder) == content(made)


def test_copy_that_is_right_is_not_made_again_by_the_next_process(
    make_bundle, object_store, folder
):
    store = object_store.folder()
    store.copy(make_bundle())
    Mirror(remote.connect(store.url), folder).look()
    object_store.asked.clear()

    Mirror(remote.connect(store.url), folder).look()

    assert not [path for _, path in object_store.asked if path.endswith("model.onnx")]


def test_processes_that_share_a_folder_take_turns(make_bundle, store_folder, folder):
    made = [make_bundle(version=number) for number in (1, 2, 3)]
    for one in made:
        store_folder.copy(one)
    several = [Mirror(remote.connect(store_folder.url), folder) for _ in range(4)]

    with ThreadPoolExecutor(len(several)) as pool:
        list(pool.map(Mirror.look, several))

    assert copies(folder) == {key: text for one in made for key, text in content(one).items()}


def test_store_that_is_lost_leaves_the_copies_and_is_followed_when_it_is_back(
    make_bundle, object_store, folder
):
    store, made = object_store.folder(), [make_bundle(), make_bundle(version=2)]
    store.copy(made[0])
    kept = Mirror(remote.connect(store.url), folder)
    kept.look()
    object_store.stop()
    try:
        with pytest.raises(RepositoryError, match=f"^{store.url} cannot be listed: Could not con"):
            kept.look()
        assert copies(folder) == content(made[0])
    finally:
        object_store.start()
    store.copy(made[1])

    kept.look()

    assert copies(folder) == content(made[0]) | content(made[1])


def test_store_that_is_lost_in_the_middle_leaves_no_half_of_a_version(
    make_bundle, object_store, folder
):
    store, made = object_store.folder(), [make_bundle(), make_bundle(version=2)]
    for one in made:
        store.copy(one)
    kept = Mirror(remote.connect(store.url), folder)
    object_store.loses_request = lambda method, path: path.endswith("2/model.onnx")

    with pytest.raises(RepositoryError, match=r"tiny/2/model\.onnx cannot be read"):
        kept.look()

    assert copies(folder) == content(made[0])  # the other is not held up by it

    object_store.reset()
    kept.look()

    assert copies(folder) == content(made[0]) | content(made[1])


def test_folder_that_cannot_be_read_is_no_empty_one(make_bundle, tmp_path, folder):
    with pytest.raises(RepositoryError, match="cannot be listed"):
        Mirror(remote.connect(f"file://{tmp_path}/nothing"), folder).look()


def test_bucket_that_is_not_there_is_said(object_store, folder):
    with pytest.raises(RepositoryError, match="models cannot be listed: The specified bucket"):
        Mirror(remote.connect("s3://nobodys/models"), folder).look()


def test_folder_of_copies_that_cannot_be_written_to_is_said(make_bundle, store_folder, tmp_path):
    (tmp_path / "file").touch()
    kept = Mirror(remote.connect(store_folder.url), tmp_path / "file" / "copies")

    with pytest.raises(RepositoryError, match="Not a directory; name another with --cache"):
        kept.look()


def test_copying_stops_between_versions_when_it_is_over(make_bundle, store_folder, folder):
    store_folder.copy(make_bundle())

    Mirror(remote.connect(store_folder.url), folder).look(lambda: True)

    assert copies(folder) == {}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "names no folder; expected such as s3://BUCKET/FOLDER"),
        ("file://relative/models", "names no folder; expected such as file:///FOLDER"),
        ("ftp://host/models", "ftp://host/models is not an address of bundles; expected s3://"),
        ("models", "models is not an address of bundles"),
        ("gs://bucket/models", "gs:// needs gcsfs, which is not installed; pip install 'train-exp"),
    ],
)
def test_address_that_cannot_work_is_refused_with_what_to_do(url, reason):
    with pytest.raises(SettingsError) as refused:
        remote.connect(url)

    assert reason in str(refused.value)


def test_secret_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(SettingsError, match="AWS_ACCESS_KEY_ID") as refused:
        remote.connect("s3://key:secret@bucket/models")

    assert "secret@" not in str(refused.value)


def test_plain_path_stays_a_path_and_a_url_as_it_was_given():
    assert place("models") == Path("models")
    assert place("s3://bucket//models") == "s3://bucket//models"


def test_each_url_has_a_folder_of_its_own_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, two = (
        mirror.folder_of(Settings(repository=url)) for url in ("s3://b/models", "s3://b-models")
    )

    assert one.parent == two.parent == tmp_path / "train-export" / "repositories"
    assert one != two
    assert one.name.startswith("s3-b-models-")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")

    assert mirror.folder_of(Settings(repository="s3://b")).parts[:4] == (
        *("/", "home", "somebody", ".cache"),
    )
    assert mirror.folder_of(Settings(repository="s3://b", cache=tmp_path)).parent == tmp_path


def settings(url, tmp_path, **changes):
    usual = Settings(repository=url, cache=tmp_path / "cache", poll_s=0.05)
    return replace(usual, **changes)


def test_server_that_looks_once_has_everything_at_the_start(make_bundle, store_folder, tmp_path):
    made = make_bundle()
    store_folder.copy(made)

    with mirror.mirrored(settings(store_folder.url, tmp_path, model_control="none")) as given:
        assert copies(given.folder) == content(made)


def test_server_without_copies_waits_for_its_store_and_says_why_it_gave_up(object_store, tmp_path):
    with (
        pytest.raises(RepositoryError, match="s3://nobodys/models cannot be listed"),
        mirror.mirrored(settings("s3://nobodys/models", tmp_path), wait_s=0.1),
    ):
        pass


def test_server_without_copies_starts_when_its_store_comes(tmp_path, caplog, monkeypatch):
    store = tmp_path / "store"

    class Coming(logging.Handler):
        def emit(self, record):
            if "trying again" in record.getMessage():
                store.mkdir()

    monkeypatch.setattr(mirror.log, "handlers", [Coming()])
    with mirror.mirrored(settings(f"file://{store}", tmp_path)):
        assert "trying again for up to 60 s" in caplog.text


@pytest.mark.parametrize("control", ["poll", "none", "explicit"])
def test_copies_are_served_while_the_store_is_lost(
    make_bundle, tmp_path, store_folder, control, caplog
):
    made = make_bundle()
    store_folder.copy(made)
    given = settings(store_folder.url, tmp_path, model_control=control)
    Mirror(remote.connect(store_folder.url), mirror.folder_of(given)).look()
    nowhere = "s3://nobodys" if store_folder.url.startswith("s3") else "file:///nowhere"
    lost = replace(given, repository=f"{nowhere}/models")
    mirror.folder_of(given).rename(mirror.folder_of(lost))

    with mirror.mirrored(lost) as local:
        assert copies(local.folder) == content(made)
    assert (caplog.text.count("the copies of it are served") == 1) == (control != "poll")


def test_trouble_that_lasts_is_logged_once_with_its_reason(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    store = tmp_path / "store"
    store.mkdir()
    failed, back = threading.Event(), threading.Event()

    class Watching(logging.Handler):
        def emit(self, record):
            (back if "can be read again" in record.getMessage() else failed).set()

    with mirror.mirrored(settings(f"file://{store}", tmp_path)) as given:
        while not (given.folder / mirror.LOCK).exists():
            threading.Event().wait(0.05)
        handler = Watching()
        mirror.log.addHandler(handler)
        store.rename(tmp_path / "elsewhere")
        assert failed.wait(WAIT_S)
        threading.Event().wait(0.3)  # several looks
        (tmp_path / "elsewhere").rename(store)
        assert back.wait(WAIT_S)
        mirror.log.removeHandler(handler)

    assert caplog.text.count("what was copied is still served") == 1
    assert "store cannot be listed: [Errno 2] No such file" in caplog.text


def answers(client, tiny, number):
    """Wait until a version answers; return whether what it says is right."""
    images = tiny.images(3)
    for _ in range(600):
        with contextlib.suppress(Exception):
            answer = client.predict(images, model="tiny")
            if answer.version == str(number):
                return answer.probabilities.argmax(axis=1).tolist() == [
                    int(one) for one in tiny.logits(images).argmax(axis=1)
                ]
        threading.Event().wait(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_server_on_an_object_store_answers_and_swaps_to_what_is_pushed(
    make_bundle, object_store, start_server, tiny, tmp_path, workers
):
    from pipeline.push import push

    store = object_store.folder()
    connected = remote.connect(store.url)
    push(make_bundle(), connected)
    options = (
        *("--repository", store.url, "--cache", str(tmp_path / "cache"), "--poll-s", "0.2"),
        *("--address", "127.0.0.1:0", "--workers", str(workers)),
    )
    server = start_server(*options)
    with Client(server.address()) as client:
        assert answers(client, tiny, 1)

        push(make_bundle(version=2), connected)

        assert answers(client, tiny, 2)

        object_store.stop()
        try:
            another = start_server(*options)
            with Client(another.address()) as second:
                assert answers(second, tiny, 2)
            assert answers(client, tiny, 2)
        finally:
            object_store.start()
        push(make_bundle(version=3), connected)

        assert answers(client, tiny, 3)
    server.popen.terminate()
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_doctor_tells_of_the_store_and_of_the_copies(make_bundle, store_folder, tmp_path):
    given = settings(store_folder.url, tmp_path, address="127.0.0.1:0")

    def told():
        found = doctor.examine(given)
        start = next(i for i, one in enumerate(found) if one.area in {"repository", "copies"})
        return [(one.area, one.ok) for one in found[start:] if one.area in AREAS]

    store_folder.write("README", b"no version")

    assert told() == [("repository", False), ("copies", True)]

    store_folder.copy(make_bundle())

    assert told() == [("repository", True), ("copies", True)]

    Mirror(remote.connect(store_folder.url), mirror.folder_of(given)).look()

    assert told() == [("repository", True), ("tiny 1", True), ("tiny", True)]


AREAS = {"repository", "copies", "tiny", "tiny 1"}
