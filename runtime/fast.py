"""The compiled engine: the instructions where numba's loops are quicker than numpy, with the same bytes.

The one big idea: a kernel here either returns a closure over one compiled call, or None, and then numpy's kernel runs: whatever is
unusual (16-bit operands, odd strides, scales that are not constants) is not done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime import native
from runtime.kernels_elementwise import byte_table, expanded_table
from runtime.kernels_window import positions
from runtime.memory import NAMES, Array
from runtime.native import LANES, REGISTER_BYTES, TAPS, Call
from runtime.requantize import bounds
from runtime.scratch import collapse
from runtime.site import Run, Site
from runtime.windows import Geometry, geometry

native.load()
HAS_PRODUCTS = native.HAS_PRODUCTS
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
    return _multiply(site, gathering, left, depth, _product_weights(site, "w", depth, matrix), y, "b")


def bind_matmul(site: Site) -> Run | None:
    """matmul of bytes."""
    a, b, y = (site.views[name] for name in ("a", "b", "y"))
    if not HAS_PRODUCTS or a.dtype != np.int8 or y.strides[1] != y.itemsize:
        return None
    (m, k), left = a.shape, _left(site, *a.shape)
    site.scratch.holds(left, None)
    arguments = (address(a), *a.strides, m, k, address(left), left.strides[0])
    return _multiply(site, Call("unsigned_rows", *arguments), left, k, _product_weights(site, "b", k, b), y.reshape(1, *y.shape), "c")


def _rows_of(*tiles: Array) -> bool:
    """Whether the elements of the last dimension lie side by side."""
    return all(tile.shape[-1] == 1 or tile.strides[-1] == tile.itemsize for tile in tiles)


def _left(site: Site, rows: int, depth: int) -> Array:
    """Room for unsigned rows [rows, depth], each with what it takes to fill the last group of taps."""
    return site.scratch.take("unsigned", (rows, -(-depth // TAPS) * TAPS), np.uint8)


def _gathering(site: Site, shape: Geometry, left: Array) -> Run:
    x, zero = site.views["x"], int(site.attributes["zero"])
    height, width, channels = x.shape
    joined = shape.dilation[1] == 1 and x.strides[1] == channels
    runs = (shape.kernel[1], 1) if joined else (1, shape.kernel[1])  # taps at once, and how often
    every = shape.taps == 1 and shape.outputs == (height, width) and not shape.padded  # and then the stride is of no matter
    if every and left.shape[1] == channels and x.flags.c_contiguous:
        rows = (address(x), x.size, 1, 1, x.size, address(left), left.size)
        return Call("unsigned_rows", *rows)
    sizes = (*shape.outputs, shape.kernel[0], *shape.stride, *shape.dilation, *shape.pad[:2])
    arguments = (address(x), *x.strides[:2], height, width, channels, *sizes, zero, address(left), left.strides[0], *runs)
    return Call("windows", *arguments)


class _Packed:
    """Weights packed for dot products, `size` bytes for each column, by `pack(packed, sums)`, which also fills in each result's sum of weights.

    `refresh` packs them before each use, into memory that is still in the cache when the product reads it: a second copy of all
    weights would be large, and no quicker. `fixed`: the sums are those of constants, and known.
    """

    def __init__(self, site: Site, name: str, columns: int, size: int, pack: Callable[[Array, Array], Run]):
        columns = -(-columns // LANES) * LANES
        self.packed = site.scratch.take("packed", (size * columns,), np.int8)
        self.fixed = name in site.constants
        key, unknown = None, False
        if self.fixed:
            key = ("sums of weights", site.instruction.name, site.constants[name][0])
            unknown = key not in site.memo
            self.sums: Array = site.memo.setdefault(key, np.empty(columns, np.int32))
        else:
            self.sums = site.scratch.take("column_sums", (columns,), np.int32)
        pack_now = pack(self.packed, self.sums)
        self.refresh = None if site.scratch.holds(self.packed, key) else pack_now
        if unknown:
            pack_now()


def _product_weights(site: Site, name: str, depth: int, matrix: Array) -> _Packed:
    def pack(packed: Array, sums: Array) -> Run:
        call = Call("pack", address(matrix), *matrix.strides, *matrix.shape, address(packed), address(sums))
        return _sequence([call], (matrix, packed, sums))

    return _Packed(site, name, matrix.shape[1], -(-depth // TAPS) * TAPS, pack)


def _tap_weights(site: Site) -> _Packed:
    w = site.views["w"]
    height, width, channels = w.shape

    def pack(packed: Array, sums: Array) -> Run:
        call = Call("pack_taps", address(w), *w.strides[:2], *w.shape, address(packed), address(sums))
        return _sequence([call], (w, packed, sums))

    return _Packed(site, "w", channels, height * -(-width // TAPS) * TAPS, pack)


class _Offset:
    """What is added to every row of sums: the bias, less what zero points contribute; `refresh` is None where it never changes."""

    def __init__(self, site: Site, weights: _Packed, bias_name: str, *, zero_left: int, per_column: int = 0):
        self.values = np.zeros(len(weights.sums), np.int32)
        bias = site.views.get(bias_name)

        def refresh() -> None:
            start = weights.sums.astype(np.int64) * -zero_left + per_column
            if bias is not None:
                start[: len(bias)] += bias
            np.copyto(self.values, start, casting="unsafe")

        fixed = weights.fixed and (bias is None or bias_name in site.constants)
        self.refresh = None if fixed else refresh
        if fixed:
            refresh()


def _multiply(site: Site, fill_left: Run | None, left: Array, depth: int, right: _Packed, y: Array, bias_name: str) -> Run:
    """y[groups, rows, n] (+)= left times right + bias, with the operands' zero points taken off."""
    zero_left, zero_right = int(site.attributes.get("za", 0)) + SHIFT, int(site.attributes.get("zb", 0))
    offset = _Offset(site, right, bias_name, zero_left=zero_left, per_column=depth * zero_left * zero_right)
    groups, rows, n = y.shape
    if y.strides[0] == rows * y.strides[1]:
        groups, rows = 1, groups * rows
    target = _target(site, y)
    place, row = address(target), target.strides[1]
    arguments = (
        address(left), left.strides[0], address(right.packed), left.shape[1] // TAPS, address(offset.values),
        place, row, target.strides[0], groups, rows, n,
    )  # fmt: skip
    row_sums = (address(left), left.strides[0], rows, depth, zero_right, place, row, n)
    take_off = Call("subtract_row_sums", *row_sums) if zero_right else None
    steps = [fill_left, right.refresh, offset.refresh, Call("product", *arguments), take_off, _adding(y, target)]
    return _sequence(steps, (left, right, offset, target, y))


def _target(site: Site, y: Array) -> Array:
    """Where new sums go: to y, or beside it if they are to be added."""
    return site.scratch.take("integers", y.shape, np.int32) if site.attributes["accumulate"] else y


def _adding(y: Array, target: Array) -> Run | None:
    return None if target is y else lambda: np.copyto(y, y + target)


def _sequence(wanted: list[Run | None], kept: tuple[Any, ...]) -> Run:
    """The steps (None: nothing to do) one after the other, holding on to the arrays whose addresses they know."""
    steps = [step for step in wanted if step is not None]
    if len(steps) == 1 and isinstance(steps[0], Call):
        steps[0].kept = kept
        return steps[0]

    def run(_: Any = kept) -> None:
        for step in steps:
            step()

    return run


def bind_dwconv(site: Site) -> Run | None:
    """dwconv of bytes."""
    x, w, y = (site.views[name] for name in ("x", "w", "y"))
    bias = site.views.get("b")
    if x.dtype != np.int8 or not _rows_of(x, w, y) or (bias is not None and not _rows_of(bias)):
        return None
    shape, zero = geometry(site, w.shape[:2]), int(site.attributes["zero"])
    sizes = (*x.shape, *shape.outputs, *shape.kernel, *shape.stride, *shape.dilation, *shape.pad[:2])
    if not HAS_PRODUCTS:
        bias = np.zeros(y.shape[2], np.int32) if bias is None else bias
        start = (address(bias), address(y), *y.strides[:2], *y.shape)
        arguments = (address(x), *x.strides[:2], *sizes, zero, address(w), *w.strides[:2], address(y), *y.strides[:2])
        begin = None if site.attributes["accumulate"] else Call("start_sums", *start)
        return _sequence([begin, Call("depthwise", *arguments)], (x, w, y, bias))
    weights, target, fill = _tap_weights(site), _target(site, y), np.full(LANES, zero, np.int8)
    offset = _Offset(site, weights, "b", zero_left=SHIFT)
    registers = shape.reach(0) * shape.outputs[1] * -(-shape.kernel[1] // TAPS)
    taps = site.scratch.take("taps", (registers, REGISTER_BYTES), np.uint8)
    places = (address(fill), address(taps), address(weights.packed), address(offset.values), address(target))
    by_products = (address(x), *x.strides[:2], *sizes, *places, *target.strides[:2])
    steps = [weights.refresh, offset.refresh, Call("depthwise_by_dot_products", *by_products), _adding(y, target)]
    return _sequence(steps, (x, fill, taps, weights, offset, target, y))


def bind_requant(site: Site) -> Run | None:
    """requant of accumulators by constant scales."""
    a, y = site.views["a"], site.views["y"]
    fixed = "s" not in site.views or "s" in site.constants
    if site.attributes["mode"] != "fp32.rne" or site.sums is not None or not fixed or a.dtype != np.int32:
        return None
    n = y.shape[-1]
    scales = np.ascontiguousarray(site.constants["s"][1] if "s" in site.views else np.full(n, site.attributes["scale"], np.float32))
    tiles = _as_rows([a, y])
    if tiles is None or not _rows_of(a, y) or not np.isfinite(scales).all():
        return None
    a, y = tiles
    low, high = bounds(NAMES[y.dtype], tuple(site.attributes["clamp"]))
    limits = (float(site.attributes["zero"]), float(low), float(high))
    arguments = (address(a), *a.strides[:2], address(y), *y.strides[:2], y.itemsize, *y.shape, address(scales), *limits)
    return _sequence([Call("requantize", *arguments)], (a, y, scales))


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
    if table is None or tiles is None or any(tile.itemsize > 2 for tile in tiles) or not _rows_of(tiles[0]):
        return None
    y, *operands = tiles
    table = np.ascontiguousarray(table)
    if any(tile.itemsize != 1 for tile in tiles):
        return _look_up_wide(table, y, operands)
    low = operands[-1]
    high = (address(operands[0]), *operands[0].strides) if len(operands) == 2 else (0, 0, 0, 0)
    arguments = (address(table), *high, address(low), *low.strides, address(y), *y.strides[:2], *y.shape)
    return _sequence([Call("look_up", *arguments)], (table, operands, y))


def _look_up_wide(table: Array, y: Array, operands: list[Array]) -> Run | None:
    if len(operands) > 1:
        return None
    x = operands[0]
    arguments = (address(table), address(x), *x.strides, x.itemsize, address(y), *y.strides[:2], y.itemsize, *y.shape)
    return _sequence([Call("look_up_wide", *arguments)], (table, x, y))


def bind_resize(site: Site) -> Run | None:
    """resize of bytes to bytes."""
    y, x, r, q = (site.views[name] for name in ("y", "x", "r", "q"))
    if x.dtype != np.int8 or y.dtype != np.int8 or not _rows_of(y, x, r, q):
        return None
    (scale_x, zero_x), (scale_y, zero_y) = site.attributes["qx"], site.attributes["qy"]
    low, high = bounds("s8", tuple(site.attributes["clamp"]))
    places = (address(x), *x.strides[:2], address(r), r.strides[0], address(q), q.strides[0], address(y), *y.strides[:2])
    reals = tuple(float(value) for value in (scale_x, zero_x, scale_y, zero_y, low, high))

    def check() -> None:
        positions(site, "r", x.shape[0])  # faults on any outside of x
        positions(site, "q", x.shape[1])

    return _sequence([check, Call("resize", *places, *y.shape, *reals)], (y, x, r, q))


KERNELS: dict[str, Callable[[Site], Run | None]] = {
    "conv": bind_conv, "matmul": bind_matmul, "dwconv": bind_dwconv, "requant": bind_requant, "resize": bind_resize,
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "cmp", "select", "cvt", "sqrt", "lut"), bind_by_table),
}  # fmt: skip
