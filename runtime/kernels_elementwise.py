"""The vector engine's elementwise instructions: add … min, cmp, select, cvt, sqrt, lut, fill.

The one big idea: each instruction has one plain evaluator, float32 step by float32 step. Where every operand is one byte
wide, the evaluator runs once over all 256 (or 256 x 256) inputs and the instruction becomes a table look-up; the bytes are
the same by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.memory import NAMES, Array
from runtime.requantize import real, round_and_clamp, store
from runtime.scratch import collapse, pieces
from runtime.site import Run, Site

Evaluate = Callable[..., Array]
#: elements below which a look-up in a 256 x 256 table saves less than making the table costs
TABLE_PAYS = 512
ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
RELATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """float32(a * b + c) with one rounding, for float32 arrays. The product is exact in float64; the sum is rounded to odd, then to float32."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    if not error.any():
        return total.astype(np.float32)
    inexact = (error != 0) & np.isfinite(error) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def add_bytes(a: Array, b: Array, attributes: dict[str, Any]) -> Array:
    """s8 + s8 → s8 in the order of onnxruntime's QLinearAdd: fma(A, ra, fma(B, rb, F)), zero point inside the rounding."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_y, zero_y) = (attributes[name] for name in ("qa", "qb", "qy"))
    ratio_a, ratio_b = (np.asarray([scale], np.float32) / np.float32(scale_y) for scale in (scale_a, scale_b))
    offset = attributes["offset"]
    offset_a, offset_b, offset_y = (np.asarray([zero + offset], np.float32) for zero in (zero_a, zero_b, zero_y))
    start = offset_y - fused_multiply_add(ratio_a, offset_a, ratio_b * offset_b)
    codes_a, codes_b = (np.asarray(stored, np.float32) + np.float32(offset) for stored in (a, b))
    values = fused_multiply_add(codes_a, ratio_a, fused_multiply_add(codes_b, ratio_b, start))
    return round_and_clamp(values, -offset, "s8", attributes["clamp"])


def multiply_bytes(a: Array, b: Array, attributes: dict[str, Any]) -> Array:
    """s8 * s8 → s8 in the order of onnxruntime's QLinearMul: one ratio, zero point inside the rounding."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_y, zero_y) = (attributes[name] for name in ("qa", "qb", "qy"))
    ratio = np.float32(scale_a) * np.float32(scale_b) / np.float32(scale_y)
    products = (a.astype(np.int32) - zero_a) * (b.astype(np.int32) - zero_b)
    values = products.astype(np.float32) * ratio + np.float32(zero_y + attributes["offset"])
    return round_and_clamp(values, -attributes["offset"], "s8", attributes["clamp"])


def _binary(site: Site) -> Evaluate:
    """The evaluator of add, sub, mul, div, max, min: (a[, b]) → y."""
    name, attributes = site.instruction.name, dict(site.attributes)
    result, dtypes = NAMES[site.views["y"].dtype], {NAMES[view.dtype] for view in site.views.values()}
    if "b" in site.views and dtypes == {"s8"} and name in ("add", "mul"):
        bytewise = {"add": add_bytes, "mul": multiply_bytes}[name]
        return lambda a, b: bytewise(a, b, attributes)
    combine, immediate = ARITHMETIC[name], np.float32(attributes["imm"])

    def evaluate(a: Array, b: Array | None = None) -> Array:
        right = np.full((), immediate) if b is None else real(b, attributes["qb"])
        return store(combine(real(a, attributes["qa"]), right), attributes["qy"], result, attributes["clamp"])

    return evaluate


def _compare(site: Site) -> Evaluate:
    """The evaluator of cmp: (a[, b]) → 0 or 1."""
    attributes, result = site.attributes, site.views["y"].dtype
    relation, immediate = RELATIONS[attributes["op"]], np.float32(attributes["imm"])

    def evaluate(a: Array, b: Array | None = None) -> Array:
        right = np.full((), immediate) if b is None else real(b, attributes["qb"])
        return relation(real(a, attributes["qa"]), right).astype(result)

    return evaluate


def _select(site: Site) -> Evaluate:
    """The evaluator of select: (c, a, b) → y."""
    attributes, result = site.attributes, NAMES[site.views["y"].dtype]

    def evaluate(c: Array, a: Array, b: Array) -> Array:
        chosen = np.where(c != 0, real(a, attributes["qa"]), real(b, attributes["qb"]))
        return store(chosen, attributes["qy"], result, attributes["clamp"])

    return evaluate


def _unary(site: Site) -> Evaluate:
    """The evaluator of cvt and sqrt: x → y."""
    attributes, result = site.attributes, NAMES[site.views["y"].dtype]
    root = site.instruction.name == "sqrt"

    def evaluate(x: Array) -> Array:
        values = real(x, attributes["qx"])
        return store(np.sqrt(values) if root else values, attributes["qy"], result, attributes["clamp"])

    return evaluate


def bind_elementwise(site: Site) -> Run:
    """Any elementwise instruction: table look-ups where the operands are bytes, else its evaluator piece by piece."""
    table = byte_table(site)
    y, *sources = collapse(list(site.views.values()))
    if table is not None:
        return _look_up_one(site, y, sources[0], table) if len(sources) == 1 else _look_up_two(site, y, sources, table)
    evaluate = _evaluator(site)
    work = pieces([y, *sources])

    def run() -> None:
        with np.errstate(all="ignore"):
            for result, *parts in work:
                np.copyto(result, evaluate(*parts))

    return run


def _evaluator(site: Site) -> Evaluate:
    return {"cmp": _compare, "select": _select, "cvt": _unary, "sqrt": _unary}.get(site.instruction.name, _binary)(site)


def byte_table(site: Site) -> Array | None:
    """What an elementwise instruction gives for all that one or two bytes of operands can hold; None where no table pays."""
    y, *sources = site.views.values()
    size = sum(source.dtype.itemsize for source in sources)
    if len(sources) > 2 or size > 2 or (size == 2 and y.size < TABLE_PAYS):
        return None
    return _table(site, _evaluator(site), [source.dtype for source in sources])


def _table(site: Site, evaluate: Evaluate, dtypes: list[np.dtype[Any]]) -> Array:
    """The evaluator's result for every operand of one or two bytes (or pair of bytes, the first in the high half), in the order of unsigned codes."""
    key = ("table", site.instruction.name, tuple(site.instruction.attributes), tuple(dtypes), site.views["y"].dtype)
    if key not in site.memo:
        first, *second = map(_codes, dtypes)
        with np.errstate(all="ignore"):
            site.memo[key] = evaluate(first.reshape(256, 1) if second else first, *second).reshape(-1)
    table: Array = site.memo[key]
    return table


def _look_up_one(site: Site, y: Array, x: Array, table: Array) -> Run:
    """Table entries by the unsigned code of x, which has one or two bytes."""
    take, codes = site.scratch.take, x.view(f"u{x.itemsize}")
    work = [(result, part, take("index", part.shape, np.intp), _dense(site, result)) for result, part in pieces([y, codes])]

    def run() -> None:
        for result, part, index, found in work:
            np.copyto(index, part)
            np.take(table, index, out=found, mode="clip")
            if found is not result:
                np.copyto(result, found)

    return run


def _dense(site: Site, result: Array) -> Array:
    """The result itself where `take` can write into it, else a working array of its shape."""
    return result if result.flags.c_contiguous else site.scratch.take("found", result.shape, result.dtype)


def _look_up_two(site: Site, y: Array, sources: list[Array], table: Array) -> Run:
    """Table entries by the unsigned codes of two bytes, the first operand's in the high half."""
    take = site.scratch.take
    kinds = (("pair", np.uint16), ("low", np.uint16), ("index", np.intp))
    work = [
        (result, high, low, _dense(site, result), *(take(role, high.shape, dtype) for role, dtype in kinds))
        for result, high, low in pieces([y, *(source.view(np.uint8) for source in sources)])
    ]  # fmt: skip

    def run() -> None:
        for result, high, low, found, pair, low_half, index in work:
            np.copyto(pair, high)
            np.left_shift(pair, 8, out=pair)
            np.copyto(low_half, low)
            np.bitwise_or(pair, low_half, out=pair)
            np.copyto(index, pair)
            np.take(table, index, out=found, mode="clip")
            if found is not result:
                np.copyto(result, found)

    return run


def bind_lut(site: Site) -> Run:
    """y = t[min(max(x - base, 0), e - 1)], or with a shift interpolated between two entries."""
    y, x, table = site.views["y"], site.views["x"], site.views["t"]
    evaluate = _reader(site)
    y, x = collapse([y, x])
    expanded_once = expanded_table(site)
    if expanded_once is not None:
        return _look_up_one(site, y, x, expanded_once)
    if x.dtype.itemsize == 1:
        expanded = np.empty(256, y.dtype)
        look_up = _look_up_one(site, y, x, expanded)

        def run_bytes() -> None:
            np.copyto(expanded, evaluate(table, _codes(x.dtype)))
            look_up()

        return run_bytes
    work = pieces([y, x])

    def run() -> None:
        for result, part in work:
            np.copyto(result, evaluate(table, part))

    return run


def expanded_table(site: Site) -> Array | None:
    """What a lut with a constant table gives for every x of one or two bytes, in the order of unsigned codes; None for other luts."""
    x = site.views["x"]
    if x.dtype.itemsize > 2 or "t" not in site.constants:
        return None
    key, content = site.constants["t"]
    memo = ("lut", key, x.dtype, tuple(site.instruction.attributes))
    if memo not in site.memo:
        site.memo[memo] = _reader(site)(content, _codes(x.dtype))
    expanded: Array = site.memo[memo]
    return expanded


def _codes(dtype: np.dtype[Any]) -> Array:
    """Every value of a type of one or two bytes, in the order of unsigned codes."""
    codes: Array = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    return codes


def _reader(site: Site) -> Callable[[Array, Array], Array]:
    """(table, x) → what lut reads there."""
    base, shift, entries = int(site.attributes["base"]), int(site.attributes["shift"]), len(site.views["t"])
    if shift == 0:
        return lambda table, x: table[np.clip(x.astype(np.int64) - base, 0, entries - 1)]
    if entries < 2 or not 0 < shift < 16:
        site.fault(f"a table of {entries} entries with a shift of {shift}", "an interpolated table needs 2 entries and a shift of 1 to 15")
    if site.views["t"].dtype.kind not in "iu":
        site.fault("an interpolated table of f32", "its entries must be integers")

    def interpolate(table: Array, x: Array) -> Array:
        """t[i] + (((t[i+1] - t[i]) * rest + half) >> shift): integers throughout."""
        place = np.clip(x.astype(np.int64) - base, 0, (entries - 1) << shift)
        index = np.minimum(place >> shift, entries - 2)
        knots = table.astype(np.int64)
        rise = (knots[index + 1] - knots[index]) * (place - (index << shift))
        between: Array = knots[index] + ((rise + (1 << (shift - 1))) >> shift)
        return between.astype(table.dtype)

    return interpolate


def bind_fill(site: Site) -> Run:
    """y = value."""
    y = site.views["y"]
    stored = y.dtype.type(site.attributes["value"])
    return lambda: np.copyto(y, stored)


def bind_copy(site: Site) -> Run:
    """ld and st: y[...] = x[...]."""
    y, x = collapse([site.views["y"], site.views["x"]])
    return lambda: np.copyto(y, x)


def bind_gather(site: Site) -> Run:
    """gather: y[n, :] = x[i[n], :]; a negative index counts from the end."""
    y, x, index = (site.views[name] for name in ("y", "x", "i"))
    rows = len(x)

    def run() -> None:
        outside = (index < -rows) | (index >= rows)
        if outside.any():
            site.fault(f"index {int(index[outside][0])} is outside a table of {rows} rows", f"expected {-rows} to {rows - 1}; check the input data")
        np.copyto(y, x[index])

    return run
