"""The compiled engine: the instructions where numba's loops are quicker than numpy, with the same bytes.

The one big idea: a kernel here either returns a closure over one compiled call, or None, and then numpy's kernel runs: whatever is
unusual (16-bit operands, odd strides, scales that are not constants) is not done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime import compiled
from runtime.kernels_elementwise import byte_table, expanded_table
from runtime.memory import Array
from runtime.requantize import bounds
from runtime.scratch import collapse
from runtime.site import Site
from runtime.windows import Geometry, geometry

Run = Callable[[], None]
HAS_PRODUCTS = compiled.has_dot_products()
#: by how much the unsigned bytes that a product takes exceed what they stand for
SHIFT = 128


def address(array: Array) -> int:
    """Where an array begins; whoever keeps the number keeps the array."""
    return int(array.ctypes.data)


def bind_conv(site: Site) -> Run | None:
    """conv of bytes with one group: gathered windows times packed weights."""
    x, w, y = (site.views[name] for name in ("x", "w", "y"))
    if not HAS_PRODUCTS or x.dtype != np.int8 or site.attributes["groups"] != 1 or not _rows_of(x, y):
        return None
    shape = geometry(site, w.shape[:2])
    depth = shape.taps * x.shape[2]
    matrix = w.reshape(depth, w.shape[3])
    if "w" not in site.constants and not np.may_share_memory(matrix, w):
        return None
    left = _left(site, shape.outputs[0] * shape.outputs[1], depth)
    gathering = None if site.scratch.holds(left, site.window) else _gathering(site, shape, left)
    return _multiply(site, gathering, left, _Right(site, "w", depth, matrix), y, "b")


def bind_matmul(site: Site) -> Run | None:
    """matmul of bytes."""
    a, b, y = (site.views[name] for name in ("a", "b", "y"))
    if not HAS_PRODUCTS or a.dtype != np.int8 or y.strides[1] != y.itemsize:
        return None
    (m, k), left = a.shape, _left(site, *a.shape)
    site.scratch.holds(left, None)
    arguments = (address(a), *a.strides, m, k, address(left), left.strides[0])
    return _multiply(site, lambda: compiled.unsigned_rows(*arguments), left, _Right(site, "b", k, b), y.reshape(1, *y.shape), "c")


def _rows_of(*tiles: Array) -> bool:
    """Whether the elements of the last dimension lie side by side."""
    return all(tile.shape[-1] == 1 or tile.strides[-1] == tile.itemsize for tile in tiles)


def _left(site: Site, rows: int, depth: int) -> Array:
    """Room for unsigned rows [rows, depth], each with what it takes to fill the last group of taps."""
    return site.scratch.take("unsigned", (rows, -(-depth // compiled.TAPS) * compiled.TAPS), np.uint8)


def _gathering(site: Site, shape: Geometry, left: Array) -> Run:
    x, zero = site.views["x"], int(site.attributes["zero"])
    height, width, channels = x.shape
    joined = shape.dilation[1] == 1 and x.strides[1] == channels
    runs = (shape.kernel[1], 1) if joined else (1, shape.kernel[1])  # taps at once, and how often
    if shape.taps == 1 and shape.stride == (1, 1) and not shape.padded and left.shape[1] == channels and x.flags.c_contiguous:
        rows = (address(x), x.size, 1, 1, x.size, address(left), left.size)
        return lambda: compiled.unsigned_rows(*rows)
    sizes = (*shape.outputs, shape.kernel[0], *shape.stride, *shape.dilation, *shape.pad[:2])
    arguments = (address(x), *x.strides[:2], height, width, channels, *sizes, zero, address(left), left.strides[0], *runs)
    return lambda: compiled.windows(*arguments)


class _Right:
    """The right matrix of a product, packed: once if it is a constant, else by `refresh` before each use. `sums` are its columns' sums."""

    def __init__(self, site: Site, name: str, depth: int, matrix: Array):
        columns = -(-matrix.shape[1] // compiled.LANES) * compiled.LANES
        size = columns * -(-depth // compiled.TAPS) * compiled.TAPS
        self.depth = depth
        self.refresh: Run | None = None
        if name in site.constants:
            key, content = site.constants[name]
            memo = ("packed", key, depth)
            if memo not in site.memo:
                site.memo[memo] = np.empty(size, np.int8), np.empty(columns, np.int32)
                compiled.pack(*_pack_arguments(np.ascontiguousarray(content).reshape(depth, -1), *site.memo[memo]))
            self.packed, self.sums = site.memo[memo]
            return
        self.packed, self.sums = site.scratch.take("packed", (size,), np.int8), site.scratch.take("column_sums", (columns,), np.int32)
        arguments = _pack_arguments(matrix, self.packed, self.sums)
        self.refresh = lambda: compiled.pack(*arguments)


def _pack_arguments(matrix: Array, packed: Array, sums: Array) -> tuple[int, ...]:
    return (address(matrix), *matrix.strides, *matrix.shape, address(packed), address(sums))


def _multiply(site: Site, fill_left: Run | None, left: Array, right: _Right, y: Array, bias_name: str) -> Run:
    """y[groups, rows, n] (+)= left times right + bias, with the operands' zero points taken off."""
    zero_left = int(site.attributes.get("za", 0)) + SHIFT
    zero_right = int(site.attributes.get("zb", 0))
    n, (groups, rows, _) = y.shape[2], y.shape
    if y.strides[0] == rows * y.strides[1]:
        groups, rows = 1, groups * rows
    accumulate = bool(site.attributes["accumulate"])
    target = site.scratch.take("integers", y.shape, np.int32) if accumulate else y
    start = np.zeros(len(right.sums), np.int64)
    offset = np.zeros(len(start), np.int32)

    def set_offset(bias: Array | None) -> None:
        """What the zero points add to every row, and the bias."""
        np.multiply(right.sums, -zero_left, out=start, casting="unsafe")
        start[:n] += right.depth * zero_left * zero_right
        if bias is not None:
            start[:n] += bias
        np.copyto(offset, start, casting="unsafe")

    bias = site.views.get(bias_name)
    fixed = right.refresh is None and (bias is None or bias_name in site.constants)
    if fixed:
        set_offset(None if bias is None else site.constants[bias_name][1])
    place, row = address(target), target.strides[1]
    arguments = (
        address(left), left.strides[0], address(right.packed), left.shape[1] // compiled.TAPS, address(offset),
        place, row, target.strides[0], groups, rows, n,
    )  # fmt: skip
    row_sums = (address(left), left.strides[0], rows, right.depth, zero_right, place, row, n)
    steps = [
        *([] if fill_left is None else [fill_left]),
        *([] if right.refresh is None else [right.refresh]),
        *([] if fixed else [lambda: set_offset(bias)]),
        lambda: compiled.product(*arguments),
        *([lambda: compiled.subtract_row_sums(*row_sums)] if zero_right else []),
        *([lambda: np.add(y, target, out=y)] if accumulate else []),
    ]
    return _sequence(steps, (left, right, offset, target, y))


def _sequence(steps: list[Any], kept: tuple[Any, ...]) -> Run:
    """The steps one after the other, holding on to the arrays whose addresses they know."""
    if len(steps) == 1:
        only = steps[0]

        def run_one(_: Any = kept) -> None:
            only()

        return run_one

    def run(_: Any = kept) -> None:
        for step in steps:
            step()

    return run


def bind_dwconv(site: Site) -> Run | None:
    """dwconv of bytes."""
    x, w, y = (site.views[name] for name in ("x", "w", "y"))
    if x.dtype != np.int8 or not _rows_of(x, w, y):
        return None
    shape, bias = geometry(site, w.shape[:2]), site.views.get("b")
    if bias is not None and not _rows_of(bias):
        return None
    bias = np.zeros(y.shape[2], np.int32) if bias is None else bias
    start = (address(bias), address(y), *y.strides[:2], *y.shape)
    sizes = (*x.shape, *shape.outputs, *shape.kernel, *shape.stride, *shape.dilation, *shape.pad[:2])
    arguments = (address(x), *x.strides[:2], *sizes, int(site.attributes["zero"]), address(w), *w.strides[:2], address(y), *y.strides[:2])
    steps = [lambda: compiled.depthwise(*arguments)]
    if not site.attributes["accumulate"]:
        steps.insert(0, lambda: compiled.start_sums(*start))
    return _sequence(steps, (x, w, y, bias))


def bind_requant(site: Site) -> Run | None:
    """requant of accumulators to bytes by constant scales."""
    a, y = site.views["a"], site.views["y"]
    fixed = "s" not in site.views or "s" in site.constants
    if site.attributes["mode"] != "fp32.rne" or site.sums is not None or not fixed or a.dtype != np.int32 or y.dtype != np.int8:
        return None
    n = y.shape[-1]
    scales = np.ascontiguousarray(site.constants["s"][1] if "s" in site.views else np.full(n, site.attributes["scale"], np.float32))
    tiles = _as_rows([a, y])
    if tiles is None or not _rows_of(a, y) or not np.isfinite(scales).all():
        return None
    a, y = tiles
    low, high = bounds("s8", tuple(site.attributes["clamp"]))
    limits = (float(site.attributes["zero"]), float(low), float(high))
    arguments = (address(a), *a.strides[:2], address(y), *y.strides[:2], *y.shape, address(scales), *limits)
    return _sequence([lambda: compiled.requantize(*arguments)], (a, y, scales))


def _as_rows(tiles: list[Array]) -> list[Array] | None:
    """The same arrays as [groups, rows, n]; None if that takes more dimensions."""
    merged = collapse([tile.reshape(1, *tile.shape) for tile in tiles], keep=1)
    if merged[0].ndim > 3:
        return None
    return [tile.reshape((1,) * (3 - tile.ndim) + tile.shape) for tile in merged]


def bind_by_table(site: Site) -> Run | None:
    """Elementwise instructions and look-ups of one or two bytes: an entry per element."""
    y, *sources = site.views.values()
    if site.instruction.name == "lut":
        sources, table = sources[:1], expanded_table(site)
    else:
        table = byte_table(site)
    tiles = _as_rows([y, *sources])
    if table is None or tiles is None or any(tile.itemsize != 1 for tile in tiles) or not _rows_of(y):
        return None
    y, *operands = tiles
    low = operands[-1]
    high = (address(operands[0]), *operands[0].strides) if len(operands) == 2 else (0, 0, 0, 0)
    table = np.ascontiguousarray(table)
    arguments = (address(table), *high, address(low), *low.strides, address(y), *y.strides[:2], *y.shape)
    return _sequence([lambda: compiled.look_up(*arguments)], (table, operands, y))


KERNELS: dict[str, Callable[[Site], Run | None]] = {
    "conv": bind_conv, "matmul": bind_matmul, "dwconv": bind_dwconv, "requant": bind_requant,
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "cmp", "select", "cvt", "sqrt", "lut"), bind_by_table),
}  # fmt: skip
