"""Which versions of which models are served.

Finds bundles in a folder, and lets a version in only after its files matched the manifest, every
batch rung was run once, and the golden set was answered within budget on this host. What is
refused is kept with its reason.
"""

import logging
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from google.protobuf import timestamp_pb2
from numpy.typing import NDArray

from protos import bundle_pb2, parity_pb2
from service import agreement, bundle
from service.errors import (
    BundleError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
    ServiceError,
)
from service.session import RUNTIME, Session

log = logging.getLogger(__name__)
CPUINFO = Path("/proc/cpuinfo")
LOGITS = "logits"  # the output that parity is measured on


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder that looks like a version of a model; nothing in it was read yet."""

    name: str
    number: int
    path: Path


@dataclass(frozen=True, slots=True)
class Version:
    """A version that passed every check and answers requests."""

    manifest: bundle_pb2.BundleManifest
    session: Session
    self_check: parity_pb2.SelfCheck

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def number(self) -> int:
        """The version's number."""
        return self.manifest.version


class Repository:
    """The versions found under one folder, `NAME/VERSION/` each.

    `load` is called once, from one thread; everything else from any thread, at any time.
    """

    def __init__(self, root: Path, *, threads: int, max_batch_rows: int) -> None:
        self._root = root
        self._threads = threads
        self.max_batch_rows = max_batch_rows
        self._lock = threading.Lock()
        self._ready: dict[tuple[str, int], Version] = {}
        self._refused: dict[tuple[str, int], str] = {}
        self._loading: set[tuple[str, int]] = set()

    def load(self, until: Callable[[], bool] = lambda: False) -> None:
        """Load every version there is; one that is refused is logged and does not stop the rest.

        Args:
            until: asked before each version; true ends the loading there.

        Raises:
            RepositoryError: the folder is not there, or nothing in it can be served.
        """
        candidates = scan(self._root)
        if not candidates:
            raise RepositoryError(
                f"{self._root} holds no bundle (NAME/VERSION/{bundle.MANIFEST}); "
                "publish one with: train-export run"
            )
        with self._lock:
            self._loading = {(candidate.name, candidate.number) for candidate in candidates}
        for candidate in candidates:
            if until():
                return
            self._load_one(candidate)
        if not self._ready:
            reasons = "; ".join(self._refused.values())
            raise RepositoryError(f"nothing in {self._root} can be served: {reasons}")

    def get(self, name: str, version: str) -> Version:
        """Return a version that is ready.

        Args:
            name: of the model.
            version: decimal; empty: the highest that is ready.

        Raises:
            InvalidRequestError: the version is not a number.
            ModelNotFoundError: there is no such model or version.
            ModelNotReadyError: there is, but it is loading or was refused.
        """
        if version and not re.fullmatch(r"[0-9]{1,18}", version):
            raise InvalidRequestError(
                f"failed to get model version from specified version string '{version}'; "
                "expected a whole number"
            )
        with self._lock:
            numbers = sorted(number for model, number in self._known() if model == name)
            if not numbers:
                raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
            if version:
                return self._numbered(name, int(version), numbers)
            ready = [number for number in numbers if (name, number) in self._ready]
            if not ready:
                raise ModelNotReadyError(
                    f"Request for unknown model: '{name}' has no available versions"
                )
            return self._ready[name, ready[-1]]

    def versions(self) -> list[Version]:
        """Return every version that is ready, by name and number."""
        with self._lock:
            return [self._ready[key] for key in sorted(self._ready)]

    def refused(self) -> dict[tuple[str, int], str]:
        """Return why each refused version was refused, by name and number."""
        with self._lock:
            return dict(sorted(self._refused.items()))

    def loading(self) -> list[tuple[str, int]]:
        """Return the names and numbers that are still to be checked."""
        with self._lock:
            return sorted(self._loading)

    def is_ready(self) -> bool:
        """Tell whether loading is over and every model has a version that answers."""
        with self._lock:
            models = {name for name, _ in self._known()}
            answering = {name for name, _ in self._ready}
            return not self._loading and bool(models) and models == answering

    def _known(self) -> set[tuple[str, int]]:
        return self._ready.keys() | self._refused.keys() | self._loading

    def _numbered(self, name: str, number: int, numbers: list[int]) -> Version:
        if number not in numbers:
            raise ModelNotFoundError(
                f"Request for unknown model: '{name}' version {number} is not found"
            )
        if (name, number) not in self._ready:
            raise ModelNotReadyError(
                f"Request for unknown model: '{name}' version {number} is not at ready state"
            )
        return self._ready[name, number]

    def _load_one(self, candidate: Candidate) -> None:
        key = (candidate.name, candidate.number)
        fields = {"model": candidate.name, "version": candidate.number}
        try:
            version = load_version(
                candidate.path, threads=self._threads, max_batch_rows=self.max_batch_rows
            )
        except ServiceError as error:
            log.warning("version refused: %s", error, extra=fields)
            with self._lock:
                self._refused[key] = str(error)
        else:
            check = version.self_check
            log.info(
                "version ready: %s %d, self-check max |Δlogit| %.2g of %.2g allowed, %.0f ms",
                candidate.name,
                candidate.number,
                check.report.logits.max,
                check.report.budget.max_logit,
                check.seconds * 1000,
                extra=fields,
            )
            with self._lock:
                self._ready[key] = version
        finally:
            with self._lock:
                self._loading.discard(key)


def scan(root: Path) -> list[Candidate]:
    """Return the versions in a repository, by name and rising number.

    A folder whose name is hidden, not a name, not a number or zero-padded is passed over, and so
    is a link: a staged bundle is hidden until it is renamed into place. A model's folder that
    cannot be read is logged and passed over.

    Raises:
        RepositoryError: the repository is not there, or cannot be read.
    """
    try:
        models = [path for path in root.iterdir() if bundle.NAME.fullmatch(path.name)]
    except OSError as error:
        raise RepositoryError(
            f"repository {root} cannot be read: {error.strerror}; "
            "publish into it with: train-export run, or name another with --repository"
        ) from error
    found = [
        Candidate(model.name, int(path.name), path)
        for model in models
        for path in _folders(model)
        if bundle.VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda candidate: (candidate.name, candidate.number))


def _folders(model: Path) -> list[Path]:
    if model.is_symlink() or not model.is_dir():
        return []
    try:
        return list(model.iterdir())
    except OSError as error:
        log.warning("model passed over: %s cannot be read: %s", model, error.strerror)
        return []


def load_version(path: Path, *, threads: int, max_batch_rows: int) -> Version:
    """Read, verify, load, warm and check one bundle.

    Raises:
        ServiceError: one of these failed; the bundle must not be served.
    """
    started_s = time.monotonic()
    content = bundle.read(path)
    session = Session(content.model, content.manifest.session, threads=threads)
    _check_schema(content, session)
    session.warm_up(max_batch_rows)
    report = _answer_golden(content, session, max_batch_rows)
    if not report.passed:
        raise BundleError(
            f"{bundle.shown(path)} fails its self-check on this host: {report.failure}"
        )
    checked = timestamp_pb2.Timestamp()
    checked.FromDatetime(datetime.now(UTC).replace(microsecond=0))
    return Version(
        content.manifest,
        session,
        parity_pb2.SelfCheck(
            report=report,
            checked=checked.ToJsonString(),
            seconds=time.monotonic() - started_s,
            cpu=cpu_name(),
            threads=threads,
        ),
    )


def cpu_name() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _check_schema(content: bundle.Bundle, session: Session) -> None:
    """Refuse a model whose tensors are not those of its manifest."""
    manifest = content.manifest
    promised = [(spec.name, spec.datatype, tuple(spec.shape)) for spec in manifest.outputs]
    found = [(tensor.name, tensor.datatype, tensor.shape) for tensor in session.outputs]
    spec = manifest.input
    promised.append((spec.name, spec.datatype, tuple(spec.shape)))
    found += [(tensor.name, tensor.datatype, tensor.shape) for tensor in session.inputs]
    if sorted(promised) != sorted(found):
        raise BundleError(
            f"{bundle.shown(content.path, bundle.MODEL)} has the tensors {sorted(found)}, "
            f"its manifest promises {sorted(promised)}"
        )
    if LOGITS not in {output.name for output in manifest.outputs}:
        raise BundleError(f"{bundle.shown(content.path)} has no output {LOGITS!r} to be checked by")
    if not spec.shape or spec.shape[0] != -1 or min(spec.shape[1:], default=1) < 1:
        raise BundleError(
            f"{bundle.shown(content.path)} takes the shape {list(spec.shape)}, "
            "expected -1 for the batch, and every other size fixed"
        )


def _answer_golden(
    content: bundle.Bundle, session: Session, max_batch_rows: int
) -> bundle_pb2.ParityReport:
    """Hold the loaded model against the golden set, to the budget it was published with."""
    golden, manifest = content.golden, content.manifest
    published = next(
        (report for report in manifest.parity if report.variant == manifest.served_variant),
        None,
    )
    if published is None or published.budget.precision not in agreement.COEFFICIENT:
        raise BundleError(
            f"{bundle.shown(content.path)} has no parity report of its served variant "
            f"{manifest.served_variant!r}; publish it again"
        )
    allowed = agreement.Budget(published.budget.precision, published.budget.scale)
    try:
        report = agreement.compare(
            golden.logits,
            _logits(session, golden.images, max_batch_rows),
            golden.labels,
            allowed=allowed,
            class_names=list(manifest.labels),
        )
        hostile = _logits(session, golden.hostile_images, max_batch_rows)
        report.hostile.rows = len(hostile)
        report.hostile.max_logit = agreement.difference(golden.hostile_logits, hostile).max
    except ValueError as error:
        raise BundleError(
            f"{bundle.shown(content.path)} has an unusable golden set: {error}"
        ) from error
    agreement.judge(report)
    report.variant, report.runtime, report.path = "self-check", RUNTIME, bundle.MODEL
    report.size_bytes = len(content.model)
    return report


def _logits(
    session: Session, images: NDArray[np.uint8], max_batch_rows: int
) -> NDArray[np.float32]:
    if not images.ndim or not len(images):
        raise ValueError("it has no images")
    parts = [
        session.run(images[start : start + max_batch_rows])[LOGITS]
        for start in range(0, len(images), max_batch_rows)
    ]
    return np.concatenate(parts).astype(np.float32, copy=False)
