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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import shadow
from pipeline.errors import ShadowError
from protos import parity_pb2
from service import agreement
from service.client import Client, SampledRows
from service.errors import ServerError

BUDGET = agreement.Budget("float32", 400.0)
KEY = "tiny", "1", "parent"
# Serves, and answers wrongly from the moment on that a file is there.
CORRUPTED = """
import sys
from pathlib import Path
from service import __main__, session
right = session.Session._call
def wrong(self, batch):
    answers = right(self, batch)
    if Path(broken).exists():
        answers["logits"] = answers["logits"] + 1
    return answers
session.Session._call = wrong
broken, sys.argv = sys.argv[1], ["serve-export", *sys.argv[2:]]
sys.exit(__main__.main())
"""


class Lines(Client):
    """The original of every version, and a server that samples what it is given, as a client."""

    def __init__(self, *sampled, refusals=()):
        self.sampled = list(sampled)  # blocks, and what is raised between them
        self.refusals = list(refusals)  # raised by the first reports
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
        live = parity_pb2.LiveParity(budget=BUDGET.message(), window_s=300)
        found = self.reported.get((model, version, "parent"), parity_pb2.ShadowFigures())
        live.window.CopyFrom(found)
        live.failure = "a flip" if found.flips_unexplained else ""
        return parity_pb2.GetParityResponse(versions=[parity_pb2.VersionParity(live=live)])


@pytest.fixture
def originals(tiny):
    return SimpleNamespace(of=lambda rows: shadow.Original(tiny.logits, BUDGET, classes=True))


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


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_no_row_is_lost_or_counted_twice_when_a_report_does_not_arrive(
    tiny, originals, monkeypatch, code
):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    client = Lines(*blocks(tiny, tiny.images(9), 3, 6), refusals=[refused(code), refused(code)])

    run(client, originals)

    assert client.calls > 2
    assert client.reported[KEY].rows == 9


def test_rows_of_a_version_that_left_are_forgotten_and_others_go_on(tiny, originals):
    client = Lines(
        *blocks(tiny, tiny.images(4)),
        *blocks(tiny, tiny.images(5), version="2"),
        refusals=[refused("NOT_FOUND")],
    )

    assert run(client, originals) == ""

    assert [(key[1], found.rows) for key, found in client.reported.items()] == [("2", 5)]


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_a_server_that_will_never_let_rows_be_read_ends_it_with_its_sentence(originals, code):
    client = Lines(refused(code))

    with pytest.raises(ServerError, match=f"refused with {code}"):
        run(client, originals)
    assert client.asked == 1


def test_a_server_that_was_lost_is_asked_again(tiny, originals, monkeypatch, caplog):
    monkeypatch.setattr(shadow, "FIRST_PAUSE_S", 0.01)
    images = tiny.images(8)
    client = Lines(
        *blocks(tiny, images[:4]), refused("UNAVAILABLE"), refused("UNAVAILABLE"),
        *blocks(tiny, images[4:]),
    )  # fmt: skip

    run(client, originals)

    assert client.asked == 3
    assert client.reported[KEY].rows == 8
    assert "trying again" in caplog.text


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

    run(client, SimpleNamespace(of=of))

    assert client.reported[KEY].rows == 3
    assert caplog.text.count("tiny 2 is not shadowed: it is not there") == 1


def test_who_asks_for_a_number_of_rows_is_told_that_their_original_cannot_be_had(tiny):
    def of(rows):
        raise ShadowError("it is not there")

    with pytest.raises(ShadowError, match="it is not there"):
        run(Lines(*blocks(tiny, tiny.images(3))), SimpleNamespace(of=of), rows=3)


def test_it_ends_after_as_many_rows_as_were_asked_for(tiny, originals):
    client = Lines(*blocks(tiny, tiny.images(30), 10, 20))

    assert shadow.Shadow(client, originals, rows=17).run() == ""
    assert client.reported[KEY].rows == 17


def test_a_broken_budget_is_said_once_and_is_the_result(tiny, originals, caplog, monkeypatch):
    monkeypatch.setattr(shadow, "REPORT_S", 0.0)
    images = tiny.images(12)
    wrong = tiny.logits(images)[:, ::-1].copy()
    client = Lines(*(block(images[at : at + 4], wrong[at : at + 4]) for at in (0, 4, 8)))

    with caplog.at_level(logging.WARNING):
        assert run(client, originals) == "a flip"

    assert caplog.text.count("live parity is broken: tiny 1: ") == 1


def test_rows_that_nobody_rescores_are_left_with_the_server(tiny, originals, monkeypatch):
    monkeypatch.setattr(shadow, "MAX_WAITING", 3)
    stuck, started = threading.Event(), threading.Event()
    known = originals.of

    def of(rows):
        started.set()
        stuck.wait(60)
        return known(rows)

    client = Lines(*blocks(tiny, tiny.images(20), *range(1, 20)))
    shadowing = shadow.Shadow(client, SimpleNamespace(of=of))  # type: ignore[arg-type] # all of it that is asked
    running = threading.Thread(target=shadowing.run)
    running.start()
    assert started.wait(30)
    time.sleep(0.3)

    # One is rescored, three wait, one is in the hand of who waits for room.
    assert len(client.sampled) == 20 - 1 - 3 - 1
    shadowing.stop()
    stuck.set()
    running.join(30)
    assert not running.is_alive()


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
    originals = shadow.Originals(Knowing(), models=bundled.parents[1])
    images = tiny.images(9)

    original = originals.of(block(images, tiny.logits(images)))

    np.testing.assert_allclose(original.answer(images), tiny.logits(images), atol=1e-4)
    assert original.classes
    assert original.allowed == BUDGET
    assert originals.of(block(images, tiny.logits(images))) is original


def test_an_original_that_was_changed_is_not_relied_on(bundled, tiny):
    with (bundled / "variants/saved_model/saved_model.pb").open("ab") as file:
        file.write(b"\0")
    originals = shadow.Originals(Knowing(), models=bundled.parents[1])

    with pytest.raises(ShadowError, match="no original to rely on: tiny/1/variants/saved_model"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))))


def test_the_original_of_another_model_is_not_relied_on(bundled, saved, tiny):
    rows = SampledRows("tiny", "1", "another", tiny.images(1), tiny.logits(tiny.images(1)), 0)

    for places in ({"models": bundled.parents[1]}, {"saved_model": saved}):
        with pytest.raises(ShadowError, match=r"from the original parent, .* 1 from another"):
            shadow.Originals(Knowing(), **places).of(rows)


def test_a_saved_model_that_does_not_say_what_it_is_is_not_relied_on(saved, tiny, tmp_path):
    nameless = shutil.copytree(saved, tmp_path / "nameless")
    shutil.rmtree(nameless / "assets.extra")
    originals = shadow.Originals(Knowing(), saved_model=nameless)

    with pytest.raises(ShadowError, match="does not say which model it is"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))))


def test_a_bundle_without_an_original_says_so(make_bundle, tiny):
    path = make_bundle(
        edit=lambda manifest: setattr(manifest.provenance, "parent_sha256", "parent")
    )
    originals = shadow.Originals(Knowing(), models=path.parents[1])

    with pytest.raises(ShadowError, match="has no variants/saved_model; give the original with"):
        originals.of(block(tiny.images(1), tiny.logits(tiny.images(1))))


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
def served(bundle, *options, code=None):
    """Run a server on a bundle; give its process and address."""
    command = ("-m", "service") if code is None else ("-c", CORRUPTED, code)
    repository = ("--repository", bundle.parents[1], "--address", "127.0.0.1:0")
    with process(*command, "serve", *repository, "--sample-rate", "1", *options) as server:
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


def settled(client, rows):
    """Wait until so many rows were reported or dropped; return the live figures."""
    until_s = time.monotonic() + 120
    while True:
        live = client.parity("tiny").versions[0].live
        if live.total.rows + live.dropped >= rows:
            return live
        assert time.monotonic() < until_s, f"{live.total.rows} of {rows} rows were reported"
        time.sleep(0.2)


@pytest.mark.slow
def test_live_figures_are_those_of_the_same_rows_worked_out_later(bundled, tiny):
    images = tiny.images(100_000, seed=3)
    enough = ("--sample-rows", "200000")
    with (
        served(bundled, *enough) as (_, address),
        shadowing(address, bundled),
        Client(address, channels=4) as client,
    ):
        sampled(client)
        time.sleep(3)  # for what was asked meanwhile to be reported
        first = client.parity("tiny").versions[0].live

        def ask(start):
            answer = client.predict(images[start : start + 1], model="tiny")
            return answer.logits

        with ThreadPoolExecutor(16) as pool:
            answers = np.concatenate(list(pool.map(ask, range(len(images)))))
        live = settled(client, first.total.rows + len(images))

    assert live.dropped == 0
    np.testing.assert_array_equal(answers, tiny.logits(images))
    original = Linear(tiny)
    reference = original.serve(tf.constant(images))["logits"].numpy()
    expected = agreement.figures(reference, answers, images, allowed=BUDGET)
    zeros = np.zeros((first.total.rows, 2, 2, 1), np.uint8)
    agreement.add(
        expected,
        agreement.figures(
            original.serve(tf.constant(zeros))["logits"].numpy(),
            tiny.logits(zeros), zeros, allowed=BUDGET,
        ),
    )  # fmt: skip
    found = live.total
    assert (found.rows, found.agreed) == (expected.rows, expected.agreed)
    assert found.flips_explained == expected.flips_explained
    assert found.flips_unexplained == expected.flips_unexplained
    assert list(found.predicted) == list(expected.predicted)
    assert list(found.pixel_mean) == list(expected.pixel_mean)
    assert found.max_logit == pytest.approx(expected.max_logit, abs=1e-9)
    assert found.sum_confidence == pytest.approx(expected.sum_confidence, rel=1e-9)
    assert live.verdict == parity_pb2.LIVE_VERDICT_PASSED


@pytest.mark.slow
def test_killing_the_shadow_costs_no_answer(bundled, tiny):
    images = tiny.images(4_000, seed=4)
    with served(bundled) as (server, address), Client(address) as client:
        with shadowing(address, bundled) as other:
            sampled(client)
            for at in range(0, len(images), 4):
                if at == 2_000:
                    other.send_signal(signal.SIGKILL)
                answer = client.predict(images[at : at + 4], model="tiny")
                np.testing.assert_array_equal(answer.logits, tiny.logits(images[at : at + 4]))
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.slow
def test_a_runtime_that_goes_wrong_turns_the_live_verdict_within_the_window(
    bundled, tiny, tmp_path
):
    broken = tmp_path / "broken"
    with (
        served(bundled, "--live-window-s", "30", code=broken) as (server, address),
        shadowing(address, bundled) as other,
        Client(address) as client,
    ):
        assert sampled(client).verdict == parity_pb2.LIVE_VERDICT_PASSED
        broken.touch()
        broken_s = time.monotonic()
        while True:
            client.predict(tiny.images(8), model="tiny")
            live = client.parity("tiny").versions[0].live
            if live.verdict == parity_pb2.LIVE_VERDICT_FAILED:
                break
            assert time.monotonic() < broken_s + 30, live
            time.sleep(0.1)
        time.sleep(1.5)
        server.terminate()
        server_said = server.communicate(timeout=60)[0]
        other.terminate()
        shadow_said = other.communicate(timeout=60)[0]

    assert "max |Δlogit| is 1" in live.failure
    assert "live parity is broken: tiny 1, max |Δlogit| is 1" in server_said
    assert "live parity is broken: tiny 1: " in shadow_said
    assert other.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_was_read_has_been_reported(bundled, tiny, number):
    with served(bundled) as (_, address), Client(address) as client:
        with shadowing(address, bundled) as other:
            sampled(client)
            client.predict(tiny.images(64), model="tiny")
            time.sleep(0.5)
            other.send_signal(number)
            said = other.communicate(timeout=60)[0]
        live = client.parity("tiny").versions[0].live

    assert live.total.rows == live.sampled
    assert other.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[number], said
    assert "Traceback" not in said
