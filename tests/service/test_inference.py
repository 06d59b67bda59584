import dataclasses
import io
import os
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protos import inference_pb2
from service import host
from service.batcher import Batch
from service.call import Call, CallError, Status
from service.errors import ModelNotReadyError
from service.inference import MAX_DECODING, SWAPS, Inference
from service.rpc import INFER
from service.statistics import Figure

DRAINING = "GRPC server is shutting down and has stopped accepting new requests."
TOLD = "[request id: <id_unknown>] "


def png(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()


def pictures(images, *, raw=True, **fields):
    """Ask the tiny model about images that are sent as PNG files."""
    files = [png(image) for image in images]
    request = inference_pb2.ModelInferRequest(model_name="tiny", **fields)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(files)])
    if raw:
        request.raw_input_contents.append(
            b"".join(struct.pack("<I", len(file)) + file for file in files)
        )
    else:
        tensor.contents.bytes_contents.extend(files)
    return request


@pytest.fixture
def infer_on():
    """Return a function that makes an Inference on a repository, real or not."""
    made = []

    def infer_on(repository: Any, max_image_pixels: int = 10_000) -> Inference:
        made.append(Inference(repository, max_image_pixels=max_image_pixels))
        return made[-1]

    yield infer_on
    for inference in made:
        inference.close()


@pytest.fixture
def begin(asked):
    """Return a function that begins a request and gives its call."""

    def begin(inference, request, *, watched=False, **fields):
        call = asked(INFER, request.SerializeToString(), **fields)
        if watched:
            call.watcher = lambda *_: None
        inference.begin(call)
        return call

    return begin


def answer(call):
    return inference_pb2.ModelInferResponse.FromString(call.result())


def refusal(call):
    with pytest.raises(CallError) as caught:
        call.result()
    return caught.value.status, str(caught.value)


def logits(response):
    place = [output.name for output in response.outputs].index("logits")
    return np.frombuffer(response.raw_output_contents[place], "<f4").reshape(-1, 3)


def until(condition, timeout_s=30.0):
    """Wait until a condition holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def figure(repository, figure):
    (snapshot,) = repository.statistics.snapshots()
    return snapshot[figure]


class Serving:
    """A repository that serves one version as long as `before` gives no other."""

    changes = 0

    def __init__(self, served, before=()):
        self.served = served
        self.before = list(before)

    def get(self, name, version):
        return self.before.pop(0)() if self.before else self.served

    def is_idle(self):
        return True


class Batcher:
    """Keeps the tickets; each is handed in by a thread that waits until it is let go on."""

    def __init__(self):
        self.tickets: list[Any] = []
        self.opened = threading.Event()

    def submit(self, ticket, *, stay=False):
        self.tickets.append(ticket)
        assert self.opened.wait(60)
        rows = len(ticket.content.batch)
        zeros: Any = np.zeros((rows, 3), np.float32)
        answers = dict.fromkeys(("probabilities", "logits"), zeros)
        ticket.content.answered(Batch(answers, rows=rows, started_s=0.0, infer_s=0.0), 0)

    def cancel(self, ticket):
        return None


@pytest.fixture
def held(repository, infer_on):
    """Give an Inference and the batcher that holds what reaches it."""
    batcher = Batcher()
    serving = Serving(dataclasses.replace(repository.get("tiny", ""), batcher=batcher))
    yield SimpleNamespace(inference=infer_on(serving), batcher=batcher, serving=serving)
    batcher.opened.set()


@pytest.mark.parametrize("raw", [True, False])
def test_pictures_are_answered_like_their_pixels(repository, infer_on, begin, infer, tiny, raw):
    inference, images = infer_on(repository), tiny.images(8)

    said = answer(begin(inference, pictures(images, raw=raw, id="a")))

    assert said == answer(begin(inference, infer(images, id="a")))
    np.testing.assert_array_equal(logits(said), tiny.logits(images))


def test_pictures_are_decoded_anywhere_though_who_took_the_call_is_kept_to_a_cpu(
    repository, infer_on, begin, tiny
):
    inference, said = infer_on(repository), []

    def ask():
        os.sched_setaffinity(0, {min(host.cpus())})
        said.append(answer(begin(inference, pictures(tiny.images(2)))))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()

    assert len(said) == 1
    for decoder in inference._decoders._threads:
        assert os.sched_getaffinity(decoder.native_id) == host.cpus()


def test_pictures_and_pixels_are_joined_into_one_batch(
    make_bundle, open_repository, gate, infer_on, begin, infer, tiny
):
    repository = open_repository(make_bundle().parents[1], load=gate.load)
    inference, images = infer_on(repository), tiny.images(5)
    first = begin(inference, infer(images[:1]))
    gate.wait()
    calls = [begin(inference, pictures(images[1:3])), begin(inference, infer(images[3:]))]
    until(lambda: figure(repository, Figure.PENDING_REQUESTS) == 2)
    gate.open()

    answer(first)
    found = [logits(answer(call)) for call in calls]

    np.testing.assert_array_equal(np.concatenate(found), tiny.logits(images[1:]))
    assert [len(batch) for batch in gate.batches] == [1, 4]


def test_request_of_too_many_pixels_is_refused_and_one_at_the_limit_is_not(
    repository, infer_on, begin, tiny
):
    request = pictures(tiny.images(3))

    assert answer(begin(infer_on(repository, 12), request)).outputs
    assert refusal(begin(infer_on(repository, 11), request)) == (
        Status.INVALID_ARGUMENT,
        f"{TOLD}the pictures up to 2 have 12 pixels, expected at most 11 in one request; "
        "send smaller ones, or fewer",
    )


def test_file_that_is_no_picture_is_refused_and_counted(repository, infer_on, begin, tiny):
    request = pictures(tiny.images(2), id="call-7")
    request.raw_input_contents[0] = request.raw_input_contents[0].replace(b"IHDR", b"IDHR")

    status, message = refusal(begin(infer_on(repository), request))

    assert status is Status.INVALID_ARGUMENT
    assert message.startswith("[request id: call-7] picture 0 ")
    assert figure(repository, Figure.OTHER) == 1


def test_pictures_that_wait_to_be_decoded_are_bounded(held, begin, tiny):
    request = pictures(tiny.images(1))
    calls = [begin(held.inference, request) for _ in range(MAX_DECODING)]

    over = begin(held.inference, request)

    assert refusal(over) == (
        Status.UNAVAILABLE,
        f"{TOLD}Exceeds maximum queue size: 64 requests of pictures are already waiting; "
        "try again later",
    )
    with pytest.raises(CallError) as caught:
        over.result()
    assert caught.value.trailers == (("grpc-retry-pushback-ms", "100"),)
    assert not held.inference.is_idle()
    held.batcher.opened.set()
    assert all(answer(call).outputs for call in calls)
    until(held.inference.is_idle)
    assert answer(begin(held.inference, request)).outputs


def test_tensors_are_taken_while_no_more_pictures_are(held, begin, infer, tiny, repository):
    for _ in range(MAX_DECODING):
        begin(held.inference, pictures(tiny.images(1)))
    held.serving.served = repository.get("tiny", "")

    assert answer(begin(held.inference, infer(tiny.images(2)))).outputs


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda call: call.cancel(), None),
        (
            lambda call: setattr(call, "deadline_s", 0.0),
            (
                Status.DEADLINE_EXCEEDED,
                f"{TOLD}the deadline passed before the pictures were decoded",
            ),
        ),
    ],
)
def test_pictures_that_nobody_waits_for_are_not_decoded(held, begin, tiny, end, outcome):
    busy = [begin(held.inference, pictures(tiny.images(1))) for _ in range(2)]
    until(lambda: len(held.batcher.tickets) == 2)
    call = begin(held.inference, pictures(tiny.images(1)))

    end(call)
    held.batcher.opened.set()

    assert all(answer(one).outputs for one in busy)
    until(held.inference.is_idle)
    assert len(held.batcher.tickets) == 2
    assert outcome is None or refusal(call) == outcome


def test_pictures_that_waited_longer_than_their_timeout_are_not_decoded(held, begin, tiny):
    request = pictures(tiny.images(1))
    busy = [begin(held.inference, request) for _ in range(2)]
    until(lambda: len(held.batcher.tickets) == 2)
    request.parameters["timeout"].int64_param = 1
    call = begin(held.inference, request)
    held.batcher.opened.set()

    assert refusal(call) == (Status.UNAVAILABLE, f"{TOLD}Request timeout expired")
    assert all(answer(one).outputs for one in busy)
    assert len(held.batcher.tickets) == 2


class Closed:
    """A batcher whose version has just been replaced."""

    def submit(self, ticket, *, stay=False):
        raise ModelNotReadyError("Request for unknown model: 'tiny' is not at ready state")


@pytest.mark.parametrize("ask", [pictures, None], ids=["pictures", "tensors"])
def test_request_whose_version_is_replaced_goes_to_the_next_and_not_for_ever(
    repository, infer_on, begin, infer, tiny, ask
):
    served = repository.get("tiny", "")
    closed = dataclasses.replace(served, batcher=Closed())
    images = tiny.images(2)
    request = (ask or infer)(images)

    for swaps in (1, SWAPS):
        inference = infer_on(Serving(served, [lambda: closed] * swaps))
        np.testing.assert_array_equal(
            logits(answer(begin(inference, request))), tiny.logits(images)
        )

    inference = infer_on(Serving(served, [lambda: closed] * (SWAPS + 1)))
    assert refusal(begin(inference, request)) == (
        Status.UNAVAILABLE,
        f"{TOLD}Request for unknown model: 'tiny' is not at ready state",
    )


def test_request_is_refused_while_draining(repository, infer_on, begin, infer, tiny):
    inference = infer_on(repository)
    inference.drain()

    for request in (infer(tiny.images(1), id="a"), pictures(tiny.images(1), id="a")):
        assert refusal(begin(inference, request)) == (
            Status.UNAVAILABLE,
            f"[request id: a] {DRAINING}",
        )


def test_what_was_accepted_before_draining_is_answered(
    make_bundle, open_repository, gate, infer_on, begin, infer, tiny
):
    inference = infer_on(open_repository(make_bundle().parents[1], load=gate.load))
    calls = [begin(inference, infer(tiny.images(1)))]
    gate.wait()
    calls += [begin(inference, infer(tiny.images(1))), begin(inference, pictures(tiny.images(1)))]

    inference.drain()

    assert not inference.is_idle()
    gate.open()
    assert all(answer(call).outputs for call in calls)
    until(inference.is_idle)


def test_what_was_accepted_is_answered_though_its_version_is_replaced_while_draining(
    repository, infer_on, begin, infer, tiny
):
    served = repository.get("tiny", "")
    serving = Serving(served)
    inference = infer_on(serving)

    def replaced():
        inference.drain()
        return dataclasses.replace(served, batcher=Closed())

    serving.before.append(replaced)

    assert answer(begin(inference, infer(tiny.images(1)))).outputs


def test_request_whose_caller_leaves_the_queue_is_never_run(
    make_bundle, open_repository, gate, infer_on, begin, infer, tiny
):
    repository = open_repository(make_bundle().parents[1], load=gate.load)
    inference = infer_on(repository)
    first = begin(inference, infer(tiny.images(1)))
    gate.wait()
    left, stays = (begin(inference, infer(tiny.images(rows))) for rows in (2, 3))

    left.cancel()
    gate.open()

    assert answer(first).outputs
    assert answer(stays).outputs
    assert [len(batch) for batch in gate.batches] == [1, 3]
    assert refusal(left) == (Status.CANCELLED, f"{TOLD}the caller cancelled the request")


def test_request_whose_caller_left_before_it_began_is_not_left_in_the_queue(
    make_bundle, open_repository, gate, infer_on, begin, infer, tiny, asked
):
    repository = open_repository(make_bundle().parents[1], load=gate.load)
    inference = infer_on(repository)
    begin(inference, infer(tiny.images(1)))
    gate.wait()
    request = infer(tiny.images(2))
    call = asked(INFER, request.SerializeToString())
    call.cancel()

    inference.begin(call)
    gate.open()

    until(inference.is_idle)
    assert [len(batch) for batch in gate.batches] == [1]


@pytest.mark.parametrize(
    ("deadline", "timeout_us", "status", "phrase"),
    [
        (True, 0, Status.DEADLINE_EXCEEDED, "the deadline passed after "),
        (False, 500_000, Status.UNAVAILABLE, "Request timeout expired"),
    ],
)
def test_request_whose_time_is_over_in_the_queue_is_never_run(
    make_bundle,
    open_repository,
    gate,
    infer_on,
    begin,
    infer,
    tiny,
    deadline,
    timeout_us,
    status,
    phrase,
):
    inference = infer_on(open_repository(make_bundle().parents[1], load=gate.load))
    first = begin(inference, infer(tiny.images(1)))
    gate.wait()
    request = infer(tiny.images(2))
    request.parameters["timeout"].int64_param = timeout_us
    over_s = time.monotonic() + 2.5
    late = begin(inference, request, **({"deadline_s": over_s} if deadline else {}))
    until(lambda: time.monotonic() > over_s + 0.05)

    gate.open()

    assert answer(first).outputs
    found, message = refusal(late)
    assert found is status
    assert message.startswith(TOLD + phrase)
    assert [len(batch) for batch in gate.batches] == [1]


def test_what_goes_wrong_in_the_model_stays_inside_and_spares_the_others(
    make_bundle, open_repository, gate, infer_on, begin, infer, tiny, fails_on_white, caplog
):
    bundle = make_bundle(model=fails_on_white)
    inference = infer_on(open_repository(bundle.parents[1], load=gate.load))
    white, images = np.full((1, 2, 2, 1), 255, np.uint8), tiny.images(3)
    first = begin(inference, infer(images[:1]))
    gate.wait()
    calls = [begin(inference, infer(batch)) for batch in (images[1:2], white, images[2:])]
    gate.open()

    assert answer(first).outputs
    np.testing.assert_array_equal(logits(answer(calls[0])), tiny.logits(images[1:2]))
    np.testing.assert_array_equal(logits(answer(calls[2])), tiny.logits(images[2:]))
    status, message = refusal(calls[1])
    assert status is Status.INTERNAL
    assert message.startswith("internal error, request ")
    assert message.removeprefix("internal error, request ") in caplog.text
    assert "Gather" in caplog.text


def test_answer_that_cannot_be_written_is_an_internal_error(
    repository, infer_on, begin, infer, tiny
):
    class Forgetful(Batcher):
        def submit(self, ticket, *, stay=False):
            ticket.content.answered(Batch({}, rows=1, started_s=0.0, infer_s=0.0), 0)

    served = dataclasses.replace(repository.get("tiny", ""), batcher=Forgetful())

    status, message = refusal(begin(infer_on(Serving(served)), infer(tiny.images(1))))

    assert status is Status.INTERNAL
    assert message.startswith("internal error, request ")


def test_call_notes_what_the_access_log_and_traces_say_of_it(
    repository, infer_on, begin, infer, tiny
):
    call: Call = begin(infer_on(repository), infer(tiny.images(3), id="call-7"), watched=True)
    answer(call)

    said = {name: call.notes[name] for name in ("request_id", "model", "version", "rows")}
    assert said == {"request_id": "call-7", "model": "tiny", "version": 1, "rows": 3}
    assert call.notes["batch_rows"] == 3
    assert float(call.notes["queue_s"]) >= 0
    assert float(call.notes["infer_s"]) > 0


# Requests that come together


@pytest.fixture
def run(infer_on, open_repository, make_bundle, asked):
    """Return a function that runs requests as one front's thread would: (calls, repository)."""
    repository = open_repository(make_bundle().parents[1])
    inference = infer_on(repository)

    def run(*requests, longest_s=60.0, **fields):
        calls = [asked(INFER, one.SerializeToString(), **fields) for one in requests]
        inference.run(calls, longest_s)
        return calls

    run.inference, run.repository = inference, repository  # type: ignore[attr-defined]
    return run


def logits_of(call):
    response = inference_pb2.ModelInferResponse.FromString(call.result())
    place = [output.name for output in response.outputs].index("logits")
    return np.frombuffer(response.raw_output_contents[place], "<f4").reshape(-1, 3)


def executions(run):
    (served,) = run.repository.versions()
    return served.statistics.values()[Figure.EXECUTIONS]


def test_requests_alike_that_come_together_are_one_call_of_the_model(run, infer, tiny):
    run(infer(tiny.images(1)))
    before = executions(run)

    calls = run(*[infer(tiny.images(1, seed=seed)) for seed in range(8)])

    assert all(call.outcome.done() for call in calls)  # by this very thread
    assert executions(run) == before + 1
    for seed, call in enumerate(calls):
        np.testing.assert_array_equal(logits_of(call), tiny.logits(tiny.images(1, seed=seed)))


def test_known_and_new_and_wrong_requests_that_come_together_get_their_own_answers(
    run, infer, tiny
):
    run(infer(tiny.images(1)), infer(tiny.images(2)))
    wrong = infer(tiny.images(1), model_name="none")
    together = [
        infer(tiny.images(1, seed=1)),
        infer(tiny.images(3, seed=2)),
        wrong,
        infer(tiny.images(2, seed=3)),
        infer(tiny.images(1, seed=4), id="four"),
    ]

    first, second, third, fourth, fifth = run(*together)

    for call, (rows, seed) in (
        (first, (1, 1)),
        (second, (3, 2)),
        (fourth, (2, 3)),
        (fifth, (1, 4)),
    ):
        np.testing.assert_array_equal(logits_of(call), tiny.logits(tiny.images(rows, seed=seed)))
    with pytest.raises(CallError) as caught:
        third.result()
    assert caught.value.status is Status.NOT_FOUND


def test_more_rows_than_one_batch_may_have_are_answered_all_the_same(run, infer, tiny):
    run(infer(tiny.images(5)))

    calls = run(*[infer(tiny.images(5, seed=seed)) for seed in range(6)])  # 30 rows, 8 at most

    for seed, call in enumerate(calls):
        np.testing.assert_array_equal(logits_of(call), tiny.logits(tiny.images(5, seed=seed)))


def test_requests_of_a_model_that_takes_long_are_answered_by_other_threads(run, infer, tiny):
    run(infer(tiny.images(1)))

    calls = run(*[infer(tiny.images(1, seed=seed)) for seed in range(4)], longest_s=0.0)

    for seed, call in enumerate(calls):
        np.testing.assert_array_equal(logits_of(call), tiny.logits(tiny.images(1, seed=seed)))


def test_known_requests_of_two_models_that_come_together_are_both_answered(
    infer_on, open_repository, make_bundle, asked, infer, tiny
):
    make_bundle(name="other", striped=100)
    inference = infer_on(open_repository(make_bundle().parents[1]))
    requests = [infer(tiny.images(2), model_name=name) for name in ("tiny", "other")]

    for _ in range(2):  # once they are read, once they are known
        calls = [asked(INFER, one.SerializeToString()) for one in requests * 3]
        inference.run(calls, 60.0)
        for number, call in enumerate(calls):
            more = np.array([0, 0, 100 * (number % 2)], np.float32)
            np.testing.assert_array_equal(logits_of(call), tiny.logits(tiny.images(2)) + more)


def test_known_requests_are_refused_once_it_drains(run, infer, tiny):
    run(infer(tiny.images(1)))
    run.inference.drain()

    (call,) = run(infer(tiny.images(1)))

    with pytest.raises(CallError) as caught:
        call.result()
    assert str(caught.value) == f"{TOLD}{DRAINING}"


def test_known_request_whose_time_is_over_is_not_run(run, infer, tiny):
    run(infer(tiny.images(1)))
    before = executions(run)

    (call,) = run(infer(tiny.images(1)), deadline_s=0.0)

    with pytest.raises(CallError) as caught:
        call.result()
    assert caught.value.status is Status.DEADLINE_EXCEEDED
    assert executions(run) == before
