import asyncio
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline import dataset, promote
from pipeline.endpoint import TOKEN, Endpoint
from pipeline.errors import BusyError, PromotionError
from pipeline.publish import write_manifest
from service import aliases, bundle
from service.client import Client
from service.errors import BundleError, ServerError

ROWS = 2_000
# What `dataset.load` is given, which is not the real one here.
DATA: Any = SimpleNamespace(sha256="images")


class Linear(tf.Module):
    """The tiny model on TensorFlow, with something added to the logits of its last class."""

    def __init__(self, tiny, striped=0.0):
        super().__init__()
        zero = tiny.logits(np.zeros((1, 2, 2, 1), np.uint8))
        unit = tiny.logits(np.eye(4, dtype=np.uint8).reshape(4, 2, 2, 1)) - zero
        self.weights = tf.Variable(unit)
        self.bias = tf.Variable(zero[0] + np.array([0, 0, striped], np.float32))

    @tf.function(input_signature=[tf.TensorSpec((None, 2, 2, 1), tf.uint8, name="image")])
    def serve(self, image):
        flat = tf.reshape(tf.cast(image, tf.float32), (-1, 4))
        return {"logits": flat @ self.weights + self.bias}


@pytest.fixture
def test_images(tiny, monkeypatch):
    """The tiny model's test set, in the place of Fashion-MNIST's."""
    images = tiny.images(ROWS, seed=9)
    labels = tiny.logits(images).argmax(axis=1).astype(np.uint8)
    labels[::10] = 0  # not always what the model says
    split = SimpleNamespace(inputs=images, targets=labels)
    monkeypatch.setattr(dataset, "load", lambda data: SimpleNamespace(test=split))
    return split


@pytest.fixture
def publish(make_bundle, tiny, tmp_path, test_images):
    """Return a function that publishes a version as the pipeline does, with its original."""

    def publish(version, *, striped=0.0, root=None, min_accuracy=0.5):
        saved = tmp_path / f"saved-{version}-{striped}"
        module = Linear(tiny, striped)
        tf.saved_model.save(module, str(saved), signatures={"serving_default": module.serve})
        answers = module.serve(tf.constant(test_images.inputs))["logits"].numpy()
        right = int((answers.argmax(axis=1) == test_images.targets).sum())

        def edit(manifest):
            manifest.provenance.parent_sha256 = f"{striped}"
            manifest.dataset.sha256 = DATA.sha256
            manifest.evaluation.accuracy.correct = right
            manifest.evaluation.min_accuracy = min_accuracy
            for file in sorted(one for one in saved.rglob("*") if one.is_file()):
                content = file.read_bytes()
                manifest.files.add(
                    path=f"variants/saved_model/{file.relative_to(saved).as_posix()}",
                    sha256=hashlib.sha256(content).hexdigest(),
                    size_bytes=len(content),
                )

        made = make_bundle(
            tmp_path / "making" / str(striped), version=version, striped=striped, edit=edit
        )
        shutil.copytree(saved, made / "variants" / "saved_model")
        home = (root or tmp_path / "models") / "tiny"
        home.mkdir(parents=True, exist_ok=True)
        return made.rename(home / str(version))

    return publish


@contextmanager
def served(repository, *options):
    command = ("serve", "--repository", str(repository), "--address", "127.0.0.1:0", *options)
    with subprocess.Popen(
        [sys.executable, "-m", "service", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("serving on ")
            yield Endpoint(line.removeprefix("serving on ").strip())
        finally:
            server.kill()


def record_of(home):
    (path,) = (home / "records").iterdir()
    return json.loads(path.read_text())


def refusal(path, endpoints, **options):
    with pytest.raises(PromotionError) as caught:
        promote.promote(path, DATA, endpoints, **options)
    return str(caught.value)


def test_a_version_whose_deployment_answers_like_its_original_becomes_champion(publish):
    first = publish(1)
    home = first.parent
    with served(home.parent) as one, served(home.parent) as other:
        promote.promote(first, DATA, [one])
        assert aliases.read(home) == {"champion": 1}
        second = publish(2, striped=1.0)
        record = promote.promote(second, DATA, [one, other])
        with Client(one.address) as client:
            image = np.zeros((1, 2, 2, 1), np.uint8)
            until_s = time.monotonic() + 30  # for the server to see the alias
            while client.predict(image, model="tiny").version != "2":
                assert time.monotonic() < until_s
                time.sleep(0.05)

    assert aliases.read(home) == {"champion": 2, "previous": 1}
    written = json.loads(record.read_text())
    assert written["promoted"] is True
    assert written["aliases_before"] == {"champion": 1}
    assert written["aliases_after"] == {"champion": 2, "previous": 1}
    assert [found["endpoint"] for found in written["endpoints"]] == [one.address, other.address]
    for found in written["endpoints"]:
        assert found["report"]["passed"] is True
        assert found["report"]["accuracy"]["rows"] == ROWS
        assert found["self_check"]["cpu"]


def test_what_was_measured_is_no_part_of_the_bundle_and_harms_no_reader(publish):
    path = publish(1)
    with served(path.parents[1]) as endpoint:
        promote.promote(path, DATA, [endpoint])

    assert bundle.read(path).manifest.version == 1
    assert not (path / "records").exists()
    with served(path.parents[1]) as endpoint, Client(endpoint.address) as client:
        assert [(one.name, one.version) for one in client.models()] == [("tiny", "1")]


def test_another_model_under_the_same_number_is_not_promoted(publish, tmp_path):
    path = publish(1)
    publish(1, striped=3.0, root=tmp_path / "elsewhere")
    with served(tmp_path / "elsewhere") as endpoint:
        said = refusal(path, [endpoint])

    assert "it serves another model under tiny 1: model.sha256 is " in said
    assert "there is none, so that the highest version that is ready answers" in said
    assert aliases.read(path.parent) == {}
    assert record_of(path.parent)["promoted"] is False


def test_one_endpoint_that_does_not_hold_keeps_the_old_champion(publish, tmp_path):
    publish(1)
    path = publish(2, striped=1.0)
    aliases.write(path.parent, {"champion": 1, "candidate": 1, "other": 2})
    publish(2, striped=5.0, root=tmp_path / "elsewhere")
    with served(path.parents[1]) as right, served(tmp_path / "elsewhere") as wrong:
        said = refusal(path, [right, wrong])

    assert said.startswith(f"tiny 2 is not the champion, {wrong.address}: it serves another")
    assert "1 stays it" in said
    assert aliases.read(path.parent) == {"champion": 1, "candidate": 1, "other": 2}
    written = record_of(path.parent)["endpoints"]
    assert [one["report"].get("passed", False) for one in written] == [True, False]


def test_accuracy_below_the_gate_is_not_promoted(publish):
    path = publish(1, min_accuracy=0.999)
    with served(path.parents[1]) as endpoint:
        assert "its accuracy is " in refusal(path, [endpoint])


def test_other_test_images_than_the_evaluations_are_noticed(publish):
    path = publish(1)
    others: Any = SimpleNamespace(sha256="others")

    with pytest.raises(PromotionError, match="these images are others; give its own with --data"):
        promote.promote(path, others, [Endpoint("127.0.0.1:1")])


def test_an_original_that_was_changed_is_not_relied_on(publish):
    path = publish(1)
    with (path / "variants/saved_model/saved_model.pb").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(BundleError, match=r"saved_model\.pb"):
        promote.promote(path, DATA, [Endpoint("127.0.0.1:1")])


def test_an_alias_of_a_version_that_is_gone_is_in_nobodys_way(publish):
    path = publish(2, striped=1.0)
    gone = publish(1)
    aliases.write(path.parent, {"champion": 2, "previous": 1})
    shutil.rmtree(gone)
    with served(path.parents[1]) as endpoint:
        promote.promote(path, DATA, [endpoint])

    assert aliases.read(path.parent) == {"champion": 2}


def test_without_a_record_there_is_no_champion(publish):
    path = publish(1)
    (path.parent / "records").write_text("in the way")
    with served(path.parents[1]) as endpoint:
        assert "records cannot be written to" in refusal(path, [endpoint])

    assert aliases.read(path.parent) == {}


def test_a_champion_that_no_longer_holds_is_told_so(publish, tmp_path):
    path = publish(1)
    aliases.write(path.parent, {"champion": 1})
    publish(1, striped=3.0, root=tmp_path / "elsewhere")
    with served(tmp_path / "elsewhere") as endpoint:
        assert "tiny 1, the champion, does not hold, " in refusal(path, [endpoint])

    assert aliases.read(path.parent) == {"champion": 1}


@contextmanager
def balanced(*addresses):
    """Give each new connection to the next server, as a balancer of connections does."""
    turns = itertools.cycle(addresses)

    async def pump(reader, writer):
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer):
        host, port = next(turns).rsplit(":", 1)
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, back), pump(there, writer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(connected, "127.0.0.1", 0), loop
    ).result()

    async def close():
        server.close()
        others = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_one_server_of_two_behind_a_balancer_with_another_model_is_found(publish, tmp_path):
    path = publish(1)
    publish(1, striped=1e-4, root=tmp_path / "elsewhere")  # within the budget
    with (
        served(path.parents[1]) as right,
        served(tmp_path / "elsewhere") as wrong,
        balanced(right.address, wrong.address) as address,
    ):
        said = refusal(path, [Endpoint(address)])

    assert "it serves another model under tiny 1" in said


def test_a_slower_server_behind_a_balancer_is_waited_for(publish, tmp_path):
    publish(1)
    path = publish(2, striped=1.0)
    slow = tmp_path / "slow"
    shutil.copytree(path.parent / "1", slow / "tiny" / "1")
    with (
        served(path.parents[1]) as one,
        served(slow, "--poll-s", "0.2") as other,
        balanced(one.address, other.address) as address,
    ):
        later = threading.Timer(2.0, shutil.copytree, (path, slow / "tiny" / "2"))
        later.start()
        promote.promote(path, DATA, [Endpoint(address)])
        later.join()

    assert aliases.read(path.parent) == {"champion": 2}


def test_a_version_that_no_server_has_is_waited_for_and_then_refused(publish, tmp_path, caplog):
    caplog.set_level("INFO")
    path = publish(2, striped=1.0)
    publish(1, root=tmp_path / "elsewhere")
    with served(tmp_path / "elsewhere") as endpoint:
        said = refusal(path, [endpoint], ready_s=1.0)

    assert "tiny 2 is not ready, it is not in the folder that is served there" in said
    assert caplog.text.count("waiting for") == 1
    assert aliases.read(path.parent) == {}


def test_a_version_that_the_server_refuses_is_refused_with_its_reason(publish, monkeypatch):
    monkeypatch.setattr(promote, "REFUSED_S", 1.0)
    good = publish(1)
    path = publish(2, striped=1.0)
    manifest = bundle.read_manifest(path)
    manifest.session.graph_optimization = "sideways"
    write_manifest(path, manifest)
    with served(good.parents[1]) as endpoint:
        said = refusal(path, [endpoint])

    assert "tiny 2 is not ready, " in said
    assert "graph_optimization is 'sideways'" in said


def test_a_server_that_is_not_there_is_told(publish):
    assert "127.0.0.1:1: " in refusal(publish(1), [Endpoint("127.0.0.1:1")], ready_s=0.5)


def test_a_server_that_goes_away_in_the_middle_leaves_the_champion(publish, monkeypatch):
    publish(1)
    path = publish(2, striped=1.0)
    aliases.write(path.parent, {"champion": 1})
    asked = []

    def predict(self, images, **options):
        asked.append(len(images))
        raise ServerError("the connection was lost", code="UNAVAILABLE")

    with served(path.parents[1]) as endpoint:
        monkeypatch.setattr(Client, "predict", predict)
        said = refusal(path, [endpoint])

    assert asked
    assert "the connection was lost" in said
    assert aliases.read(path.parent) == {"champion": 1}


KILLED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from pipeline import dataset, promote
from pipeline.endpoint import Endpoint
images = np.zeros((2000, 2, 2, 1), np.uint8)
split = SimpleNamespace(inputs=images, targets=np.zeros(2000, np.uint8))
dataset.load = lambda data: SimpleNamespace(test=split)
data = SimpleNamespace(sha256="images")
def stuck(*arguments):
    print("asking", flush=True)
    time.sleep(600)
promote._ask = stuck
promote.promote(Path(sys.argv[1]), data, [Endpoint("127.0.0.1:1")])
"""


def test_a_kill_in_the_middle_leaves_the_champion_and_the_next_promotion_works(publish):
    publish(1)
    path = publish(2, striped=1.0)
    aliases.write(path.parent, {"champion": 1})
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        text=True,
    ) as killed:
        assert killed.stdout.readline() == "asking\n"
        with pytest.raises(BusyError):
            promote.promote(path, DATA, [Endpoint("127.0.0.1:1")])
        killed.send_signal(signal.SIGKILL)

    assert aliases.read(path.parent) == {"champion": 1, "candidate": 2}
    assert "no server answers there" in refusal(path, [Endpoint("127.0.0.1:1")], ready_s=0.5)
    assert aliases.read(path.parent) == {"champion": 1}  # as before the one that was killed
    with served(path.parents[1]) as endpoint:
        promote.promote(path, DATA, [endpoint])
    assert aliases.read(path.parent) == {"champion": 2, "previous": 1}


def test_an_interrupt_takes_the_candidate_back(publish, monkeypatch):
    path = publish(1)

    def interrupted(*arguments):
        assert aliases.read(path.parent) == {"candidate": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(promote, "_ask", interrupted)

    with pytest.raises(KeyboardInterrupt):
        promote.promote(path, DATA, [Endpoint("127.0.0.1:1")])
    assert aliases.read(path.parent) == {}


def test_promoting_the_champion_again_changes_nothing(publish):
    path = publish(1)
    aliases.write(path.parent, {"champion": 1})
    with served(path.parents[1]) as endpoint:
        promote.promote(path, DATA, [endpoint])

    assert aliases.read(path.parent) == {"champion": 1}


def test_a_rollback_gives_the_champion_back_and_can_be_taken_back(publish):
    publish(1)
    home = publish(2, striped=1.0).parent
    aliases.write(home, {"champion": 2, "previous": 1, "other": 1})

    assert promote.rollback(home) == (2, 1)
    assert aliases.read(home) == {"champion": 1, "previous": 2, "other": 1}
    assert promote.rollback(home) == (1, 2)


def test_a_rollback_without_a_champion_before_says_what_to_do(publish):
    home = publish(1).parent
    aliases.write(home, {"champion": 1})

    with pytest.raises(PromotionError, match="no previous champion to go back to; choose"):
        promote.rollback(home)
    with pytest.raises(BundleError, match="there is no model"):
        promote.rollback(home.parent / "nobody")


def test_an_endpoint_shows_the_token_of_its_file_or_of_the_environment(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        "pipeline.endpoint.Client", lambda address, **options: given.append(options)
    )
    (tmp_path / "token").write_text("from-file\n")

    monkeypatch.setenv(TOKEN, "from-environment")
    Endpoint("h:1").connect()
    Endpoint("h:1", token_file=tmp_path / "token", tls=True).connect()
    monkeypatch.delenv(TOKEN)
    Endpoint("h:1").connect()

    assert [options["token"] for options in given] == ["from-environment", "from-file", None]
    assert [options["tls"] is not None for options in given] == [False, True, False]
