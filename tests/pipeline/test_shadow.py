import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import replicas, shadow
from pipeline.errors import ShadowError
from protos import parity_pb2
from service import agreement
from service.client import Client, SampledRows
from service.errors import ServerError

BUDGET = agreement.Budget("float32", 400.0)
KEY = "tiny", "1", "parent"


class Lines(Client):
    """The original of every version, and a server that samples what it is given, as a client."""

    def __init__(self, *sampled, refusals=()):
        self.sampled = list(sampled)  # blocks, and what is raised between them
        self.refusals = list(refusals)  # raised by the first reports
        self.silent = None  # raised instead of a verdict
        self.reported = {}
        self.calls = 0
        self.asked = 0
        self.waiting = threading.Event()

    def sample(self, model=""):
        self.asked += 1
        while self.sampled:
            found = self.sampled.pop(0)
            if isinstance(found, Exception):
                raise found
            yield found
        self.waiting.set()
        threading.Event().wait(60)
        yield

    def report(self, figures, *, model, version, parent_sha256, **_):
        self.calls += 1
        if self.refusals:
            raise self.refusals.pop(0)
        total = self.reported.setdefault(
            (model, version, parent_sha256), parity_pb2.ShadowFigures()
        )
        agreement.add(total, figures)

    def parity(self, model="", version="", **_):
        if self.silent:
            raise self.silent
        live = parity_pb2.LiveParity(budget=BUDGET.message(), window_s=300)
        found = self.reported.get((model, version, "parent"), parity_pb2.ShadowFigures())
        live.window.CopyFrom(found)
        live.failure = "a flip" if found.flips_unexplained else ""
        return parity_pb2.GetParityResponse(versions=[parity_pb2.VersionParity(live=live)])


class Given(shadow.Originals):
    """Originals that a function gives."""

    def __init__(self, of):
        self._of = of

    def of(self, rows, client=None):
        return self._of(rows)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Have all that was read rescored at a stop, however busy the machine is."""
    monkeypatch.setattr(shadow, "STOP_S", 60.0)


@pytest.fixture
def originals(tiny):
    return Given(lambda rows: shadow.Original(tiny.logits, BUDGET, classes=True))


def block(images, outputs, version="1", dropped=0):
    return SampledRows("tiny", version, "parent", images, outputs, dropped)


def blocks(tiny, images, *borders, version="1"):
    parts = np.split(images, borders)
    return [block(part, tiny.logits(part), version) for part in parts if len(part)]


def refused(code):
    return ServerError(f"refused with {code}", code=code)


def run(client, originals, **options):
    """Shadow until everything sampled was read, or to the end of itself."""
    shadowing = shadow.Shadow(client, originals, **options)

    def stop():
        client.waiting.wait(60)
        shadowing.stop()

    threading.Thread(target=stop, daemon=True).start()
    return shadowing.run()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=10
)
@given(st.lists(st.integers(0, 40), max_size=6))
def test_what_is_reported_depends_on_the_rows_and_not_on_how_they_came(tiny, originals, borders):
    images = tiny.images(40)
    client = Lines(*blocks(tiny, images, *sorted(borders)))

    assert run(client, originals) == ""

    logits = tiny.logits(images)
    expected = agreement.figures(logits, logits, images, allowed=BUDGET)
    found = client.reported[KEY]
    assert found.sum_confidence == pytest.approx(expected.sum_confidence)
    found.sum_confidence = expected.sum_confidence
    assert found == expected


def test_versions_are_counted_apart(tiny, originals):
    images = tiny.images(12)
    client = Lines(*blocks(tiny, images[:8]), *blocks(tiny, images[8:], version="2"))

    run(client, originals)

    assert client.reported["tiny", "1", "parent"].rows == 8
    assert client.reported["tiny", "2", "parent"].rows == 4


def test_no_row_is_lost_when_a_report_does_not_arrive(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    gone = refused("UNAVAILABLE")
    client = Lines(*blocks(tiny, tiny.images(9), 3, 6), refusals=[gone, gone])

    run(client, originals)

    assert client.calls > 2
    assert client.reported[KEY].rows == 9


def test_no_row_is_reported_twice_when_nobody_says_whether_it_arrived(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    client = Lines(*blocks(tiny, tiny.images(9), 3), refusals=[refused("DEADLINE_EXCEEDED")])

    run(client, originals)

    assert client.reported[KEY].rows == 6


def test_one_report_is_of_many_rows(tiny, originals):
    client = Lines(*blocks(tiny, tiny.images(64), *range(64)))

    run(client, originals)

    assert client.reported[KEY].rows == 64
    assert client.calls < 10


def test_rows_of_a_version_that_left_are_forgotten_and_others_go_on(tiny, originals):
    client = Lines(
        *blocks(tiny, tiny.images(4)),
        *blocks(tiny, tiny.images(5), version="2"),
        refusals=[refused("NOT_FOUND")],
    )

    assert run(client, originals) == ""

    assert [(key[1], found.rows) for key, found in client.reported.items()] == [("2", 5)]


@pytest.mark.parametrize(
    "code", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"]
)
def test_a_server_that_will_never_let_rows_be_read_ends_it_with_its_sentence(originals, code):
    client = Lines(refused(code))

    with pytest.raises(ServerError, match=f"refused with {code}"):
        run(client, originals)
    assert client.asked == 1


def test_a_server_without_the_calls_is_said_to_be_another(originals):
    with pytest.raises(ServerError, match="it is not serve-export, or an older one"):
        run(Lines(refused("UNIMPLEMENTED")), originals)


def test_a_server_that_was_lost_is_asked_again(tiny, originals, monkeypatch, caplog):
    monkeypatch.setattr(replicas, "FIRST_PAUSE_S", 0.01)
    images = tiny.images(8)
    client = Lines(
        *blocks(tiny, images[:4]), refused("UNAVAILABLE"), refused("UNAVAILABLE"),
        refused("CANCELLED"), *blocks(tiny, images[4:]),
    )  # fmt: skip

    run(client, originals)

    assert client.asked == 4
    assert client.reported[KEY].rows == 8
    assert caplog.text.count("no rows: refused with UNAVAILABLE; trying again") == 1


def test_rows_whose_original_cannot_be_had_are_passed_over_and_said_once(tiny, originals, caplog):
    known = originals.of

    def of(rows):
        if rows.version == "2":
            raise ShadowError("it is not there")
        return known(rows)

    images = tiny.images(9)
    client = Lines(
        *blocks(tiny, images[:6], 3, version="2"), *blocks(tiny, images[6:]),
    )  # fmt: skip

    run(client, Given(of))

    assert client.reported[KEY].rows == 3
    assert caplog.text.count("tiny 2 is not shadowed: it is not there") == 1


@pytest.mark.parametrize("broken", ["shape", "refused"])
def test_an_original_that_cannot_answer_the_rows_is_said_to_be_no_match(tiny, caplog, broken):
    def answer(images):
        if broken == "refused":
            raise tf.errors.InvalidArgumentError(None, None, "expected (?, 28, 28, 1)")
        return tiny.logits(images)[:, :2]

    original = shadow.Original(answer, BUDGET, classes=True)
    client = Lines(*blocks(tiny, tiny.images(3)))

    assert run(client, Given(lambda rows: original)) == ""

    assert not client.reported
    assert "tiny 1 is not shadowed: its original cannot answer rows of (3, 2, 2, 1)" in caplog.text


def test_an_original_that_could_not_be_had_is_looked_for_again(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "REFUSED_S", 0.0)
    known, missing = originals.of, [ShadowError("not yet")]

    def of(rows):
        if missing:
            raise missing.pop()
        return known(rows)

    client = Lines(*blocks(tiny, tiny.images(6), 2))
    run(client, Given(of))

    assert client.reported[KEY].rows == 4


def test_who_asks_for_a_number_of_rows_is_told_that_their_original_cannot_be_had(tiny):
    def of(rows):
        raise ShadowError("it is not there")

    with pytest.raises(ShadowError, match="it is not there"):
        run(Lines(*blocks(tiny, tiny.images(3))), Given(of), rows=3)


def test_it_ends_after_as_many_rows_as_were_asked_for(tiny, originals):
    client = Lines(*blocks(tiny, tiny.images(30), 10, 20))

    assert shadow.Shadow(client, originals, rows=17).run() == ""
    assert client.reported[KEY].rows == 17


def test_who_asks_for_more_rows_than_came_is_told_how_many_were_missing(tiny, originals):
    with pytest.raises(ShadowError, match="stopped, 3 rows before"):
        run(Lines(*blocks(tiny, tiny.images(7))), originals, rows=10)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "NOT_FOUND"])
def test_without_a_verdict_nobody_is_told_that_parity_holds(tiny, originals, code):
    client = Lines(*blocks(tiny, tiny.images(7)))
    client.silent = refused(code)

    with pytest.raises(ShadowError, match="before it could judge them"):
        run(client, originals, rows=7)


def test_a_stop_does_not_wait_for_all_that_was_read(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "STOP_S", 0.0)
    started, stopped = threading.Event(), threading.Event()
    client = Lines(*blocks(tiny, tiny.images(16), *range(16)))
    known = originals.of

    def of(rows):
        started.set()
        stopped.wait(60)
        return known(rows)

    shadowing = shadow.Shadow(client, Given(of))
    running = threading.Thread(target=shadowing.run)
    running.start()
    assert started.wait(30)
    assert client.waiting.wait(30)  # all was read
    shadowing.stop()
    stopped.set()
    running.join(30)

    assert not running.is_alive()
    assert 0 < client.reported[KEY].rows < 16


def test_a_broken_budget_is_said_once_and_is_the_result(tiny, originals, caplog, monkeypatch):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    images = tiny.images(12)
    wrong = tiny.logits(images)[:, ::-1].copy()
    client = Lines(*(block(images[at : at + 4], wrong[at : at + 4]) for at in (0, 4, 8)))

    with caplog.at_level(logging.WARNING):
        assert run(client, originals) == "a flip"

    assert caplog.text.count("live parity is broken: tiny 1: ") == 1


def test_figures_that_hold_again_are_said_to(tiny, originals, caplog, monkeypatch):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    images = tiny.images(3, seed=2)

    class Forgetful(Lines):
        def report(self, figures, **more):
            self.reported.clear()  # the window has passed
            super().report(figures, **more)

    client = Forgetful(
        block(images, tiny.logits(images)[:, ::-1].copy()), *blocks(tiny, images),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert run(client, originals) == ""

    assert caplog.text.count("live parity is broken: tiny 1: ") == 1
    assert caplog.text.count("live parity holds again: tiny 1: ") == 1


def test_rows_that_nobody_rescores_are_left_with_the_server(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "MAX_WAITING", 3)
    stuck, started = threading.Event(), threading.Event()
    known = originals.of

    def of(rows):
        started.set()
        stuck.wait(60)
        return known(rows)

    client = Lines(*blocks(tiny, tiny.images(20), *range(1, 20)))
    shadowing = shadow.Shadow(client, Given(of))
    running = threading.Thread(target=shadowing.run)
    running.start()
    assert started.wait(30)
    # One is rescored, three wait, one is in the hand of who waits for room.
    left = 20 - 1 - 3 - 1
    until_s = time.monotonic() + 30
    while len(client.sampled) > left and time.monotonic() < until_s:
        time.sleep(0.01)
    time.sleep(0.3)  # for more to be taken, if any is

    assert len(client.sampled) == left
    shadowing.stop()
    stuck.set()
    running.join(30)
    assert not running.is_alive()


class Many:
    """Servers by their addresses, which may come and go."""

    def __init__(self, monkeypatch, **servers):
        monkeypatch.setattr(shadow, "REPORT_S", 0.01)
        monkeypatch.setattr(replicas, "LOOK_UP_S", 0.01)
        monkeypatch.setattr(replicas, "FIRST_PAUSE_S", 0.01)
        self.servers = servers
        self.named = set(servers)
        self.closed = []

    def connect(self, address):
        server = self.servers[address]
        server.close = lambda: self.closed.append(address)
        return server

    def run(self, originals, until=None, **options):
        """Shadow them until everything sampled was read and more holds; return the result."""
        servers = replicas.Replicas(lambda: self.named, self.connect)
        shadowing = shadow.Shadow(servers, originals, **options)

        def stop():
            for server in tuple(self.servers.values()):
                server.waiting.wait(60)
            wait_for(until or (lambda: True))
            shadowing.stop()

        threading.Thread(target=stop, daemon=True).start()
        with servers:
            return shadowing.run()


def wait_for(found):
    until_s = time.monotonic() + 60
    while not found() and time.monotonic() < until_s:
        time.sleep(0.01)


def test_every_server_is_told_of_its_own_rows_and_of_no_others(tiny, originals, monkeypatch):
    images = tiny.images(12)
    many = Many(
        monkeypatch,
        a=Lines(*blocks(tiny, images[:5])),
        b=Lines(*blocks(tiny, images[5:])),
    )

    assert many.run(originals) == ""

    assert [many.servers[name].reported[KEY].rows for name in "ab"] == [5, 7]
    assert sorted(many.closed) == ["a", "b"]


def test_servers_of_one_version_share_its_original(bundled, tiny, monkeypatch):
    load = Mock(wraps=tf.saved_model.load)
    monkeypatch.setattr(tf.saved_model, "load", load)

    class Both(Lines):
        def parity(self, model="", version="", **_):
            answer = super().parity(model, version)
            known = Knowing().parity().versions[0].self_check
            answer.versions[0].self_check.CopyFrom(known)
            return answer

        def metadata(self, model, version="", **_):
            return Knowing().metadata(model)

    servers = {name: Both(*blocks(tiny, tiny.images(6), 3)) for name in "abc"}
    many = Many(monkeypatch, **servers)

    assert many.run(shadow.Originals(models=bundled.parents[1])) == ""

    assert load.call_count == 1
    assert [one.reported[KEY].rows for one in servers.values()] == [6, 6, 6]


def test_who_comes_and_who_goes_is_said_and_who_stays_is_shadowed_on(
    tiny, originals, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    images = tiny.images(9)
    a, c = Lines(*blocks(tiny, images[:3])), Lines(*blocks(tiny, images[3:]))
    b = Lines(*[refused("UNAVAILABLE")] * 1000)
    many = Many(monkeypatch, a=a, b=b)

    def change():
        wait_for(lambda: "a is there" in caplog.text and "b is there" in caplog.text)
        many.servers["c"] = c
        many.named = {"a", "c"}
        wait_for(lambda: "b is gone" in caplog.text)
        b.waiting.set()

    threading.Thread(target=change, daemon=True).start()
    many.run(originals, lambda: c.reported)

    assert a.reported[KEY].rows == 3
    assert c.reported[KEY].rows == 6
    assert many.closed.count("b") == 1
    said = [
        one.message for one in caplog.records if "there" in one.message or "gone" in one.message
    ]
    assert said[:2] == ["a is there, and shadowed", "b is there, and shadowed"]
    assert sorted(said[2:]) == ["b is gone", "c is there, and shadowed"]


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "FAILED_PRECONDITION", "UNIMPLEMENTED"])
def test_a_server_that_lets_nobody_read_does_not_end_what_others_are_shadowed_with(
    tiny, originals, monkeypatch, caplog, code
):
    closed = Lines(refused(code))
    closed.waiting.set()
    many = Many(monkeypatch, a=closed, b=Lines(*blocks(tiny, tiny.images(6), 2)))

    assert many.run(originals, lambda: "a is not shadowed" in caplog.text) == ""

    assert many.servers["b"].reported[KEY].rows == 6
    assert caplog.text.count("a is not shadowed: ") == 1


def test_servers_that_all_let_nobody_read_end_only_who_waits_for_rows(
    originals, monkeypatch, caplog
):
    many = Many(monkeypatch, a=Lines(refused("PERMISSION_DENIED")))
    many.servers["a"].waiting.set()
    assert many.run(originals, lambda: "a is not shadowed" in caplog.text) == ""

    many = Many(monkeypatch, a=Lines(refused("PERMISSION_DENIED")))
    with pytest.raises(ServerError, match="refused with PERMISSION_DENIED"):
        many.run(originals, rows=5)


@pytest.mark.parametrize("code", ["INTERNAL", "INVALID_ARGUMENT", "UNAVAILABLE", "NOT_FOUND"])
def test_a_server_that_takes_no_report_does_not_end_what_others_are_shadowed_with(
    tiny, originals, monkeypatch, code
):
    many = Many(
        monkeypatch,
        a=Lines(*blocks(tiny, tiny.images(4)), refusals=[refused(code)] * 1000),
        b=Lines(*blocks(tiny, tiny.images(6), 2)),
    )

    assert many.run(originals, lambda: many.servers["b"].reported) == ""

    assert many.servers["b"].reported[KEY].rows == 6
    assert not many.servers["a"].reported


def test_a_number_of_rows_is_of_all_servers_together(tiny, originals, monkeypatch):
    many = Many(monkeypatch, **{name: Lines(*blocks(tiny, tiny.images(9), 3, 6)) for name in "ab"})

    assert many.run(originals, lambda: False, rows=15) == ""

    assert sum(one.reported[KEY].rows for one in many.servers.values()) == 15


def test_rows_that_a_server_took_away_with_it_must_come_anew(tiny, originals, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    lost = [*blocks(tiny, tiny.images(8)), *[refused("UNAVAILABLE")] * 1000]
    a = Lines(*lost, refusals=[refused("UNAVAILABLE")] * 1000)
    b = Lines()
    many = Many(monkeypatch, a=a, b=b)

    def change():
        wait_for(lambda: a.calls)
        many.named = {"b"}
        wait_for(lambda: "a is gone" in caplog.text)
        many.servers["c"] = Lines(*blocks(tiny, tiny.images(10)))
        many.named = {"b", "c"}

    threading.Thread(target=change, daemon=True).start()

    assert many.run(originals, lambda: False, rows=10) == ""

    assert many.servers["c"].reported[KEY].rows == 10


def test_the_result_names_the_server_that_fails_even_when_it_has_gone(
    tiny, originals, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    images = tiny.images(3, seed=2)
    wrong = block(images, tiny.logits(images)[:, ::-1].copy())
    a, b = Lines(wrong, refused("UNAVAILABLE")), Lines(*blocks(tiny, images))
    many = Many(monkeypatch, a=a, b=b)

    def leave():
        wait_for(lambda: "live parity is broken: a tiny 1: " in caplog.text)
        many.named = {"b"}

    threading.Thread(target=leave, daemon=True).start()

    assert many.run(originals, lambda: "a is gone" in caplog.text) == "a a flip"


def test_the_heartbeat_goes_on_while_nothing_comes_and_ends_with_the_shadow(
    originals, monkeypatch, tmp_path
):
    monkeypatch.setattr(shadow, "REPORT_S", 0.01)
    beat, client = tmp_path / "alive", Lines()
    shadowing = shadow.Shadow(client, originals, heartbeat=beat)
    running = threading.Thread(target=shadowing.run)
    running.start()

    for _ in range(3):  # whatever is made old becomes new
        wait_for(lambda: beat.exists() and beat.stat().st_mtime > 1)
        os.utime(beat, (1, 1))
        wait_for(lambda: beat.stat().st_mtime > 1)
        assert beat.stat().st_mtime > 1
    shadowing.stop()
    running.join(60)
    os.utime(beat, (1, 1))
    time.sleep(0.1)
    assert beat.stat().st_mtime == 1


def test_a_heartbeat_that_cannot_be_written_ends_it(originals, tmp_path):
    with pytest.raises(FileNotFoundError):
        shadow.Shadow(Lines(), originals, heartbeat=tmp_path / "none" / "alive").run()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("", "8 rows in 300 s, 87.50% agree, max |Δ| 0.002 of 0.004 allowed: passed"),
        ("no", "8 rows in 300 s, 87.50% agree, max |Δ| 0.002 of 0.004 allowed: FAILED, no"),
    ],
)
def test_figures_are_told_on_one_line(failure, said):
    live = parity_pb2.LiveParity(window_s=300, budget=BUDGET.message(), failure=failure)
    live.window.rows, live.window.agreed, live.window.max_logit = 8, 7, 2e-3

    assert shadow.described(live) == said
    assert shadow.described(parity_pb2.LiveParity()) == "no rows"


class Linear(tf.Module):
    """The tiny model on TensorFlow."""

    def __init__(self, tiny, offset=0.0):
        super().__init__()
        zero = tiny.logits(np.zeros((1, 2, 2, 1), np.uint8))
        unit = tiny.logits(np.eye(4, dtype=np.uint8).reshape(4, 2, 2, 1)) - zero
        self.weights = tf.Variable(unit)
        self.bias = tf.Variable(zero[0] + np.float32(offset))

    @tf.function(input_signature=[tf.TensorSpec((None, 2, 2, 1), tf.uint8, name="image")])
    def serve(self, image):
        flat = tf.reshape(tf.cast(image, tf.float32), (-1, 4))
        return {"logits": flat @ self.weights + self.bias}


def save(module, path, parent="parent"):
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    (path / "assets.extra").mkdir()
    (path / "assets.extra" / "metadata.json").write_text(json.dumps({"parent.sha256": parent}))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_once):
    return save(Linear(tiny_once), tmp_path_factory.mktemp("saved") / "saved_model")


@pytest.fixture(scope="module")
def tiny_once(request):
    return request.getfixturevalue("tiny")


@pytest.fixture
def bundled(make_bundle, saved, tmp_path):
    """A bundle of the tiny model that has its original, as the pipeline publishes it."""

    def edit(manifest):
        manifest.provenance.parent_sha256 = "parent"
        for file in sorted(path for path in saved.rglob("*") if path.is_file()):
            content = file.read_bytes()
            manifest.files.add(
                path=f"variants/saved_model/{file.relative_to(saved).as_posix()}",
                sha256=hashlib.sha256(content).hexdigest(),
                size_bytes=len(content),
            )

    shutil.copytree(saved, tmp_path / "models/tiny/1/variants/saved_model")
    path = tmp_path / "models/tiny/1"
    moved = tmp_path / "variants"
    shutil.move(path / "variants", moved)
    path.rmdir()
    made = make_bundle(edit=edit)
    shutil.move(moved, made / "variants")
    return made


class Knowing(Client):
    """A server that only knows what a version may differ by, as a client."""

    def __init__(self):
        pass

    def parity(self, model="", version="", **_):
        check = parity_pb2.SelfCheck()
        check.report.budget.CopyFrom(BUDGET.message())
        check.report.classes.add(label="dark")
        return parity_pb2.GetParityResponse(versions=[parity_pb2.VersionParity(self_check=check)])

    def metadata(self, model, version="", **_):
        return SimpleNamespace(properties={"parity.output": "logits"})


def test_the_original_of_a_bundle_answers_as_it_should(bundled, tiny):
    originals = shadow.Originals(models=bundled.parents[1])
    images = tiny.images(9)

    original = originals.of(block(images, tiny.logits(images)), Knowing())

    np.testing.assert_allclose(original.answer(images), tiny.logits(images), atol=1e-4)
    assert original.classes
    assert original.allowed == BUDGET
    assert originals.of(block(images, tiny.logits(images)), Knowing()) is original


def test_an_original_that_was_changed_is_not_relied_on(bundled, tiny):
    with (bundled / "variants/saved_model/saved_model.pb").open("ab") as file:
        file.write(b"\0")
    originals = shadow.Originals(models=bundled.parents[1])

    with pytest.raises(ShadowError, match="no original to rely on: tiny/1/variants/saved_model"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))), Knowing())


def test_the_original_of_another_model_is_not_relied_on(bundled, saved, tiny):
    rows = SampledRows("tiny", "1", "another", tiny.images(1), tiny.logits(tiny.images(1)), 0)

    for places in ({"models": bundled.parents[1]}, {"saved_model": saved}):
        with pytest.raises(ShadowError, match=r"from the original parent, .* 1 from another"):
            shadow.Originals(**places).of(rows, Knowing())


def test_a_saved_model_that_does_not_say_what_it_is_is_not_relied_on(saved, tiny, tmp_path):
    nameless = shutil.copytree(saved, tmp_path / "nameless")
    shutil.rmtree(nameless / "assets.extra")
    originals = shadow.Originals(saved_model=nameless)

    with pytest.raises(ShadowError, match="does not say which model it is"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))), Knowing())


def test_a_file_of_an_original_that_no_digest_speaks_for_is_not_relied_on(bundled, tiny):
    (bundled / "variants/saved_model/saved_model.pbtxt").write_text("")
    originals = shadow.Originals(models=bundled.parents[1])

    with pytest.raises(ShadowError, match=r"saved_model.pbtxt, which its manifest does not list"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))), Knowing())


def test_a_server_that_says_nothing_of_its_budget_is_not_held_to_one(bundled, tiny):
    class Silent(Knowing):
        def parity(self, model="", version="", **_):
            return parity_pb2.GetParityResponse(versions=[parity_pb2.VersionParity()])

    with pytest.raises(ShadowError, match="does not say how far tiny 1 may be"):
        shadow.Originals(models=bundled.parents[1]).of(
            block(tiny.images(1), tiny.logits(tiny.images(1))), Silent()
        )


def test_an_original_is_let_go_when_no_rows_of_its_version_come(bundled, tiny):
    now_s = [0.0]
    originals = shadow.Originals(models=bundled.parents[1], clock=lambda: now_s[0])
    shutil.copytree(bundled, bundled.parent / "2")
    text = (bundled / "manifest.json").read_text()
    (bundled.parent / "2/manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    images = tiny.images(1)
    first, second = (block(images, tiny.logits(images), version) for version in "12")

    before = originals.of(first, Knowing())
    now_s[0] = shadow.UNUSED_S
    originals.of(second, Knowing())
    assert originals.of(first, Knowing()) is before
    now_s[0] += shadow.UNUSED_S + 1
    originals.of(second, Knowing())
    assert originals.of(first, Knowing()) is not before


class Line(tf.Module):
    """y = 2x - 1 on TensorFlow."""

    @tf.function(input_signature=[tf.TensorSpec((None, None), tf.float32, name="x")])
    def serve(self, x):
        return {"y": 2 * x - 1}


class KnowingLine(Lines):
    """A server that samples a model without classes, as a client."""

    def parity(self, model="", version="", **_):
        answer = super().parity(model, version)
        answer.versions[0].self_check.report.budget.CopyFrom(BUDGET.message())
        return answer

    def metadata(self, model, version="", **_):
        return SimpleNamespace(properties={"parity.output": "y"})


def test_a_model_that_is_no_classifier_is_held_to_its_differences(tmp_path):
    x = np.linspace(-8, 8, 24, dtype=np.float32).reshape(8, 3)
    client = KnowingLine(SampledRows("line", "1", "parent", x, 2 * x - 1 + np.float32(0.5), 0))
    saved_model = save(Line(), tmp_path / "line")

    assert run(client, shadow.Originals(saved_model=saved_model)) == ""

    found = client.reported["line", "1", "parent"]
    assert (found.rows, found.agreed, found.max_logit) == (8, 8, 0.5)
    assert not found.predicted
    assert not found.pixel_mean


def test_a_bundle_without_an_original_says_so(make_bundle, tiny):
    path = make_bundle(
        edit=lambda manifest: setattr(manifest.provenance, "parent_sha256", "parent")
    )
    originals = shadow.Originals(models=path.parents[1])

    with pytest.raises(ShadowError, match="has no variants/saved_model; give the original with"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))), Knowing())


@contextmanager
def process(*command):
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def served(bundle, address="127.0.0.1:0", rate="1"):
    """Run a server on a bundle; give its process and address."""
    where = ("--repository", bundle.parents[1], "--address", address)
    with process("-m", "service", "serve", *where, "--sample-rate", rate) as server:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("serving on "):
                break
        else:
            raise AssertionError("".join(lines))
        yield server, line.removeprefix("serving on ").strip()


def shadowing(address, bundle, *options):
    models = ("--models", bundle.parents[1], "--endpoint", address)
    return process("-m", "pipeline", "shadow", *models, *options)


def ask_until_it_ends(client, started):
    """Ask about images until a process has ended; return its status and what it said."""
    while started.poll() is None:
        client.predict(np.arange(64, dtype=np.uint8).reshape(16, 2, 2, 1), model="tiny")
        time.sleep(0.05)
    return started.returncode, started.stdout.read()


def sampled(client):
    """Wait until somebody is shown rows; return the live figures."""
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        client.predict(np.zeros((1, 2, 2, 1), np.uint8), model="tiny")
        live = client.parity("tiny").versions[0].live
        if live.total.rows:
            return live
        time.sleep(0.2)
    raise AssertionError("nobody has reported anything")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_was_read_has_been_reported(bundled, tiny, number):
    with served(bundled) as (_, address), Client(address) as client:
        with shadowing(address, bundled) as other:
            before = sampled(client).sampled
            client.predict(tiny.images(64), model="tiny")
            wait_for(lambda: client.parity("tiny").versions[0].live.sampled >= before + 64)
            time.sleep(0.5)  # for what was handed out to arrive
            other.send_signal(number)
            said = other.communicate(timeout=60)[0]
        live = client.parity("tiny").versions[0].live

    assert live.total.rows == live.sampled
    assert other.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[number], said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_server_that_comes_back_on_its_address_is_shadowed_again(bundled, tiny):
    with (
        served(bundled) as (server, address),
        shadowing(address, bundled) as other,
        Client(address) as client,
    ):
        sampled(client)
        server.kill()
        server.wait()
        with served(bundled, address):
            sampled(client)
        other.terminate()
        said = other.communicate(timeout=60)[0]

    assert other.returncode == 0, said
    assert "no rows: " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offset", "missing", "status", "sentence"),
    [
        (0.0, False, 0, ""),
        (1.0, False, 1, "error: max |Δlogit| is 1, over the float32 budget"),
        (0.0, True, 1, "error: nowhere does not say which model it is"),
    ],
    ids=["right", "wrong", "missing"],
)
def test_who_asks_for_some_rows_is_given_a_verdict_by_status_and_in_one_sentence(
    bundled, tiny, tmp_path, offset, missing, status, sentence
):
    original = "nowhere" if missing else save(Linear(tiny, offset), tmp_path / "original")
    with (
        served(bundled) as (_, address),
        Client(address) as client,
        shadowing(address, bundled, "--original", original, "--rows", "40") as other,
    ):
        found, said = ask_until_it_ends(client, other)
        live = client.parity("tiny").versions[0].live

    assert found == status, said
    assert live.total.rows == (0 if missing else 40)
    last = said.strip().splitlines()[-1]
    assert last.startswith(sentence)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_server_that_samples_nothing_is_said_to(bundled):
    with served(bundled, rate="0") as (_, address), shadowing(address, bundled) as other:
        said = other.communicate(timeout=120)[0]

    assert other.returncode == 1
    assert said.strip().splitlines()[-1].startswith("error: this server lets nobody read rows;")


# Shadows; a name stands for what a file says, a host a line.
NAMED = """
import socket
import sys
from pathlib import Path
names, sys.argv = Path(sys.argv[1]), ["train-export", *sys.argv[2:]]
known = socket.getaddrinfo
def found(host, port, *words, **more):
    if host != "inference":
        return known(host, port, *words, **more)
    hosts = names.read_text().split()
    if not hosts:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [known(one, port, *words, **more)[0] for one in hosts]
socket.getaddrinfo = found
from pipeline.__main__ import app
app()
"""


@pytest.mark.slow
def test_servers_behind_a_name_are_shadowed_as_they_come_and_go(bundled, tmp_path):
    names, beat, log = tmp_path / "names", tmp_path / "alive", tmp_path / "log"
    names.write_text("")
    with served(bundled, "127.0.0.2:0") as (first, a), log.open("w") as output:
        port = a.rpartition(":")[2]
        words = ("shadow", "--models", bundled.parents[1], "--endpoint", f"inference:{port}")
        command = [sys.executable, "-c", NAMED, names, *words, "--every-address"]
        with (
            served(bundled, f"127.0.0.3:{port}") as (_, b),
            subprocess.Popen(
                [*map(str, command), "--heartbeat", str(beat)], stdout=output, stderr=output
            ) as other,
        ):
            try:
                wait_for(lambda: "addresses are not known" in log.read_text())
                names.write_text("127.0.0.2\n127.0.0.3\n")
                reported_of(a, b)
                first.kill()
                first.wait()
                with served(bundled, f"127.0.0.4:{port}") as (_, c):
                    names.write_text("127.0.0.3\n127.0.0.4\n")
                    reported_of(b, c)
                    wait_for(lambda: f"{a} is gone" in log.read_text())
                    assert time.time() - beat.stat().st_mtime < 60
                    other.terminate()
                    status = other.wait(60)
            finally:
                other.kill()

    said = log.read_text()
    assert status == 0, said
    assert [said.count(f"{one} is there") for one in (a, b, c)] == [1, 1, 1]
    assert [said.count(f"{one} is gone") for one in (a, b, c)] == [1, 0, 0]
    assert "Traceback" not in said


def reported_of(*addresses):
    """Wait until rows of every server have been reported to it."""
    for address in addresses:
        with Client(address) as client:
            sampled(client)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tls",), "a certificate is for a name, which our client cannot be told to expect"),
        (("--endpoint", "inference"), "the server is 'inference', expected HOST:PORT"),
    ],
)
def test_what_every_address_cannot_be_had_with_is_said(bundled, options, sentence):
    with shadowing("inference:1", bundled, "--every-address", *options) as other:
        said = other.communicate(timeout=60)[0]

    assert other.returncode == 2
    assert sentence in said


def test_rows_of_floats_are_judged_by_the_size_of_their_own_answers():
    def twice(rows):
        with np.errstate(over="ignore"):
            return rows * np.float32(2)

    original = shadow.Original(twice, BUDGET, classes=False)
    inputs = np.array([[1], [np.nan], [np.inf], [3e38], [1e9]], np.float32)
    served = np.array([[2], [np.nan], [np.inf], [np.inf], [2e9 + 200]], np.float32)

    found = shadow._figures(original, inputs, served)

    assert found.rows == 2  # to the others the original itself has no finite answer
    assert found.max_logit < BUDGET.max_logit
    assert shadow._figures(original, inputs[1:3], served[1:3]).rows == 0
    served[0] = np.nan
    assert shadow._figures(original, inputs, served).max_logit == np.inf
