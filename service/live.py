"""What shadows have found of each loaded version: counted, added up over workers, and judged.

Figures come in here checked and are kept for as long as the version stays loaded. With several
workers each writes its own into a folder that all of them read: a report reaches one of them, and
every one tells what all of them were told. Nothing here knows rows or calls.
"""

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from google.protobuf import timestamp_pb2
from google.protobuf.message import DecodeError

from protos import bundle_pb2, parity_pb2
from service import agreement
from service.errors import InvalidRequestError, PreconditionError

log = logging.getLogger(__name__)
BUCKETS = 30  # that the window is counted in; one of them more is looked at
MIN_ROWS = 500  # below it a share or a distribution says little
SLACK = 1e-6  # relative, of sums in float64 against their bounds
FOLDER = "live"
SEPARATOR = "~"  # in no name
DEFAULT_WINDOW_S = 300.0
READER = -1  # number of a process that loads nothing
Clock: TypeAlias = Callable[[], float]
Key: TypeAlias = tuple[str, int]  # name and version


@dataclass(slots=True)
class Tally:
    """What one process knows of one version, or all of them together."""

    budget: bundle_pb2.Budget
    expected: bundle_pb2.TestDistribution  # empty where the manifest has none
    total: parity_pb2.ShadowFigures = field(default_factory=parity_pb2.ShadowFigures)
    # By the time of their report: whole widths of a bucket, on the monotonic clock of the host.
    buckets: dict[int, parity_pb2.ShadowFigures] = field(default_factory=dict)
    reported: str = ""
    sampled: int = 0  # rows handed to shadows
    dropped: int = 0

    def add(self, other: "Tally") -> None:
        """Add another process's; raises ValueError where it is of another model."""
        if other.total.rows:  # without any it has no classes either
            agreement.add(self.total, other.total)
        for place, figures in other.buckets.items():
            agreement.add(self.buckets.setdefault(place, parity_pb2.ShadowFigures()), figures)
        self.reported = max(self.reported, other.reported)
        self.sampled += other.sampled
        self.dropped += other.dropped

    def written(self) -> bytes:
        """Return it as a file keeps it."""
        content = {
            "budget": _text(self.budget),
            "expected": _text(self.expected),
            "total": _text(self.total),
            "buckets": {place: _text(figures) for place, figures in self.buckets.items()},
            "reported": self.reported,
            "sampled": self.sampled,
            "dropped": self.dropped,
        }
        return json.dumps(content).encode()

    @classmethod
    def read(cls, content: bytes) -> "Tally":
        """Read what `written` returned; raises ValueError, KeyError or DecodeError otherwise."""
        found = json.loads(content)
        figures = parity_pb2.ShadowFigures.FromString
        return cls(
            bundle_pb2.Budget.FromString(base64.b64decode(found["budget"])),
            bundle_pb2.TestDistribution.FromString(base64.b64decode(found["expected"])),
            figures(base64.b64decode(found["total"])),
            {
                int(place): figures(base64.b64decode(text))
                for place, text in found["buckets"].items()
            },
            found["reported"],
            found["sampled"],
            found["dropped"],
        )


class Live:
    """The live parity of one loaded version. Safe to use from several threads."""

    def __init__(self, key: Key, tally: Tally, store: "LiveStore", path: Path | None) -> None:
        """Store the parts; a `LiveStore` makes it.

        Args:
            key: which version.
            tally: empty.
            store: of all versions, and of the other workers'.
            path: of the file for other processes to read; None: there are none.
        """
        self._key, self._tally, self._store, self._path = key, tally, store, path
        self._lock = threading.Lock()
        self._failing = False
        self._keep()

    def count(self, *, sampled: int = 0, dropped: int = 0) -> None:
        """Count rows that were handed to a shadow, and rows that one was too slow for."""
        with self._lock:
            self._tally.sampled += sampled
            self._tally.dropped += dropped
            self._keep()

    def add(self, figures: parity_pb2.ShadowFigures) -> None:
        """Add what a shadow reports; logged where it changes the verdict.

        Args:
            figures: that `check` let pass.

        Raises:
            PreconditionError: they are of more rows than shadows were handed.
        """
        with self._lock:
            known = self._store.merged(self._key, self._tally)
            left = known.sampled - known.total.rows
            if figures.rows > left:
                raise PreconditionError(
                    f"{figures.rows} rows are reported of '{self._key[0]}' version {self._key[1]}, "
                    f"of which {left} were handed to shadows since it was loaded and not yet "
                    "reported; report each sampled row once"
                )
            place = self._store.place()
            buckets = self._tally.buckets
            for old in [one for one in buckets if one < place - BUCKETS]:
                del buckets[old]
            agreement.add(buckets.setdefault(place, parity_pb2.ShadowFigures()), figures)
            agreement.add(self._tally.total, figures)
            self._tally.reported = _now()
            self._keep()
            self._tell_change()

    def message(self) -> parity_pb2.LiveParity | None:
        """Return what all workers were told of this version; None before the first report."""
        with self._lock:
            known = self._store.merged(self._key, self._tally)
        return self._store.judged(known) if known.reported else None

    def counts(self) -> parity_pb2.LiveParity:
        """Return what this process knows, whether or not anything was reported."""
        with self._lock:
            return self._store.judged(self._store.merged(self._key, self._tally))

    def close(self) -> None:
        """Forget it: the version is no longer loaded, or anew."""
        with self._lock:
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._path = None

    def _keep(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        part = self._path.with_name(f".{self._path.name}")
        part.write_bytes(self._tally.written())
        part.replace(self._path)

    def _tell_change(self) -> None:
        """Log once that the verdict is bad, and once that it is good again."""
        found = self._store.judged(self._store.merged(self._key, self._tally))
        failed = found.verdict == parity_pb2.LIVE_VERDICT_FAILED
        if failed == self._failing:
            return
        self._failing = failed
        fields = {"model": self._key[0], "version": self._key[1]}
        rows, window_s = found.window.rows, found.window_s
        if failed:
            log.warning(
                "live parity is broken: %s %d, %s; of %d rows in the last %g s",
                *(*self._key, found.failure, rows, window_s),
                extra=fields,
            )
        else:
            log.info(
                "live parity holds again: %s %d, max |Δlogit| %.2g of %.2g allowed; "
                "of %d rows in the last %g s",
                *(*self._key, found.window.max_logit, found.budget.max_logit, rows, window_s),
                extra=fields,
            )


class LiveStore:
    """The live parity of every version: in memory, or in files shared by several workers."""

    def __init__(
        self,
        folder: Path | None = None,
        worker: int = 0,
        *,
        window_s: float = DEFAULT_WINDOW_S,
        clock: Clock = time.monotonic,
    ) -> None:
        """Store where the figures are; opens nothing.

        Args:
            folder: shared by all workers; None: in this process's memory.
            worker: number of this one, which forgets what one before it was told in its place;
                `READER`: none.
            window_s: seconds that a verdict looks back, give or take a thirtieth.
            clock: in seconds, the same in all processes of the host.
        """
        self._folder = None if folder is None else folder / FOLDER
        self._worker, self._window_s, self._clock = worker, window_s, clock
        self._lock = threading.Lock()
        self._open: dict[Key, Live] = {}
        self._took_over = False

    def open(
        self, key: Key, budget: bundle_pb2.Budget, expected: bundle_pb2.TestDistribution
    ) -> Live:
        """Begin to count a version that was loaded, from nothing.

        Args:
            key: name and version.
            budget: of its served variant.
            expected: what its manifest says of the test set.
        """
        with self._lock:
            self._take_over()
            before = self._open.pop(key, None)
            if before is not None:
                before.close()
            live = self._open[key] = Live(key, Tally(budget, expected), self, self._path(key))
        return live

    def drop(self, key: Key) -> None:
        """Forget a version that is no longer loaded."""
        with self._lock:
            live = self._open.pop(key, None)
        if live is not None:
            live.close()

    def all(self) -> list[tuple[Key, parity_pb2.LiveParity]]:
        """Return the live parity of every version that any worker has loaded, by its key."""
        with self._lock:
            own = dict(self._open)
        found = {key: live.counts() for key, live in own.items()}
        for key in {key for key, _ in self._files()} - own.keys():
            tallies = list(self._others(key))
            if tallies:
                found[key] = self.judged(_sum(tallies))
        return sorted(found.items())

    def place(self) -> int:
        """Return the bucket of this moment."""
        return math.floor(self._clock() * BUCKETS / self._window_s)

    def merged(self, key: Key, own: Tally) -> Tally:
        """Return what all workers know of a version, of which one is given."""
        return _sum([own, *self._others(key)])

    def judged(self, known: Tally) -> parity_pb2.LiveParity:
        """Return what is known as it is told, with the verdict of the window."""
        window = parity_pb2.ShadowFigures()
        oldest = self.place() - BUCKETS
        for place, figures in known.buckets.items():
            if place >= oldest:
                agreement.add(window, figures)
        failure = _failure(window, known.budget) if window.rows else ""
        verdict = parity_pb2.LIVE_VERDICT_FAILED if failure else parity_pb2.LIVE_VERDICT_PASSED
        message = parity_pb2.LiveParity(
            total=known.total,
            window=window,
            window_s=self._window_s,
            verdict=verdict if window.rows else parity_pb2.LIVE_VERDICT_UNSPECIFIED,
            failure=failure,
            budget=known.budget,
            reported=known.reported,
            sampled=known.sampled,
            dropped=known.dropped,
        )
        if window.rows >= MIN_ROWS:
            index, expected = agreement.stability_index, known.expected
            with suppress(ValueError):  # the manifest says nothing of it, or of other classes
                message.predicted_psi = index(expected.predicted, window.predicted)
            with suppress(ValueError):
                message.pixel_mean_psi = index(expected.pixel_mean, window.pixel_mean)
        return message

    def _others(self, key: Key) -> Iterable[Tally]:
        for other, path in self._files():
            if other == key and path != self._path(key):
                # Dropped since, or left by a process that was killed.
                with suppress(OSError, ValueError, KeyError, DecodeError):
                    yield Tally.read(path.read_bytes())

    def _files(self) -> list[tuple[Key, Path]]:
        """Return every worker's file of every version: NAME~VERSION.WORKER."""
        found = []
        for path in [] if self._folder is None else sorted(self._folder.glob(f"[!.]*{SEPARATOR}*")):
            name, _, rest = path.name.rpartition(SEPARATOR)
            number, _, worker = rest.partition(".")
            if number.isdecimal() and worker.isdecimal():
                found.append(((name, int(number)), path))
        return found

    def _path(self, key: Key) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{key[0]}{SEPARATOR}{key[1]}.{self._worker}"

    def _take_over(self) -> None:
        """Remove what another process has left that was this worker."""
        if self._took_over or self._folder is None:
            return
        self._took_over = True
        self._folder.mkdir(exist_ok=True)
        for _, path in self._files():
            if path.name.endswith(f".{self._worker}"):
                path.unlink(missing_ok=True)


def check(figures: parity_pb2.ShadowFigures, manifest: bundle_pb2.BundleManifest) -> None:
    """Refuse figures that contradict themselves, or are not of a model like this.

    Raises:
        InvalidRequestError: they do.
    """
    rows = figures.rows
    generic = manifest.kind == bundle_pb2.KIND_GENERIC
    spec = manifest.input
    images = spec.datatype == "UINT8" and len(spec.shape) > 2  # noqa: PLR2004  as pixel_histogram
    if not rows:
        raise InvalidRequestError("the report has no rows, expected at least one")
    if figures.agreed + figures.flips_explained + figures.flips_unexplained != rows:
        raise InvalidRequestError(
            f"{figures.agreed} rows agreed and {figures.flips_explained} + "
            f"{figures.flips_unexplained} flipped, expected {rows} together"
        )
    if generic and figures.agreed != rows:
        raise InvalidRequestError("rows flipped their class, of a model that has no classes")
    _check_counts("predicted", figures.predicted, 0 if generic else len(manifest.labels), rows)
    bins = agreement.PIXEL_BINS if images else 0
    _check_counts("pixel_mean", figures.pixel_mean, bins, rows)
    _check_numbers(figures)


def _check_counts(name: str, counts: Iterable[int], expected: int, rows: int) -> None:
    found = list(counts)
    if len(found) != expected or (expected and sum(found) != rows):
        raise InvalidRequestError(
            f"{name} has {len(found)} counts that add up to {sum(found)}, "
            f"expected {expected} that add up to {rows if expected else 0}"
        )


def _check_numbers(figures: parity_pb2.ShadowFigures) -> None:
    """Refuse what is no sum of so many rows; where a logit is infinite, sums need not be finite."""
    largest, rows = figures.max_logit, figures.rows
    if not largest >= 0:
        raise InvalidRequestError(f"max_logit is {largest}, expected 0 or more, or infinity")
    if not math.isfinite(largest):
        return
    for name, value, bound in (
        ("sum_logit", figures.sum_logit, largest * rows),
        ("sum_confidence", figures.sum_confidence, float(rows)),
    ):
        if not 0 <= value <= bound * (1 + SLACK):
            raise InvalidRequestError(f"{name} is {value}, expected 0 to {bound:g}")


def cleaned(figures: parity_pb2.ShadowFigures) -> parity_pb2.ShadowFigures:
    """Return figures whose sums can be added to others, where a logit was not finite.

    The sum of the differences is infinite then; a confidence that is none counts as 0.
    """
    clean = parity_pb2.ShadowFigures()
    clean.CopyFrom(figures)
    if not math.isfinite(figures.max_logit):
        clean.sum_logit = math.inf
        clean.sum_confidence = min(max(0.0, clean.sum_confidence), float(clean.rows))
        if math.isnan(figures.sum_confidence):
            clean.sum_confidence = 0.0
    return clean


def _failure(window: parity_pb2.ShadowFigures, budget: bundle_pb2.Budget) -> str:
    """Return why a window does not pass, or nothing. Written so that NaN never passes."""
    limit = f"the {budget.precision} budget of {budget.max_logit:.3g}"
    is_int8 = budget.precision == "int8"
    if not math.isfinite(window.max_logit):
        return "a logit is not finite"
    if window.flips_unexplained:
        return (
            f"{window.flips_unexplained} rows change their top-1 class although the reference's "
            f"margin is wider than twice {limit}, allowed is none"
        )
    # int8 is allowed a thousandth of rows beyond its budget, which a maximum cannot tell.
    if not is_int8 and not window.max_logit <= budget.max_logit:
        return f"max |Δlogit| is {window.max_logit:.3g}, over {limit}"
    share = window.agreed / window.rows
    if is_int8 and window.rows >= MIN_ROWS and not share >= agreement.INT8_MIN_AGREEMENT:
        return f"top-1 agreement is {share:.4f}, expected {agreement.INT8_MIN_AGREEMENT}"
    return ""


def _sum(tallies: list[Tally]) -> Tally:
    """Return what several processes know together; the first says what model it is."""
    total = Tally(tallies[0].budget, tallies[0].expected)
    for tally in tallies:
        with suppress(ValueError):  # a worker that has loaded other files under this number
            total.add(tally)
    return total


def _text(
    message: bundle_pb2.Budget | bundle_pb2.TestDistribution | parity_pb2.ShadowFigures,
) -> str:
    return base64.b64encode(message.SerializeToString()).decode()


def _now() -> str:
    moment = timestamp_pb2.Timestamp()
    moment.FromDatetime(datetime.now(UTC).replace(microsecond=0))
    return moment.ToJsonString()
