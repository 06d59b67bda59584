"""The way of one ModelInfer request: checked, decoded, queued, answered."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2
from service import errors, frame, host, tensors
from service.batch_queue import Ticket
from service.batcher import Batch, Batcher, Expect, ignore
from service.call import DRAINING, STATUS, Call, CallError, parsed, refusal
from service.forms import Form, Forms
from service.parameters import Parameters
from service.repository import Repository

SWAPS = 8  # versions that may close under one request before it is refused
DECODERS = 2  # threads for pictures; Pillow lets go of the interpreter's lock
MAX_DECODING = 64  # requests of pictures that may wait for them
RETRY_S = 0.1
MAX_ID_CHARACTERS = 128  # of a request's id in a message, which has to say more
# How statistics count what ends a request before it is queued.
DECODING_FAILURES: dict[type[Exception], str] = {
    errors.PictureError: "OTHER",
    errors.CancelledError: "CANCELED",
    errors.DeadlineError: "REJECTED",
    errors.QueueTimeoutError: "REJECTED",
}


class _Request:
    """A request that fits a version, and its rows once they are there: the batcher's `Job`."""

    __slots__ = ("attempt", "batch", "call", "form")

    def __init__(self, call: Call, form: Form, batch: NDArray[np.generic], attempt: int) -> None:
        self.call, self.form, self.batch, self.attempt = call, form, batch, attempt

    def answered(self, batch: Batch, start: int) -> None:
        call, rows = self.call, len(self.batch)
        try:
            content = self.form.written(batch, start, rows)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            self.failed(error)
            return
        if call.watcher is not None:
            call.notes.update(
                model=self.form.served.name,
                version=self.form.served.number,
                rows=rows,
                batch_rows=batch.rows,
                queue_s=batch.started_s - call.started_s,
                infer_s=batch.infer_s,
            )
        call.answer(content)

    def failed(self, error: Exception) -> None:
        _refuse(self.call, self.form.request_id, error)


class Inference:
    """ModelInfer on every model of a repository. Safe to call from several threads at once."""

    def __init__(self, repository: Repository, *, max_image_pixels: int) -> None:
        self._repository = repository
        self._max_image_pixels = max_image_pixels
        self._forms = Forms()
        self._draining = False
        self._decoders = ThreadPoolExecutor(
            DECODERS,
            thread_name_prefix="pictures",
            # Started by who takes calls, which may keep to less.
            initializer=partial(host.let_go, host.cpus()),
        )
        self._lock = threading.Lock()
        self._decoding = 0

    def begin(self, call: Call) -> None:
        """Check a request and let it wait for its model; returns at once and never raises."""
        self._begin(call, None)

    def run(self, calls: Sequence[Call], longest_s: float, expect: Expect = ignore) -> None:
        """Begin requests that came together, and run what is short of them on this thread.

        Never raises; returns once nothing more can be done here.

        Args:
            calls: the requests.
            longest_s: expected seconds of a call of the model from which on it is left to others.
            expect: told of those of every other, before it is made.
        """
        fed: set[Batcher] = set()
        known: list[_Request] = []
        same = True
        for call in calls:
            request = self._begun_alike(call)
            if request is None:
                self._begin(call, fed)
                continue
            known.append(request)
            form, first = request.form, known[0].form
            same = (
                same
                and (
                    form is first  # so that their rows have one shape
                    or (
                        form.served is first.served
                        and request.batch.shape[1:] == known[0].batch.shape[1:]
                    )
                )
            )
        if known and not (same and not fed and self._run_at_once(known, longest_s, expect)):
            for request in known:
                self._queue(request, fed)
        if fed:
            own = fed.pop()
            for other in fed:
                other.wake()
            own.work(longest_s, expect)

    def _begun_alike(self, call: Call) -> _Request | None:
        """Return a call's request if one like it is known; None if it has to be read."""
        try:
            known = self._forms.find(call.content, self._repository.changes)
        except Exception:  # noqa: BLE001  it will be said where the call is read
            return None
        if known is None or self._draining:
            return None
        form, rows = known
        if call.watcher is not None:
            call.notes["model"] = form.served.name
        return _Request(call, form, rows, 0)

    def _run_at_once(self, requests: Sequence[_Request], longest_s: float, expect: Expect) -> bool:
        """Run requests of one version on this thread, if nothing of it waits or need wait."""
        tickets = [_ticket(request) for request in requests]
        return requests[0].form.served.batcher.run_at_once(tickets, longest_s, expect)

    def _queue(self, request: _Request, fed: set[Batcher] | None) -> None:
        try:
            self._wait(request, fed)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            _refuse(request.call, request.form.request_id, error)

    def drain(self) -> None:
        """Refuse requests from now on; what was accepted is answered."""
        self._draining = True

    def is_idle(self) -> bool:
        """Tell whether no request is being decoded, waits or runs."""
        return not self._decoding and self._repository.is_idle()

    def close(self) -> None:
        """Let go of the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _begin(self, call: Call, fed: set[Batcher] | None) -> None:
        request = self._begun_alike(call)
        if request is None:
            self._read(call, fed, 0)
        else:
            self._queue(request, fed)

    def _read(self, call: Call, fed: set[Batcher] | None, attempt: int) -> None:
        """Begin a request of which nothing is known yet."""
        try:
            frame.check(call.content)
            request = parsed(call, inference_pb2.ModelInferRequest.FromString)
        except (CallError, errors.InvalidRequestError) as error:
            call.refuse(refusal(call.path, error))
            return
        call.notes["request_id"] = request.id
        call.notes["model"] = request.model_name
        if self._draining and not attempt:  # what was accepted is answered
            _refuse(call, request.id, errors.DrainingError(DRAINING))
            return
        try:
            self._accept(call, request, fed, attempt)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            _refuse(call, request.id, error)

    def _accept(
        self,
        call: Call,
        request: inference_pb2.ModelInferRequest,
        fed: set[Batcher] | None,
        attempt: int,
    ) -> None:
        changes = self._repository.changes
        served = self._repository.get(request.model_name, request.model_version)
        manifest, options = served.manifest, served.options
        try:
            parameters = Parameters.read(request, options)
            outputs = tensors.requested(request, manifest.outputs)
            batch = tensors.decode(request, manifest.input, options.max_batch_rows)
        except errors.ServiceError:
            served.statistics.failed("OTHER", time.monotonic() - call.started_s)
            raise
        form = Form(request.id, served, parameters, outputs)
        if isinstance(batch, list):
            self._decode_later(call, form, batch, attempt)
        else:
            self._forms.keep(call.content, request, form, batch, changes)
            self._wait(_Request(call, form, batch, attempt), fed)

    def _decode_later(self, call: Call, form: Form, contents: list[bytes], attempt: int) -> None:
        with self._lock:
            full = self._decoding == MAX_DECODING
            self._decoding += not full
        if full:
            form.served.statistics.failed("REJECTED", 0.0)
            raise errors.OverloadedError(
                f"Exceeds maximum queue size: {MAX_DECODING} requests of pictures are already "
                "waiting; try again later",
                retry_after_s=RETRY_S,
            )
        self._decoders.submit(self._decode, call, form, contents, attempt)

    def _decode(self, call: Call, form: Form, contents: list[bytes], attempt: int) -> None:
        from service import pictures  # noqa: PLC0415  Pillow: only for who sends some

        height, width, channels = form.served.manifest.input.shape[1:]
        try:
            _check_wanted(call, form)
            batch = pictures.decode_all(contents, (height, width, channels), self._max_image_pixels)
            self._wait(_Request(call, form, batch, attempt), None)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            if type(error) in DECODING_FAILURES:
                form.served.statistics.failed(DECODING_FAILURES[type(error)], 0.0)
            _refuse(call, form.request_id, error)
        finally:
            with self._lock:
                self._decoding -= 1

    def _wait(self, request: _Request, fed: set[Batcher] | None) -> None:
        """Queue a request; where its version has just been replaced, begin again with the next."""
        call, batcher = request.call, request.form.served.batcher
        ticket = _ticket(request)
        try:
            batcher.submit(ticket, stay=fed is not None)
        except errors.ModelNotReadyError:
            if request.attempt == SWAPS:
                raise
            self._read(call, fed, request.attempt + 1)
        else:
            if fed is not None:
                fed.add(batcher)
            call.on_cancel(lambda: batcher.cancel(ticket))


def _ticket(request: _Request) -> Ticket:
    call, batch, parameters = request.call, request.batch, request.form.parameters
    return Ticket(
        len(batch),
        batch.shape[1:],
        call.started_s,
        call.deadline_s,
        call.started_s + parameters.wait_s,
        parameters.level,
        request,
    )


def _check_wanted(call: Call, form: Form) -> None:
    """Refuse to decode pictures whose answer nobody would read."""
    now_s = time.monotonic()
    if call.over:
        raise errors.CancelledError("the caller cancelled the request")
    if now_s >= call.deadline_s:
        raise errors.DeadlineError("the deadline passed before the pictures were decoded")
    if now_s >= call.started_s + form.parameters.wait_s:
        raise errors.QueueTimeoutError("Request timeout expired")


def _refuse(call: Call, request_id: str, error: Exception) -> None:
    if isinstance(error, errors.ServiceError) and type(error) in STATUS:
        # Triton's clients find their request in a message by this prefix.
        error.args = (f"[request id: {request_id[:MAX_ID_CHARACTERS] or '<id_unknown>'}] {error}",)
    call.refuse(refusal(call.path, error))
