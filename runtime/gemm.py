"""Exact integer matrix products at the speed of the floating-point BLAS.

The one big idea: a float32 product of integers is exact, in any order of summation, as long as no partial sum can exceed 2**24
(float64: 2**53). A partial sum of x·w is at most max|x| · sum|w|, so the columns of the weights tell where K must be cut; the
parts are added as int32, which wraps as the accumulators do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.memory import Array
from runtime.scratch import Scratch

#: the largest sum that each type holds exactly
EXACT: dict[np.dtype[Any], int] = {np.dtype(np.float32): 1 << 24, np.dtype(np.float64): 1 << 53}
#: the largest magnitude of a stored value
LARGEST = {np.dtype(np.int8): 1 << 7, np.dtype(np.int16): 1 << 15}


def working_type(source: np.dtype[Any]) -> np.dtype[Any]:
    """float32 for int8 operands, float64 for int16 ones."""
    return np.dtype(np.float32) if source == np.int8 else np.dtype(np.float64)


@dataclass(frozen=True, slots=True)
class Part:
    """One BLAS call: left[..., M, K] @ right[..., K, N]; `bound` is the largest magnitude any of its partial sums can reach."""

    left: Array
    right: Array
    bound: int


def cut(left: Array, right: Array, content: Array, *, largest: int) -> list[Part]:
    """The product as parts that are exact each; `largest` bounds |left|, and `content` (integers) is what `right` will hold."""
    magnitudes = np.abs(content).view(f"u{content.itemsize}")  # unsigned: abs of the least number is itself
    bound = largest * int(magnitudes.sum(axis=-2, dtype=np.int64).max())
    depth = right.shape[-2]
    if bound <= EXACT[left.dtype] or depth == 1:
        return [Part(left, right, bound)]
    half = depth // 2
    return [
        *cut(left[..., :half], right[..., :half, :], content[..., :half, :], largest=largest),
        *cut(left[..., half:], right[..., half:, :], content[..., half:, :], largest=largest),
    ]  # fmt: skip


def cut_evenly(left: Array, right: Array, largest_product: int) -> list[Part]:
    """The product cut along K so that each part is exact for any content whose products stay within `largest_product`."""
    depth, step = right.shape[-2], max(1, EXACT[left.dtype] // largest_product)
    return [
        Part(left[..., k : k + step], right[..., k : k + step, :], largest_product * min(step, depth - k))
        for k in range(0, depth, step)
    ]  # fmt: skip


def sums(parts: list[Part]) -> list[list[Part]]:
    """Parts in order, gathered as long as they may be added in floating point."""
    gathered: list[list[Part]] = []
    total = 0
    for part in parts:
        if gathered and total + part.bound <= EXACT[part.left.dtype]:
            gathered[-1].append(part)
            total += part.bound
        else:
            gathered.append([part])
            total = part.bound
    return gathered


@dataclass(slots=True)
class FloatSums:
    """The sums of one instruction as they leave the BLAS: exact in float32, with and without the bias, which is not added yet.

    A requant that follows may take them instead of the accumulators; where nothing else reads those, they need not be `stored`.
    """

    bias: tuple[Any, Array] | None  # (a key that stands for the content, int32 [N])
    values: Array = field(default_factory=lambda: np.empty(0, np.float32))  # [M, N]; lasts until the next product
    taken: bool = False
    stored: bool = True


def float_sums(dtype: np.dtype[Any], bound: int, bias: tuple[Any, Array] | None) -> FloatSums | None:
    """Whether sums of this type, at most `bound`, and the bias are exact in float32: then their record, its values still to come."""
    largest = bound + (int(np.abs(bias[1].astype(np.int64)).max()) if bias else 0)
    return FloatSums(bias) if dtype == np.float32 and largest <= EXACT[np.dtype(np.float32)] else None


def bind_product(
    parts: list[Part], y: Array, scratch: Scratch, *, bias: Array | None, accumulate: bool, floats: FloatSums | None = None
) -> Callable[[], None]:
    """A closure for y = (bias, or y if `accumulate`) + the sum of `parts`, wrapping in 32 bits.

    y: int32, of the shape of the product ([..., M, N], any strides). `bias` broadcasts to y. `floats` gets the sums' place.
    """
    dtype = parts[0].left.dtype
    shape = (*parts[0].left.shape[:-1], parts[0].right.shape[-1])
    groups = [[(part.left, part.right) for part in group] for group in sums(parts)]
    product = scratch.take("product", shape, dtype)
    partial = scratch.take("partial", shape, dtype) if len(parts) > len(groups) else product
    first = bind_store(product, y, scratch, bias=bias, accumulate=accumulate, floats=floats)
    others = bind_store(product, y, scratch, bias=None, accumulate=True) if len(groups) > 1 else first
    work = [(group, others if number else first) for number, group in enumerate(groups)]

    def run() -> None:
        for ((left, right), *more), store in work:
            np.matmul(left, right, out=product)
            for other_left, other_right in more:
                np.matmul(other_left, other_right, out=partial)
                np.add(product, partial, out=product)
            store()

    return run


def bind_store(
    product: Array, y: Array, scratch: Scratch, *, bias: Array | None, accumulate: bool, floats: FloatSums | None = None
) -> Callable[[], None]:
    """A closure for y = (bias, or y if `accumulate`) + product, wrapping in 32 bits; for nothing where a requant takes `floats` instead."""
    whole = scratch.take("integers", product.shape, np.int32) if accumulate else y
    kept = floats or FloatSums(None)
    kept.values = product

    def store() -> None:
        if not kept.stored:
            return
        to_int32(product, whole)
        if accumulate:
            np.add(y, whole, out=y)
        if bias is not None:
            np.add(y, bias, out=y)

    return store


def to_int32(product: Array, out: Array) -> None:
    """Sums in any of the types of EXACT into int32, wrapping: only float64 ones can be larger, and take the way over int64."""
    np.copyto(out, product.astype(np.int64) if product.dtype == np.float64 else product, casting="unsafe")
