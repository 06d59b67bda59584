"""The way of one ModelInfer request: checked, decoded, queued, answered."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2
from service import errors, pictures, tensors
from service.batch_queue import Ticket
from service.batcher import Answers, Job, Timing
from service.call import DRAINING, STATUS, Call, refusal
from service.parameters import Parameters
from service.repository import Repository, Served
from service.tensors import Output

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


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A request that fits a version, and what it asks of it."""

    call: Call
    request: inference_pb2.ModelInferRequest
    served: Served
    parameters: Parameters
    outputs: Sequence[Output]
    attempt: int


class Inference:
    """ModelInfer on every model of a repository. Safe to call from several threads at once."""

    def __init__(self, repository: Repository, *, max_image_pixels: int) -> None:
        self._repository = repository
        self._max_image_pixels = max_image_pixels
        self._draining = False
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")
        self._lock = threading.Lock()
        self._decoding = 0

    def begin(self, call: Call, request: inference_pb2.ModelInferRequest) -> None:
        """Check a request and let it wait for its model; returns at once and never raises."""
        call.notes["request_id"] = request.id
        call.notes["model"] = request.model_name
        self._begin(call, request, 0)

    def drain(self) -> None:
        """Refuse requests from now on; what was accepted is answered."""
        self._draining = True

    def is_idle(self) -> bool:
        """Tell whether no request is being decoded, waits or runs."""
        return not self._decoding and self._repository.is_idle()

    def close(self) -> None:
        """Let go of the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _begin(self, call: Call, request: inference_pb2.ModelInferRequest, attempt: int) -> None:
        if self._draining and not attempt:  # what was accepted is answered
            _refuse(call, request, errors.DrainingError(DRAINING))
            return
        try:
            served = self._repository.get(request.model_name, request.model_version)
            self._accept(call, request, served, attempt)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            _refuse(call, request, error)

    def _accept(
        self, call: Call, request: inference_pb2.ModelInferRequest, served: Served, attempt: int
    ) -> None:
        manifest, options = served.manifest, served.options
        try:
            parameters = Parameters.read(request, options, time.monotonic())
            outputs = tensors.requested(request, manifest.outputs)
            batch = tensors.decode(request, manifest.input, options.max_batch_rows)
        except errors.ServiceError:
            served.statistics.failed("OTHER", time.monotonic() - call.started_s)
            raise
        accepted = _Accepted(call, request, served, parameters, outputs, attempt)
        if isinstance(batch, list):
            self._decode_later(accepted, batch)
        else:
            self._wait(accepted, batch)

    def _decode_later(self, accepted: _Accepted, contents: list[bytes]) -> None:
        with self._lock:
            full = self._decoding == MAX_DECODING
            self._decoding += not full
        if full:
            accepted.served.statistics.failed("REJECTED", 0.0)
            raise errors.OverloadedError(
                f"Exceeds maximum queue size: {MAX_DECODING} requests of pictures are already "
                "waiting; try again later",
                retry_after_s=RETRY_S,
            )
        self._decoders.submit(self._decode, accepted, contents)

    def _decode(self, accepted: _Accepted, contents: list[bytes]) -> None:
        height, width, channels = accepted.served.manifest.input.shape[1:]
        try:
            _check_wanted(accepted)
            batch = pictures.decode_all(contents, (height, width, channels), self._max_image_pixels)
            self._wait(accepted, batch)
        except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
            if type(error) in DECODING_FAILURES:
                accepted.served.statistics.failed(DECODING_FAILURES[type(error)], 0.0)
            _refuse(accepted.call, accepted.request, error)
        finally:
            with self._lock:
                self._decoding -= 1

    def _wait(self, accepted: _Accepted, batch: NDArray[np.generic]) -> None:
        """Queue a request; where its version has just been replaced, begin again with the next."""
        call, served = accepted.call, accepted.served
        ticket = Ticket(
            rows=len(batch),
            shape=batch.shape[1:],
            arrived_s=call.started_s,
            deadline_s=call.deadline_s,
            timeout_s=accepted.parameters.timeout_s,
            level=accepted.parameters.level,
            content=Job(
                batch,
                lambda answers, timing: _answer(accepted, answers, timing),
                lambda error: _refuse(call, accepted.request, error),
            ),
        )
        try:
            served.batcher.submit(ticket)
        except errors.ModelNotReadyError:
            if accepted.attempt == SWAPS:
                raise
            self._begin(call, accepted.request, accepted.attempt + 1)
        else:
            call.on_cancel(lambda: served.batcher.cancel(ticket))


def _check_wanted(accepted: _Accepted) -> None:
    """Refuse to decode pictures whose answer nobody would read."""
    now_s = time.monotonic()
    if accepted.call.over:
        raise errors.CancelledError("the caller cancelled the request")
    if now_s >= accepted.call.deadline_s:
        raise errors.DeadlineError("the deadline passed before the pictures were decoded")
    if now_s >= accepted.parameters.timeout_s:
        raise errors.QueueTimeoutError("Request timeout expired")


def _answer(accepted: _Accepted, answers: Answers, timing: Timing) -> None:
    try:
        content = _written(accepted, answers, timing)
    except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
        _refuse(accepted.call, accepted.request, error)
    else:
        accepted.call.answer(content)


def _written(accepted: _Accepted, answers: Answers, timing: Timing) -> bytes:
    served = accepted.served
    response = inference_pb2.ModelInferResponse(
        model_name=served.name, model_version=str(served.number), id=accepted.request.id
    )
    for output in accepted.outputs:
        tensors.append_output(response, output, answers[output.name], served.manifest.labels)
    accepted.call.notes.update(
        version=served.number,
        rows=timing.rows,
        batch_rows=timing.batch_rows,
        queue_s=timing.queue_s,
        infer_s=timing.infer_s,
    )
    return response.SerializeToString()


def _refuse(call: Call, request: inference_pb2.ModelInferRequest, error: Exception) -> None:
    if isinstance(error, errors.ServiceError) and type(error) in STATUS:
        # Triton's clients find their request in a message by this prefix.
        error.args = (f"[request id: {request.id[:MAX_ID_CHARACTERS] or '<id_unknown>'}] {error}",)
    call.refuse(refusal(call.path, error))
