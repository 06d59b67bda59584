"""What this server says about the parity of what it serves, and what shadows see and say of it."""

import json
import threading
from collections.abc import Iterator
from contextlib import suppress

from protos import parity_pb2
from service import bundle
from service.bundle import checked_output
from service.call import Stream
from service.errors import (
    InvalidRequestError,
    LimitError,
    ModelNotFoundError,
    ModelNotReadyError,
    PreconditionError,
)
from service.live import check, cleaned
from service.repository import Repository, Served
from service.sampling import OFF, Ring, Sampling, Taken

SAMPLE_PAUSE_S = 0.25  # rows gather meanwhile; each message costs the server some 0.3 ms
WATCH_PAUSE_S = 0.5
MAX_WATCHERS = 64  # each costs the making of an answer at every pause
MESSAGE_ROWS = 256
# Of rows in one message, unless one row alone has more: it fits into what any server sends.
MESSAGE_BYTES = (1 << 20) - 4096


class Streams:
    """The calls of ParityService that are answered for as long as the caller listens."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)

    def sample(self, request: parity_pb2.SampleTrafficRequest) -> Stream:
        """Begin SampleTraffic.

        Raises:
            PreconditionError: no row may be read.
            ModelNotFoundError: the named model is not in the repository.
            LimitError: too many read rows already.
        """
        sampling = self._repository.sampling
        if request.model and sampling.rate:
            with suppress(ModelNotReadyError):  # it may become so
                self._repository.get(request.model, "")
        return _SampleStream(sampling, sampling.open(request.model))

    def watch(self, request: parity_pb2.GetParityRequest) -> Stream:
        """Begin StreamParity.

        Raises:
            ServiceError: as `get_parity`.
            LimitError: too many watch already.
        """
        get_parity(self._repository, request)
        if not self._watchers.acquire(blocking=False):
            raise LimitError(f"{MAX_WATCHERS} calls watch the parity of this server already")
        return _ParityStream(self._repository, request, self._watchers)


class _SampleStream:
    pause_s = SAMPLE_PAUSE_S

    def __init__(self, sampling: Sampling, ring: Ring) -> None:
        self._sampling, self._ring = sampling, ring

    def due(self) -> Iterator[bytes]:
        while (taken := self._ring.take(MESSAGE_ROWS, MESSAGE_BYTES)) is not None:
            yield _sampled(taken).SerializeToString()

    def close(self) -> None:
        self._sampling.close(self._ring)


class _ParityStream:
    pause_s = WATCH_PAUSE_S

    def __init__(
        self,
        repository: Repository,
        request: parity_pb2.GetParityRequest,
        watchers: threading.Semaphore,
    ) -> None:
        self._repository, self._request, self._watchers = repository, request, watchers
        self._shown: bytes | None = None

    def due(self) -> Iterator[bytes]:
        answer = get_parity(self._repository, self._request)
        content = answer.SerializeToString()
        for one in answer.versions:  # what goes on all the time is no news
            one.live.sampled = one.live.dropped = 0
        shown = answer.SerializeToString()
        if shown != self._shown:
            self._shown = shown
            yield content

    def close(self) -> None:
        self._watchers.release()


def report_shadow(
    repository: Repository, request: parity_pb2.ReportShadowRequest
) -> parity_pb2.ReportShadowResponse:
    """Answer ParityService.ReportShadow.

    Raises:
        InvalidRequestError: the version is not a number, or the figures cannot be of this model.
        ModelNotFoundError: the version is not served.
        PreconditionError: no row is sampled, the original is another than the version's own, or
            more rows are reported than shadows were handed.
    """
    if not repository.sampling.rate:
        raise PreconditionError(OFF)
    if not (request.version.isascii() and request.version.isdecimal()):
        raise InvalidRequestError(
            f"the report is of version '{request.version[:64]}', expected the number that came "
            "with the rows"
        )
    try:
        served = repository.get(request.model, request.version)
    except ModelNotReadyError as error:
        raise ModelNotFoundError(str(error)) from error
    parent = served.manifest.provenance.parent_sha256
    if request.parent_sha256 != parent:
        raise PreconditionError(
            f"the report is of an original with sha256 '{request.parent_sha256[:64]}', "
            f"'{served.name}' version {served.number} comes from '{parent}'; "
            "give the shadow the original of this version"
        )
    check(request.figures, served.manifest)
    served.live.add(cleaned(request.figures))
    return parity_pb2.ReportShadowResponse()


def get_parity(
    repository: Repository, request: parity_pb2.GetParityRequest
) -> parity_pb2.GetParityResponse:
    """Answer ParityService.GetParity.

    Raises:
        InvalidRequestError: a version without a model, or one that is not a number.
        ModelNotFoundError: the named model or version is not in the repository.
        ModelNotReadyError: it is, but may not be served.
    """
    if request.version and not request.model:
        raise InvalidRequestError(
            f"version is '{request.version}' without a model; name the model as well"
        )
    if request.version:
        found = [repository.get(request.model, request.version)]
    elif request.model:
        highest = repository.get(request.model, "")
        found = [other for other in repository.versions() if other.name == highest.name]
    else:
        found = repository.versions()
    return parity_pb2.GetParityResponse(versions=[_parity(served) for served in found])


def properties(served: Served) -> dict[str, str]:
    """Return what ModelMetadata says beyond the tensors, by dotted names."""
    manifest, check = served.manifest, served.self_check.report
    model = next(file for file in manifest.files if file.path == bundle.MODEL)
    report = next(report for report in manifest.parity if report.variant == manifest.served_variant)
    return {
        "labels": json.dumps(list(manifest.labels)),
        "max_batch_rows": str(served.options.max_batch_rows),
        "model.sha256": model.sha256,
        "dataset.name": manifest.dataset.name,
        "dataset.sha256": manifest.dataset.sha256,
        "parent.sha256": manifest.provenance.parent_sha256,
        "run": manifest.provenance.run,
        "parity.output": checked_output(manifest),
        "parity.variant": report.variant,
        "parity.rows": str(report.accuracy.rows),
        "parity.accuracy": f"{report.accuracy.value:.6g}",
        "parity.reference_accuracy": f"{report.reference_accuracy.value:.6g}",
        "parity.agreement": f"{report.agreement:.6g}",
        "parity.max_logit_difference": f"{report.logits.max:.6g}",
        "parity.max_logit_budget": f"{report.budget.max_logit:.6g}",
        "parity.self_check.max_logit_difference": f"{check.logits.max:.6g}",
        "parity.self_check.checked": served.self_check.checked,
    }


def _parity(served: Served) -> parity_pb2.VersionParity:
    return parity_pb2.VersionParity(
        model=served.name,
        version=str(served.number),
        variants=served.manifest.parity,
        served=served.manifest.served if served.manifest.HasField("served") else None,
        self_check=served.self_check,
        live=served.live.message(),
    )


def _sampled(taken: Taken) -> parity_pb2.SampledRows:
    source = taken.blocks[0].source
    return parity_pb2.SampledRows(
        model=source.model,
        version=str(source.number),
        parent_sha256=source.parent_sha256,
        rows=sum(block.rows for block in taken.blocks),
        input=b"".join(block.inputs.tobytes() for block in taken.blocks),
        output=b"".join(block.outputs.tobytes() for block in taken.blocks),
        dropped=taken.dropped,
    )
