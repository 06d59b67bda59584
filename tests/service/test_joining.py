import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.client import Client
from service.errors import ServerError

CODE = grpc.StatusCode


@pytest.fixture
def joining(serve, held, model):
    """Make a client that joins up to six rows, with the gate that its requests pass."""
    gate = held(model.infer)
    with Client(serve(ModelMetadata=model.about, ModelInfer=gate), coalesce_rows=6) as client:
        yield client, gate
        gate.open()


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


def wait_for(condition):
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s, "it did not come about"
        time.sleep(0.001)


def queued(client):
    """Count the callers who wait to be joined."""
    return sum(map(len, list(client._wire._queue._waiting.values())))


def test_calls_that_come_while_one_is_in_flight_are_joined(joining, model, tiny):
    client, gate = joining
    images = [tiny.images(rows, seed=rows) for rows in (1, 2, 3, 4, 5)]
    with ThreadPoolExecutor(5) as threads:
        first = threads.submit(client.predict, images[0], model="tiny")
        assert gate.entered.acquire(timeout=30)  # a lone call is sent at once
        others = []
        for later in images[1:]:
            others.append(threads.submit(client.predict, later, model="tiny"))
            wait_for(lambda: queued(client) == len(others))
        gate.open()
        answers = [asked.result(30) for asked in (first, *others)]

    assert model.rows == [1, 5, 4, 5]  # 2 and 3 together; no more than six
    for answer, asked in zip(answers, images, strict=True):
        np.testing.assert_array_equal(answer.logits, tiny.logits(asked))


def test_as_many_joined_requests_are_in_flight_as_there_are_connections(serve, held, model, tiny):
    gate = held(model.infer)
    address = serve(ModelMetadata=model.about, ModelInfer=gate)
    with (
        Client(address, coalesce_rows=8, channels=2) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        asked = [threads.submit(client.predict, tiny.images(1), model="tiny") for _ in range(4)]
        assert gate.entered.acquire(timeout=30)
        assert gate.entered.acquire(timeout=30)
        wait_for(lambda: queued(client) == 2)
        gate.open()
        for one in asked:
            one.result(30)
    assert model.rows == [1, 1, 2]


def test_calls_to_other_versions_and_of_other_shapes_are_not_joined(joining, model, tiny):
    client, gate = joining
    kinds = [("1", (2, 2, 1)), ("2", (2, 2, 1)), ("1", (4,))]
    with ThreadPoolExecutor(6) as threads:
        asked = []
        for version, shape in kinds * 2:
            images = tiny.images(2).reshape(2, *shape)
            asked.append(threads.submit(client.predict, images, model="tiny", version=version))
        for _ in kinds:
            assert gate.entered.acquire(timeout=30)
        wait_for(lambda: queued(client) == 3)
        gate.open()
        for one in asked:
            np.testing.assert_array_equal(one.result(30).logits, tiny.logits(tiny.images(2)))
    assert model.rows == [2] * 6


def test_call_that_spoils_a_joined_request_is_refused_alone(serve, held, model, tiny):
    def infer(request, context):
        if 13 in request.raw_input_contents[0]:
            context.abort(CODE.INVALID_ARGUMENT, "13 is not lucky")
        return model.infer(request, context)

    gate = held(infer)
    good, bad = np.full((1, 2, 2, 1), 7, np.uint8), np.full((1, 2, 2, 1), 13, np.uint8)
    address = serve(ModelMetadata=model.about, ModelInfer=gate)
    with Client(address, coalesce_rows=8) as client, ThreadPoolExecutor(4) as threads:
        first = threads.submit(client.predict, good, model="tiny")
        assert gate.entered.acquire(timeout=30)
        others = [threads.submit(client.predict, one, model="tiny") for one in (good, bad, good)]
        wait_for(lambda: queued(client) == 3)
        gate.open()
        for asked in (first, others[0], others[2]):
            np.testing.assert_array_equal(asked.result(30).logits, tiny.logits(good))
        assert refusal(others[1].result, 30) == ("INVALID_ARGUMENT", "13 is not lucky")


def test_error_of_a_joined_request_reaches_those_joined_and_nobody_else(serve, held, model, tiny):
    def infer(request, context):
        if request.inputs[0].shape[0] == 2:
            context.abort(CODE.INTERNAL, "internal error, request 5f2c")
        return model.infer(request, context)

    gate = held(infer)
    address = serve(ModelMetadata=model.about, ModelInfer=gate)
    with Client(address, coalesce_rows=2 + 1) as client, ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(client.predict, tiny.images(1), model="tiny")]
        assert gate.entered.acquire(timeout=30)
        for rows in (1, 1, 2):
            images = tiny.images(rows)
            asked.append(threads.submit(client.predict, images, model="tiny", timeout_s=30))
            wait_for(lambda: queued(client) == len(asked) - 1)
        gate.open()
        codes = [one.exception(30) and one.exception(30).code for one in asked]

    assert codes == [None, "INTERNAL", "INTERNAL", "INTERNAL"]
    assert asked[1].exception() is not asked[2].exception()


def test_call_whose_time_is_up_is_not_sent_with_the_others(joining, model, tiny):
    client, gate = joining
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(client.predict, tiny.images(1), model="tiny")
        assert gate.entered.acquire(timeout=30)
        code, _ = refusal(client.predict, tiny.images(2), model="tiny", timeout_s=0.2)
        last = threads.submit(client.predict, tiny.images(3), model="tiny")
        wait_for(lambda: queued(client) == 2)
        gate.open()
        first.result(30)
        last.result(30)

    assert code == "DEADLINE_EXCEEDED"
    assert model.rows == [1, 3]


def test_joined_request_lasts_as_long_as_its_most_patient_caller(joining, model, tiny):
    client, gate = joining
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(client.predict, tiny.images(1), model="tiny")
        assert gate.entered.acquire(timeout=30)
        patient = threads.submit(client.predict, tiny.images(2), model="tiny")
        hasty = threads.submit(client.predict, tiny.images(3), model="tiny", timeout_s=1)
        wait_for(lambda: queued(client) == 2)
        gate.open(1)
        first.result(30)
        assert gate.entered.acquire(timeout=30)
        assert gate.left[1] > 10
        assert refusal(hasty.result, 30)[0] == "DEADLINE_EXCEEDED"
        gate.open()
        np.testing.assert_array_equal(patient.result(30).logits, tiny.logits(tiny.images(2)))


def test_client_that_is_closed_answers_all_who_wait(serve, held, model, tiny):
    gate = held(model.infer)
    client = Client(serve(ModelMetadata=model.about, ModelInfer=gate), coalesce_rows=8)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(client.predict, tiny.images(1), model="tiny") for _ in range(3)]
        assert gate.entered.acquire(timeout=30)
        wait_for(lambda: queued(client) == 2)
        client.close()
        for one in asked:
            assert refusal(one.result, 30)[0] == "CANCELLED"
    gate.open()


@settings(max_examples=20)
@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=8),
    coalesce_rows=st.integers(0, 10),
    channels=st.integers(1, 2),
)
def test_every_caller_gets_the_answers_to_its_own_rows(
    serve, model, tiny, sizes, coalesce_rows, channels
):
    def ask(number):
        for seed, rows in enumerate(sizes[number]):
            images = tiny.images(rows, seed=1000 * number + seed)
            answer = asker.predict(images, model="tiny")
            np.testing.assert_array_equal(answer.logits, tiny.logits(images))

    model.asked.clear()
    address = serve(**model.methods())
    with (
        Client(address, coalesce_rows=coalesce_rows, channels=channels) as asker,
        ThreadPoolExecutor(len(sizes)) as threads,
    ):
        list(threads.map(ask, range(len(sizes))))

    assert sum(model.rows) == sum(map(sum, sizes))
    assert max(model.rows) <= 8
