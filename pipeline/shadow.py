"""Hold what a server answers its clients against the original, while it does.

A process beside the server: it reads the rows that the server samples, has the original SavedModel
on TensorFlow answer them too, counts what both have in common, and reports it back. The server
never waits for it, and serves on when it dies.
"""

import json
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from pipeline import device
from pipeline.errors import ShadowError
from protos import parity_pb2
from service import agreement, bundle
from service.client import Client, SampledRows
from service.errors import BundleError, ServerError

log = logging.getLogger(__name__)
SAVED_MODEL = "variants/saved_model"
SIGNATURE = "serving_default"
METADATA = "assets.extra/metadata.json"
MAX_ORIGINALS = 4  # loaded at a time; a swap needs two
MAX_WAITING = 16  # blocks of at most 256 rows; beyond, the server drops and counts
REPORT_S = 1.0
SAY_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # before a server that was lost is asked again
STOP_S = 5.0  # for what is read to be rescored and reported
# What passes by itself: the server restarts, or was never there, or others shadow it.
AGAIN = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
STALE = frozenset({"NOT_FOUND", "FAILED_PRECONDITION"})  # the version was unloaded, or loaded anew
Key = tuple[str, str, str]  # model, version, digest of its parent
Answer = Callable[[NDArray[np.generic]], NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class Original:
    """The model that a version was exported from, and what its answers are held to."""

    answer: Answer  # rows of the input to rows of the output that parity is measured on
    allowed: agreement.Budget
    classes: bool  # whether the outputs are logits


class Originals:
    """Originals by version, loaded when they are first needed."""

    def __init__(
        self, client: Client, *, models: Path | None = None, saved_model: Path | None = None
    ) -> None:
        """Store where they are: one of the two must be given.

        Args:
            client: of the server that knows the budgets.
            models: the folder of bundles, each with its original.
            saved_model: the only original there is.
        """
        self._client, self._models, self._saved_model = client, models, saved_model
        self._loaded: OrderedDict[Key, Original] = OrderedDict()

    def of(self, rows: SampledRows) -> Original:
        """Return the original of a version.

        Raises:
            ShadowError: it is not there, or not the one this version was exported from.
            ServerError: the server does not say what it may differ by.
        """
        key = rows.model, rows.version, rows.parent_sha256
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key]
        path = self._saved_model or self._bundled(rows)
        if self._saved_model is not None:
            _check_parent(path, rows)
        check = self._client.parity(rows.model, rows.version).versions[0].self_check.report
        about = self._client.metadata(rows.model, rows.version)
        log.info("loading the original of %s %s from %s", rows.model, rows.version, path)
        original = Original(
            _load(path, about.properties["parity.output"]),
            agreement.Budget(check.budget.precision, check.budget.scale),
            classes=bool(check.classes),
        )
        self._loaded[key] = original
        if len(self._loaded) > MAX_ORIGINALS:
            self._loaded.popitem(last=False)
        return original

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
        if not any(file.path.startswith(f"{SAVED_MODEL}/") for file in manifest.files):
            raise ShadowError(f"{path} has no {SAVED_MODEL}; give the original with --original")
        return path / SAVED_MODEL


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
        self._over = threading.Event()
        self._waiting: queue.Queue[SampledRows | ServerError] = queue.Queue(MAX_WAITING)
        self._unreported: dict[Key, parity_pb2.ShadowFigures] = {}
        self._dropped: dict[Key, int] = {}
        self._refused: set[Key] = set()  # whose originals cannot be had
        self._verdicts: dict[tuple[str, str], str] = {}  # why a version failed; empty: it did not
        self._said_s = time.monotonic()

    def run(self) -> str:
        """Shadow the server until `stop`, or until the rows have come.

        Returns:
            Why live parity does not hold, for the first version where it does not; empty otherwise.

        Raises:
            ServerError: the server lets nobody read rows, or not us.
            ShadowError: only some rows were asked for, and their original cannot be had.
        """
        reader = threading.Thread(target=self._read, name="sampled", daemon=True)
        reader.start()
        due_s = time.monotonic() + REPORT_S
        try:
            while not self._finished():
                self._next(max(0.0, due_s - time.monotonic()))
                if time.monotonic() >= due_s:
                    self._report()
                    due_s = time.monotonic() + REPORT_S
        finally:
            self._over.set()
        self._report()
        return next((reason for reason in self._verdicts.values() if reason), "")

    def stop(self) -> None:
        """End soon, with what was read reported; from any thread or signal handler."""
        self._over.set()

    def _finished(self) -> bool:
        return self._left == 0 or (self._over.is_set() and self._waiting.empty())

    def _next(self, longest_s: float) -> None:
        """Rescore what was read, or wait for it."""
        try:
            found = self._waiting.get(timeout=0.0 if self._over.is_set() else longest_s)
        except queue.Empty:
            return
        if isinstance(found, ServerError):
            self._report()
            raise found
        self._rescore(found)

    def _rescore(self, rows: SampledRows) -> None:
        key = rows.model, rows.version, rows.parent_sha256
        if key in self._refused:
            return
        inputs, outputs = rows.inputs[: self._left], rows.outputs[: self._left]
        try:
            original = self._originals.of(rows)
            figures = agreement.figures(
                original.answer(inputs),
                outputs,
                inputs,
                allowed=original.allowed,
                classes=original.classes,
            )
        except (ShadowError, ServerError) as error:
            if isinstance(error, ServerError) and error.code in AGAIN | STALE:
                return  # the server left meanwhile, or the version did
            if self._left is not None:
                raise
            self._refused.add(key)
            log.error("%s %s is not shadowed: %s", rows.model, rows.version, error)  # noqa: TRY400
            return
        if self._left is not None:
            self._left -= len(inputs)
        self._dropped[key] = rows.dropped
        agreement.add(self._unreported.setdefault(key, parity_pb2.ShadowFigures()), figures)

    def _report(self) -> None:
        """Report what was counted since the last time, and say what the server makes of it."""
        for key in list(self._unreported):
            model, version, parent = key
            try:
                self._client.report(
                    self._unreported[key], model=model, version=version, parent_sha256=parent
                )
                del self._unreported[key]
                live = self._client.parity(model, version).versions[0].live
            except ServerError as error:
                if error.code in STALE:
                    self._unreported.pop(key, None)  # counted of a version that is no more
                elif error.code not in AGAIN:
                    raise
                continue
            self._say(key, live)

    def _say(self, key: Key, live: parity_pb2.LiveParity) -> None:
        model, version, _ = key
        line = f"{model} {version}: {described(live)}, {self._dropped.get(key, 0):,} rows dropped"
        before = self._verdicts.get((model, version), "")
        self._verdicts[model, version] = live.failure
        if live.failure and not before:
            log.warning("live parity is broken: %s", line)
        if self._show is not None:
            self._show(line)
        elif time.monotonic() >= self._said_s + SAY_S:
            self._said_s = time.monotonic()
            log.info("%s", line)

    def _read(self) -> None:
        """Put what the server samples into the queue; a refusal for good comes last."""
        pause_s = FIRST_PAUSE_S
        while not self._over.is_set():
            try:
                with closing(self._client.sample(self._model)) as sampled:
                    for rows in sampled:
                        pause_s = FIRST_PAUSE_S
                        if not self._put(rows):
                            return
                reason = "the server ended the stream"
            except ServerError as error:
                if error.code not in AGAIN:
                    self._put(error)
                    return
                reason = str(error)
            if not self._over.is_set():
                log.warning("%s; trying again in %g s", reason, pause_s)
            self._over.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _put(self, found: SampledRows | ServerError) -> bool:
        """Wait for room; false once nobody will read it."""
        while not self._over.is_set():
            try:
                self._waiting.put(found, timeout=0.2)
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
