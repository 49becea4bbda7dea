"""Operators along one axis: softmax and layer normalization.

The one big idea: a row is read once per pass, whole if it fits and in pieces if not; its sums are integers, so pieces change
nothing. What is left is elementwise float32 with one value per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.errors import CompileError
from npucc.lowering.elementwise import LoadedTable, look_up, quant_pair
from npucc.lowering.emitter import Emitter, Ring, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.tiling import halvings, tile_sizes
from npucc.lowering.views import View, merge_dimensions
from npucc.ops import LayerNorm


@dataclass(slots=True)
class _Rows:
    """A tensor and its result as rows [count, length] along one axis, cut into row blocks and, where a row is too long, into pieces."""

    emitter: Emitter
    source: View  # the axis last
    result: View
    lead: tuple[int, ...]
    length: int
    rows: int
    piece: int

    def blocks(self) -> list[tuple[tuple[int, ...], int]]:
        """(index of the leading dimensions but the last, first row, rows): rows of the innermost leading dimension."""
        found = []
        for index in np.ndindex(self.lead[:-1]):
            for start, count in windows(self.lead[-1], self.rows):
                found.append(((*index, start), count))
        return found

    def window(self, view: View, index: tuple[int, ...], count: int, start: int, size: int) -> View:
        ones = (1,) * (len(index) - 1)
        window = view.window((*index, start), (*ones, count, size))
        return replace(window, shape=window.shape[-2:], strides=window.strides[-2:])


def _rows_of(emitter: Emitter, group: Group, axis: int, bytes_per_element: int, bytes_per_row: int) -> _Rows:
    """Rows along `axis`; the bytes are what a tile takes in the scratchpad. Raises CompileError if one element does not fit."""
    views = emitter.placement.views
    source, result = _with_axis_last((views[group.anchor.inputs[0]], views[group.result]), axis)
    lead, length = source.shape[:-1], source.shape[-1]
    for piece in halvings(length):
        for rows in tile_sizes(lead[-1]):
            if rows * (piece * bytes_per_element + bytes_per_row) + 512 <= emitter.spm_free:
                return _Rows(emitter, source, result, lead, length, rows, piece)
    raise CompileError(f"not even one element of a row fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")


def _with_axis_last(views: tuple[View, View], axis: int) -> list[View]:
    """Both with the axis last, and in front of it the other dimensions, merged where that is possible, the largest behind the others."""
    others = [dimension for dimension in range(len(views[0].shape)) if dimension != axis]
    shape, strides = merge_dimensions([views[0].shape[d] for d in others], *([view.strides[d] for d in others] for view in views))
    order = sorted(range(len(shape)), key=lambda dimension: shape[dimension])
    return [
        replace(view, shape=(*(shape[d] for d in order), view.shape[axis]), strides=(*(steps[d] for d in order), view.strides[axis]))
        for view, steps in zip(views, strides, strict=True)
    ]


def _spread(tile: Tile, size: int) -> Tile:
    """One value per row [rows, 1] as an operand of [rows, size]."""
    return Tile(tile.space, tile.address, tile.dtype, (tile.shape[0], size), (tile.strides[0], 0))


def lower_softmax(emitter: Emitter, group: Group) -> None:
    """Largest value, table of exponentials, integer sum, one division: three passes over each row."""
    node, graph = group.anchor, emitter.graph
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    axis = node.attributes.axis % len(graph.tensors[node.inputs[0]].shape)  # type: ignore[attr-defined]
    length = graph.tensors[node.inputs[0]].shape[axis]
    values = arithmetic.softmax_exponentials(source, length)
    table_view = emitter.constant(values.entries.astype(np.int32), "s32")
    table = emitter.load(table_view, emitter.ring(table_view.bytes, 1))
    wide, narrow = DTYPES[source.dtype], DTYPES[result.dtype]
    distance = "s16" if wide == 1 else "s32"  # wide enough for the largest difference of two inputs
    rows = _rows_of(emitter, group, axis, 2 * wide + DTYPES[distance] + 4 + 2 * narrow, wide + 8 + 64)
    x_ring, d_ring, e_ring, y_ring = (
        emitter.ring(rows.rows * rows.piece * size, slots) for size, slots in ((wide, 2), (DTYPES[distance], 1), (4, 1), (narrow, 2))
    )
    top_ring, sum_ring = emitter.ring(wide * rows.rows, 1), emitter.ring(4 * rows.rows, 1)
    for index, count in rows.blocks():
        top, total = spm_tile(top_ring.next(), source.dtype, (count, 1)), spm_tile(sum_ring.next(), "s32", (count, 1))
        pieces = windows(rows.length, rows.piece)

        def exponentials(start: int, size: int, *, index: tuple[int, ...] = index, count: int = count, top: Tile = top) -> Tile:
            window = rows.window(rows.source, index, count, start, size)
            x = emitter.load_once(window, x_ring)
            d = spm_tile(d_ring.next(), distance, (count, size))
            e = spm_tile(e_ring.next(), "s32", (count, size))
            emitter.vector("sub", d, x, _spread(top, size))
            look_up(emitter, e, d, LoadedTable(table, values))
            return e

        for start, size in pieces:
            window = rows.window(rows.source, index, count, start, size)
            emitter.issue("reduce", top, emitter.load_once(window, x_ring), op="max", accumulate=int(start > 0))
        e = None
        for start, size in pieces:
            e = exponentials(start, size)
            emitter.issue("reduce", total, e, op="sum", accumulate=int(start > 0))
        for start, size in pieces:
            e = e if len(pieces) == 1 and e is not None else exponentials(start, size)
            window = rows.window(rows.result, index, count, start, size)
            target = emitter.result_tile(window, y_ring)
            emitter.vector("div", target, e, _spread(total, size), qy=quant_pair(arithmetic.softmax_steps(result)))
            emitter.store(window, target)


def lower_layer_norm(emitter: Emitter, group: Group) -> None:
    """Integer sums of values and squares, then mean and deviation per row in float32, then one pass over the row."""
    node, graph = group.anchor, emitter.graph
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    axis = len(graph.tensors[node.inputs[0]].shape) - 1
    wide, narrow = DTYPES[source.dtype], DTYPES[result.dtype]
    rows = _rows_of(emitter, group, axis, 2 * wide + 4 + 2 * narrow + 8, 4 * 8 + 64)
    rings = [emitter.ring(rows.rows * rows.piece * size, slots) for size, slots in ((wide, 2), (4, 1), (narrow, 2))]
    statistics = [emitter.ring(rows.rows * size, 1) for size in (4, 8, 4, 4, 4)]
    scales = [_row_constant(emitter, graph.tensors[name].data, rows.piece) if name else None for name in (*node.inputs[1:], "", "")[:2]]
    attributes = node.attributes
    assert isinstance(attributes, LayerNorm)
    epsilon = float(arithmetic.epsilon_in_steps(attributes.epsilon, source.scale))
    for index, count in rows.blocks():
        mean, inverse = _row_statistics(emitter, rows, index, count, source.zero, epsilon, rings[0], statistics, centered=attributes.centered)
        for start, size in windows(rows.length, rows.piece):
            window = rows.window(rows.source, index, count, start, size)
            x = emitter.load_once(window, rings[0])
            value = spm_tile(rings[1].next(), "f32", (count, size))
            if mean is None:
                emitter.vector("mul", value, x, _spread(inverse, size), qa=(1.0, source.zero))
            else:
                emitter.vector("sub", value, x, _spread(mean, size), qa=(1.0, source.zero))
                emitter.vector("mul", value, value, _spread(inverse, size))
            out = rows.window(rows.result, index, count, start, size)
            target = emitter.result_tile(out, rings[2])
            steps: list[tuple[str, Callable[[int, int, int], Tile]]] = [
                (op, scale) for op, scale in zip(("mul", "add"), scales, strict=True) if scale
            ]
            for name, operand in steps:
                emitter.vector(name, value, value, operand(start, size, count))
            emitter.vector("cvt", target, value, qy=quant_pair(result))
            emitter.store(out, target)


def _row_constant(emitter: Emitter, data: np.ndarray | None, piece: int) -> Callable[[int, int, int], Tile]:
    """A float32 vector along the row: gives its piece as an operand of [rows, piece]."""
    assert data is not None
    view = emitter.constant(data.astype(np.float32).reshape(-1), "f32")
    ring = emitter.ring(4 * piece, 1)

    def operand(start: int, size: int, count: int) -> Tile:
        tile = emitter.load_once(view.window((start,), (size,)), ring)
        return Tile(tile.space, tile.address, "f32", (count, size), (0, 4))

    return operand


def _row_statistics(
    emitter: Emitter, rows: _Rows, index: tuple[int, ...], count: int, zero: int, epsilon: float, x_ring: Ring, rings: list[Ring], *, centered: bool,
) -> tuple[Tile | None, Tile]:  # fmt: skip
    """(mean if centered, 1 / standard deviation) of each row, in steps of the input's scale, float32 [rows, 1]."""
    sums, squares, mean, square, deviation = (
        spm_tile(ring.next(), dtype, (count, 1)) for ring, dtype in zip(rings, ("s32", "s64", "f32", "f32", "f32"), strict=True)
    )
    for start, size in windows(rows.length, rows.piece):
        window = rows.window(rows.source, index, count, start, size)
        x = emitter.load_once(window, x_ring)
        if centered:
            emitter.issue("reduce", sums, x, op="sum", zero=zero, accumulate=int(start > 0))
        emitter.issue("reduce", squares, x, op="sumsq", zero=zero, accumulate=int(start > 0))
    share = float(np.float32(1) / np.float32(rows.length))
    emitter.vector("mul", deviation, squares, imm=share)
    if centered:
        emitter.vector("mul", mean, sums, imm=share)
        emitter.vector("mul", square, mean, mean)
        emitter.vector("sub", deviation, deviation, square)
        emitter.vector("max", deviation, deviation, imm=0.0)
    emitter.vector("add", deviation, deviation, imm=epsilon)
    emitter.vector("sqrt", deviation, deviation)
    ones = spm_tile(square.address, "f32", (count, 1))
    emitter.vector("fill", ones, value=1.0)
    emitter.vector("div", deviation, ones, deviation)
    return mean if centered else None, deviation
