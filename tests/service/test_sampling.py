import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import aclosing, closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import bundle_pb2, parity_pb2
from service import agreement
from service.aio_client import AsyncClient
from service.asking import SampledRows
from service.client import Client
from service.errors import LimitError, PreconditionError, ServerError
from service.live import LiveStore
from service.model_config import VersionPolicy
from service.repository import Repository
from service.rpc import Rpc
from service.sampling import MAX_RINGS, Block, Ring, Sampler, Sampling, Source
from service.version import load

FRONTS = ("grpcio", "native")
WAIT_S = 60
BUDGET = agreement.Budget("float32", 100.0).message()
MANY = 10**9


def until(condition):
    """Wait for what another thread is about to do."""
    end_s = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.005)
    return found


def source(name="tiny", number=1):
    live = LiveStore().open((name, number), BUDGET, bundle_pb2.TestDistribution())
    return Source(name, number, "ab", live)


def block(start, rows, of, width=4):
    """Return rows that tell their number: 8 bytes of input a column, and their double as output."""
    inputs = np.arange(start, start + rows, dtype=np.int64).reshape(-1, 1).repeat(width, axis=1)
    return Block(of, inputs, (2 * inputs[:, :1]).astype(np.float32))


def drained(ring, max_rows=MANY, max_bytes=MANY):
    """Take everything; return the rows by their numbers, and the last count of those dropped."""
    numbers, dropped = [], 0
    while (taken := ring.take(max_rows, max_bytes)) is not None:
        for one in taken.blocks:
            np.testing.assert_array_equal(one.outputs[:, 0], 2 * one.inputs[:, 0])
            numbers += one.inputs[:, 0].tolist()
        dropped = taken.dropped
    return numbers, dropped


# Rings


def test_ring_gives_rows_in_their_order_and_is_empty_then():
    ring, one = Ring("", max_rows=10, max_bytes=MANY), source()
    for start in (0, 3, 5):
        ring.put(block(start, 2, one))

    assert drained(ring) == ([0, 1, 3, 4, 5, 6], 0)
    assert ring.size == (0, 0)
    assert ring.take(1, 1) is None
    assert (one.live.counts().sampled, one.live.counts().dropped) == (6, 0)


def test_full_ring_drops_the_oldest_rows_and_counts_them():
    ring, one = Ring("", max_rows=5, max_bytes=MANY), source()
    for start in range(0, 12, 3):
        ring.put(block(start, 3, one))
        assert ring.size[0] <= 5

    assert drained(ring) == ([7, 8, 9, 10, 11], 7)
    assert (one.live.counts().sampled, one.live.counts().dropped) == (5, 7)


def test_rows_that_alone_are_too_many_leave_the_newest():
    ring = Ring("", max_rows=5, max_bytes=MANY)
    ring.put(block(0, 2, source()))
    ring.put(block(10, 8, source()))

    assert drained(ring) == ([13, 14, 15, 16, 17], 3)


def test_ring_is_bounded_in_bytes_as_well():
    ring, one = Ring("", max_rows=MANY, max_bytes=100), source()  # 36 a row
    for start in range(10):
        ring.put(block(start, 1, one))
        assert ring.size[1] <= 100
    assert drained(ring) == ([8, 9], 8)

    ring.put(block(0, 3, one, width=100))  # not one of them has room
    assert ring.size == (0, 0)
    assert drained(ring)[0] == []
    ring.put(block(0, 1, one))
    assert drained(ring) == ([0], 11)


def test_dropped_rows_are_counted_by_version():
    ring, one, other = Ring("", max_rows=4, max_bytes=MANY), source(), source(number=2)
    ring.put(block(0, 3, one))
    ring.put(block(10, 3, other))

    first, second = ring.take(MANY, MANY), ring.take(MANY, MANY)

    assert first is not None
    assert second is not None
    assert (first.blocks[0].source, first.dropped) == (one, 2)
    assert (second.blocks[0].source, second.dropped) == (other, 0)
    assert (one.live.counts().dropped, other.live.counts().dropped) == (2, 0)


def test_rows_of_different_versions_and_shapes_are_not_taken_together():
    ring, one, other = Ring("", max_rows=MANY, max_bytes=MANY), source(), source(number=2)
    for rows in (block(0, 1, one), block(1, 1, one), block(2, 1, other), block(3, 1, one, 7)):
        ring.put(rows)

    found = [ring.take(MANY, MANY) for _ in range(4)]

    assert [len(one.blocks) if one else 0 for one in found] == [2, 1, 1, 0]


@pytest.mark.parametrize("limits", [(2, MANY), (MANY, 80), (2, 1)])
def test_no_more_rows_are_taken_than_asked_for_but_one(limits):
    ring = Ring("", max_rows=MANY, max_bytes=MANY)
    ring.put(block(0, 5, source()))

    taken = ring.take(*limits)

    assert taken is not None
    assert sum(one.rows for one in taken.blocks) == (1 if limits == (2, 1) else 2)
    assert sum(drained(ring, *limits)[0]) > 0
    assert ring.size == (0, 0)


@given(
    puts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.booleans()), max_size=40),
    max_rows=st.integers(1, 20),
    max_bytes=st.integers(1, 600),
)
def test_every_row_is_given_once_in_order_or_counted_as_dropped(puts, max_rows, max_bytes):
    ring, one = Ring("", max_rows=max_rows, max_bytes=max_bytes), source()
    start, given = 0, []
    for rows, width, reads in puts:
        ring.put(block(start, rows, one, width))
        start += rows
        assert ring.size[0] <= max_rows
        assert ring.size[1] <= max_bytes
        if reads:
            given += drained(ring, 4, 100)[0]
    given += drained(ring, 4, 100)[0]

    assert given == sorted(set(given))
    counted = one.live.counts()
    assert (counted.sampled, counted.dropped) == (len(given), start - len(given))


# Samplers


def sampler(rate, seed=0):
    made = Sampler(source(), "y", rate, random.Random(seed))
    ring = Ring("", max_rows=MANY, max_bytes=MANY)
    made.rings = (ring,)
    return made, ring


def show(made, start, rows):
    inputs = np.arange(start, start + rows, dtype=np.int64).reshape(-1, 1)
    made(inputs, {"x": inputs, "y": 2.0 * inputs})


def test_all_rows_are_sampled_at_rate_1():
    made, ring = sampler(1.0)
    show(made, 0, 5)
    show(made, 5, 1)

    assert drained(ring)[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_rows_are_sampled_at_the_rate_whatever_the_batches(rate, batch):
    made, ring = sampler(rate, seed=batch)
    rows = 100_000 // batch * batch
    for start in range(0, rows, batch):
        show(made, start, batch)

    found = len(drained(ring)[0])

    assert abs(found - rows * rate) < 5 * (rows * rate * (1 - rate)) ** 0.5


def test_whether_a_row_is_sampled_says_nothing_of_the_next():
    made, ring = sampler(0.3)
    show(made, 0, 100_000)
    picked = np.zeros(100_000, bool)
    picked[drained(ring)[0]] = True

    pairs = Counter(zip(picked[:-1].tolist(), picked[1:].tolist(), strict=True))

    for (one, other), count in pairs.items():
        share = (0.3 if one else 0.7) * (0.3 if other else 0.7)
        assert abs(count / 99_999 - share) < 0.008


@pytest.mark.parametrize("rate", [5e-324, 1e-300])
def test_smallest_rate_samples_nothing_and_fails_at_nothing(rate):
    made, ring = sampler(rate)
    show(made, 0, 1000)

    assert drained(ring)[0] == []


def test_sampled_rows_are_copies():
    made, ring = sampler(1.0)
    inputs = np.zeros((3, 1), np.int64)
    outputs = np.zeros((3, 1), np.float32)
    made(inputs, {"y": outputs})
    inputs[:] = outputs[:] = 9

    taken = ring.take(MANY, MANY)

    assert taken is not None
    assert not taken.blocks[0].inputs.any()
    assert not taken.blocks[0].outputs.any()


def test_outputs_beyond_float32_are_sampled_as_infinite():
    made, ring = sampler(1.0)
    made(np.zeros((1, 1), np.uint8), {"y": np.array([[1e300]])})

    taken = ring.take(MANY, MANY)

    assert taken is not None
    assert np.isinf(taken.blocks[0].outputs).all()


def test_threads_that_sample_at_once_sample_every_row_once():
    made, ring = sampler(0.25)

    def work(start):
        for at in range(start, start + 8000, 8):
            show(made, at, 8)

    threads = [threading.Thread(target=work, args=(8000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = drained(ring)[0]

    assert len(found) == len(set(found))
    assert abs(len(found) - 8000) < 5 * (32_000 * 0.25 * 0.75) ** 0.5


# Who listens


def added(sampling, name="tiny", number=1):
    manifest = bundle_pb2.BundleManifest(name=name, version=number)
    batcher = cast("Any", SimpleNamespace(sample=None))
    sampling.add(manifest, BUDGET, batcher)
    return batcher


def test_batcher_is_asked_for_rows_only_while_somebody_listens():
    sampling = Sampling(rate=0.5)
    before = added(sampling)
    assert before.sample is None

    ring = sampling.open("")
    after = added(sampling, number=2)
    assert before.sample is not None
    assert after.sample is not None
    sampling.close(ring)

    assert before.sample is after.sample is None


def test_listener_to_one_model_gets_nothing_of_others():
    sampling = Sampling(rate=1)
    tiny, other = added(sampling), added(sampling, "other")

    sampling.open("tiny")

    assert tiny.sample is not None
    assert other.sample is None


def test_version_that_leaves_or_is_loaded_anew_is_no_longer_asked():
    sampling = Sampling(rate=1)
    sampling.open("")
    old = added(sampling)
    new = added(sampling)
    assert old.sample is None
    assert new.sample is not None

    sampling.remove("tiny", 1)
    sampling.remove("tiny", 7)

    assert new.sample is None
    assert sampling.live.all() == []


def test_nobody_listens_where_the_rate_is_0():
    sampling = Sampling()
    batcher = added(sampling)

    with pytest.raises(PreconditionError, match="start it with --sample-rate above 0"):
        sampling.open("")

    assert batcher.sample is None


def test_no_more_than_a_few_listen_at_once():
    sampling = Sampling(rate=1)
    rings = [sampling.open("") for _ in range(MAX_RINGS)]
    with pytest.raises(LimitError, match="4 shadows read rows of this server already"):
        sampling.open("")

    sampling.close(rings[0])

    sampling.open("")


def test_every_listener_gets_every_sampled_row():
    sampling = Sampling(rate=1)
    batcher = added(sampling)
    rings = [sampling.open("") for _ in range(2)]
    inputs = np.arange(6).reshape(3, 2)

    batcher.sample(inputs, {"logits": inputs.astype(np.float32)})

    for ring in rings:
        taken = ring.take(MANY, MANY)
        assert taken is not None
        np.testing.assert_array_equal(taken.blocks[0].inputs, inputs)


# Over the wire


class Shadow:
    """A client that reads rows in a thread of its own."""

    def __init__(self, address, model=""):
        self.client = Client(address)
        self.rows: list[SampledRows] = []
        self.error: ServerError | None = None
        self._model = model
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for rows in self.client.sample(self._model):
                self.rows.append(rows)
        except ServerError as error:
            self.error = error

    def count(self):
        return sum(len(one.inputs) for one in self.rows)

    def close(self):
        self.client.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def by_image(tiny, rows):
    """Return how often each image came, after each was held against the answer it was given."""
    seen: Counter[bytes] = Counter()
    for one in rows:
        np.testing.assert_allclose(one.outputs, tiny.logits(one.inputs), atol=1e-4)
        seen.update(image.tobytes() for image in one.inputs)
    return seen


@pytest.fixture
def serving(make_bundle, make_generic_bundle, options, listen):
    """Return a function that serves tiny 1 and line 1 with these settings of sampling."""
    opened: list[tuple[Rpc, Repository]] = []

    def serving(*, load=load, sampling=None, **changes):
        def edit(manifest):
            manifest.provenance.parent_sha256 = "ab"

        root = make_bundle(edit=edit).parents[1]
        make_generic_bundle(edit=edit)
        sampling = sampling or Sampling(rate=1.0)
        usual = {"policy": VersionPolicy(), **changes}
        repository = Repository(root, defaults=options(**usual), load=load, sampling=sampling)
        repository.reconcile()
        rpc = Rpc(repository)
        opened.append((rpc, repository))
        return listen(rpc), repository

    yield serving
    for rpc, repository in opened:
        rpc.close()
        repository.close()


@pytest.fixture
def shadow():
    """Return a function that starts a shadow, and waits until the server knows of it."""
    started = []

    def shadow(address, repository, model=""):
        before = len(repository.sampling._rings)
        started.append(Shadow(address, model))
        until(lambda: len(repository.sampling._rings) > before or started[-1].error)
        return started[-1]

    yield shadow
    for one in started:
        one.close()


def test_every_row_reaches_the_shadow_once_with_its_own_answer(serving, shadow, tiny):
    address, repository = serving(instances=2)
    reader = shadow(address, repository)
    images = np.random.default_rng(0).integers(0, 256, (2000, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(2000) // 256, np.arange(2000) % 256

    def ask(part):
        with Client(address) as client:
            for size, start in enumerate(range(0, len(part), 5)):
                client.predict(part[start : start + 1 + size % 5], model="tiny")

    parts = [images[start::8] for start in range(8)]
    threads = [threading.Thread(target=ask, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = Counter(
        image.tobytes()
        for part in parts
        for size, start in enumerate(range(0, len(part), 5))
        for image in part[start : start + 1 + size % 5]
    )
    until(lambda: reader.count() >= asked.total())

    assert by_image(tiny, reader.rows) == asked
    assert {(one.model, one.version, one.parent_sha256) for one in reader.rows} == {
        ("tiny", "1", "ab")
    }
    assert {one.dropped for one in reader.rows} == {0}


def test_rows_of_a_generic_model_come_with_the_output_its_parity_is_of(serving, shadow):
    address, repository = serving()
    reader = shadow(address, repository)
    with Client(address) as client:
        client.predict(np.array([[1, 2, 3], [4, 5, 6]], np.float32), model="line")
        client.predict(np.array([[7]], np.float32), model="line")

    until(lambda: reader.count() == 3)

    together, alone = reader.rows
    np.testing.assert_array_equal(together.outputs, [[1, 3, 5], [7, 9, 11]])
    np.testing.assert_array_equal(together.inputs, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(alone.outputs, [[13]])


def test_shadow_of_one_model_gets_no_rows_of_another(serving, shadow, tiny):
    address, repository = serving()
    reader = shadow(address, repository, "line")
    with Client(address) as client:
        client.predict(tiny.images(2), model="tiny")
        client.predict(np.array([[1]], np.float32), model="line")

    until(reader.count)

    assert [one.model for one in reader.rows] == ["line"]


def test_no_row_leaves_a_server_by_default(serving, shadow, tiny):
    address, repository = serving(sampling=Sampling())
    reader = shadow(address, repository)
    until(lambda: reader.error)

    assert reader.error.code == "FAILED_PRECONDITION"
    assert "start it with --sample-rate above 0" in str(reader.error)
    assert all(one.batcher.sample is None for one in repository.versions())


def test_shadow_of_an_unknown_model_is_refused(serving, shadow):
    address, repository = serving()
    reader = shadow(address, repository, "none")
    until(lambda: reader.error)

    assert reader.error.code == "NOT_FOUND"
    assert repository.sampling._rings == []


def test_fifth_shadow_is_refused_until_another_leaves(serving, shadow):
    address, repository = serving()
    readers = [shadow(address, repository) for _ in range(MAX_RINGS)]
    late = shadow(address, repository)
    until(lambda: late.error)
    assert late.error.code == "RESOURCE_EXHAUSTED"

    readers[0].close()
    until(lambda: len(repository.sampling._rings) < MAX_RINGS)

    assert shadow(address, repository).error is None


def test_reader_that_dies_keeps_nothing(serving, shadow):
    address, repository = serving()
    reader = shadow(address, repository)
    served = repository.get("tiny", "")
    assert served.batcher.sample is not None

    reader.close()

    until(lambda: not repository.sampling._rings)
    until(lambda: served.batcher.sample is None)
    assert reader.error is not None
    assert reader.error.code == "CANCELLED"


def test_rows_that_come_faster_than_they_are_read_are_dropped_and_counted(serving, shadow, tiny):
    address, repository = serving(sampling=Sampling(rate=1.0, max_rows=4))
    reader = shadow(address, repository)
    with Client(address) as client:
        for _ in range(5):
            client.predict(tiny.images(8), model="tiny")

        def known():
            live = repository.get("tiny", "").live.counts()
            return live.sampled + live.dropped == 40 and live

        live = until(known)
        until(lambda: reader.count() == live.sampled)

    assert live.dropped >= 4
    assert reader.rows[-1].dropped == live.dropped


def test_sampling_that_fails_fails_no_answer_and_is_logged_once(serving, tiny, caplog):
    address, repository = serving()
    served = repository.get("tiny", "")

    def broken(inputs, answers):
        raise RuntimeError("no memory")

    served.batcher.sample = broken
    with Client(address) as client:
        for _ in range(3):
            answer = client.predict(tiny.images(2), model="tiny")
            assert answer.logits.tolist() == tiny.logits(tiny.images(2)).tolist()

    until(lambda: served.batcher.sample is None)
    until(lambda: [record for record in caplog.records if record.levelname == "ERROR"])
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the rows of 'tiny' version 1 cannot be sampled; they are no longer"
    ]


def test_rows_are_sampled_over_a_hot_swap_each_with_its_version(serving, shadow, make_bundle, tiny):
    address, repository = serving(policy=VersionPolicy(latest=1))
    reader = shadow(address, repository)
    over = threading.Event()
    sent = Counter[str]()

    def ask():
        with Client(address) as client:
            while not over.is_set():
                sent[client.predict(tiny.images(3), model="tiny").version] += 3

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: sent["1"] > 30)
    make_bundle(version=2, striped=64)
    repository.reconcile()
    until(lambda: sent["2"] > 30)
    over.set()
    thread.join()
    until(lambda: sum(len(one.inputs) for one in reader.rows if one.version == "2") >= sent["2"])

    for one in reader.rows:
        more = [0, 0, 64 if one.version == "2" else 0]
        np.testing.assert_allclose(one.outputs, tiny.logits(one.inputs) + more, atol=1e-4)
    assert {one.version for one in reader.rows} <= {"1", "2"}
    assert sum(len(one.inputs) for one in reader.rows if one.version == "2") == sent["2"]
    with Client(address) as client, pytest.raises(ServerError) as caught:
        client.report(
            parity_pb2.ShadowFigures(rows=1), model="tiny", version="1", parent_sha256="ab"
        )
    assert caught.value.code == "NOT_FOUND"


def test_live_figures_are_those_that_the_same_rows_give_offline(serving, shadow, tiny):
    address, repository = serving()
    reader = shadow(address, repository)
    images = tiny.images(400, seed=5)
    allowed = agreement.Budget("float32", 40.0)
    with Client(address) as client:
        for start in range(0, 400, 8):
            client.predict(images[start : start + 8], model="tiny")
        until(lambda: reader.count() == 400)
        found = parity_pb2.ShadowFigures()
        for one in reader.rows:
            found = agreement.figures(
                tiny.logits(one.inputs), one.outputs, one.inputs, allowed=allowed
            )
            client.report(found, model=one.model, version=one.version, parent_sha256="ab")
        (version,) = client.parity("tiny").versions
        with pytest.raises(ServerError) as caught:
            client.report(found, model="tiny", version="1", parent_sha256="ab")

    served = np.concatenate([one.outputs for one in reader.rows])
    asked = np.concatenate([one.inputs for one in reader.rows])
    whole = agreement.figures(tiny.logits(asked), served, asked, allowed=allowed)
    live = version.live
    assert caught.value.code == "FAILED_PRECONDITION"
    assert (live.sampled, live.dropped, live.total.rows) == (400, 0, 400)
    assert (live.total.agreed, live.total.max_logit) == (whole.agreed, whole.max_logit)
    assert list(live.total.predicted) == list(whole.predicted)
    assert list(live.total.pixel_mean) == list(whole.pixel_mean)
    assert live.total.sum_logit == pytest.approx(whole.sum_logit)
    assert live.total.sum_confidence == pytest.approx(whole.sum_confidence)
    assert live.verdict == parity_pb2.LIVE_VERDICT_PASSED


def reported(client, rows, tiny):
    """Report a message of rows, as a shadow that holds the tiny model would."""
    allowed = agreement.Budget("float32", 40.0)
    found = agreement.figures(tiny.logits(rows.inputs), rows.outputs, rows.inputs, allowed=allowed)
    client.report(found, model=rows.model, version=rows.version, parent_sha256=rows.parent_sha256)


def test_model_that_goes_wrong_while_it_serves_turns_red_at_the_next_report(
    serving, shadow, tiny, caplog
):
    wrong = threading.Event()

    def load_fragile(path, options):
        loaded = load(path, options)

        def run(batch):
            answers: dict[str, Any] = loaded.session.run(batch)
            return {
                name: answer + np.float32(0.5) * np.float32(wrong.is_set())
                for name, answer in answers.items()
            }

        return replace(loaded, session=cast("Any", SimpleNamespace(run=run)))

    address, repository = serving(load=load_fragile)
    reader = shadow(address, repository, "tiny")
    verdicts = []

    def wait_for(rows):
        until(lambda: reader.count() == rows)

    with Client(address) as client, closing(client.watch_parity("tiny")) as watch:
        assert not next(watch).versions[0].HasField("live")
        for count in range(1, 4):
            if count == 2:
                wrong.set()
            client.predict(tiny.images(8), model="tiny")
            wait_for(8 * count)
            reported(client, reader.rows[-1], tiny)
            (version,) = next(watch).versions
            verdicts.append((version.live.verdict, version.live.total.rows))

    passed, failed = parity_pb2.LIVE_VERDICT_PASSED, parity_pb2.LIVE_VERDICT_FAILED
    assert verdicts == [(passed, 8), (failed, 16), (failed, 24)]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("live parity is broken: tiny 1, max |Δlogit| is 0.5, over the")


def test_shadow_that_awaits_is_told_the_same(serving, loop, tiny):
    address, repository = serving()
    images = tiny.images(6)

    async def shadow():
        async with AsyncClient(address) as client:
            async with aclosing(client.sample("tiny")) as rows:
                first = asyncio.ensure_future(anext(rows))
                await asyncio.to_thread(until, lambda: repository.sampling._rings)
                await client.predict(images, model="tiny")
                found = await first
            allowed = agreement.Budget("float32", 40.0)
            figures = agreement.figures(
                tiny.logits(found.inputs), found.outputs, found.inputs, allowed=allowed
            )
            await client.report(figures, model="tiny", version="1", parent_sha256="ab")
            async with aclosing(client.watch_parity("tiny", "1")) as parity:
                return found, await anext(parity)

    found, answer = asyncio.run_coroutine_threadsafe(shadow(), loop).result(WAIT_S)

    np.testing.assert_array_equal(found.inputs, images)
    np.testing.assert_allclose(found.outputs, tiny.logits(images), atol=1e-4)
    assert answer.versions[0].live.total.rows == 6
    until(lambda: not repository.sampling._rings)


def test_generator_that_is_closed_ends_the_call(serving, shadow, tiny):
    address, repository = serving()
    with Client(address) as client:
        rows = client.sample("tiny")
        thread = threading.Thread(
            target=lambda: (
                until(lambda: repository.sampling._rings)
                and client.predict(tiny.images(1), model="tiny")
            )
        )
        thread.start()
        assert len(next(rows).inputs) == 1
        thread.join()
        rows.close()

        until(lambda: not repository.sampling._rings)


def test_rows_of_a_version_that_has_left_are_passed_over(serving, tiny):
    address, repository = serving(policy=VersionPolicy(latest=1))
    with Client(address) as client, closing(client.sample()) as rows:
        done = threading.Event()

        def ask():
            until(lambda: repository.sampling._rings)
            gone = repository.get("tiny", "1")
            sampled, images = gone.batcher.sample, tiny.images(4)
            repository.unload("tiny")
            sampled(images, {"logits": tiny.logits(images)})
            client.predict(np.array([[1]], np.float32), model="line")
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        found = next(rows)
        thread.join()

    assert done.is_set()
    assert found.model == "line"


def test_shadow_is_told_that_the_server_stops_and_does_not_keep_it(
    make_bundle, start_server, tiny, tmp_path
):
    server = start_server(
        *("--repository", str(make_bundle().parents[1]), "--address", "127.0.0.1:0"),
        *("--threads", "1", "--instances", "1", "--sample-rate", "1", "--drain-s", "600"),
    )
    with Client(server.address()) as client:
        rows, watch = client.sample(), client.watch_parity()
        assert len(next(watch).versions) == 1
        come = threading.Event()

        def ask():
            while not come.wait(0.2):  # what is asked before the stream is open is not shown
                client.predict(tiny.images(4), model="tiny")

        asker = threading.Thread(target=ask)
        asker.start()
        try:
            count = len(next(rows).inputs)
        finally:
            come.set()
            asker.join()
        assert count > 0
        assert count % 4 == 0

        server.popen.terminate()
        codes = []
        for stream in (rows, watch):
            with pytest.raises(ServerError) as caught:
                list(stream)
            codes.append(caught.value.code)

    assert codes == ["UNAVAILABLE", "UNAVAILABLE"]
    assert server.wait() == 0


def test_shadow_needs_an_admin_s_token_where_there_are_tokens(make_bundle, start_server, tmp_path):
    for name in ("user", "admin"):
        (tmp_path / name).write_text(f"a-token-of-the-{name}")
    server = start_server(
        *("--repository", str(make_bundle().parents[1]), "--address", "127.0.0.1:0"),
        *("--threads", "1", "--instances", "1", "--sample-rate", "0.5"),
        *("--token-file", str(tmp_path / "user"), "--admin-token-file", str(tmp_path / "admin")),
    )
    address = server.address()
    figures = parity_pb2.ShadowFigures()
    codes = {}
    for name in ("user", "admin"):
        with Client(address, token=f"a-token-of-the-{name}") as client:
            with pytest.raises(ServerError) as caught:
                next(client.sample("none"))
            with pytest.raises(ServerError) as also:
                client.report(figures, model="none", version="1", parent_sha256="")
            codes[name] = (caught.value.code, also.value.code)

    assert codes == {"user": ("PERMISSION_DENIED",) * 2, "admin": ("NOT_FOUND",) * 2}
