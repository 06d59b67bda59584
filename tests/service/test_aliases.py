import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service import aliases
from service.errors import BundleError


@pytest.fixture
def model(tmp_path):
    for number in (1, 2, 30):
        (tmp_path / "tiny" / str(number)).mkdir(parents=True)
    return tmp_path / "tiny"


def refusal(call, *arguments):
    with pytest.raises(BundleError) as caught:
        call(*arguments)
    return str(caught.value)


def test_what_was_written_is_read(model):
    aliases.write(model, {"champion": 2, "a": 1, "before_that-1": 30})

    assert aliases.read(model) == {"champion": 2, "a": 1, "before_that-1": 30}
    assert json.loads((model / "aliases.json").read_text())["champion"] == 2


def test_model_without_a_file_or_without_a_folder_has_none(model):
    assert aliases.read(model) == {}
    assert aliases.read(model.parent / "absent") == {}


def test_writing_replaces_all_of_them_and_leaves_no_other_file(model):
    aliases.write(model, {"champion": 1, "candidate": 2})
    aliases.write(model, {"champion": 2})

    assert aliases.read(model) == {"champion": 2}
    assert {path.name for path in model.iterdir()} == {"1", "2", "30", "aliases.json"}


def test_reader_sees_the_old_aliases_or_the_new_and_never_none_of_them(model):
    over = threading.Event()
    aliases.write(model, {"champion": 1})

    def flip():
        while not over.is_set():
            for number in (1, 2):
                aliases.write(model, {"champion": number})

    writer = threading.Thread(target=flip)
    writer.start()
    try:
        seen = [aliases.read(model) for _ in range(2000)]
    finally:
        over.set()
        writer.join()

    assert all(one in ({"champion": 1}, {"champion": 2}) for one in seen)


def test_file_may_be_read_by_a_server_that_runs_as_somebody_else(model):
    aliases.write(model, {"champion": 1})

    assert (model / "aliases.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "content",
    [
        *[b"[]", b"7", b"null", b'"champion"', b'{"champion": "1"}', b'{"champion": 1.0}'],
        *[b'{"champion": true}', b'{"champion": 0}', b'{"champion": -1}', b'{"champion": null}'],
        *[b'{"champion": 1000000000}', b'{"Champion": 1}', b'{"": 1}', b'{"1": 1}'],
        *[b'{"a b": 1}', b'{"../x": 1}', b'{"champion\\n": 1}', b'{"' + b"a" * 33 + b'": 1}'],
    ],
)
def test_file_of_something_else_is_refused_with_an_example(model, content):
    (model / "aliases.json").write_bytes(content)

    assert refusal(aliases.read, model) == (
        'tiny/aliases.json is not a set of aliases; expected such as {"champion": 3}, '
        "lower-case names with whole numbers"
    )


@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"{", b"\xff\xfe", b"\x00" * 100, b"[" * 60_000, b'{"a": 1} {}'],
        b'{"champion": ' + b"9" * 5000 + b"}",
    ],
)
def test_file_that_is_not_json_is_refused(model, content):
    (model / "aliases.json").write_bytes(content)

    assert refusal(aliases.read, model).startswith("tiny/aliases.json is not JSON: ")


def test_longest_alias_is_read(model):
    aliases.write(model, {"a" * 32: 1})

    assert aliases.read(model) == {"a" * 32: 1}


def test_file_over_the_limit_is_refused_and_one_up_to_it_is_read(model):
    text = '{"champion": 1}'.ljust(aliases.MAX_BYTES)
    (model / "aliases.json").write_text(text)
    assert aliases.read(model) == {"champion": 1}

    (model / "aliases.json").write_text(text + " ")
    assert refusal(aliases.read, model) == (
        "tiny/aliases.json cannot be read: it has over 65536 bytes"
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_not_a_plain_file_is_refused_without_waiting_for_it(model, kind):
    path = model / "aliases.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(model / "elsewhere")

    assert refusal(aliases.read, model).startswith("tiny/aliases.json cannot be read: ")


def test_alias_of_a_version_that_is_not_there_is_refused_and_nothing_is_changed(model):
    aliases.write(model, {"champion": 1})

    assert refusal(aliases.write, model, {"champion": 3}) == (
        "tiny has no version 3 for champion to point at"
    )
    assert aliases.read(model) == {"champion": 1}


@pytest.mark.parametrize("name", ["Champion", "1", "", "a b", "../x", "a" * 33])
def test_name_that_is_no_alias_is_refused(model, name):
    assert refusal(aliases.write, model, {name: 1}) == (
        f"{name!r} is not an alias; expected lower-case letters and digits"
    )


@pytest.mark.parametrize("name", ["absent", ".hidden", "a b"])
def test_model_that_is_not_there_is_refused(model, name):
    assert refusal(aliases.write, model.parent / name, {}) == (
        f"there is no model {name!r}; name one that was published"
    )


def test_file_that_cannot_be_replaced_is_said_to_be_so_and_nothing_is_left_behind(model):
    (model / "aliases.json").mkdir()

    assert refusal(aliases.write, model, {"champion": 1}) == (
        "tiny/aliases.json cannot be written: Is a directory"
    )
    assert {path.name for path in model.iterdir()} == {"1", "2", "30", "aliases.json"}


def test_aliases_that_many_set_at_once_are_all_set(model):
    def add(name):
        with aliases.changing(model):
            named = aliases.read(model)
            time.sleep(0.005)
            aliases.write(model, {**named, name: 1})

    (model / "1").mkdir(exist_ok=True)
    names = [f"alias-{number}" for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(add, names))

    assert aliases.read(model) == dict.fromkeys(names, 1)


def test_aliases_of_a_model_that_is_not_there_are_not_changed(tmp_path):
    with (
        pytest.raises(BundleError, match="there is no model 'none'"),
        aliases.changing(tmp_path / "none"),
    ):
        raise AssertionError
