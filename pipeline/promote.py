"""Ask the deployment that will serve a version for the whole test set, before it is the champion.

The version is `candidate` while it is asked for by its number. What was measured is written beside
the bundle, into `records/`: a published version never changes. Whatever ends this early leaves the
champion where it was.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, files
from pipeline.endpoint import CHANNELS, Endpoint
from pipeline.errors import PromotionError
from pipeline.records import Dataset
from pipeline.runtimes import Show, counted, open_model
from protos import bundle_pb2, parity_pb2
from service import agreement, aliases, bundle
from service.client import Client
from service.errors import ServerError, ServiceError

log = logging.getLogger(__name__)
CANDIDATE, PREVIOUS = "candidate", "previous"
ORIGINAL = "variants/saved_model"
RECORDS = "records"
LOCK = ".promoting"
KEPT = ".aliases-before"  # of a promotion that is under way, or was killed
ABSENT = "it is not in the folder that is served there"
UNREACHED = "no server answers there"
AGAIN = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
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
    show: Show = lambda done, total: None,
) -> Path:
    """Make a published version the champion if every endpoint answers like its original.

    Args:
        path: the bundle, NAME/VERSION in the folder that the endpoints serve.
        data: its test images are asked for, all of them.
        endpoints: servers or balancers; each is asked over several connections.
        ready_s: longest wait for a server to have the version ready.
        show: told of the progress, in rows that endpoints have answered.

    Returns:
        The record of what was measured.

    Raises:
        PromotionError: one does not, or not in time; the champion is what it was.
        BusyError: another promotion of this model is under way.
        BundleError: there is no such version, or the aliases cannot be read or written.
    """
    home, number = path.parent, int(path.name)
    manifest = bundle.read(path).manifest  # and every file, the original's among them, is its own
    if manifest.dataset.sha256 != data.sha256:
        raise PromotionError(
            f"{home.name} {number} was evaluated on {manifest.dataset.name} "
            f"{manifest.dataset.sha256[:12]}, these images are {data.sha256[:12]}; give its own "
            "with --data"
        )
    test = dataset.load(data).test
    output = bundle.checked_output(manifest)
    reference = open_model(path / ORIGINAL).run(test.inputs)[output].astype(np.float32, copy=False)
    with files.locked(home / LOCK, wait=False), _candidate(home, number) as before:
        measured, failures = [], []
        told = counted(show, len(test.inputs) * len(endpoints))
        for endpoint in endpoints:
            try:
                found = _ask(endpoint, manifest, (test, reference), ready_s, told)
            except (ServiceError, OSError, ValueError) as error:
                failures.append(f"{endpoint.address}: {error}")
                continue
            measured.append(found)
            if not found.report.passed:
                failures.append(f"{endpoint.address}: {found.report.failure}")
        record = _write(home, number, before, measured, failures)
        if not failures:
            _crown(home, number)
    if failures:
        raise PromotionError(_refusal(home.name, number, before, failures, record))
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
    """Name the version `candidate` for a while; give the aliases that there were.

    What there was is kept in a file meanwhile: whoever comes after a kill puts it back.
    """
    kept = home / KEPT
    with aliases.changing(home):
        before = _aliases(home)
        if kept.exists():
            before = _with_candidate(before, json.loads(kept.read_bytes()))
        files.write_whole(kept, json.dumps(before).encode())
        aliases.write(home, {**before, CANDIDATE: number})
    try:
        yield before
    finally:
        with aliases.changing(home):
            known = _aliases(home)
            promoted = known.get(aliases.CHAMPION) == number
            aliases.write(home, _with_candidate(known, {} if promoted else before))
            kept.unlink(missing_ok=True)


def _aliases(home: Path) -> dict[str, int]:
    """Return the aliases of versions that are still there."""
    known = aliases.read(home)
    gone = sorted(name for name, number in known.items() if not (home / str(number)).is_dir())
    if gone:
        log.warning("dropping %s of %s: the version is gone", ", ".join(gone), home.name)
    return {name: number for name, number in known.items() if name not in gone}


def _with_candidate(known: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Return aliases with the candidate there was before, or none."""
    others = {name: number for name, number in known.items() if name != CANDIDATE}
    return others | {name: number for name, number in before.items() if name == CANDIDATE}


def _crowned(known: dict[str, int], number: int) -> dict[str, int]:
    champion = known.get(aliases.CHAMPION)
    before = {PREVIOUS: champion} if champion not in (None, number) else {}
    return {**known, **before, aliases.CHAMPION: number}


def _crown(home: Path, number: int) -> None:
    with aliases.changing(home):
        aliases.write(home, _crowned(_aliases(home), number))


def _refusal(
    name: str, number: int, before: dict[str, int], failures: Sequence[str], record: Path
) -> str:
    why = "; ".join(failures)
    champion = before.get(aliases.CHAMPION)
    if champion == number:
        return f"{name} {number}, the champion, does not hold, {why}; measured: {record}"
    stays = (
        f"{champion} stays it"
        if champion
        else "there is none, so that the highest version that is ready answers"
    )
    return f"{name} {number} is not the champion, {why}; {stays}; measured: {record}"


def _ask(
    endpoint: Endpoint,
    manifest: bundle_pb2.BundleManifest,
    asked: tuple[dataset.Split, NDArray[np.float32]],
    ready_s: float,
    told: Callable[[int], None],
) -> Measured:
    """Ask one endpoint for the version, once it has it, and judge what it answers.

    Args:
        endpoint: whom.
        manifest: of the version.
        asked: the test rows, and what the original answers to them.
        ready_s: longest wait for the version.
        told: how many more rows it has answered.

    Raises:
        ServiceError: it does not answer, or has not got the version.
        OSError, ValueError: it cannot be reached with what was given.
    """
    name, number = manifest.name, str(manifest.version)
    address, (test, reference) = endpoint.address, asked
    with endpoint.connect() as client:
        _wait(client, address, name, number, ready_s)
        # Once on each connection: behind a balancer they may end at different servers.
        wrong = [why for _ in range(CHANNELS) if (why := _other_model(client, manifest))]
        checks = [client.parity(name, number).versions[0].self_check for _ in range(CHANNELS)]
        if wrong:
            return Measured(address, bundle_pb2.ParityReport(failure=wrong[0]), checks[0])
        logits = _logits(client, address, manifest, test.inputs, told)
    report = agreement.compare_by_kind(
        reference, logits, test.targets, allowed=_budget(manifest),
        class_names=list(manifest.labels),
    )  # fmt: skip
    report.variant, report.path = "served", bundle.MODEL
    report.runtime = checks[0].report.runtime
    report.failure = report.failure or _accuracy_failure(report, manifest)
    report.passed = not report.failure
    log.info(
        "%s: max |Δlogit| %.2g of %.2g allowed, agreement %.2f %%: %s",
        address, report.logits.max, report.budget.max_logit, 100 * report.agreement,
        report.failure or "passed",
    )  # fmt: skip
    return Measured(address, report, checks[0])


def _wait(client: Client, address: str, name: str, number: str, ready_s: float) -> None:
    """Wait until every connection ends at a server that has the version ready.

    Raises:
        ServerError: one cannot be reached; or has refused the version, or not found it in time.
    """
    until_s = time.monotonic() + ready_s
    refused_s = None
    reasons = _reasons(client, name, number)
    if reasons:
        log.info("waiting for %s to have %s %s ready", address, name, number)
    while reasons:
        now_s = time.monotonic()
        refused = next((why for why in reasons if why not in (ABSENT, UNREACHED)), None)
        refused_s = (refused_s or now_s) if refused else None
        if now_s > until_s or (refused_s is not None and now_s > refused_s + REFUSED_S):
            reason = refused or reasons[0]
            raise ServerError(f"{name} {number} is not ready, {reason}", code="UNAVAILABLE")
        time.sleep(LOOK_S)
        reasons = _reasons(client, name, number)


def _reasons(client: Client, name: str, number: str) -> list[str]:
    """Return why connections end at servers that have not got the version; one each."""
    return [why for _ in range(CHANNELS) if (why := _unready(client, name, number))]


def _unready(client: Client, name: str, number: str) -> str:
    """Return why the server at the end of the next connection has not got the version."""
    try:
        found = client.models(timeout_s=LOOK_S * 10)
    except ServerError as error:
        if error.code not in AGAIN:
            raise
        return UNREACHED
    state = next((one for one in found if (one.name, one.version) == (name, number)), None)
    if state is None:
        return ABSENT
    return "" if state.state == "READY" else state.reason or ABSENT


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
    client: Client,
    address: str,
    manifest: bundle_pb2.BundleManifest,
    rows: NDArray[Any],
    told: Callable[[int], None],
) -> NDArray[np.float32]:
    parts = []
    name, number = manifest.name, str(manifest.version)
    output = bundle.checked_output(manifest)
    for start in range(0, len(rows), PART_ROWS):
        answer = client.predict(rows[start : start + PART_ROWS], model=name, version=number)
        parts.append(answer.outputs[output].astype(np.float32, copy=False))
        told(len(parts[-1]))
        if start % (4 * PART_ROWS) == 0:
            log.info("%s has answered %d of %d", address, start + len(parts[-1]), len(rows))
    return np.concatenate(parts)


def _budget(manifest: bundle_pb2.BundleManifest) -> agreement.Budget:
    served = next(one for one in manifest.parity if one.variant == manifest.served_variant)
    return agreement.Budget(served.budget.precision, served.budget.scale)


def _accuracy_failure(report: bundle_pb2.ParityReport, manifest: bundle_pb2.BundleManifest) -> str:
    gate = manifest.evaluation.min_accuracy
    if manifest.kind != bundle_pb2.KIND_GENERIC and report.accuracy.value < gate:
        return f"its accuracy is {report.accuracy.value:.2%}, the gate is at {gate:.2%}"
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
    known = _with_candidate(_aliases(home), before if failures else {})
    after = known if failures else _crowned(known, number)
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
    path = folder / f"{number}-{now:%Y%m%dT%H%M%S.%fZ}.json"
    try:
        folder.mkdir(exist_ok=True)
        files.write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise PromotionError(
            f"{folder} cannot be written to: {error.strerror}; the aliases are what they were"
        ) from error
    return path
