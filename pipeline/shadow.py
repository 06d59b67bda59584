"""Hold what a server answers its clients against the original, while it does.

A process beside the server: it reads the rows that the server samples, has the original SavedModel
on TensorFlow answer them too, counts what both have in common, and reports it back. The server
never waits for it, and serves on when it dies. The verdict is the server's, of all that shadows
have reported.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipeline import device
from pipeline.errors import ShadowError
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
REFUSED_S = 60.0  # before an original that could not be had is looked for again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # before a server that was lost is asked again
STOP_S = 5.0  # for what is read to be rescored
ANSWER_S = 5.0  # longest wait for an answer to a report
# What passes by itself: the server restarts, or was never there, or others shadow it.
AGAIN = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"})
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
        client: Client,
        *,
        models: Path | None = None,
        saved_model: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store where they are: one of the two must be given.

        Args:
            client: of the server that knows the budgets.
            models: the folder of bundles, each with its original.
            saved_model: the only original there is, whatever is in `models`. It is known by the
                digest of the .keras file that its exporter wrote into it; there is no manifest to
                verify its files against.
            clock: in seconds.
        """
        self._client, self._models, self._saved_model = client, models, saved_model
        self._clock = clock
        self._loaded: dict[Key, _Loaded] = {}

    def of(self, rows: SampledRows) -> Original:
        """Return the original of a version.

        Raises:
            ShadowError: it is not there, or not the one this version was exported from.
            ServerError: the server does not say what it may differ by.
        """
        now_s = self._clock()
        key = rows.model, rows.version, rows.parent_sha256
        if key not in self._loaded:
            self._loaded[key] = _Loaded(self._load(rows), now_s)
        self._loaded[key].used_s = now_s
        for other in [one for one, it in self._loaded.items() if it.used_s < now_s - UNUSED_S]:
            log.info("letting the original of %s %s go, unused", *other[:2])
            del self._loaded[other]
        return self._loaded[key].original

    def _load(self, rows: SampledRows) -> Original:
        if self._saved_model is None:
            path = self._bundled(rows)
        else:
            path = self._saved_model
            _check_parent(path, rows)
        check = self._client.parity(rows.model, rows.version).versions[0].self_check.report
        about = self._client.metadata(rows.model, rows.version)
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
    """What is known of one version that rows have come of."""

    unreported: parity_pb2.ShadowFigures = field(default_factory=parity_pb2.ShadowFigures)
    dropped: int = 0
    judged: bool = False  # whether the server has, since rows were last added
    failure: str = ""  # why the server says that it fails
    line: str = ""  # the last that was to be said
    said_s: float = -np.inf


class Shadow:
    """Reads, rescores and reports until it is stopped."""

    def __init__(
        self,
        client: Client,
        originals: Originals,
        *,
        model: str = "",
        rows: int | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Store the parts; `run` does it.

        Args:
            client: of the server.
            originals: of its versions.
            model: whose rows; empty: of all models.
            rows: how many; None: no end.
            show: given a line at every report; None: one is logged now and then.
        """
        self._client, self._originals, self._model, self._show = client, originals, model, show
        self._left = rows
        self._stop_by_s: float | None = None
        self._over = threading.Event()  # nothing is read any more
        self._waiting: queue.Queue[SampledRows | ServerError] = queue.Queue(MAX_WAITING)
        self._versions: dict[Key, _Version] = {}
        self._refused: dict[Key, float] = {}  # whose originals cannot be had, and until when

    def run(self) -> str:
        """Shadow the server until `stop`, or until the rows have come.

        Returns:
            Why live parity does not hold, for the first version where it does not; empty otherwise.

        Raises:
            ServerError: the server lets nobody read rows, or not us.
            ShadowError: only some rows were asked for, and they did not come, their original cannot
                be had, or the server does not say what it makes of them.
        """
        threading.Thread(target=self._read, name="sampled", daemon=True).start()
        due_s = time.monotonic() + REPORT_S
        try:
            while not self._finished():
                self._next(min(LOOK_S, max(0.0, due_s - time.monotonic())))
                if time.monotonic() >= due_s:
                    self._report()
                    due_s = time.monotonic() + REPORT_S
        finally:
            self._over.set()
        self._report()
        for version in self._versions.values():
            log.info("in the end, %s", version.line or "nothing was judged")
        if self._left is not None:
            self._check_judged(self._left)
        return next((one.failure for one in self._versions.values() if one.failure), "")

    def stop(self) -> None:
        """End soon, with what was read reported; from any thread or signal handler."""
        self._stop_by_s = time.monotonic() + STOP_S  # no lock: a handler may interrupt its holder

    def _finished(self) -> bool:
        if self._left == 0:
            return True
        if self._stop_by_s is None:
            return False
        self._over.set()
        return self._waiting.empty() or time.monotonic() > self._stop_by_s

    def _next(self, longest_s: float) -> None:
        """Rescore what was read, or wait for it."""
        try:
            found = self._waiting.get(timeout=longest_s)
        except queue.Empty:
            return
        if isinstance(found, SampledRows):
            self._rescore(found)
            return
        self._report()
        if found.code == "UNIMPLEMENTED":
            raise ServerError(
                f"the server cannot let rows be read ({found}); it is not serve-export, or an "
                "older one",
                code=found.code,
            ) from found
        raise found

    def _rescore(self, rows: SampledRows) -> None:
        key = rows.model, rows.version, rows.parent_sha256
        if time.monotonic() < self._refused.get(key, 0.0):
            return
        inputs, outputs = rows.inputs[: self._left], rows.outputs[: self._left]
        try:
            figures = _figures(self._originals.of(rows), inputs, outputs)
        except (ShadowError, ServerError) as error:
            # The server may have left meanwhile, or the version: neither is worth a word.
            if not isinstance(error, ServerError) or error.code not in AGAIN | STALE:
                self._refuse(key, error)
            return
        if self._left is not None:
            self._left -= len(inputs)
        version = self._versions.setdefault(key, _Version())
        version.dropped, version.judged = rows.dropped, False
        agreement.add(version.unreported, figures)

    def _refuse(self, key: Key, error: ShadowError | ServerError) -> None:
        """Say that a version is not shadowed for a while; raise it to who waits for rows."""
        if self._left is not None:
            raise error
        now_s = time.monotonic()
        self._refused = {other: s for other, s in self._refused.items() if s > now_s}
        self._refused[key] = now_s + REFUSED_S
        log.error("%s %s is not shadowed: %s", *key[:2], error)

    def _report(self) -> None:
        """Report what was counted since the last time, and say what the server makes of it."""
        for key, version in list(self._versions.items()):
            if not version.unreported.rows:
                continue
            try:
                live = self._told(key, version)
            except ServerError as error:
                if error.code in STALE:
                    del self._versions[key]  # what was counted is of a version that is no more
                elif error.code not in AGAIN:
                    raise
                continue
            self._say(key, version, live)

    def _told(self, key: Key, version: _Version) -> parity_pb2.LiveParity:
        """Report a version's figures, and return what the server then says of it."""
        model, number, parent = key
        try:
            self._client.report(
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
        return self._client.parity(model, number, timeout_s=ANSWER_S).versions[0].live

    def _say(self, key: Key, version: _Version, live: parity_pb2.LiveParity) -> None:
        line = f"{key[0]} {key[1]}: {described(live)}, {version.dropped:,} rows dropped"
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
        version.judged, version.failure, version.line = True, live.failure, line

    def _check_judged(self, left: int) -> None:
        """Refuse to give a verdict that nobody has given."""
        if left:
            raise ShadowError(f"stopped, {left:,} rows before as many had come as were asked for")
        if not self._versions or not all(one.judged for one in self._versions.values()):
            raise ShadowError(
                "the rows have come, but the server went away, or loaded another version, before "
                "it could judge them; start the shadow again"
            )

    def _read(self) -> None:
        """Put what the server samples into the queue; a refusal for good comes last."""
        pause_s, said = FIRST_PAUSE_S, ""
        while not self._over.is_set():
            try:
                with closing(self._client.sample(self._model)) as sampled:
                    for rows in sampled:
                        pause_s, said = FIRST_PAUSE_S, ""
                        if not self._put(rows):
                            return
                reason = "the server ended the stream"
            except ServerError as error:
                if error.code not in AGAIN:
                    self._put(error)
                    return
                reason = str(error)
            if reason != said and not self._over.is_set():
                log.warning("no rows: %s; trying again", reason)
                said = reason
            self._over.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _put(self, found: SampledRows | ServerError) -> bool:
        """Wait for room; false once nobody will read it."""
        while not self._over.is_set():
            try:
                self._waiting.put(found, timeout=LOOK_S)
            except queue.Full:
                continue
            return True
        return False


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

    Raises:
        ShadowError: the original does not take such rows, or gives others.
    """
    try:
        return agreement.figures(
            original.answer(inputs),
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
