"""Ask the deployment that will serve a version for the whole test set, before it is the champion.

The version is `candidate` while it is asked for by its number. What was measured is written beside
the bundle, into `records/`: a published version never changes. Whatever ends this early leaves the
champion where it was.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from json import dumps
from pathlib import Path

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, files
from pipeline.endpoint import Endpoint
from pipeline.errors import PromotionError
from pipeline.records import Dataset
from pipeline.runtimes import open_model
from protos import bundle_pb2, parity_pb2
from service import agreement, aliases, bundle
from service.client import Client
from service.errors import ServerError, ServiceError

log = logging.getLogger(__name__)
CANDIDATE, PREVIOUS = "candidate", "previous"
ORIGINAL = "variants/saved_model"
LOGITS = "logits"
RECORDS = "records"
LOCK = ".promoting"
READY_S = 120.0  # for a server to find a version, try it and load it
REFUSED_S = 5.0  # a version that is still being copied is refused too, at first
LOOK_S = 0.5
PART_ROWS = 1024  # asked for between two looks at the progress


@dataclass(frozen=True, slots=True)
class Measured:
    """What one endpoint answered."""

    endpoint: str
    report: bundle_pb2.ParityReport
    self_check: parity_pb2.SelfCheck


def promote(
    path: Path,
    data: Dataset,
    endpoints: Sequence[Endpoint],
    *,
    ready_s: float = READY_S,
) -> Path:
    """Make a published version the champion if every endpoint answers like its original.

    Args:
        path: the bundle, NAME/VERSION in the folder that the endpoints serve.
        data: its test images are asked for, all of them.
        endpoints: servers or balancers; each is asked over several connections.
        ready_s: longest wait for a server to have the version ready.

    Returns:
        The record of what was measured.

    Raises:
        PromotionError: one does not, or not in time; the champion is what it was.
        BusyError: another promotion of this model is under way.
        BundleError: there is no such version, or the aliases cannot be read or written.
    """
    home, number = path.parent, int(path.name)
    manifest = bundle.read_manifest(path)
    test = dataset.load(data).test
    reference = open_model(path / ORIGINAL).run(test.images)[LOGITS].astype(np.float32, copy=False)
    with files.locked(home / LOCK, wait=False), _candidate(home, number) as before:
        measured, failures = [], []
        for endpoint in endpoints:
            try:
                found = _ask(endpoint, manifest, test, reference, ready_s)
            except (ServiceError, OSError, ValueError) as error:
                failures.append(f"{endpoint.address}: {error}")
                continue
            measured.append(found)
            if not found.report.passed:
                failures.append(f"{endpoint.address}: {found.report.failure}")
        if not failures:
            _crown(home, number)
        record = _write(home, number, before, measured, failures)
    if failures:
        kept = before.get(aliases.CHAMPION)
        raise PromotionError(
            f"{home.name} {number} is not the champion, {'; '.join(failures)}; "
            f"{f'{kept} stays it' if kept else 'there is none still'}; measured: {record}"
        )
    log.info("%s %d is the champion; measured: %s", home.name, number, record)
    return record


def rollback(home: Path) -> tuple[int, int]:
    """Give `champion` back to the version that had it before.

    Returns:
        The version that was the champion, and the one that is.

    Raises:
        PromotionError: there is none to go back to.
        BundleError: the aliases cannot be read or written.
    """
    with aliases.changing(home):
        known = aliases.read(home)
        champion, previous = known.get(aliases.CHAMPION), known.get(PREVIOUS)
        if champion is None or previous is None:
            raise PromotionError(
                f"{home.name} has no {PREVIOUS} champion to go back to; choose a version with "
                f"serve-export alias {home.name} {aliases.CHAMPION} VERSION"
            )
        aliases.write(home, {**known, aliases.CHAMPION: previous, PREVIOUS: champion})
    return champion, previous


@contextmanager
def _candidate(home: Path, number: int) -> Iterator[dict[str, int]]:
    """Name the version `candidate` for a while; give the aliases that there were."""
    with aliases.changing(home):
        before = aliases.read(home)
        aliases.write(home, {**before, CANDIDATE: number})
    try:
        yield before
    finally:
        with aliases.changing(home):
            known = aliases.read(home)
            known.pop(CANDIDATE, None)
            if known.get(aliases.CHAMPION) != number and before.get(CANDIDATE, number) != number:
                known[CANDIDATE] = before[CANDIDATE]
            aliases.write(home, known)


def _crown(home: Path, number: int) -> None:
    with aliases.changing(home):
        known = aliases.read(home)
        champion = known.get(aliases.CHAMPION)
        if champion not in (None, number):
            known[PREVIOUS] = champion
        aliases.write(home, {**known, aliases.CHAMPION: number})


def _ask(
    endpoint: Endpoint,
    manifest: bundle_pb2.BundleManifest,
    test: dataset.Split,
    reference: NDArray[np.float32],
    ready_s: float,
) -> Measured:
    """Ask one endpoint for the version, once it has it, and judge what it answers.

    Raises:
        ServiceError: it does not answer, or has not got the version.
        OSError, ValueError: it cannot be reached with what was given.
    """
    name, number = manifest.name, str(manifest.version)
    address = endpoint.address
    with endpoint.connect() as client:
        _wait(client, address, name, number, ready_s)
        wrong = _other_model(client, manifest)
        logits = _logits(client, address, name, number, test.images)
        parity = client.parity(name, number).versions[0]
    report = agreement.compare(
        reference, logits, test.labels, allowed=_budget(manifest),
        class_names=list(manifest.labels),
    )  # fmt: skip
    report.variant, report.path = "served", bundle.MODEL
    report.runtime = parity.self_check.report.runtime
    report.failure = wrong or report.failure or _accuracy_failure(report, manifest)
    report.passed = not report.failure
    log.info(
        "%s: max |Δlogit| %.2g of %.2g allowed, agreement %.2f %%: %s",
        address, report.logits.max, report.budget.max_logit, 100 * report.agreement,
        report.failure or "passed",
    )  # fmt: skip
    return Measured(address, report, parity.self_check)


def _wait(client: Client, address: str, name: str, number: str, ready_s: float) -> None:
    """Wait until a server has the version ready.

    Raises:
        ServerError: it cannot be reached; or has refused the version, or not found it in time.
    """
    until_s = time.monotonic() + ready_s
    refused_s = None
    reason = "it is not in the folder that is served there"
    while True:
        try:
            state = next(
                (one for one in client.models() if (one.name, one.version) == (name, number)), None
            )
        except ServerError as error:
            if time.monotonic() > until_s:
                raise
            state, reason = None, str(error)
        now_s = time.monotonic()
        if state is not None and state.state == "READY":
            return
        if state is not None and state.reason:
            refused_s, reason = refused_s or now_s, state.reason
        else:
            refused_s = None
        if now_s > until_s or (refused_s is not None and now_s > refused_s + REFUSED_S):
            raise ServerError(f"{name} {number} is not ready, {reason}", code="UNAVAILABLE")
        log.info("waiting for %s to have %s %s ready", address, name, number)
        time.sleep(LOOK_S)


def _other_model(client: Client, manifest: bundle_pb2.BundleManifest) -> str:
    """Return why what is served under the number is not this version; nothing if it is."""
    said = client.metadata(manifest.name, str(manifest.version)).properties
    model = next(file for file in manifest.files if file.path == bundle.MODEL)
    for name, promised in (
        ("model.sha256", model.sha256),
        ("parent.sha256", manifest.provenance.parent_sha256),
    ):
        if said.get(name, "") != promised:
            return (
                f"it serves another model under {manifest.name} {manifest.version}: {name} is "
                f"{said.get(name, '')[:12] or 'not told'}, expected {promised[:12]}"
            )
    return ""


def _logits(
    client: Client, address: str, name: str, number: str, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    parts = []
    for start in range(0, len(images), PART_ROWS):
        answer = client.predict(images[start : start + PART_ROWS], model=name, version=number)
        parts.append(answer.logits.astype(np.float32, copy=False))
        if start % (4 * PART_ROWS) == 0:
            log.info("%s has answered %d of %d", address, start + len(parts[-1]), len(images))
    return np.concatenate(parts)


def _budget(manifest: bundle_pb2.BundleManifest) -> agreement.Budget:
    served = next(one for one in manifest.parity if one.variant == manifest.served_variant)
    return agreement.Budget(served.budget.precision, served.budget.scale)


def _accuracy_failure(report: bundle_pb2.ParityReport, manifest: bundle_pb2.BundleManifest) -> str:
    evaluated = manifest.evaluation
    if report.reference_accuracy.correct != evaluated.accuracy.correct:
        return (
            f"the original is right on {report.reference_accuracy.correct} test images, "
            f"{evaluated.accuracy.correct} when it was evaluated: the test images are others"
        )
    if report.accuracy.value < evaluated.min_accuracy:
        return (
            f"its accuracy is {report.accuracy.value:.2%}, "
            f"the gate is at {evaluated.min_accuracy:.2%}"
        )
    return ""


def _write(
    home: Path,
    number: int,
    before: dict[str, int],
    measured: Sequence[Measured],
    failures: Sequence[str],
) -> Path:
    """Write what was measured, whole; return where."""
    now = datetime.now(UTC)
    after = {name: value for name, value in aliases.read(home).items() if name != CANDIDATE}
    content = {
        "model": home.name,
        "version": number,
        "measured": now.isoformat(timespec="seconds"),
        "promoted": not failures,
        "failures": list(failures),
        "aliases_before": before,
        "aliases_after": after,
        "endpoints": [
            {
                "endpoint": one.endpoint,
                "report": json_format.MessageToDict(one.report, preserving_proto_field_name=True),
                "self_check": json_format.MessageToDict(
                    one.self_check, preserving_proto_field_name=True
                ),
            }
            for one in measured
        ],
    }
    folder = home / RECORDS
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}-{now:%Y%m%dT%H%M%S.%fZ}.json"
    files.write_whole(path, (dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path
