"""Between integers and reals: the float32 steps that every kernel shares.

The one big idea: each step is one IEEE-754 single-precision operation, rounded once, in a fixed order; so the same integers
come out on every machine. `rint` rounds half to even; the zero point is added after rounding; clipping happens in float,
before the narrow cast, so that no cast is ever out of range. The q31 modes of requant work on exact 64-bit integers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.memory import NAMES, NUMPY, Array
from runtime.scratch import collapse, pieces
from runtime.site import Run, Site

DEFAULT_CLAMP = (-128, 127)
#: elements of a row to which short rows are joined, with their scales repeated: numpy's inner loops want to be long
LONG_ROW = 256


def bounds(dtype: str, clamp: tuple[int, int]) -> tuple[int, int]:
    """Lowest and highest stored value: the clamp within the type's range; the default clamp means the whole range."""
    limits = np.iinfo(NUMPY[dtype])
    if tuple(clamp) == DEFAULT_CLAMP:
        return int(limits.min), int(limits.max)
    return max(clamp[0], int(limits.min)), min(clamp[1], int(limits.max))


def real(stored: Array, quant: tuple[float, int]) -> Array:
    """float32(x - zero) * scale as a new float32 array; float tiles are what they are."""
    if stored.dtype == np.float32:
        return stored.astype(np.float32)
    scale, zero = quant
    values: Array
    if stored.dtype.itemsize <= 2:
        values = stored.astype(np.float32)
        if zero:
            values -= np.float32(zero)
    else:
        values = (stored.astype(np.int64) - zero).astype(np.float32)
    if scale != 1.0:
        values *= np.float32(scale)
    return values


def store(values: Array, quant: tuple[float, int], dtype: str, clamp: tuple[int, int]) -> Array:
    """clamp(rint(v / scale) + zero) as an array of `dtype`; NaN becomes the zero point. For f32: v itself. May change `values`."""
    if dtype == "f32":
        return values
    scale, zero = quant
    if scale != 1.0:
        np.divide(values, np.float32(scale), out=values)
    return round_and_clamp(values, zero, dtype, clamp)


def round_and_clamp(values: Array, zero: int, dtype: str, clamp: tuple[int, int]) -> Array:
    """clamp(rint(v) + zero) as an array of `dtype`; NaN becomes the zero point. May change `values`."""
    low, high = bounds(dtype, clamp)
    np.rint(values, out=values)
    unknown = np.isnan(values)
    if unknown.any():
        values[unknown] = 0
    if dtype in ("s32", "s64"):
        return _wide(values, zero, dtype, low, high)
    # |rint(v)| below 2**24 - 2**15: the sum is exact; above: it saturates either way
    values += np.float32(zero)
    np.clip(values, np.float32(low), np.float32(high), out=values)
    return values.astype(NUMPY[dtype])


def _wide(rounded: Array, zero: int, dtype: str, low: int, high: int) -> Array:
    """The same for results that float32 does not hold exactly: to 64 bits (from 2**63 on it saturates), then add and clamp as integers."""
    too_high, too_low = rounded >= 2.0**63, rounded <= -(2.0**63)
    integers = np.where(too_high | too_low, 0, rounded).astype(np.int64) + zero
    limited: Array = np.where(too_high, high, np.where(too_low, low, np.clip(integers, low, high)))
    return limited.astype(NUMPY[dtype])


def bind_requant(site: Site) -> Run:
    """y[..., n] = clamp(round(a[..., n] * factor of n) + zero)."""
    if site.attributes["mode"] != "fp32.rne":
        return _requant_by_integers(site)
    a, y = site.views["a"], site.views["y"]
    quant = (int(site.attributes["zero"]), tuple(site.attributes["clamp"]))
    if "s" not in site.views:
        scale: Array = np.asarray(site.attributes["scale"], np.float32)
        a, y = collapse([a, y])
        return _requant(site, a, y, lambda _: scale, quant)
    a, y = collapse([a.reshape(1, *a.shape), y.reshape(1, *y.shape)], keep=1)
    if "s" not in site.constants:
        live = site.views["s"]
        return _requant(site, a, y, lambda _: live, quant, join=False)
    key, scales = site.constants["s"]
    if site.sums is None or not _bounded(scales):
        return _requant(site, a, y, lambda rows: _repeated(site, key, scales, rows), quant)
    site.sums.taken = True
    a, y = collapse([site.sums.values.reshape(1, *site.views["a"].shape), site.views["y"].reshape(1, *site.views["y"].shape)], keep=1)
    if site.sums.bias is None:
        return _requant(site, a, y, lambda rows: _repeated(site, key, scales, rows), quant)
    bias_key, bias = site.sums.bias
    biases = bias.astype(np.float32)
    return _requant(site, a, y, lambda rows: _repeated(site, key, scales, rows), quant, bias_for=lambda rows: _repeated(site, bias_key, biases, rows))


def _bounded(scales: Array) -> bool:
    """Whether no product with an int32 can leave the range of float32 (and no scale is NaN)."""
    return bool((np.abs(scales) < np.float32(2.0**96)).all())


def _repeated(site: Site, key: Any, values: Array, rows: int) -> Array:
    """The float32 values of all channels `rows` times, one after the other."""
    memo = ("repeated", key, rows)
    if memo not in site.memo:
        site.memo[memo] = np.tile(values, rows)
    repeated: Array = site.memo[memo]
    return repeated


def _rows_at_once(part: Array) -> int:
    """How many neighbouring rows of [..., rows, n] to take as one: a divisor of `rows`; 1 where they do not lie side by side."""
    if part.ndim < 2 or not part.flags.c_contiguous:
        return 1
    rows, channels = part.shape[-2:]
    return max(count for count in range(1, rows + 1) if rows % count == 0 and (count == 1 or count * channels <= LONG_ROW))


def _requant(
    site: Site, a: Array, y: Array, scale_for: Callable[[int], Array], quant: tuple[int, tuple[int, int]], *,
    bias_for: Callable[[int], Array] | None = None, join: bool = True,
) -> Run:  # fmt: skip
    """`scale_for` so many rows taken as one (see `join`); `bias_for` them (of float sums, exact in float32): what to add to a first."""
    zero, clamp = quant
    dtype = NAMES[y.dtype]
    low, high = (np.float32(bound) for bound in bounds(dtype, clamp))
    work = []
    for part, result in pieces([a, y]):
        shaped = site.scratch.take("requant", part.shape, np.float32)
        joined = _rows_at_once(part) if join else 1
        part, values = (each.reshape(-1, joined * each.shape[-1]) if joined > 1 else each for each in (part, shaped))
        work.append((part, scale_for(joined), bias_for and bias_for(joined), values, shaped, result))
    offset = np.float32(zero)

    def run() -> None:
        for part, scale, bias, values, shaped, result in work:
            if bias is None:
                np.copyto(values, part, casting="unsafe")
            else:
                np.add(part, bias, out=values)
            np.multiply(values, scale, out=values)
            np.rint(values, out=values)
            if offset:
                np.add(values, offset, out=values)
            values.clip(low, high, values)
            np.copyto(result, shaped, casting="unsafe")

    def run_guarded() -> None:
        if _bounded(work[0][1]):
            run()
            return
        with np.errstate(all="ignore"):
            for part, scale, _, _, shaped, result in work:
                np.copyto(result, round_and_clamp(part.astype(np.float32) * scale, zero, dtype, clamp).reshape(shaped.shape))

    fixed = "s" not in site.views or "s" in site.constants
    return run if fixed and _bounded(work[0][1]) else run_guarded


# ---- the q31 modes ----------------------------------------------------------------------------------------------------


def nearest_even(values: Array, multiplier: Array, shift: Array) -> Array:
    """values * multiplier / 2**shift, half to even. |values| <= 2**31, 0 <= multiplier < 2**31, 0 <= shift <= 63; all int64."""
    product = values * multiplier
    inexact = (shift > 0).astype(np.int64)
    odd = (product >> shift) & inexact
    rounded: Array = (product + (half_step(shift) - inexact) + odd) >> shift
    return rounded


def tosa(values: Array, multiplier: Array, shift: Array) -> Array:
    """apply_scale_32 with single rounding: (values * multiplier + 2**(shift-1)) >> shift."""
    scaled: Array = (values * multiplier + half_step(shift)) >> shift
    return scaled


def tfl(values: Array, multiplier: Array, shift: Array) -> Array:
    """MultiplyByQuantizedMultiplier: a saturated left shift, the rounded high half of the doubled product, a rounded division by 2**n.

    The published division of (product + nudge) by 2**31, which truncates, equals (product + 2**30) >> 31 for both signs.
    """
    wide, narrow = np.maximum(31 - shift, 0), np.maximum(shift - 31, 0)
    high = (np.clip(values << wide, -(1 << 31), (1 << 31) - 1) * multiplier + (1 << 30)) >> 31
    away = (high < 0) & (narrow > 0)
    divided: Array = (high + half_step(narrow) - away) >> narrow
    return divided


def half_step(shift: Array) -> Array:
    """2**(shift-1), and 0 where there is no shift."""
    half: Array = np.left_shift(shift > 0, np.maximum(shift - 1, 0), dtype=np.int64)
    return half


ROUND: dict[str, Callable[[Array, Array, Array], Array]] = {"q31.rne": nearest_even, "q31.tosa": tosa, "q31.tfl": tfl}


def _requant_by_integers(site: Site) -> Run:
    rescale, zero = ROUND[site.attributes["mode"]], int(site.attributes["zero"])
    views, y = site.views, site.views["y"]
    low, high = bounds(NAMES[y.dtype], tuple(site.attributes["clamp"]))
    a, y = collapse([views["a"].reshape(1, *views["a"].shape), y.reshape(1, *y.shape)], keep=1)
    work = pieces([a, y])
    factors = [views.get("s", np.asarray(site.attributes["multiplier"])), views.get("r", np.asarray(site.attributes["shift"]))]

    def run() -> None:
        multiplier, shift = (factor.astype(np.int64) & mask for factor, mask in zip(factors, (0x7FFFFFFF, 63), strict=True))
        for part, result in work:
            values = rescale(part.astype(np.int64), multiplier, shift)
            np.copyto(result, np.clip(values + zero, low, high), casting="unsafe")

    return run
