import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from service import errors
from service.call import MAX_MESSAGE_CHARACTERS, STATUS, Call, CallError, Status, refusal

# What is said to whoever runs the server, and reaches no client as it is.
INSIDE = {
    errors.ServiceError,
    errors.BundleError,
    errors.ModelError,
    errors.RepositoryError,
    errors.SettingsError,
    errors.AddressError,
    errors.WorkerError,
    errors.ServerError,
}


class Noted(Call):
    """A call that keeps all that would be sent."""

    def __init__(self, path="/a/B", content=b""):
        super().__init__(path, content, metadata={})
        self.sent: list[bytes | CallError] = []

    def _send(self, content):
        self.sent.append(content)

    def _send_error(self, error):
        self.sent.append(error)


def kinds():
    """Return every class of error there is, however deep."""

    def walk(kind):
        return {kind}.union(*(walk(child) for child in kind.__subclasses__()))

    return {kind for kind in walk(errors.ServiceError) if kind.__module__ == errors.__name__}


def made(kind):
    more: dict[type, dict[str, Any]] = {
        errors.OverloadedError: {"retry_after_s": 0.25},
        errors.ServerError: {"code": "X"},
    }
    return kind("it is so", **more.get(kind, {}))


def test_every_error_has_a_status_or_stays_inside():
    assert kinds() == INSIDE | set(STATUS)
    assert not INSIDE & set(STATUS)


def test_every_error_is_in_the_tree_of_its_modules_docstring():
    tree = [line.split()[1] for line in (errors.__doc__ or "").splitlines() if "──" in line]

    assert sorted(tree) == sorted(kind.__name__ for kind in kinds() - {errors.ServiceError})


@pytest.mark.parametrize("kind", sorted(STATUS, key=str))
def test_error_that_may_be_told_is_told_as_it_is(kind):
    error = refusal("/a/B", made(kind))

    assert (error.status, str(error)) == (STATUS[kind], "it is so")


@pytest.mark.parametrize(
    "error",
    [
        *(made(kind) for kind in sorted(INSIDE, key=str)),
        RuntimeError("it is so"),
        MemoryError("it is so"),
        KeyError("it is so"),
        type("MineError", (errors.InvalidRequestError,), {})("it is so"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_that_stays_inside_is_logged_and_the_client_gets_a_token(error, caplog):
    with caplog.at_level(logging.ERROR):
        told = refusal("/a/B", error)

    assert told.status is Status.INTERNAL
    assert told.trailers == ()
    token = str(told).removeprefix("internal error, request ")
    assert len(token) == 8
    assert f"call failed: /a/B, request {token}" in caplog.text
    assert "it is so" in caplog.text
    assert "it is so" not in str(told)


def test_two_internal_errors_have_two_tokens():
    assert str(refusal("/a/B", KeyError())) != str(refusal("/a/B", KeyError()))


def test_status_that_is_one_already_is_kept():
    error = CallError(Status.UNIMPLEMENTED, "no", (("a", "b"),))

    assert refusal("/a/B", error) is error


@pytest.mark.parametrize(
    ("retry_after_s", "pushback"), [(0.001, "1"), (0.0011, "2"), (0.25, "250"), (12.0, "12000")]
)
def test_overload_says_in_whole_milliseconds_when_to_come_back(retry_after_s, pushback):
    error = refusal("/a/B", errors.OverloadedError("full", retry_after_s=retry_after_s))

    assert error.status is Status.UNAVAILABLE
    assert error.trailers == (("grpc-retry-pushback-ms", pushback),)


@pytest.mark.parametrize("kind", sorted(set(STATUS) - {errors.OverloadedError}, key=str))
def test_no_other_error_says_when_to_come_back(kind):
    assert refusal("/a/B", made(kind)).trailers == ()


def test_longest_message_is_kept_and_a_longer_one_is_cut():
    longest = "x" * MAX_MESSAGE_CHARACTERS

    assert str(CallError(Status.INTERNAL, longest)) == longest
    assert str(CallError(Status.INTERNAL, longest + "y")) == longest[:-1] + "…"


def test_first_outcome_is_sent_and_no_other():
    call, refused = Noted(), CallError(Status.NOT_FOUND, "no")

    call.answer(b"1")
    call.answer(b"2")
    call.refuse(refused)
    call.cancel()

    assert call.sent == [b"1"]
    other = Noted()
    other.refuse(refused)
    other.answer(b"1")
    assert other.sent == [refused]


def note(statuses, _, status):
    statuses.append(status)


def test_one_of_many_threads_ends_a_call():
    endings = [
        lambda call: call.answer(b"1"),
        lambda call: call.refuse(CallError(Status.NOT_FOUND, "no")),
        lambda call: call.cancel(),
    ] * 4
    with ThreadPoolExecutor(len(endings)) as threads:
        for _ in range(200):
            call = Noted()
            statuses: list[Status] = []
            call.watcher = partial(note, statuses)
            together = threading.Barrier(len(endings))

            def end(ending, call=call, together=together):
                together.wait(30)
                ending(call)

            list(threads.map(end, endings))
            assert len(statuses) == 1
            assert len(call.sent) == (statuses != [Status.CANCELLED])


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda call: call.answer(b"1"), Status.OK),
        (lambda call: call.refuse(CallError(Status.NOT_FOUND, "no")), Status.NOT_FOUND),
        (lambda call: call.cancel(), Status.CANCELLED),
    ],
)
def test_watcher_is_told_the_end_once_and_before_anything_is_sent(end, status):
    call, seen = Noted(), []
    call.watcher = lambda _, status: seen.append((status, list(call.sent)))

    end(call)
    call.answer(b"2")

    assert seen == [(status, [])]
    assert call.over


def test_caller_who_has_left_is_sent_nothing():
    call = Noted()

    call.cancel()
    call.answer(b"1")
    call.refuse(CallError(Status.NOT_FOUND, "no"))

    assert call.sent == []


def test_who_waits_for_a_cancellation_is_told_of_it_before_the_call_ends():
    call, told = Noted(), []
    call.on_cancel(lambda: told.append(call.over))

    assert told == []
    call.cancel()
    assert told == [False]


def test_who_asks_after_the_cancellation_is_told_at_once():
    call, told = Noted(), []
    call.cancel()

    call.on_cancel(lambda: told.append("left"))

    assert told == ["left"]


def test_cancellation_of_what_has_ended_tells_nobody():
    call, told = Noted(), []
    call.on_cancel(lambda: told.append("left"))

    call.answer(b"1")
    call.cancel()

    assert told == []


def test_cancellation_may_refuse_the_call_itself():
    call, statuses = Noted(), []
    call.watcher = lambda _, status: statuses.append(status)
    call.on_cancel(lambda: call.refuse(CallError(Status.CANCELLED, "the caller left")))

    call.cancel()

    assert statuses == [Status.CANCELLED]


@pytest.mark.parametrize("end", ["answer", "refuse", "cancel"])
def test_call_that_is_over_keeps_nothing_of_what_was_asked(end):
    call = Noted(content=b"megabytes")
    asked = object()
    kept = weakref.ref(holder := Held(asked))
    call.on_cancel(partial(holder.tell))
    del holder

    if end == "answer":
        call.answer(b"")
    elif end == "refuse":
        call.refuse(CallError(Status.INVALID_ARGUMENT, "no"))
    else:
        call.cancel()

    assert call.content == b""
    assert kept() is None


class Held:
    """What a request is kept as while it waits."""

    def __init__(self, asked):
        self.asked = asked

    def tell(self):
        """Do nothing about the cancellation."""


def test_metadata_may_come_as_pairs_and_has_text_values_only():
    call = Call("/a/b", b"", metadata=(("x", "1"), ("y-bin", b"2"), ("z", "3")))

    assert call.metadata == {"x": "1", "z": "3"}
    assert call.metadata is call.metadata
