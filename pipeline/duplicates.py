"""Find rows that two parts of a data set share, exactly or nearly.

Nearly: the values of two rows, each row less its mean, correlate at `ALIKE` or more, so that other
brightness and contrast hide nothing; a shift or a flip does. No pair is missed among the rows that
are compared. Rows of mean 0 and length 1 that correlate so are within `REACH` of each other, also
along the direction in which rows differ most: they are sorted along it. Sums over a grid of blocks
then bound each correlation from above, and only what could reach `ALIKE` is computed in full.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Looked at on Fashion-MNIST: from here up pairs are one product, from 0.99 about every second one.
ALIKE = 0.995
MIN_VALUES = 64  # of a row; fewer correlate by chance
GRID = 8  # blocks along each side of an image
REACH = (2 * (1 - ALIKE)) ** 0.5 + 1e-3  # how far apart they are at most; float32 rounds
CHUNK_VALUES = 1 << 22  # of rows that are scaled at once; 16 MiB
BLOCK_ROWS = 512
CHUNK_ROWS = 4096  # that a block is compared with at once
MAX_WORK = 1e11  # multiplications; some seconds of two cores
ROUNDING = 1e-4  # of a bound in float32
DENSE = 1 / 16  # from this share of a chunk on, all of its pairs are cheaper at once
SEED = 42
Numbers = NDArray[np.intp]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matches:
    """Which row of the one part a row of the other is a copy of."""

    rows: Numbers  # one for each row of the other part; -1: none
    compared: int  # rows of the other part that were looked at


def exact(one: NDArray[Any], other: NDArray[Any]) -> Matches:
    """Return for each row of `other` the first row of `one` that has the same values."""
    known: dict[bytes, int] = {}
    for row, digest in enumerate(_digests(one)):
        known.setdefault(digest, row)
    rows = np.array([known.get(digest, -1) for digest in _digests(other)], np.intp)
    return Matches(rows, len(other))


def near(one: NDArray[Any], other: NDArray[Any], *, max_work: float = MAX_WORK) -> Matches:
    """Return for each row of `other` a row of `one` that is nearly the same.

    Args:
        one: images (rows, height, width, channels).
        other: images of the same size.
        max_work: in multiplications, after which no more rows of `other` are looked at; they are
            taken in blocks, in an order that is random but always the same.
    """
    found = np.full(len(other), -1, np.intp)
    if one[0].size < MIN_VALUES:
        return Matches(found, 0)
    signatures, bounds = _signatures(one), _signatures(other)
    direction = _widest(signatures[:, :-1])
    along, at = signatures[:, :-1] @ direction, bounds[:, :-1] @ direction
    order, rows = np.argsort(along, kind="stable"), np.argsort(at, kind="stable")
    along, signatures = along[order], signatures[order]
    step = min(CHUNK_ROWS, max(1, 4 * CHUNK_VALUES // one[0].size))
    work, compared = 0.0, 0
    blocks = np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))
    for number in np.random.default_rng(SEED).permutation(len(blocks)):
        if work > max_work:
            break
        block = blocks[number]
        first = int(np.searchsorted(along, at[block[0]] - REACH))
        last = int(np.searchsorted(along, at[block[-1]] + REACH))
        for start in range(first, last, step):
            chunk = slice(start, min(start + step, last))
            left = block[found[block] < 0]
            possible = signatures[chunk] @ bounds[left].T >= ALIKE - ROUNDING
            firsts, seconds, cost = _verified(one[order[chunk]], other[left], possible)
            found[left[seconds]] = order[chunk][firsts]
            work += cost + float(possible.size) * bounds.shape[1]
        compared += len(block)
    return Matches(found, compared)


def _verified(
    one: NDArray[Any], other: NDArray[Any], possible: NDArray[np.bool_]
) -> tuple[Numbers, Numbers, float]:
    """Return which of the possible pairs correlate, and how many multiplications that took."""
    firsts, seconds = np.nonzero(possible)
    if not len(firsts):
        return firsts, seconds, 0.0
    hit, firsts = np.unique(firsts, return_inverse=True)
    mine, units = _units(one[hit]), _units(other)
    if len(firsts) > possible.size * DENSE:
        firsts, seconds = np.nonzero(mine @ units.T >= ALIKE)
        cost = float(len(hit)) * units.size
    else:
        alike = _correlations(mine, firsts, units, seconds)
        firsts, seconds = firsts[alike >= ALIKE], seconds[alike >= ALIKE]
        cost = float(len(alike)) * units.shape[1]
    return hit[firsts], seconds, cost


def _correlations(one: Floats, firsts: Numbers, other: Floats, seconds: Numbers) -> Floats:
    chunk = max(1, CHUNK_VALUES // one.shape[1])
    parts = [
        np.einsum("ij,ij->i", one[firsts[at : at + chunk]], other[seconds[at : at + chunk]])
        for at in range(0, len(firsts), chunk)
    ]
    return np.concatenate(parts)


def _widest(coordinates: Floats) -> Floats:
    """Return the direction of length 1 in which rows differ most."""
    centred = coordinates - coordinates.mean(axis=0)
    directions: Floats = np.linalg.eigh(centred.T @ centred)[1]
    return directions[:, -1]


def _units(rows: NDArray[Any]) -> Floats:
    """Return rows with mean 0 and length 1, (rows, values); nothing but zeros where all is one."""
    flat = rows.reshape(len(rows), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.where(lengths > 0, lengths, 1), np.float32)


def _signatures(rows: NDArray[Any]) -> Floats:
    """Return vectors whose products are at least the correlations of the rows.

    Block sums over the root of the block's size are coordinates in an orthonormal basis; the
    length of what they leave out is the last column, and bounds the rest by Cauchy and Schwarz.
    """
    chunk = max(1, CHUNK_VALUES // rows[0].size)
    return np.concatenate([_of_blocks(rows[at : at + chunk]) for at in range(0, len(rows), chunk)])


def _of_blocks(rows: NDArray[Any]) -> Floats:
    units = _units(rows)
    tall, high = _blocks(rows.shape[1])
    wide, across = _blocks(rows.shape[2])
    sums = np.add.reduceat(np.add.reduceat(units.reshape(rows.shape), tall, axis=1), wide, axis=2)
    sums /= np.sqrt(np.outer(high, across))[..., np.newaxis]
    kept = sums.reshape(len(units), -1)
    left = np.square(units).sum(axis=1) - np.square(kept).sum(axis=1)
    return np.column_stack([kept, np.sqrt(np.maximum(left, 0))])


def _blocks(length: int) -> tuple[Numbers, Numbers]:
    """Return where the blocks along a side begin, and how long they are."""
    edges = np.linspace(0, length, min(GRID, length) + 1).astype(np.intp)
    return edges[:-1], np.diff(edges)


def _digests(rows: NDArray[Any]) -> Iterator[bytes]:
    for row in rows:
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()
