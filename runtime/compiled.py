"""Loops over raw memory that numba compiles for this computer's processor; `fast.py` decides where they run, `native.py` loads them.

The one big idea: the bound operands are plain addresses and strides (in bytes), so a call costs less than a microsecond and each loop
is one pass over the cache. Sums are 32-bit integers that wrap, exact in any order; floating point takes the very steps of the numpy
kernels, one rounding each (numba contracts nothing). Nothing here checks bounds: the tiles were checked when they were bound.
All is in one file, whose digest tells `native.py` whether the object code that it keeps is still of these loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from runtime.native import FEATURES, HAS_PRODUCTS, LANES, PROCESSOR, REGISTER_BYTES, TAPS

ROWS = 6  # rows of the left matrix at a time: with 4 registers of columns, 24 sums, 4 weights, 1 broadcast of the 32 registers
PANEL = 4 * LANES  # columns of the right matrix at a time
#: what turns int8 into the unsigned byte of the same order, 128 larger
FLIP = np.uint8(0x80)

Address, Real = types.intp, types.float32


@dataclass(frozen=True, slots=True)
class _Loop:
    """A function to compile, its arguments' types, and whether it needs the processor's dot products."""

    function: Any
    arguments: tuple[Any, ...]
    by_products: bool


_loops: list[_Loop] = []


def _compiled(*arguments: Any, by_products: bool = False) -> Callable[[Any], Any]:
    def note(function: Any) -> Any:
        _loops.append(_Loop(function, arguments, by_products))
        return function

    return note


def _pointer_to(element: Any) -> Any:
    """A compiled function from an address to a pointer to elements of that type."""

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        signature = types.CPointer(element)(types.intp)
        return signature, lambda context, builder, signed, values: builder.inttoptr(values[0], context.get_value_type(signed.return_type))

    return pointer


_bytes, _codes = _pointer_to(types.uint8), _pointer_to(types.int8)
_shorts, _sums, _reals = _pointer_to(types.uint16), _pointer_to(types.int32), _pointer_to(types.float32)

# ---- generated code: registers of sixteen sums --------------------------------------------------------------------------

_NUMBER, _WIDE, _FLAG, _BYTE = (ir.IntType(bits) for bits in (32, 64, 1, 8))
_REGISTER, _MASK, _QUARTER = (ir.VectorType(kind, LANES) for kind in (_NUMBER, _FLAG, _BYTE))


class _Writer:
    """Writes LLVM instructions where `builder` stands; addresses and offsets are 64-bit numbers."""

    def __init__(self, builder: Any):
        self.builder = builder

    def plus(self, base: Any, offset: Any, times: int = 1) -> Any:
        """base + offset * times."""
        if isinstance(offset, int):
            return self.builder.add(base, ir.Constant(_WIDE, offset * times))
        return self.builder.add(base, self.builder.mul(offset, ir.Constant(_WIDE, times)))

    def load(self, place: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(place, kind.as_pointer()), align=1)

    def broadcast(self, value: Any) -> Any:
        """A 32-bit number in all lanes."""
        nothing = ir.Constant(_REGISTER, ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(_NUMBER, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(_REGISTER, [0] * LANES))

    def lanes_below(self, count: Any, start: int = 0) -> Any:
        """The mask of the lanes whose number, counted from `start`, is below `count`."""
        numbers = ir.Constant(_REGISTER, [start + lane for lane in range(LANES)])
        return self.builder.icmp_signed("<", numbers, self.broadcast(self.builder.trunc(count, _NUMBER)))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def start(self, value: Any) -> Any:
        """A pointer to a sum that begins with `value`; LLVM keeps it in a register."""
        place = cgutils.alloca_once(self.builder, _REGISTER)
        self.builder.store(value, place)
        return place

    def dot(self, total: Any, unsigned: Any, signed: Any) -> None:
        """Add the four products of each lane to its sum behind the pointer `total`."""
        self.builder.store(self.call("llvm.x86.avx512.vpdpbusd.512", _REGISTER, self.builder.load(total), unsigned, signed), total)

    def store(self, total: Any, place: Any, mask: Any) -> None:
        pointer = self.builder.inttoptr(place, _REGISTER.as_pointer())
        self.call("llvm.masked.store.v16i32.p0", ir.VoidType(), self.builder.load(total), pointer, ir.Constant(_NUMBER, 4), mask)


# ---- matrix products ---------------------------------------------------------------------------------------------------


def _block(rows: int, vectors: int) -> Any:
    """y[rows, columns] = bias + x[rows, 4 * depth] (unsigned bytes) times w (packed, signed), columns <= 16 * vectors, sums in registers.

    w: for each group of four k, `vectors` registers; a register holds 16 columns of the four k each. `bias` has 16 * vectors entries.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_row, w, depth, bias, y, y_row, columns = values
        write = _Writer(builder)
        starts = [write.load(write.plus(bias, v * REGISTER_BYTES), _REGISTER) for v in range(vectors)]
        sums = [[write.start(start) for start in starts] for _ in range(rows)]
        with cgutils.for_range(builder, depth, intp=_WIDE) as loop:
            step = write.plus(w, loop.index, vectors * REGISTER_BYTES)
            weights = [write.load(write.plus(step, v * REGISTER_BYTES), _REGISTER) for v in range(vectors)]
            place = write.plus(x, loop.index, TAPS)
            for m, row in enumerate(sums):
                four = write.broadcast(write.load(write.plus(place, x_row, m), _NUMBER))
                for total, weight in zip(row, weights, strict=True):
                    write.dot(total, four, weight)
        for v in range(vectors):
            mask = write.lanes_below(columns, v * LANES)
            for m, row in enumerate(sums):
                write.store(row[v], write.plus(write.plus(y, y_row, m), v * REGISTER_BYTES), mask)
        return context.get_dummy_value()

    @intrinsic
    def block(typing_context: Any, x: Any, x_row: Any, w: Any, depth: Any, bias: Any, y: Any, y_row: Any, columns: Any) -> Any:
        return types.void(*[types.intp] * 8), generate

    return block


_six_by_4, _six_by_3, _six_by_2, _six_by_1 = (_block(ROWS, vectors) for vectors in (4, 3, 2, 1))
_one_by_4, _one_by_3, _one_by_2, _one_by_1 = (_block(1, vectors) for vectors in (4, 3, 2, 1))


@_compiled(*[Address] * 11, by_products=True)
def product(x: int, x_row: int, w: int, depth: int, bias: int, y: int, y_row: int, y_group: int, groups: int, rows: int, n: int) -> None:
    """y[groups, rows, n] = bias[n] + x[groups * rows, 4 * depth] times w as `pack` leaves it; `bias` has whole registers."""
    for start in range(0, n, PANEL):
        panel, place, left = w + start * depth * TAPS, bias + start * 4, n - start
        vectors = min(4, (left + LANES - 1) // LANES)
        for group in range(groups):
            source, target = x + group * rows * x_row, y + group * y_group + start * 4
            for first in range(0, rows, ROWS if rows >= ROWS else 1):
                row = min(first, rows - ROWS) if rows >= ROWS else first  # the last block begins early: the same sums once more
                at, to = source + row * x_row, target + row * y_row
                if rows >= ROWS:
                    if vectors == 4:
                        _six_by_4(at, x_row, panel, depth, place, to, y_row, left)
                    elif vectors == 3:
                        _six_by_3(at, x_row, panel, depth, place, to, y_row, left)
                    elif vectors == 2:
                        _six_by_2(at, x_row, panel, depth, place, to, y_row, left)
                    else:
                        _six_by_1(at, x_row, panel, depth, place, to, y_row, left)
                elif vectors == 4:
                    _one_by_4(at, x_row, panel, depth, place, to, y_row, left)
                elif vectors == 3:
                    _one_by_3(at, x_row, panel, depth, place, to, y_row, left)
                elif vectors == 2:
                    _one_by_2(at, x_row, panel, depth, place, to, y_row, left)
                else:
                    _one_by_1(at, x_row, panel, depth, place, to, y_row, left)


def _side_by_side(write: _Writer, places: list[Any], masks: list[Any]) -> Any:
    """The bytes of 16 lanes at four addresses as 64, the four of each lane one after the other; zeros where a mask is not set."""
    zeros, every = ir.Constant(_QUARTER, [0] * LANES), ir.Constant(ir.VectorType(_NUMBER, 2 * LANES), list(range(2 * LANES)))
    pointers = [write.builder.inttoptr(place, _QUARTER.as_pointer()) for place in places]
    one, two, three, four = (
        write.call("llvm.masked.load.v16i8.p0", _QUARTER, pointer, ir.Constant(_NUMBER, 1), mask, zeros)
        for pointer, mask in zip(pointers, masks, strict=True)
    )
    low, high = (write.builder.shuffle_vector(left, right, every) for left, right in ((one, two), (three, four)))
    order = [tap * LANES + lane for lane in range(LANES) for tap in range(TAPS)]
    return write.builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_NUMBER, 4 * LANES), order))


@intrinsic
def _pack_register(typing_context: Any, w: Any, w_row: Any, rows: Any, columns: Any, out: Any, sums: Any) -> Any:
    """out[16, 4] = up to 16 columns of up to four rows of weights, zeros beyond; sums[16] += those of the columns."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        first, row, height, count, target, totals = values
        write = _Writer(builder)
        counts = [builder.select(builder.icmp_signed("<", ir.Constant(_WIDE, tap), height), count, ir.Constant(_WIDE, 0)) for tap in range(TAPS)]
        packed = _side_by_side(write, [write.plus(first, row, tap) for tap in range(TAPS)], [write.lanes_below(each) for each in counts])
        builder.store(packed, builder.inttoptr(target, packed.type.as_pointer()), align=1)
        total, ones = write.start(write.load(totals, _REGISTER)), ir.Constant(_REGISTER, [0x01010101] * LANES)
        write.dot(total, ones, builder.bitcast(packed, _REGISTER))
        builder.store(builder.load(total), builder.inttoptr(totals, _REGISTER.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


@_compiled(*[Address] * 7, by_products=True)
def pack(w: int, w_row: int, w_column: int, k: int, n: int, packed: int, sums: int) -> None:
    """w[k, n] as `product` takes it (its rest filled with zeros), and the sum of each column. `packed` and `sums` hold whole registers."""
    depth, whole = (k + TAPS - 1) // TAPS, (n + LANES - 1) // LANES * LANES
    totals = carray(_sums(sums), whole)
    for column in range(whole):
        totals[column] = 0
    for start in range(0, whole, PANEL):
        wide = min(PANEL, whole - start)
        for group in range(depth):
            source, target = w + group * TAPS * w_row + start * w_column, packed + (start * depth + group * wide) * TAPS
            if w_column == 1:
                for column in range(0, wide, LANES):
                    place, total = target + column * TAPS, sums + (start + column) * 4
                    _pack_register(source + column, w_row, k - group * TAPS, n - start - column, place, total)
                continue
            codes = carray(_codes(target), (wide, TAPS))
            for column in range(wide):
                for tap in range(TAPS):
                    inside = group * TAPS + tap < k and start + column < n
                    value = carray(_codes(source + tap * w_row + column * w_column), 1)[0] if inside else np.int8(0)
                    codes[column, tap] = value
                    totals[start + column] += value


@_compiled(*[Address] * 7)
def unsigned_rows(a: int, a_row: int, a_column: int, m: int, k: int, out: int, out_row: int) -> None:
    """a[m, k] + 128 as rows of bytes."""
    for row in range(m):
        target = carray(_bytes(out + row * out_row), k)
        if a_column == 1:
            source = carray(_bytes(a + row * a_row), k)
            for column in range(k):
                target[column] = source[column] ^ FLIP
        else:
            for column in range(k):
                target[column] = carray(_bytes(a + row * a_row + column * a_column), 1)[0] ^ FLIP


@_compiled(*[Address] * 8)
def subtract_row_sums(x: int, x_row: int, m: int, k: int, factor: int, y: int, y_row: int, n: int) -> None:
    """y[m, n] -= factor * the sum of x[m, k] (unsigned bytes)."""
    for row in range(m):
        source, target = carray(_bytes(x + row * x_row), k), carray(_sums(y + row * y_row), n)
        total = np.int32(0)
        for column in range(k):
            total += np.int32(source[column])
        for column in range(n):
            target[column] -= np.int32(factor * total)


@_compiled(*[Address] * 20)
def windows(
    x: int, x_row: int, x_column: int, height: int, width: int, channels: int, h: int, w: int, kernel_h: int, stride_h: int,
    stride_w: int, dilation_h: int, dilation_w: int, top: int, left: int, zero: int, out: int, out_row: int, run: int, runs: int,
) -> None:  # fmt: skip
    """All windows of x[height, width, channels] + 128 as rows [h * w] of bytes; `run` taps that lie side by side in x are copied at once."""
    fill = np.uint8(zero) ^ FLIP
    for i in range(h):
        for j in range(w):
            place = out + (i * w + j) * out_row
            for k in range(kernel_h):
                row = i * stride_h + k * dilation_h - top
                for part in range(runs):
                    column = j * stride_w + part * dilation_w - left
                    target = carray(_bytes(place), run * channels)
                    place += run * channels
                    first = max(0, -column) if 0 <= row < height else run
                    last = max(first, min(run, width - column)) if 0 <= row < height else run
                    for index in range(first * channels):
                        target[index] = fill
                    for index in range(last * channels, run * channels):
                        target[index] = fill
                    if last > first:
                        size = (last - first) * channels
                        inside = carray(_bytes(place - run * channels + first * channels), size)
                        source = carray(_bytes(x + row * x_row + (column + first) * x_column), size)
                        for index in range(size):
                            inside[index] = source[index] ^ FLIP


# ---- depthwise convolution ---------------------------------------------------------------------------------------------

COLUMNS = 4  # neighbouring results at a time


@intrinsic
def _four_taps(typing_context: Any, first: Any, second: Any, third: Any, fourth: Any, channels: Any, out: Any) -> Any:
    """out[16, 4] = the unsigned bytes of up to 16 channels at four addresses, side by side per channel."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *places, count, target = values
        write = _Writer(builder)
        together = _side_by_side(write, places, [write.lanes_below(count)] * TAPS)
        flipped = builder.xor(together, ir.Constant(together.type, [0x80] * REGISTER_BYTES))
        builder.store(flipped, builder.inttoptr(target, together.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


def _neighbours(columns: int) -> Any:
    """y[columns, channels <= 16] = bias + the sums over rows and groups of taps of t (as `_four_taps` leaves them) times w."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        t, t_row, t_column, w, rows, groups, bias, y, y_column, channels = values
        write = _Writer(builder)
        start = write.load(bias, _REGISTER)
        sums = [write.start(start) for _ in range(columns)]
        with cgutils.for_range(builder, rows, intp=_WIDE) as down:
            line, weights = builder.add(t, builder.mul(down.index, t_row)), write.plus(w, builder.mul(down.index, groups), REGISTER_BYTES)
            with cgutils.for_range(builder, groups, intp=_WIDE) as across:
                place = write.plus(line, across.index, REGISTER_BYTES)
                weight = write.load(write.plus(weights, across.index, REGISTER_BYTES), _REGISTER)
                for column, total in enumerate(sums):
                    write.dot(total, write.load(write.plus(place, t_column, column), _REGISTER), weight)
        mask = write.lanes_below(channels)
        for column, total in enumerate(sums):
            write.store(total, write.plus(y, y_column, column), mask)
        return context.get_dummy_value()

    @intrinsic
    def neighbours(
        typing_context: Any, t: Any, t_row: Any, t_column: Any, w: Any, rows: Any, groups: Any, bias: Any, y: Any, y_column: Any, channels: Any
    ) -> Any:
        return types.void(*[types.intp] * 10), generate

    return neighbours


_four_neighbours, _one_neighbour = _neighbours(COLUMNS), _neighbours(1)


@_compiled(*[Address] * 23, by_products=True)
def depthwise_by_dot_products(
    x: int, x_row: int, x_column: int, height: int, width: int, channels: int, h: int, w: int, kernel_h: int, kernel_w: int, stride_h: int,
    stride_w: int, dilation_h: int, dilation_w: int, top: int, left: int, fill: int, taps: int, weights: int, bias: int, y: int, y_row: int,
    y_column: int,
) -> None:  # fmt: skip
    """y[h, w, channels] = bias + windows of x + 128, each channel times its own taps, packed as `pack_taps` does.

    `fill`: where 16 bytes of what lies around x stand; `taps`: room for [rows that the windows touch, w, groups of taps] registers.
    """
    groups, rows = (kernel_w + TAPS - 1) // TAPS, (h - 1) * stride_h + (kernel_h - 1) * dilation_h + 1
    column_size = groups * REGISTER_BYTES
    row_size = w * column_size
    for start in range(0, channels, LANES):
        count = min(LANES, channels - start)
        for r in range(rows):
            inside = 0 <= r - top < height
            source = x + (r - top) * x_row + start
            for j in range(w):
                for group in range(groups):
                    first = j * stride_w + group * TAPS * dilation_w - left
                    second, third, fourth = first + dilation_w, first + 2 * dilation_w, first + 3 * dilation_w
                    _four_taps(
                        source + first * x_column if inside and 0 <= first < width else fill,
                        source + second * x_column if inside and 0 <= second < width else fill,
                        source + third * x_column if inside and 0 <= third < width else fill,
                        source + fourth * x_column if inside and 0 <= fourth < width else fill,
                        count, taps + r * row_size + j * column_size + group * REGISTER_BYTES,
                    )  # fmt: skip
        packed = weights + start * kernel_h * groups * TAPS
        for i in range(h):
            line, target = taps + i * stride_h * row_size, y + i * y_row + start * 4
            if w < COLUMNS:
                for j in range(w):
                    _one_neighbour(
                        line + j * column_size, dilation_h * row_size, column_size, packed, kernel_h, groups, bias + start * 4,
                        target + j * y_column, y_column, count,
                    )  # fmt: skip
                continue
            for block in range(0, w, COLUMNS):
                j = min(block, w - COLUMNS)  # the last block begins early: the same sums once more
                _four_neighbours(
                    line + j * column_size, dilation_h * row_size, column_size, packed, kernel_h, groups, bias + start * 4,
                    target + j * y_column, y_column, count,
                )  # fmt: skip


@_compiled(*[Address] * 8)
def pack_taps(w: int, w_row: int, w_column: int, kernel_h: int, kernel_w: int, channels: int, packed: int, sums: int) -> None:
    """w[kernel_h, kernel_w, channels] as registers [groups of 16 channels, kernel_h, groups of taps]; the sum of each channel's taps."""
    groups, whole = (kernel_w + TAPS - 1) // TAPS, (channels + LANES - 1) // LANES
    target = carray(_codes(packed), (whole, kernel_h, groups, LANES, TAPS))
    totals = carray(_sums(sums), whole * LANES)
    for channel in range(whole * LANES):
        totals[channel] = 0
        for k in range(kernel_h):
            for tap in range(groups * TAPS):
                inside = channel < channels and tap < kernel_w
                value = carray(_codes(w + k * w_row + tap * w_column + channel), 1)[0] if inside else np.int8(0)
                target[channel // LANES, k, tap // TAPS, channel % LANES, tap % TAPS] = value
                totals[channel] += value


@njit(inline="always")
def _add_tap(total: Any, x: Any, w: Any, channels: int) -> None:
    for c in range(channels):
        total[c] += np.int32(x[c]) * np.int32(w[c])


@njit(inline="always")
def _add_three_taps(total: Any, x: int, x_step: int, w: int, w_step: int, channels: int) -> None:
    x0, x1, x2 = carray(_codes(x), channels), carray(_codes(x + x_step), channels), carray(_codes(x + 2 * x_step), channels)
    w0, w1, w2 = carray(_codes(w), channels), carray(_codes(w + w_step), channels), carray(_codes(w + 2 * w_step), channels)
    for c in range(channels):
        total[c] += np.int32(x0[c]) * np.int32(w0[c]) + np.int32(x1[c]) * np.int32(w1[c]) + np.int32(x2[c]) * np.int32(w2[c])


@_compiled(*[Address] * 23)
def depthwise(
    x: int, x_row: int, x_column: int, height: int, width: int, channels: int, h: int, w: int, kernel_h: int, kernel_w: int, stride_h: int,
    stride_w: int, dilation_h: int, dilation_w: int, top: int, left: int, zero: int, weights: int, w_row: int, w_column: int, y: int,
    y_row: int, y_column: int,
) -> None:  # fmt: skip
    """y[h, w, channels] += windows of x, each channel times its own taps [kernel_h, kernel_w, channels]."""
    for i in range(h):
        for j in range(w):
            total = carray(_sums(y + i * y_row + j * y_column), channels)
            for k in range(kernel_h):
                row, tap = i * stride_h + k * dilation_h - top, 0
                while tap < kernel_w:
                    column = j * stride_w + tap * dilation_w - left
                    place, weight = x + row * x_row + column * x_column, weights + k * w_row + tap * w_column
                    if 0 <= row < height and column >= 0 and tap + 2 < kernel_w and column + 2 * dilation_w < width:
                        _add_three_taps(total, place, dilation_w * x_column, weight, w_column, channels)
                        tap += 3
                        continue
                    if 0 <= row < height and 0 <= column < width:
                        _add_tap(total, carray(_codes(place), channels), carray(_codes(weight), channels), channels)
                    elif zero != 0:
                        taps = carray(_codes(weight), channels)
                        for c in range(channels):
                            total[c] += np.int32(zero) * np.int32(taps[c])
                    tap += 1


@_compiled(*[Address] * 7)
def start_sums(bias: int, y: int, y_row: int, y_column: int, h: int, w: int, n: int) -> None:
    """y[h, w, n] = bias[n]."""
    source = carray(_sums(bias), n)
    for i in range(h):
        for j in range(w):
            target = carray(_sums(y + i * y_row + j * y_column), n)
            for c in range(n):
                target[c] = source[c]


# ---- the vector engine -------------------------------------------------------------------------------------------------


@_compiled(*[Address] * 11, Real, Real, Real)
def requantize(
    a: int, a_group: int, a_row: int, y: int, y_group: int, y_row: int, size: int, groups: int, rows: int, n: int, scales: int, zero: float,
    low: float, high: float,
) -> None:  # fmt: skip
    """y[groups, rows, n] = clamp(rint(float32(a) * scale of n) + zero), int32 to integers of `size` bytes, one or two."""
    scale = carray(_reals(scales), n)
    for group in range(groups):
        for row in range(rows):
            source = carray(_sums(a + group * a_group + row * a_row), n)
            place = y + group * y_group + row * y_row
            if size == 1:
                target = carray(_codes(place), n)
                for c in range(n):
                    value = np.rint(np.float32(source[c]) * scale[c]) + zero
                    target[c] = np.int8(np.int32(min(max(value, low), high)))
            else:
                wide = carray(_shorts(place), n)
                for c in range(n):
                    value = np.rint(np.float32(source[c]) * scale[c]) + zero
                    wide[c] = np.uint16(np.int32(min(max(value, low), high)))


@_compiled(*[Address] * 15)
def look_up(
    table: int, high: int, high_group: int, high_row: int, high_step: int, low: int, low_group: int, low_row: int, low_step: int,
    y: int, y_group: int, y_row: int, groups: int, rows: int, n: int,
) -> None:  # fmt: skip
    """y[groups, rows, n] = table[256 * high + low], all bytes; an address of 0 for `high` means zeros."""
    entries = carray(_bytes(table), 1 << 16)
    for group in range(groups):
        for row in range(rows):
            target = carray(_bytes(y + group * y_group + row * y_row), n)
            first = low + group * low_group + row * low_row
            if high == 0:
                for c in range(n):
                    target[c] = entries[np.intp(carray(_bytes(first + c * low_step), 1)[0])]
            else:
                second = high + group * high_group + row * high_row
                for c in range(n):
                    upper, lower = carray(_bytes(second + c * high_step), 1)[0], carray(_bytes(first + c * low_step), 1)[0]
                    target[c] = entries[np.intp(upper) << 8 | np.intp(lower)]


@_compiled(*[Address] * 13)
def look_up_wide(
    table: int, x: int, x_group: int, x_row: int, x_step: int, x_size: int, y: int, y_group: int, y_row: int, y_size: int, groups: int,
    rows: int, n: int,
) -> None:  # fmt: skip
    """y[groups, rows, n] = table[x], of one or two bytes each, not one byte both."""
    for group in range(groups):
        for row in range(rows):
            source, place = x + group * x_group + row * x_row, y + group * y_group + row * y_row
            if y_size == 1:
                entries, target = carray(_bytes(table), 1 << 16), carray(_bytes(place), n)
                for c in range(n):
                    target[c] = entries[np.intp(carray(_shorts(source + c * x_step), 1)[0])]
            else:
                wide_entries, wide = carray(_shorts(table), 1 << 16), carray(_shorts(place), n)
                if x_size == 1:
                    for c in range(n):
                        wide[c] = wide_entries[np.intp(carray(_bytes(source + c * x_step), 1)[0])]
                else:
                    for c in range(n):
                        wide[c] = wide_entries[np.intp(carray(_shorts(source + c * x_step), 1)[0])]


@_compiled(*[Address] * 13, *[Real] * 6)
def resize(
    x: int, x_row: int, x_column: int, r: int, r_row: int, q: int, q_row: int, y: int, y_row: int, y_column: int, h: int, w: int, channels: int,
    scale_x: float, zero_x: float, scale_y: float, zero_y: float, low: float, high: float,
) -> None:  # fmt: skip
    """y[h, w, channels] between two rows and two columns of x: positions and weights in r[h, 4] and q[w, 4], all bytes."""
    for i in range(h):
        rows, a = carray(_sums(r + i * r_row), 4), carray(_reals(r + i * r_row), 4)
        for j in range(w):
            columns, b = carray(_sums(q + j * q_row), 4), carray(_reals(q + j * q_row), 4)
            upper, lower = x + rows[0] * x_row, x + rows[1] * x_row
            x0, x1 = carray(_codes(upper + columns[0] * x_column), channels), carray(_codes(upper + columns[1] * x_column), channels)
            x2, x3 = carray(_codes(lower + columns[0] * x_column), channels), carray(_codes(lower + columns[1] * x_column), channels)
            w0, w1, w2, w3 = b[2] * a[2], b[3] * a[2], b[2] * a[3], b[3] * a[3]
            target = carray(_codes(y + i * y_row + j * y_column), channels)
            for c in range(channels):
                total = w0 * ((np.float32(x0[c]) - zero_x) * scale_x)
                total += w1 * ((np.float32(x1[c]) - zero_x) * scale_x)
                total += w2 * ((np.float32(x2[c]) - zero_x) * scale_x)
                total += w3 * ((np.float32(x3[c]) - zero_x) * scale_x)
                value = np.rint(total / scale_y)
                value = (np.float32(0) if np.isnan(value) else value) + zero_y
                target[c] = np.int8(np.int32(min(max(value, low), high)))


# ---- the object code ---------------------------------------------------------------------------------------------------

_WORDS = {Address: ("q", "i64"), Real: ("f", "float")}  # how `native.Call` writes a kind of argument, and LLVM


def _entry(name: str, loop: _Loop, native_name: str) -> str:
    """LLVM's text of a function that takes a pointer to the arguments, one in each 64-bit word, and calls the loop.

    numba's own convention: two places for a result and an error, which the loops leave alone, before the arguments.
    """
    kinds = [_WORDS[kind][1] for kind in loop.arguments]
    loads = [
        f"%place{i} = getelementptr i64, ptr %arguments, i64 {i}\n%value{i} = load {kind}, ptr %place{i}"
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    values = ", ".join(f"{kind} %value{i}" for i, kind in enumerate(kinds))
    body = "\n".join(["%result = alloca ptr", "%error = alloca ptr", *loads, f"%status = call i32 @{native_name}(ptr %result, ptr %error, {values})"])
    declared = f"declare i32 @{native_name}(ptr, ptr, {', '.join(kinds)})"
    return f'{declared}\ndefine void @"{name}"(ptr %arguments) {{\n{body}\nret void\n}}'


def object_code() -> bytes:
    """An object file with an entry for each loop that this processor can run, as `native.py` expects it."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module, names = binding.parse_assembly(""), set()
    for loop in _loops:
        if loop.by_products and not HAS_PRODUCTS:
            continue
        compiled = njit(types.void(*loop.arguments), error_model="numpy")(loop.function).overloads[loop.arguments]
        name = f"{loop.function.__name__}.{''.join(_WORDS[kind][0] for kind in loop.arguments)}"
        for text in (compiled.library.get_llvm_str(), _entry(name, loop, compiled.fndesc.mangled_name)):
            module.link_in(binding.parse_assembly(text))
        names.add(name)
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name not in names:
            value.linkage = "internal"  # so that what only numba's wrappers need is dropped, with all that they refer to
    machine = binding.Target.from_default_triple().create_target_machine(cpu=PROCESSOR, features=FEATURES, opt=3, jit=True)
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, binding.create_pass_builder(machine, binding.create_pipeline_tuning_options()))
    return machine.emit_object(module)  # type: ignore[no-any-return]
