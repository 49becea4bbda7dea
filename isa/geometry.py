"""Which bytes a tile touches, and whether two tiles touch a common one.

The one big idea: every tile has a normal form, contiguous runs repeated along a few positive strides, largest first. Two tiles whose
strides nest are compared stride by stride like numbers digit by digit; only the others are spelled out run by run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from isa.program import DTYPES, Tile

MAXIMUM_RUNS = 1 << 17  # tiles with more runs that do not nest are taken to overlap

Dimensions = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes of a tile relative to its address: from `low` to `high` (exclusive), in runs of `run` bytes.

    `dims` are (count, stride) pairs, strides positive and falling; () means one contiguous block.
    """

    low: int
    high: int
    run: int
    dims: Dimensions

    @property
    def runs(self) -> int:
        count = 1
        for size, _ in self.dims:
            count *= size
        return count


def footprint(tile: Tile) -> Footprint:
    """The normal form of a tile's byte set, address and loop steps aside."""
    tile = tile.storage
    return _footprint(tile.shape, tile.strides, DTYPES[tile.dtype])


@lru_cache(maxsize=65536)
def _footprint(shape: tuple[int, ...], strides: tuple[int, ...], run: int) -> Footprint:
    low = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if stride < 0)
    high = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if stride > 0) + run
    dims = _moving(shape, strides)
    while dims and dims[-1][1] <= run:
        size, stride = dims.pop()
        run += (size - 1) * stride
    merged: list[tuple[int, int]] = []
    for size, stride in reversed(dims):
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (size * merged[-1][0], merged[-1][1])
        elif merged and stride == merged[-1][1]:
            merged[-1] = (size + merged[-1][0] - 1, stride)
        else:
            merged.append((size, stride))
    return Footprint(low, high, run, tuple(reversed(merged)))


def _moving(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(count, positive stride) of the dimensions that move, largest stride first."""
    return sorted(((size, abs(stride)) for size, stride in zip(shape, strides, strict=True) if size > 1 and stride), key=lambda pair: -pair[1])


def overlaps(first: Footprint, first_address: int, second: Footprint, second_address: int) -> bool:
    """Whether two tiles share a byte. Exact, except that two irregular tiles of very many runs are taken to overlap."""
    delta = (second_address + second.low) - (first_address + first.low)
    if delta >= first.high - first.low or -delta >= second.high - second.low:
        return False
    return (not first.dims and not second.dims) or _share_byte(first, second, delta)


@lru_cache(maxsize=65536)
def _share_byte(first: Footprint, second: Footprint, delta: int) -> bool:
    """`overlaps` where the second tile's lowest byte lies `delta` after the first's."""
    strides = sorted({stride for _, stride in first.dims + second.dims}, reverse=True)
    first_digits, second_digits = _digits(first, strides), _digits(second, strides)
    if first_digits is not None and second_digits is not None:
        return _meet(tuple(zip(strides, first_digits, second_digits, strict=True)), first.run, second.run, delta)
    if max(first.runs, second.runs) > MAXIMUM_RUNS:
        return True
    starts, others = run_starts(first), run_starts(second) + delta
    nearest = np.searchsorted(starts, others + second.run, side="left") - 1  # the last run that begins before the other ends
    return bool(((nearest >= 0) & (starts[nearest] + first.run > others)).any())


def _digits(tile: Footprint, strides: list[int]) -> list[int] | None:
    """The tile's count along each of the strides, or None when some stride is smaller than what lies within it."""
    counts, span = {stride: size for size, stride in tile.dims}, tile.run
    for stride in reversed(strides):
        if span > stride:
            return None
        span += (counts.get(stride, 1) - 1) * stride
    return [counts.get(stride, 1) for stride in strides]


def _meet(levels: tuple[tuple[int, int, int], ...], first_run: int, second_run: int, delta: int) -> bool:
    """Digit by digit: at each stride the second tile is `quotient` or `quotient + 1` steps after the first."""
    if not levels:
        return -second_run < delta < first_run
    stride, first_count, second_count = levels[0]
    quotient = delta // stride
    return any(
        -second_count < steps < first_count and _meet(levels[1:], first_run, second_run, delta - steps * stride) for steps in (quotient, quotient + 1)
    )


def run_starts(tile: Footprint) -> npt.NDArray[np.int64]:
    """Where each run begins after the lowest byte, rising."""
    starts = np.zeros(1, np.int64)
    for size, stride in tile.dims:
        starts = (starts[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return np.sort(starts)


@lru_cache(maxsize=65536)
def writes_twice(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> bool:
    """Whether two elements of a tile share a byte (very large irregular tiles are taken to)."""
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        return True
    dims, span = _moving(shape, strides), item
    for size, stride in reversed(dims):
        if stride < span:
            break
        span += (size - 1) * stride
    else:
        return False
    elements = Footprint(0, 0, item, tuple(dims))
    return elements.runs > MAXIMUM_RUNS or bool((np.diff(run_starts(elements)) < item).any())
