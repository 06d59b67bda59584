"""A real bundle, server, shadow and traffic: live figures are what the same rows say offline."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from pipeline import dataset
from pipeline.config import DataConfig
from protos import parity_pb2
from service import agreement, bundle
from service.client import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "fashion-mnist-smoke"
REQUESTS, CHUNK = 100_000, 5_000
SIZES = (1, 1, 2)  # rows of a request, in turn
WINDOW_S = 60
WAIT_S = 120
# Serves; from the moment on that a file is there, with half of its largest kernel gone.
SERVER = """
import sys
from pathlib import Path
import onnx
from onnx import numpy_helper
from service import __main__, session
load, call = session.Session.__init__, session.Session._call
def damaged(content):
    model = onnx.load_model_from_string(content)
    kernel = max(model.graph.initializer, key=lambda one: numpy_helper.to_array(one).size)
    weights = numpy_helper.to_array(kernel).copy()
    weights.reshape(-1)[: weights.size // 2] = 0
    kernel.CopyFrom(numpy_helper.from_array(weights, kernel.name))
    return model.SerializeToString()
def remembered(self, model, options, **more):
    load(self, model, options, **more)
    self.known = model, options, more
def swapped(self, batch):
    if self.known is not None and broken.exists():
        (model, options, more), self.known = self.known, None
        self._sessions = session.Session(damaged(model), options, **more)._sessions
    return call(self, batch)
session.Session.__init__, session.Session._call = remembered, swapped
broken, sys.argv = Path(sys.argv[1]), ["serve-export", *sys.argv[2:]]
sys.exit(__main__.main())
"""
# Shadows, and writes down which rows came together: TensorFlow's last bits depend on that.
SHADOW = """
import sys
import numpy as np
from service.client import Client
sample, path = Client.sample, sys.argv[1]
def recorded(self, *words):
    with open(path, "ab") as file:
        for rows in sample(self, *words):
            np.save(file, rows.inputs)
            np.save(file, rows.outputs)
            file.flush()
            yield rows
Client.sample = recorded
sys.argv = ["train-export", *sys.argv[2:]]
from pipeline.__main__ import app
app()
"""


@pytest.fixture(scope="module")
def published(environment, tmp_path_factory):
    """A bundle that the pipeline has trained, exported, proven and published."""
    folder = tmp_path_factory.mktemp("published")
    done = subprocess.run(
        ["train-export", "run", "--preset", "smoke"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "models" / NAME / "1"


@pytest.fixture(scope="module")
def images():
    return dataset.load(dataset.prepare(DataConfig())).test.inputs


@contextmanager
def process(log, *command):
    """Run Python; what it says goes into a file."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "NO_COLOR": "1"},
        ) as started,
    ):
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def served(folder, path, *options):
    """Serve a bundle; give the server's address. Its weights can be broken while it does."""
    log = folder / "server.log"
    with process(
        log, "-c", SERVER, folder / "broken", "serve", "--repository", path.parents[1],
        "--address", "127.0.0.1:0", "--sample-rate", 1, "--live-window-s", WINDOW_S, *options,
    ) as server:  # fmt: skip
        lines = eventually(
            lambda: [one for one in log.read_text().splitlines() if one.startswith("serving on ")],
            lambda: f"{server.poll()}: {log.read_text()}",
        )
        yield lines[0].removeprefix("serving on ")
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


def shadowing(folder, address, path):
    words = ("shadow", "--endpoint", address, "--models", path.parents[1])
    return process(folder / "shadow.log", "-c", SHADOW, folder / "rows", *words)


def eventually(found, said):
    """Wait until something is found, and return it."""
    until_s = time.monotonic() + WAIT_S
    while not (it := found()):
        assert time.monotonic() < until_s, said()
        time.sleep(0.1)
    return it


def live_of(client):
    return client.parity(NAME, "1").versions[0].live


def listened_to(client, folder):
    """Ask about black images until the shadow has reported one."""

    def reported():
        client.predict(np.zeros((1, 28, 28, 1), np.uint8), model=NAME)
        return live_of(client).total.rows

    eventually(reported, (folder / "shadow.log").read_text)
    settled(client, folder)


def settled(client, folder):
    """Wait until all rows that were handed out have been reported; return the live figures."""
    last = [0]

    def done():
        live = live_of(client)
        before, last[0] = last[0], live.sampled
        # The second look is for what the server has not handed out yet.
        return live if live.total.rows == live.sampled == before else time.sleep(0.3)

    return eventually(done, (folder / "shadow.log").read_text)


def asked(client, images, start, requests):
    """Send so many small requests from several threads; return their rows and their answers."""
    sizes = [SIZES[at % len(SIZES)] for at in range(start, start + requests)]
    ends = np.cumsum(sizes) + start * sum(SIZES) // len(SIZES)
    rows = [np.arange(end - size, end) % len(images) for size, end in zip(sizes, ends, strict=True)]

    def ask(which):
        return client.predict(images[which], model=NAME).logits

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, rows))
    return images[np.concatenate(rows)], np.concatenate(answers)


@dataclass
class Story:
    """What happened, and what was written down."""

    inputs: np.ndarray
    outputs: np.ndarray
    whole: parity_pb2.LiveParity  # after all requests
    broken: parity_pb2.LiveParity  # after the weights were
    broken_after_s: float
    folder: Path


@pytest.fixture(scope="module")
def story(published, images, tmp_path_factory):
    """A hundred thousand requests, and some more with weights that are no longer what they were."""
    folder = tmp_path_factory.mktemp("story")
    parts = []
    with (
        served(folder, published, "--sample-rows", 50_000) as address,
        shadowing(folder, address, published) as shadow,
        Client(address, channels=4) as client,
    ):
        listened_to(client, folder)
        first = live_of(client).sampled
        for start in range(0, REQUESTS, CHUNK):
            parts.append(asked(client, images, start, CHUNK))
            settled(client, folder)  # or the ring would overflow on a slow machine
        whole = live_of(client)
        (folder / "broken").touch()
        started_s = time.monotonic()
        while not live_of(client).failure:
            assert time.monotonic() < started_s + WINDOW_S, whole
            parts.append(asked(client, images, 0, 300))
            time.sleep(0.5)
        seconds = time.monotonic() - started_s
        rows = first + sum(len(inputs) for inputs, _ in parts)
        eventually(lambda: live_of(client).sampled >= rows, (folder / "shadow.log").read_text)
        broken = settled(client, folder)
        shadow.terminate()
        assert shadow.wait(60) == 0, (folder / "shadow.log").read_text()
    inputs, outputs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Story(inputs, outputs, whole, broken, seconds, folder)


def recorded(story):
    """Return the blocks that the shadow was sent."""
    blocks = []
    with (story.folder / "rows").open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        while file.tell() < end:
            blocks.append((np.load(file), np.load(file)))
    return blocks


def counted(inputs, outputs):
    """Count equal rows, bit for bit, but the black ones that were asked about first."""
    rows = zip(inputs.reshape(len(inputs), -1), outputs, strict=True)
    return collections.Counter(
        image.tobytes() + logits.tobytes() for image, logits in rows if image.any()
    )


def test_the_shadow_is_sent_every_row_that_was_asked_as_it_was_answered(story):
    blocks = recorded(story)

    assert story.whole.dropped == story.broken.dropped == 0
    assert len(blocks) < len(story.inputs) / 10
    found = counted(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))
    assert found == counted(story.inputs, story.outputs)


def test_live_figures_are_those_of_the_same_rows_worked_out_offline(story, published):
    import tensorflow as tf

    manifest = bundle.read_manifest(published)
    served = next(one for one in manifest.parity if one.variant == manifest.served_variant)
    allowed = agreement.Budget(served.budget.precision, served.budget.scale)
    original = tf.saved_model.load(str(published / "variants/saved_model"))
    serve = original.signatures["serving_default"]

    found = parity_pb2.ShadowFigures()
    totals = {}
    for inputs, outputs in recorded(story):
        reference = serve(image=tf.constant(inputs))["logits"].numpy()
        agreement.add(found, agreement.figures(reference, outputs, inputs, allowed=allowed))
        totals[found.rows] = json_format.MessageToDict(found)

    for live in (story.whole, story.broken):
        expected = totals[live.total.rows]
        figures = json_format.MessageToDict(live.total)
        for name in ("sumLogit", "sumConfidence"):
            assert figures.pop(name) == pytest.approx(expected.pop(name), rel=1e-9)
        assert figures == expected
    assert story.whole.total.rows >= REQUESTS
    assert story.broken.total.agreed < story.broken.total.rows
    assert story.broken.total.flips_unexplained > 0


def test_weights_that_change_in_memory_turn_the_live_verdict_within_the_window(story):
    assert story.whole.verdict == parity_pb2.LIVE_VERDICT_PASSED
    assert story.broken.verdict == parity_pb2.LIVE_VERDICT_FAILED
    assert story.broken_after_s < WINDOW_S
    alert = f"live parity is broken: {NAME} 1"
    for log in ("server.log", "shadow.log"):
        assert (story.folder / log).read_text().count(alert) == 1
    assert "FAILED, " in (story.folder / "shadow.log").read_text()


def test_killing_the_shadow_in_mid_traffic_leaves_every_request_answered(
    published, images, tmp_path
):
    with (
        served(tmp_path, published) as address,
        shadowing(tmp_path, address, published) as shadow,
        Client(address, channels=4) as client,
    ):
        listened_to(client, tmp_path)
        before = live_of(client).total.rows

        def kill():
            log = tmp_path / "shadow.log"
            try:
                eventually(lambda: live_of(client).total.rows > before, log.read_text)
            finally:
                shadow.kill()

        threading.Thread(target=kill).start()
        answered = 0
        while shadow.poll() is None or answered < 5_000:
            rows, _ = asked(client, images, answered, 1_000)
            answered += len(rows)
        rows, answers = asked(client, images, 0, 1_000)
        live = live_of(client)

    assert shadow.returncode == -signal.SIGKILL
    assert len(answers) == len(rows)
    assert before < live.total.rows < answered
