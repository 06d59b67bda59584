"""tritonclient.grpc's streams: many requests on one call, answered in their order."""

import queue
from typing import Any

from tests.conformance.clients.asked import MODEL, WAIT_S, check_refusal

REQUESTS = 40


def open_stream(client, **options):
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), **options)
    return answers


def answers_come_in_the_order_of_the_requests(asked):
    with asked.client() as client:
        answers = open_stream(client)
        for number in range(REQUESTS):
            start, stop = number % 20, number % 20 + 1 + number % 7
            client.async_stream_infer(MODEL, asked.inputs(start, stop), request_id=str(number))
        client.stop_stream()

    assert answers.qsize() == REQUESTS
    for number in range(REQUESTS):
        start, stop = number % 20, number % 20 + 1 + number % 7
        result, error = answers.get_nowait()
        assert error is None, error
        assert result.get_response().id == str(number)
        asked.check(result, start, stop)


def refused_request_leaves_the_stream_alive(asked):
    with asked.client() as client:
        answers = open_stream(client)
        client.async_stream_infer(MODEL, asked.inputs(0, 2), request_id="before")
        client.async_stream_infer("nobody", asked.inputs(0, 2), request_id="bad")
        client.async_stream_infer(MODEL, asked.inputs(0, 2), model_version="7", request_id="bad")
        client.async_stream_infer(MODEL, asked.inputs(3, 5), request_id="after")
        got = [answers.get(timeout=WAIT_S) for _ in range(4)]
        client.stop_stream()

    asked.check(got[0][0], 0, 2)
    for _, error in got[1:3]:
        assert error is not None
        assert "bad" in error.message(), error.message()
    assert "Request for unknown model: 'nobody' is not found" in got[1][1].message()
    asked.check(got[3][0], 3, 5)


def answer_says_that_it_is_the_last_when_asked_to(asked):
    with asked.client() as client:
        answers = open_stream(client)
        client.async_stream_infer(MODEL, asked.inputs(0, 2), enable_empty_final_response=True)
        client.stop_stream()

    result, error = answers.get_nowait()
    assert error is None, error
    assert result.get_response().parameters["triton_final_response"].bool_param
    assert answers.empty()


def refusal_ends_a_stream_that_asked_for_a_status(asked):
    with asked.client() as client:
        answers = open_stream(client, headers={"triton_grpc_error": "true"})
        client.async_stream_infer(MODEL, asked.inputs(0, 2))
        client.async_stream_infer("nobody", asked.inputs(0, 2))
        result, error = answers.get(timeout=WAIT_S)
        assert error is None, error
        asked.check(result, 0, 2)
        _, error = answers.get(timeout=WAIT_S)
        check_refusal(error, "NOT_FOUND", "Request for unknown model: 'nobody' is not found")
        client.stop_stream()

        answers = open_stream(client)
        client.async_stream_infer(MODEL, asked.inputs(0, 2))
        asked.check(answers.get(timeout=WAIT_S)[0], 0, 2)
        client.stop_stream()


def cancelled_stream_harms_nobody(asked):
    with asked.client() as client:
        answers = open_stream(client)
        for _ in range(REQUESTS):
            client.async_stream_infer(MODEL, asked.inputs(0, 8))
        client.stop_stream(cancel_requests=True)
        got = [answers.get_nowait() for _ in range(answers.qsize())]
        assert [error.status() for _, error in got if error] == ["StatusCode.CANCELLED"]
        asked.check(client.infer(MODEL, asked.inputs(0, 8)), 0, 8)


def compressed_stream_is_understood(asked):
    with asked.client() as client:
        answers = open_stream(client, compression_algorithm="gzip", stream_timeout=WAIT_S)
        client.async_stream_infer(MODEL, asked.inputs())
        client.stop_stream()
        asked.check(answers.get_nowait()[0])
