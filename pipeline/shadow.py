"""Hold what a server answers its clients against the original, while it does.

A process beside one server, or beside all that a name stands for: it has the original SavedModel
on TensorFlow answer the rows that a server samples, counts what both have in common, and reports it
back to that server. No server ever waits for it, and all serve on when it dies. The verdict is the
server's, of all that shadows have reported.
"""

import json
import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipeline import device
from pipeline.errors import ShadowError
from pipeline.replicas import AGAIN, ANSWER_S, REFUSED_S, Found, Replica, Replicas
from protos import bundle_pb2, parity_pb2
from service import agreement, bundle
from service.client import Client, SampledRows
from service.errors import BundleError, ServerError

log = logging.getLogger(__name__)
SAVED_MODEL = "variants/saved_model"
GRAPH = "saved_model.pb"
SIGNATURE = "serving_default"
METADATA = "assets.extra/metadata.json"
UNUSED_S = 600.0  # after which an original is let go
MAX_WAITING = 16  # blocks of at most 256 rows; beyond, the server drops and counts
REPORT_S = 1.0
SAY_S = 10.0
LOOK_S = 0.2  # longest wait before a signal is noticed
STOP_S = 5.0  # for what is read to be rescored
STALE = frozenset({"NOT_FOUND", "FAILED_PRECONDITION"})  # the version was unloaded, or loaded anew
Key = tuple[str, str, str]  # model, version, digest of its parent
Answer = Callable[[NDArray[np.generic]], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Original:
    """The model that a version was exported from, and what its answers are held to."""

    answer: Answer  # rows of the input to rows of the output that parity is measured on
    allowed: agreement.Budget
    classes: bool  # whether the outputs are logits


@dataclass(slots=True)
class _Loaded:
    original: Original
    used_s: float


class Originals:
    """Originals by version, loaded when they are first needed and let go when unused."""

    def __init__(
        self,
        *,
        models: Path | None = None,
        saved_model: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store where they are: one of the two must be given.

        Args:
            models: the folder of bundles, each with its original.
            saved_model: the only original there is, whatever is in `models`. It is known by the
                digest of the .keras file that its exporter wrote into it; there is no manifest to
                verify its files against.
            clock: in seconds.
        """
        self._models, self._saved_model, self._clock = models, saved_model, clock
        self._loaded: dict[Key, _Loaded] = {}

    def of(self, rows: SampledRows, client: Client) -> Original:
        """Return the original of a version; not for several threads at a time.

        Args:
            rows: of the version.
            client: of the server that sent them, which knows the budget. Servers that have the
                same version share its original.

        Raises:
            ShadowError: it is not there, or not the one this version was exported from.
            ServerError: the server does not say what it may differ by.
        """
        now_s = self._clock()
        key = rows.model, rows.version, rows.parent_sha256
        if key not in self._loaded:
            self._loaded[key] = _Loaded(self._load(rows, client), now_s)
        self._loaded[key].used_s = now_s
        for other in [one for one, it in self._loaded.items() if it.used_s < now_s - UNUSED_S]:
            log.info("letting the original of %s %s go, unused", *other[:2])
            del self._loaded[other]
        return self._loaded[key].original

    def _load(self, rows: SampledRows, client: Client) -> Original:
        if self._saved_model is None:
            path = self._bundled(rows)
        else:
            path = self._saved_model
            _check_parent(path, rows)
        check = client.parity(rows.model, rows.version).versions[0].self_check.report
        about = client.metadata(rows.model, rows.version)
        if check.budget.precision not in agreement.COEFFICIENT:
            raise ShadowError(
                f"the server does not say how far {rows.model} {rows.version} may be from its "
                f"original: its budget is of {check.budget.precision!r}, expected one of "
                f"{sorted(agreement.COEFFICIENT)}"
            )
        log.info("loading the original of %s %s from %s", rows.model, rows.version, path)
        return Original(
            _load(path, about.properties["parity.output"]),
            agreement.Budget(check.budget.precision, check.budget.scale),
            classes=bool(check.classes),
        )

    def _bundled(self, rows: SampledRows) -> Path:
        """Return the original in a bundle whose every file is what its manifest promises."""
        assert self._models is not None  # noqa: S101  one of the two is
        path = self._models / rows.model / rows.version
        try:
            manifest = bundle.read(path).manifest
        except BundleError as error:
            raise ShadowError(f"{path} has no original to rely on: {error}") from error
        if manifest.provenance.parent_sha256 != rows.parent_sha256:
            raise ShadowError(
                f"{path} comes from the original {manifest.provenance.parent_sha256[:12]}, "
                f"the server's {rows.model} {rows.version} from {rows.parent_sha256[:12]}; "
                "give the folder that this server serves with --models"
            )
        _check_listed(path, manifest)
        return path / SAVED_MODEL


@dataclass(slots=True)
class _Version:
    """What is known of one version of one server that rows have come of."""

    unreported: parity_pb2.ShadowFigures = field(default_factory=parity_pb2.ShadowFigures)
    dropped: int = 0
    unjudged: int = 0  # rows that were added since the server has last judged them
    failure: str = ""  # why the server says that it fails
    line: str = ""  # the last that was to be said
    said_s: float = -np.inf


class Shadow:
    """Reads, rescores and reports until it is stopped. All rows are answered by one thread."""

    def __init__(
        self,
        servers: Client | Replicas,
        originals: Originals,
        *,
        model: str = "",
        rows: int | None = None,
        show: Callable[[str], None] | None = None,
        heartbeat: Path | None = None,
    ) -> None:
        """Store the parts; `run` does it.

        Args:
            servers: the one there is, or those that a name stands for.
            originals: of their versions.
            model: whose rows; empty: of all models.
            rows: how many, of all servers together; None: no end.
            show: given a line at every report; None: one is logged now and then.
            heartbeat: a file whose time is set every `REPORT_S` or so while this goes on.
        """
        self._originals, self._model, self._show = originals, model, show
        self._servers, self._heartbeat = servers, heartbeat
        self._left = rows
        self._stop_by_s: float | None = None
        self._waiting: queue.Queue[Found] = queue.Queue(MAX_WAITING)
        self._versions: dict[Replica, dict[Key, _Version]] = {}  # of every server that there is
        self._shut: set[Replica] = set()  # that let nobody read rows
        self._refused: dict[tuple[Replica, Key], float] = {}  # not shadowed, and until when
        self._failures: list[str] = []  # of servers that went

    def run(self) -> str:
        """Shadow the servers until `stop`, or until the rows have come.

        What goes wrong with one of several servers is logged, and the others are shadowed on.

        Returns:
            Why live parity does not hold, for the first version where it does not; empty otherwise.

        Raises:
            ServerError: the one server lets nobody read rows, or not us; with `rows`, none of
                several does.
            ShadowError: only some rows were asked for, and they did not come, their original cannot
                be had, or a server does not say what it makes of them.
            OSError: the heartbeat's file cannot be written.
        """
        if isinstance(self._servers, Replicas):
            self._servers.watch()
        else:
            self._begin(Replica(self._servers))
        due_s = 0.0
        try:
            while not self._finished():
                self._next(min(LOOK_S, max(0.0, due_s - time.monotonic())))
                if time.monotonic() >= due_s:
                    self._tick()
                    due_s = time.monotonic() + REPORT_S
        finally:
            self._end()
        self._report()
        for replica, key, version in self._all():
            said = version.line or f"{replica.prefix}{key[0]} {key[1]}: nothing was judged"
            log.info("in the end, %s", said)
        if self._left is not None:
            self._check_judged(self._left)
        failures = [f"{one.prefix}{it.failure}" for one, _, it in self._all() if it.failure]
        return next(iter(self._failures + failures), "")

    def stop(self) -> None:
        """End soon, with what was read reported; from any thread or signal handler."""
        self._stop_by_s = time.monotonic() + STOP_S  # no lock: a handler may interrupt its holder

    def _finished(self) -> bool:
        if self._left == 0:
            return True
        if self._stop_by_s is None:
            return False
        self._end()
        return self._waiting.empty() or time.monotonic() > self._stop_by_s

    def _end(self) -> None:
        """Read nothing more."""
        for replica in self._versions:
            replica.end()

    def _tick(self) -> None:
        """Do what is to be done once in a while."""
        if self._heartbeat is not None:
            self._heartbeat.touch()
        if isinstance(self._servers, Replicas) and self._stop_by_s is None:
            new, gone = self._servers.follow()
            for replica in gone:
                self._forget(replica)
            for replica in new:
                self._begin(replica)
        self._report()

    def _begin(self, replica: Replica) -> None:
        if replica.address:
            log.info("%s is there, and shadowed", replica.address)
        self._versions[replica] = {}
        replica.read(self._model, self._waiting)

    def _forget(self, replica: Replica) -> None:
        """Count without a server that is gone; rows that it has not judged must come anew."""
        log.info("%s is gone", replica.address)
        self._shut.discard(replica)
        for version in self._versions.pop(replica).values():
            self._take_back(version)
            if version.failure:
                self._failures.append(f"{replica.prefix}{version.failure}")

    def _take_back(self, version: _Version) -> None:
        if self._left is not None:
            self._left += version.unjudged

    def _all(self) -> list[tuple[Replica, Key, _Version]]:
        return [
            (replica, key, version)
            for replica, versions in self._versions.items()
            for key, version in versions.items()
        ]

    def _next(self, longest_s: float) -> None:
        """Rescore what was read, or wait for it."""
        try:
            replica, found = self._waiting.get(timeout=longest_s)
        except queue.Empty:
            return
        if replica not in self._versions:
            return  # it went, and nobody could be told
        if isinstance(found, SampledRows):
            self._shut.discard(replica)
            self._rescore(replica, found)
        else:
            self._shut_out(replica, found)

    def _shut_out(self, replica: Replica, error: ServerError) -> None:
        """Say that a server lets nobody read rows, or raise it where there is no other."""
        self._report()
        if error.code == "UNIMPLEMENTED":
            error = ServerError(
                f"the server cannot let rows be read ({error}); it is not serve-export, or an "
                "older one",
                code=error.code,
            )
        self._shut.add(replica)
        needed = self._left is not None or not isinstance(self._servers, Replicas)
        if needed and self._shut == set(self._versions):
            raise error
        log.error("%s is not shadowed: %s", replica.address, error)

    def _rescore(self, replica: Replica, rows: SampledRows) -> None:
        key = rows.model, rows.version, rows.parent_sha256
        if time.monotonic() < self._refused.get((replica, key), 0.0):
            return
        inputs, outputs = rows.inputs[: self._left], rows.outputs[: self._left]
        try:
            figures = _figures(self._originals.of(rows, replica.client), inputs, outputs)
            judged = figures.rows
        except (ShadowError, ServerError) as error:
            # The server may have left meanwhile, or the version: neither is worth a word.
            if not isinstance(error, ServerError) or error.code not in AGAIN | STALE:
                self._refuse(replica, key, error)
            return
        if self._left is not None:
            self._left -= len(inputs)
        version = self._versions[replica].setdefault(key, _Version())
        version.dropped = rows.dropped
        version.unjudged += judged
        if judged:
            agreement.add(version.unreported, figures)

    def _refuse(self, replica: Replica, key: Key, error: ShadowError | ServerError) -> None:
        """Say that a version is not shadowed for a while; raise it to who waits for rows.

        What one of several servers says is no reason to end.
        """
        alone = not isinstance(self._servers, Replicas)
        if self._left is not None and (alone or isinstance(error, ShadowError)):
            raise error
        now_s = time.monotonic()
        self._refused = {other: s for other, s in self._refused.items() if s > now_s}
        self._refused[replica, key] = now_s + REFUSED_S
        log.error("%s%s %s is not shadowed: %s", replica.prefix, *key[:2], error)

    def _report(self) -> None:
        """Report what was counted since the last time, and say what the servers make of it."""
        for replica, key, version in self._all():
            if not version.unreported.rows:
                continue
            try:
                live = self._told(replica.client, key, version)
            except ServerError as error:
                if error.code in STALE:
                    del self._versions[replica][key]  # what was counted is of one that is no more
                elif error.code not in AGAIN:
                    self._give_up(replica, key, error)
                continue
            self._say(replica, key, version, live)

    def _give_up(self, replica: Replica, key: Key, error: ServerError) -> None:
        """Let a version be for a while whose figures one of several servers does not take."""
        if not isinstance(self._servers, Replicas):
            raise error
        self._take_back(self._versions[replica].pop(key))
        self._refuse(replica, key, error)

    def _told(self, client: Client, key: Key, version: _Version) -> parity_pb2.LiveParity:
        """Report a version's figures, and return what the server then says of it."""
        model, number, parent = key
        try:
            client.report(
                version.unreported,
                model=model,
                version=number,
                parent_sha256=parent,
                timeout_s=ANSWER_S,
            )
        except ServerError as error:
            if error.code == "DEADLINE_EXCEEDED":  # it may have arrived: no row counts twice
                version.unreported.Clear()
            raise
        version.unreported.Clear()
        return client.parity(model, number, timeout_s=ANSWER_S).versions[0].live

    def _say(
        self, replica: Replica, key: Key, version: _Version, live: parity_pb2.LiveParity
    ) -> None:
        name = f"{replica.prefix}{key[0]} {key[1]}"
        line = f"{name}: {described(live)}, {version.dropped:,} rows dropped"
        now_s = time.monotonic()
        if live.failure and not version.failure:
            log.warning("live parity is broken: %s", line)
            version.said_s = now_s
        elif version.failure and not live.failure:
            log.info("live parity holds again: %s", line)
            version.said_s = now_s
        if self._show is not None:
            self._show(line)
        elif now_s >= version.said_s + SAY_S:
            log.info("%s", line)
            version.said_s = now_s
        version.unjudged, version.failure, version.line = 0, live.failure, line

    def _check_judged(self, left: int) -> None:
        """Refuse to give a verdict that nobody has given."""
        if left:
            raise ShadowError(f"stopped, {left:,} rows before as many had come as were asked for")
        found = self._all()
        if not found or any(version.unjudged for _, _, version in found):
            raise ShadowError(
                "the rows have come, but the server went away, or loaded another version, before "
                "it could judge them; start the shadow again"
            )


def described(live: parity_pb2.LiveParity) -> str:
    """Return what live figures say, on one line."""
    window = live.window
    if not window.rows:
        return "no rows"
    verdict = f"FAILED, {live.failure}" if live.failure else "passed"
    return (
        f"{window.rows:,} rows in {live.window_s:g} s, {window.agreed / window.rows:.2%} agree, "
        f"max |Δ| {window.max_logit:.2g} of {live.budget.max_logit:.2g} allowed: {verdict}"
    )


def _figures(
    original: Original, inputs: NDArray[np.generic], outputs: NDArray[np.floating]
) -> parity_pb2.ShadowFigures:
    """Have rows answered by the original, and count what both answers have in common.

    Of floats a client may send any: rows that the original has no finite answer to say nothing of
    parity and are left out, and answers larger than the test set's are held to their own size.

    Raises:
        ShadowError: the original does not take such rows, or gives others.
    """
    try:
        reference = original.answer(inputs)
        if np.issubdtype(inputs.dtype, np.floating) and reference.shape == outputs.shape:
            usual = np.isfinite(reference).reshape(len(reference), -1).all(axis=1)
            inputs, outputs, reference = inputs[usual], outputs[usual], reference[usual]
            if not len(inputs):
                return parity_pb2.ShadowFigures()
            sizes = np.abs(reference.reshape(len(reference), -1).astype(np.float64)).max(axis=1)
            shares = np.maximum(1.0, sizes / original.allowed.scale)
            shares = shares.reshape(-1, *[1] * (reference.ndim - 1))
            reference, outputs = reference / shares, outputs / shares
        return agreement.figures(
            reference,
            outputs,
            inputs,
            allowed=original.allowed,
            classes=original.classes,
        )
    except (ValueError, TypeError, tf.errors.OpError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ShadowError(f"its original cannot answer rows of {inputs.shape}: {reason}") from error


def _check_listed(path: Path, manifest: bundle_pb2.BundleManifest) -> None:
    """Refuse a bundle without an original, or with a file in it that no digest speaks for."""
    listed = {file.path for file in manifest.files}
    if f"{SAVED_MODEL}/{GRAPH}" not in listed:
        raise ShadowError(f"{path} has no {SAVED_MODEL}; give the original with --original")
    found = (one.relative_to(path).as_posix() for one in (path / SAVED_MODEL).rglob("*"))
    for name in sorted(found):
        if name not in listed and not (path / name).is_dir():
            raise ShadowError(
                f"{path} has {name}, which its manifest does not list; remove it, or publish again"
            )


def _check_parent(path: Path, rows: SampledRows) -> None:
    """Refuse a SavedModel that does not say it was exported from the version's parent."""
    try:
        parent = json.loads((path / METADATA).read_bytes())["parent.sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShadowError(
            f"{path} does not say which model it is: {METADATA} is missing or unreadable; give "
            "the folder variants/saved_model of a bundle with --original"
        ) from error
    if parent != rows.parent_sha256:
        raise ShadowError(
            f"{path} comes from the original {str(parent)[:12]}, the server's {rows.model} "
            f"{rows.version} from {rows.parent_sha256[:12]}"
        )


def _load(path: Path, output: str) -> Answer:
    """Load a SavedModel, and return how its output is asked for.

    Raises:
        ShadowError: it cannot be loaded, or has no such output.
    """
    device.prepare()
    try:
        loaded = tf.saved_model.load(str(path))
        serve = loaded.signatures[SIGNATURE]
        (name,) = serve.structured_input_signature[1]
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise ShadowError(
            f"{path} cannot be loaded as a SavedModel with one input and the signature "
            f"{SIGNATURE}: {error}"
        ) from error
    if output not in serve.structured_outputs:
        raise ShadowError(
            f"{path} has the outputs {sorted(serve.structured_outputs)}, parity is measured on "
            f"{output!r}"
        )

    def answer(inputs: NDArray[np.generic]) -> NDArray[np.floating]:
        serve = loaded.signatures[SIGNATURE]  # `loaded` owns the variables: keep it alive
        found: NDArray[np.floating] = serve(**{name: tf.constant(inputs)})[output].numpy()
        return found

    return answer
