"""Where a tensor lies: a view is a strided window of a buffer.

The one big idea: a transpose, slice, split, reshape, expand or concat need not move a byte. Its result is another view of
the same buffer, and only what no view can express is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from isa.program import DTYPES


@dataclass(frozen=True, slots=True)
class View:
    """Elements of `buffer` at byte `offset` + Σ index·stride, in the tensor's logical (ONNX) dimension order."""

    buffer: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @staticmethod
    def dense(buffer: str, shape: Sequence[int], dtype: str, order: Sequence[int] | None = None) -> View:
        """A whole buffer whose bytes run in the given order of dimensions, slowest first (default: row-major)."""
        shape = tuple(shape)
        strides = [0] * len(shape)
        step = DTYPES[dtype]
        for dimension in reversed(order if order is not None else range(len(shape))):
            strides[dimension] = step
            step *= shape[dimension]
        return View(buffer, 0, shape, tuple(strides), dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]

    def window(self, starts: Sequence[int], sizes: Sequence[int], steps: Sequence[int] | None = None) -> View:
        """Per dimension: `sizes` elements from `starts`, every `steps`-th (steps may be negative)."""
        steps = steps or (1,) * len(self.shape)
        offset = self.offset + sum(start * stride for start, stride in zip(starts, self.strides, strict=True))
        return replace(self, offset=offset, shape=tuple(sizes), strides=tuple(s * n for s, n in zip(self.strides, steps, strict=True)))

    def permute(self, permutation: Sequence[int]) -> View:
        return replace(self, shape=tuple(self.shape[i] for i in permutation), strides=tuple(self.strides[i] for i in permutation))

    def broadcast(self, shape: Sequence[int]) -> View:
        """As an operand of that shape: missing and size-1 dimensions repeat (stride 0)."""
        missing = len(shape) - len(self.shape)
        sizes, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        return replace(
            self,
            shape=tuple(shape),
            strides=tuple(0 if have == 1 and want != 1 else stride for have, want, stride in zip(sizes, shape, strides, strict=True)),
        )

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements in row-major order under another shape; None if no strides can say it."""
        shape = tuple(shape)
        if math.prod(shape) == 0 or math.prod(self.shape) != math.prod(shape):
            return None
        runs = _merged_runs(self.shape, self.strides)
        strides: list[int] = []
        run, left = 0, runs[0][0] if runs else 1
        for size in shape:
            if size == 1:
                strides.append(0)
                continue
            while left == 1 and run + 1 < len(runs):
                run, left = run + 1, runs[run + 1][0]
            if left % size:
                return None
            left //= size
            strides.append(runs[run][1] * left)
        return replace(self, shape=shape, strides=_fill_unit_strides(shape, strides, DTYPES[self.dtype]))

    def order(self) -> tuple[int, ...]:
        """Dimensions from the slowest to the fastest in memory."""
        return tuple(sorted(range(len(self.shape)), key=lambda d: (-abs(self.strides[d]) if self.shape[d] > 1 else -(1 << 60), d)))


def _merged_runs(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of maximal groups of adjacent dimensions that walk memory as one; size-1 dimensions vanish."""
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


def _fill_unit_strides(shape: Sequence[int], strides: Sequence[int], element: int) -> tuple[int, ...]:
    """Give size-1 dimensions the stride a dense array would have there (any would do; this one reads well)."""
    filled, step = list(strides), element
    for dimension in reversed(range(len(shape))):
        if shape[dimension] == 1:
            filled[dimension] = step
        else:
            step = shape[dimension] * strides[dimension]
    return tuple(filled)


def merge_dimensions(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Drop size-1 dimensions and merge neighbours that every operand walks as one. Returns the shape and each operand's strides."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dimension, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(steps[-1] == own[dimension] * size for steps, own in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for steps, own in zip(merged, strides, strict=True):
                steps[-1] = own[dimension]
            continue
        sizes.append(size)
        for steps, own in zip(merged, strides, strict=True):
            steps.append(own[dimension])
    if not sizes:
        return (1,), tuple((own[-1] if len(own) else 0,) for own in strides)
    return tuple(sizes), tuple(tuple(steps) for steps in merged)


def reshape_copy(source: View, result: View) -> tuple[View, View] | None:
    """Both views under one shape, in which copying element by element is the reshape; None if no strides can say it."""
    shapes = [source.shape, result.shape]
    finest = common_refinement(source.shape, result.shape)
    for shape in [*([finest] if finest else []), *shapes]:
        pair = source.reshape(shape), result.reshape(shape)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def common_refinement(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest shape that both shapes are groupings of; None if there is none."""
    edges = sorted({*_edges(left), *_edges(right)})
    if any(high % low for low, high in pairwise(edges)):
        return None
    return tuple(reversed([high // low for low, high in pairwise(edges)])) or (1,)


def _edges(shape: Sequence[int]) -> list[int]:
    """Products of trailing dimensions: 1, last, last·previous …"""
    edges = [1]
    for size in reversed(shape):
        edges.append(edges[-1] * size)
    return edges
