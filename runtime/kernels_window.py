"""The vector engine's windows and reductions: maxpool, avgpool, reduce, resize.

The one big idea: a window's rows and columns can be reduced one after the other, and every sum is over integers, so each is a
few whole-array operations and exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.memory import NAMES, Array
from runtime.requantize import DEFAULT_CLAMP, real, round_and_clamp, store
from runtime.site import Run, Site
from runtime.windows import Geometry, geometry, pad, tap


def bind_maxpool(site: Site) -> Run:
    """y = largest x in the window; padding never wins."""
    y, x = site.views["y"], site.views["x"]
    shape = geometry(site, site.attributes["kernel"])
    padded = pad(site, shape, int(np.iinfo(x.dtype).min))
    across = [tap(padded.array, shape, 1, index) for index in range(shape.kernel[1])]
    widest = site.scratch.take("widest", across[0].shape, x.dtype)
    down = [tap(widest, shape, 0, index) for index in range(shape.kernel[0])]

    def run() -> None:
        padded.refresh()
        _fold(np.maximum, across, widest)
        _fold(np.maximum, down, y)

    return run


def _fold(combine: Callable[..., Array], terms: list[Array], out: Array) -> None:
    np.copyto(out, terms[0])
    for term in terms[1:]:
        combine(out, term, out=out)


def _inside(x: Array, shape: Geometry) -> tuple[Array, Array]:
    """How many taps of each output row, and of each output column, lie inside x."""
    counts = []
    for axis in (0, 1):
        taps = np.arange(shape.kernel[axis]) * shape.dilation[axis] - shape.pad[axis]
        position = np.arange(shape.outputs[axis])[:, None] * shape.stride[axis] + taps
        counts.append(((position >= 0) & (position < x.shape[axis])).sum(axis=1))
    return counts[0], counts[1]


def bind_avgpool(site: Site) -> Run:
    """y = clamp(rint(float32(sum of (x - zx)) * float32(scale / count)) + zy)."""
    y, x = site.views["y"], site.views["x"]
    shape = geometry(site, site.attributes["kernel"])
    zero_x, zero_y = int(site.attributes["zx"]), int(site.attributes["zy"])
    rows, columns = _inside(x, shape)
    count = rows[:, None] * columns if site.attributes["count"] == "inside" else np.full(shape.outputs, shape.taps)
    factor = (np.float32(site.attributes["scale"]) / count.astype(np.float32))[:, :, None]
    largest = max(abs(int(limit) - zero_x) for limit in (np.iinfo(x.dtype).min, np.iinfo(x.dtype).max))
    dtype = np.float32 if largest * shape.taps <= 1 << 24 else np.float64  # a float64 sum is exact, and rounded to float32 once
    top, left, _, _ = shape.pad
    height, width, channels = x.shape
    values = site.scratch.take("values", (height + top + shape.pad[2], width + left + shape.pad[3], channels), dtype)
    interior = values[top : top + height, left : left + width]
    across = [tap(values, shape, 1, index) for index in range(shape.kernel[1])]
    row_sums = site.scratch.take("row_sums", across[0].shape, dtype)
    down = [tap(row_sums, shape, 0, index) for index in range(shape.kernel[0])]
    sums = site.scratch.take("sums", y.shape, dtype)

    def run() -> None:
        values[...] = 0
        np.subtract(x, dtype(zero_x), out=interior, dtype=dtype, casting="unsafe")
        _fold(np.add, across, row_sums)
        _fold(np.add, down, sums)
        scaled = sums.astype(np.float32) * factor
        np.copyto(y, round_and_clamp(scaled, zero_y, NAMES[y.dtype], DEFAULT_CLAMP))

    return run


def bind_reduce(site: Site) -> Run:
    """y = op of (x - zero) over every dimension where y has size 1."""
    y, x, name = site.views["y"], site.views["x"], str(site.attributes["op"])
    axes = tuple(axis for axis, size in enumerate(y.shape) if size == 1 and x.shape[axis] != 1)
    accumulate, zero = bool(site.attributes["accumulate"]), int(site.attributes["zero"])
    if name in ("max", "min"):
        return _bind_extreme(site, axes, accumulate=accumulate)
    integer = np.int64 if y.dtype.itemsize > 4 or x.dtype.itemsize > 2 else np.int32  # a sum modulo 2**32 holds any narrower one

    def run() -> None:
        values = x.astype(integer)
        if zero:
            values -= zero
        if name == "sumsq":
            values *= values
        total = np.add.reduce(values, axis=axes, dtype=integer, keepdims=True) if axes else values
        if accumulate:
            total = total.astype(np.int64) + y
        np.copyto(y, total, casting="unsafe")

    return run


def _bind_extreme(site: Site, axes: tuple[int, ...], *, accumulate: bool) -> Run:
    y, x = site.views["y"], site.views["x"]
    combine = np.maximum if site.attributes["op"] == "max" else np.minimum

    def run() -> None:
        kept = combine.reduce(x, axis=axes, keepdims=True) if axes else x
        np.copyto(y, combine(kept, y) if accumulate else kept, casting="unsafe")

    return run


def bind_resize(site: Site) -> Run:
    """Linear interpolation of real(x), each step in float32, in the order of the table."""
    y, x, attributes = site.views["y"], site.views["x"], site.attributes

    def run() -> None:
        i0, i1, a0, a1 = (part[:, None] for part in positions(site, "r", x.shape[0]))
        j0, j1, b0, b1 = positions(site, "q", x.shape[1])
        values = real(x, attributes["qx"])
        with np.errstate(all="ignore"):
            total = (b0 * a0)[..., None] * values[i0, j0]
            total += (b1 * a0)[..., None] * values[i0, j1]
            total += (b0 * a1)[..., None] * values[i1, j0]
            total += (b1 * a1)[..., None] * values[i1, j1]
            np.copyto(y, store(total, attributes["qy"], NAMES[y.dtype], attributes["clamp"]))

    return run


def positions(site: Site, name: str, size: int) -> tuple[Array, Array, Array, Array]:
    """The two source indices and their float32 weights, per output row or column. Faults on positions outside x."""
    table = np.ascontiguousarray(site.views[name])
    indices, weights = table[:, :2], table.view(np.float32)[:, 2:]
    if indices.min() < 0 or indices.max() >= size:
        site.fault(f"{name} holds positions {indices.min()} to {indices.max()}, but x has 0 to {size - 1}", "check the table that was loaded there")
    return indices[:, 0], indices[:, 1], weights[:, 0], weights[:, 1]
