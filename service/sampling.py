"""Which of the answered rows shadows are shown, and what is kept of them until they are read.

A batcher shows every batch to its version's sampler while somebody listens, and only then. A
sampler counts rows down to the next one that it copies; whoever listens has a ring of its own,
bounded in rows and bytes, in which the newest rows take the place of the oldest. Nothing here
waits for a reader.
"""

import math
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos import bundle_pb2
from service.batcher import Answers, Batcher
from service.bundle import checked_output
from service.errors import LimitError, PreconditionError
from service.live import Key, Live, LiveStore

MAX_RINGS = 4  # open at a time
MAX_RING_BYTES = 16 << 20
MAX_MISSES = 2.0**62  # more rows than a server answers
OFF = (
    "this server lets nobody read rows; start it with --sample-rate above 0 "
    "(SERVE_EXPORT_SAMPLE_RATE), such as 0.01"
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The version that rows are of, from its loading on."""

    model: str
    number: int
    parent_sha256: str
    live: Live


class Block(NamedTuple):
    """Some rows of one version: what it was asked, and what it answered."""

    source: Source
    inputs: NDArray[np.generic]  # (rows, ...)
    outputs: NDArray[np.float32]  # (rows, ...)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.inputs)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, input and output."""
        return max(1, (self.inputs.nbytes + self.outputs.nbytes) // len(self.inputs))

    def cut(self, start: int, end: int | None = None) -> "Block":
        """Return some of its rows, which share its memory."""
        return Block(self.source, self.inputs[start:end], self.outputs[start:end])


class Taken(NamedTuple):
    """Blocks of one version, of rows of one shape, and how many rows of it were dropped so far."""

    blocks: list[Block]
    dropped: int


class Ring:
    """What one shadow has not read yet. Safe to use from several threads."""

    def __init__(self, model: str, *, max_rows: int, max_bytes: int) -> None:
        """Make an empty one.

        Args:
            model: whose rows are kept; empty: of every model.
            max_rows: most rows kept.
            max_bytes: most bytes of their inputs and outputs.
        """
        self.model = model
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._lock = threading.Lock()
        self._blocks: deque[Block] = deque()
        self._rows = self._bytes = 0
        self._dropped: dict[Source, int] = {}  # since the ring was made
        self._counted: dict[Source, int] = {}  # of these, those that its live figures know of

    @property
    def size(self) -> tuple[int, int]:
        """Rows and bytes that are kept now."""
        with self._lock:
            return self._rows, self._bytes

    def put(self, block: Block) -> None:
        """Keep rows, instead of the oldest where there is no room."""
        with self._lock:
            self._blocks.append(block)
            self._count(block, 1)
            while self._rows > self._max_rows or self._bytes > self._max_bytes:
                self._drop(self._blocks.popleft())

    def take(self, max_rows: int, max_bytes: int) -> Taken | None:
        """Take the oldest rows that go together; None if there are none.

        Args:
            max_rows: most rows.
            max_bytes: most bytes, unless one row alone has more.
        """
        with self._lock:
            found = self._together(max_rows, max_bytes)
            late = {
                source: dropped - self._counted.get(source, 0)
                for source, dropped in self._dropped.items()
            }
            self._counted = dict(self._dropped)
            taken = Taken(found, self._dropped.get(found[0].source, 0)) if found else None
        for source, rows in late.items():
            if rows:
                source.live.count(dropped=rows)
        if taken is not None:
            taken.blocks[0].source.live.count(sampled=sum(block.rows for block in taken.blocks))
        return taken

    def _together(self, max_rows: int, max_bytes: int) -> list[Block]:
        found: list[Block] = []
        while self._blocks and max_rows > 0:
            block = self._blocks[0]
            room = min(max_rows, max_bytes // block.row_bytes)
            if found and not (room > 0 and _alike(found[0], block)):
                break
            self._blocks.popleft()
            self._count(block, -1)
            rows = max(1, room)
            if rows < block.rows:
                rest = block.cut(rows)
                self._blocks.appendleft(rest)
                self._count(rest, 1)
                block = block.cut(0, rows)
            found.append(block)
            max_rows -= block.rows
            max_bytes -= block.rows * block.row_bytes
        return found

    def _drop(self, block: Block) -> None:
        """Let go of as many of a block's rows as there is no room for, the first ones."""
        self._count(block, -1)
        room = min(self._max_rows - self._rows, (self._max_bytes - self._bytes) // block.row_bytes)
        kept = max(0, min(room, block.rows))
        self._dropped[block.source] = self._dropped.get(block.source, 0) + block.rows - kept
        if kept:
            rest = block.cut(block.rows - kept)
            self._blocks.appendleft(rest)
            self._count(rest, 1)

    def _count(self, block: Block, sign: int) -> None:
        self._rows += sign * block.rows
        self._bytes += sign * block.rows * block.row_bytes


class Sampler:
    """Picks rows of one version and puts them into every ring that wants them."""

    def __init__(self, source: Source, output: str, rate: float, chance: random.Random) -> None:
        """Store the parts.

        Args:
            source: the version.
            output: the name of the output that its parity is measured on.
            rate: with which every row is picked, whatever became of the others; above 0.
            chance: what decides.
        """
        self.source, self._output = source, output
        self.rings: tuple[Ring, ...] = ()
        self._lock = threading.Lock()
        self._chance = chance
        self._log_miss = math.log1p(-rate) if rate < 1 else -math.inf
        self._left = self._misses()  # rows until the next that is picked

    def __call__(self, inputs: NDArray[np.generic], answers: Answers) -> None:
        """Copy the rows of a batch that are picked.

        Args:
            inputs: (rows, ...).
            answers: every output by its name, (rows, ...).
        """
        with self._lock:
            picked = self._pick(len(inputs))
        if not picked:
            return
        with np.errstate(over="ignore"):  # of outputs wider than float32
            outputs = answers[self._output].take(picked, axis=0).astype(np.float32, copy=False)
        block = Block(self.source, inputs.take(picked, axis=0), outputs)
        for ring in self.rings:
            ring.put(block)

    def _pick(self, rows: int) -> list[int]:
        if self._left >= rows:  # most batches have none
            self._left -= rows
            return []
        picked = []
        at = self._left
        while at < rows:
            picked.append(at)
            at += 1 + self._misses()
        self._left = at - rows
        return picked

    def _misses(self) -> int:
        """Return how many rows are passed over before the next: geometrically distributed."""
        misses = math.log(1 - self._chance.random()) / self._log_miss
        return int(min(misses, MAX_MISSES))


class Sampling:
    """The samplers of all loaded versions, and who listens. Safe to use from several threads."""

    def __init__(
        self,
        live: LiveStore | None = None,
        *,
        rate: float = 0.0,
        max_rows: int = 4096,
        max_bytes: int = MAX_RING_BYTES,
        make_chance: Callable[[], random.Random] = random.Random,
    ) -> None:
        """Store how; nothing is sampled until somebody listens.

        Args:
            live: what is known of each version.
            rate: with which every row is picked; 0: none ever is.
            max_rows: most rows kept for one listener.
            max_bytes: most bytes of them.
            make_chance: makes what decides, one a version.
        """
        self.live = live or LiveStore()
        self.rate = rate
        self._max_rows, self._max_bytes, self._make_chance = max_rows, max_bytes, make_chance
        self._lock = threading.Lock()
        self._rings: list[Ring] = []
        self._sampled: dict[Key, tuple[Sampler, Batcher]] = {}

    def add(
        self, manifest: bundle_pb2.BundleManifest, budget: bundle_pb2.Budget, batcher: Batcher
    ) -> Live:
        """Begin with a version that was loaded; return what will be known of it.

        Args:
            manifest: the version's.
            budget: of its served variant.
            batcher: that runs it.
        """
        key = (manifest.name, manifest.version)
        live = self.live.open(key, budget, manifest.test_distribution)
        if self.rate:
            source = Source(*key, manifest.provenance.parent_sha256, live)
            sampler = Sampler(source, checked_output(manifest), self.rate, self._make_chance())
            with self._lock:
                before = self._sampled.pop(key, None)
                self._sampled[key] = sampler, batcher
                self._connect()
            if before is not None:
                before[1].sample = None
        return live

    def remove(self, name: str, number: int) -> None:
        """End with a version that is no longer loaded."""
        with self._lock:
            before = self._sampled.pop((name, number), None)
        if before is not None:
            before[1].sample = None
        self.live.drop((name, number))

    def open(self, model: str) -> Ring:
        """Begin to keep rows for a listener, of one model or of all.

        Raises:
            PreconditionError: no row may be read.
            LimitError: too many listen already.
        """
        if not self.rate:
            raise PreconditionError(OFF)
        with self._lock:
            if len(self._rings) == MAX_RINGS:
                raise LimitError(
                    f"{MAX_RINGS} shadows read rows of this server already; stop one of them"
                )
            ring = Ring(model, max_rows=self._max_rows, max_bytes=self._max_bytes)
            self._rings.append(ring)
            self._connect()
        return ring

    def close(self, ring: Ring) -> None:
        """Keep nothing more for a listener that has left."""
        with self._lock:
            self._rings.remove(ring)
            self._connect()

    def _connect(self) -> None:
        """Let every batcher show its rows to those who listen, if there are any."""
        for sampler, batcher in self._sampled.values():
            sampler.rings = tuple(
                ring for ring in self._rings if ring.model in {"", sampler.source.model}
            )
            batcher.sample = sampler if sampler.rings else None


def _alike(one: Block, other: Block) -> bool:
    return (
        one.source is other.source
        and one.inputs.shape[1:] == other.inputs.shape[1:]
        and one.outputs.shape[1:] == other.outputs.shape[1:]
    )
