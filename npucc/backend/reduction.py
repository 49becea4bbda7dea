"""Windows and rows: pooling, reductions, softmax, layer normalization, interpolation.

The one big idea: every sum is over integers, so a row or window may be cut anywhere: partial sums are accumulated in the
scratchpad and turned into the result once. A row that does not fit is read again for each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from isa.program import Tile
from npucc import arithmetic, ops
from npucc.backend.convolution_tiles import IMAGE_ORDER, Convolution
from npucc.backend.elementwise import Box, boxes, largest_box, quant_pair, vector_with_table
from npucc.backend.emitter import Emitter, Ring, spm_tile, windows
from npucc.backend.layers import Group
from npucc.backend.tiling import halvings, tile_sizes
from npucc.backend.views import View
from npucc.errors import CompileError


def lower_pool(emitter: Emitter, group: Group) -> None:
    """Max or average over windows: tiles of rows, columns and channels."""
    node, graph = group.anchor, emitter.graph
    attributes = node.attributes
    assert isinstance(attributes, ops.Pool)
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    x, view = emitter.placement.views[node.inputs[0]], emitter.placement.views[group.result]
    batches, channels, height, width = view.shape
    kernel = np.empty((*attributes.kernel, 1, channels), np.int8)
    geometry = Convolution(
        x, source.zero, kernel, np.empty(0), np.empty(0), attributes.strides, attributes.dilations, attributes.pads[:2], channels, (height, width)
    )
    rows, columns, depth = _pool_tile(emitter, geometry, channels)
    x_ring = emitter.ring(geometry.reach(0, rows) * geometry.reach(1, columns) * depth, 2)
    y_ring = emitter.ring(rows * columns * depth, 2)
    shared: dict[str, object] = {"kernel": attributes.kernel, "stride": attributes.strides, "dilation": attributes.dilations}
    if node.op == "average_pool":
        count = "window" if attributes.count_include_pad else "inside"
        shared |= {"scale": arithmetic.ratio(source, result), "zx": source.zero, "zy": result.zero, "count": count}
    for batch in range(batches):
        for low, many in windows(channels, depth):
            for row, row_count in windows(height, rows):
                for column, column_count in windows(width, columns):
                    top, tall, before, after = geometry.source(0, row, row_count)
                    left, wide, ahead, behind = geometry.source(1, column, column_count)
                    if min(tall, wide) == 0:
                        raise CompileError("a pooling window lies wholly in the padding", node=node.name, hint="reduce the pads of the pooling node")
                    window = x.window((batch, low, top, left), (1, many, tall, wide)).permute(IMAGE_ORDER)
                    tile = emitter.load_once("x", window, window, x_ring)
                    out = Box((batch, low, row, column), (1, many, row_count, column_count), IMAGE_ORDER).of(view, view.shape)
                    target = emitter.result_tile(out, y_ring)
                    emitter.issue(POOL_INSTRUCTIONS[node.op], _image(target), _image(tile), pad=(before, ahead, after, behind), **shared)  # type: ignore[arg-type]
                    emitter.store(out, target)


POOL_INSTRUCTIONS = {"max_pool": "maxpool", "average_pool": "avgpool"}


def _pool_tile(emitter: Emitter, geometry: Convolution, channels: int) -> tuple[int, int, int]:
    """(rows, columns, channels) of the largest tile of which several fit."""
    height, width = geometry.size
    for depth in halvings(channels):
        for columns in halvings(width):
            for rows in tile_sizes(height):
                size = geometry.reach(0, rows) * geometry.reach(1, columns) * depth + rows * columns * depth + 16
                if 2 * size <= emitter.spm_free and (rows * columns * depth * 4 <= max(8192, height * width * channels) or rows == 1):
                    return rows, columns, depth
    raise CompileError(f"not even one pooling window fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")


def _image(tile: Tile) -> Tile:
    """[1, rows, columns, channels] without its batch."""
    return Tile(tile.space, tile.address, tile.dtype, tile.shape[1:], tile.strides[1:])


def lower_reduce(emitter: Emitter, group: Group) -> None:
    """Sum, mean, max or min over whole dimensions: partial results are accumulated over blocks of the input."""
    node, graph = group.anchor, emitter.graph
    axes = set(node.attributes.axes)  # type: ignore[attr-defined]
    x, view = emitter.placement.views[node.inputs[0]], emitter.placement.views[group.result]
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    kind = node.op.removeprefix("reduce_")
    sums = kind in ("mean", "sum")
    order = x.order()
    kept = largest_box(view.shape, view.order(), lambda sizes: 16 * math.prod(sizes) <= emitter.spm_free // 4)
    partial_ring = emitter.ring(math.prod(kept.sizes) * (4 if sums else 1), 2)
    y_ring = emitter.ring(math.prod(kept.sizes), 2)

    def block_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x.shape[d] if d in axes else size for d, size in enumerate(sizes))

    block = largest_box(block_shape(kept.sizes), order, lambda sizes: 2 * math.prod(sizes) + 64 <= emitter.spm_free)
    x_ring = emitter.ring(math.prod(block.sizes), 2)
    count = math.prod(x.shape[d] for d in axes)
    for out in boxes(view.shape, kept):
        permuted = tuple(out.sizes[d] for d in order)
        out_window = replace(out, order=order).of(view, view.shape)
        target = emitter.result_tile(out_window, None) if emitter.tile(out_window).space == "spm" else spm_tile(y_ring.next(), view.dtype, permuted)
        partial = spm_tile(partial_ring.next(), "s32", permuted) if sums else target
        for inner in boxes(block_shape(out.sizes), block):
            starts = tuple(a + b for a, b in zip(out.starts, inner.starts, strict=True))
            tile = emitter.load(replace(inner, starts=starts, order=order).of(x, x.shape), x_ring)
            part = _part(partial, [inner.starts[d] for d in order], [inner.sizes[d] for d in order], [d in axes for d in order])
            started = any(inner.starts[d] > 0 for d in axes)
            emitter.issue("reduce", *_squeezed(part, tile), op="sum" if sums else kind, zero=source.zero if sums else 0, accumulate=int(started))
        if sums:
            scale = arithmetic.mean_multiplier(source, result, count if kind == "mean" else 1)
            emitter.vector("requant", target, partial, scale=scale, zero=result.zero)
        emitter.store(out_window, target)


def _part(tile: Tile, starts: list[int], sizes: list[int], reduced: list[bool]) -> Tile:
    """The window of a partial result that a block of the input contributes to."""
    offset = sum(0 if r else start * stride for start, stride, r in zip(starts, tile.strides, reduced, strict=True))
    return Tile(tile.space, tile.address + offset, tile.dtype, tuple(1 if r else size for size, r in zip(sizes, reduced, strict=True)), tile.strides)


def _squeezed(result: Tile, source: Tile) -> tuple[Tile, Tile]:
    """Drop dimensions of size 1 in both."""
    kept = [d for d in range(len(source.shape)) if source.shape[d] != 1 or result.shape[d] != 1] or [len(source.shape) - 1]

    def squeeze(tile: Tile) -> Tile:
        return Tile(tile.space, tile.address, tile.dtype, tuple(tile.shape[d] for d in kept), tuple(tile.strides[d] for d in kept))

    return squeeze(result), squeeze(source)


@dataclass(slots=True)
class _Rows:
    """A tensor as rows [count, length] along one axis, cut into row blocks and, where a row is too long, into pieces."""

    emitter: Emitter
    view: View  # the axis last
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


def _rows_of(emitter: Emitter, view: View, axis: int, bytes_per_element: int, bytes_per_row: int) -> _Rows:
    """Rows along `axis`; the bytes are what a tile takes in the scratchpad. Raises CompileError if one element does not fit."""
    rank = len(view.shape)
    moved = view.permute([*(d for d in range(rank) if d != axis), axis])
    lead = moved.shape[:-1]
    if not lead:
        moved, lead = replace(moved, shape=(1, *moved.shape), strides=(0, *moved.strides)), (1,)
    length = moved.shape[-1]
    for piece in halvings(length):
        for rows in tile_sizes(lead[-1]):
            if rows * (piece * bytes_per_element + bytes_per_row) + 512 <= emitter.spm_free:
                return _Rows(emitter, moved, lead, length, rows, piece)
    raise CompileError(f"not even one element of a row fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")


def _moved(view: View, axis: int) -> View:
    rank = len(view.shape)
    moved = view.permute([*(d for d in range(rank) if d != axis), axis])
    return moved if rank > 1 else replace(moved, shape=(1, *moved.shape), strides=(0, *moved.strides))


def _spread(tile: Tile, size: int) -> Tile:
    """One value per row [rows, 1] as an operand of [rows, size]."""
    return Tile(tile.space, tile.address, tile.dtype, (tile.shape[0], size), (tile.strides[0], 0))


def lower_softmax(emitter: Emitter, group: Group) -> None:
    """Largest value, table of exponentials, integer sum, one division: three passes over each row."""
    node, graph = group.anchor, emitter.graph
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    axis = node.attributes.axis % len(graph.tensors[node.inputs[0]].shape)  # type: ignore[attr-defined]
    length = graph.tensors[node.inputs[0]].shape[axis]
    entries = arithmetic.softmax_exponentials(source, length)
    table_view = emitter.constant(entries.astype(np.int32), "s32")
    table = emitter.load(table_view, emitter.ring(table_view.bytes, 1))
    rows = _rows_of(emitter, emitter.placement.views[node.inputs[0]], axis, 2 + 2 + 4 + 2, 2 + 8 + 64)
    y_view = _moved(emitter.placement.views[group.result], axis)
    x_ring, d_ring, e_ring, y_ring = (emitter.ring(rows.rows * rows.piece * size, slots) for size, slots in ((1, 2), (2, 1), (4, 1), (1, 2)))
    top_ring, sum_ring = emitter.ring(rows.rows, 1), emitter.ring(4 * rows.rows, 1)
    for index, count in rows.blocks():
        top, total = spm_tile(top_ring.next(), "s8", (count, 1)), spm_tile(sum_ring.next(), "s32", (count, 1))
        pieces = windows(rows.length, rows.piece)

        def exponentials(start: int, size: int, *, index: tuple[int, ...] = index, count: int = count, top: Tile = top) -> Tile:
            window = rows.window(rows.view, index, count, start, size)
            x = emitter.load_once("x", window, window, x_ring)
            d = spm_tile(d_ring.next(), "s16", (count, size))
            e = spm_tile(e_ring.next(), "s32", (count, size))
            emitter.vector("sub", d, x, _spread(top, size))
            vector_with_table(emitter, e, d, table, 1 - len(entries))
            return e

        for start, size in pieces:
            window = rows.window(rows.view, index, count, start, size)
            emitter.issue("reduce", top, emitter.load_once("x", window, window, x_ring), op="max", accumulate=int(start > 0))
        e = None
        for start, size in pieces:
            e = exponentials(start, size)
            emitter.issue("reduce", total, e, op="sum", accumulate=int(start > 0))
        for start, size in pieces:
            e = e if len(pieces) == 1 and e is not None else exponentials(start, size)
            window = rows.window(y_view, index, count, start, size)
            target = emitter.result_tile(window, y_ring)
            emitter.vector("div", target, e, _spread(total, size), qy=quant_pair(result))
            emitter.store(window, target)


def lower_layer_norm(emitter: Emitter, group: Group) -> None:
    """Integer sums of values and squares, then mean and deviation per row in float32, then one pass over the row."""
    node, graph = group.anchor, emitter.graph
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    view = emitter.placement.views[node.inputs[0]]
    axis = len(view.shape) - 1
    rows = _rows_of(emitter, view, axis, 2 + 4 + 2 + 8, 4 * 8 + 64)
    y_view = _moved(emitter.placement.views[group.result], axis)
    rings = [emitter.ring(rows.rows * rows.piece * size, slots) for size, slots in ((1, 2), (4, 1), (1, 2))]
    statistics = [emitter.ring(rows.rows * size, 1) for size in (4, 8, 4, 4, 4)]
    scales = [_row_constant(emitter, graph.tensors[name].data, rows.piece) if name else None for name in (*node.inputs[1:], "", "")[:2]]
    epsilon = float(np.float32(node.attributes.epsilon / float(source.scale) ** 2))  # type: ignore[attr-defined]
    for index, count in rows.blocks():
        mean, deviation = _row_statistics(emitter, rows, index, count, source.zero, epsilon, rings[0], statistics)
        for start, size in windows(rows.length, rows.piece):
            window = rows.window(rows.view, index, count, start, size)
            x = emitter.load_once("x", window, window, rings[0])
            value = spm_tile(rings[1].next(), "f32", (count, size))
            emitter.vector("sub", value, x, _spread(mean, size), qa=(1.0, source.zero))
            emitter.vector("mul", value, value, _spread(deviation, size))
            out = rows.window(y_view, index, count, start, size)
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
    name = f"row constant {ring.addresses[0]}"

    def operand(start: int, size: int, count: int) -> Tile:
        tile = emitter.load_once(name, start, view.window((start,), (size,)), ring)
        return Tile(tile.space, tile.address, "f32", (count, size), (0, 4))

    return operand


def _row_statistics(
    emitter: Emitter, rows: _Rows, index: tuple[int, ...], count: int, zero: int, epsilon: float, x_ring: Ring, rings: list[Ring],
) -> tuple[Tile, Tile]:  # fmt: skip
    """(mean, 1 / standard deviation) of each row, in steps of the input's scale, float32 [rows, 1]."""
    sums, squares, mean, square, deviation = (
        spm_tile(ring.next(), dtype, (count, 1)) for ring, dtype in zip(rings, ("s32", "s64", "f32", "f32", "f32"), strict=True)
    )
    for start, size in windows(rows.length, rows.piece):
        window = rows.window(rows.view, index, count, start, size)
        x = emitter.load_once("x", window, window, x_ring)
        emitter.issue("reduce", sums, x, op="sum", zero=zero, accumulate=int(start > 0))
        emitter.issue("reduce", squares, x, op="sumsq", zero=zero, accumulate=int(start > 0))
    share = float(np.float32(1) / np.float32(rows.length))
    emitter.vector("mul", mean, sums, imm=share)
    emitter.vector("mul", square, mean, mean)
    emitter.vector("mul", deviation, squares, imm=share)
    emitter.vector("sub", deviation, deviation, square)
    emitter.vector("max", deviation, deviation, imm=0.0)
    emitter.vector("add", deviation, deviation, imm=epsilon)
    emitter.vector("sqrt", deviation, deviation)
    ones = spm_tile(square.address, "f32", (count, 1))
    emitter.vector("fill", ones, value=1.0)
    emitter.vector("div", deviation, ones, deviation)
    return mean, deviation


def lower_resize_linear(emitter: Emitter, group: Group) -> None:
    """Interpolation: tiles of result rows and columns, each with its own small table of sources and weights."""
    node, graph = group.anchor, emitter.graph
    attributes = node.attributes
    assert isinstance(attributes, ops.Resize)
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    x, view = emitter.placement.views[node.inputs[0]], emitter.placement.views[group.result]
    axes = [arithmetic.interpolation(x.shape[2 + a], attributes.size[a], attributes.scales[a], attributes.coordinates) for a in range(2)]
    rows, columns, depth = _resize_tile(emitter, axes, view)
    reach = [max(_span(axes[a], start, count)[1] for start, count in windows(attributes.size[a], (rows, columns)[a])) for a in range(2)]
    x_ring, y_ring = emitter.ring(reach[0] * reach[1] * depth, 2), emitter.ring(rows * columns * depth, 2)
    row_ring, column_ring = emitter.ring(16 * rows, 2), emitter.ring(16 * columns, 2)
    for batch in range(view.shape[0]):
        for low, many in windows(view.shape[1], depth):
            for row, row_count in windows(attributes.size[0], rows):
                for column, column_count in windows(attributes.size[1], columns):
                    (top, tall), (left, wide) = _span(axes[0], row, row_count), _span(axes[1], column, column_count)
                    window = x.window((batch, low, top, left), (1, many, tall, wide)).permute(IMAGE_ORDER)
                    tile = emitter.load_once("x", window, window, x_ring)
                    r = emitter.load_once("r", row, emitter.constant(_weights(axes[0], row, row_count, top), "s32"), row_ring)
                    q = emitter.load_once("q", column, emitter.constant(_weights(axes[1], column, column_count, left), "s32"), column_ring)
                    out = Box((batch, low, row, column), (1, many, row_count, column_count), IMAGE_ORDER).of(view, view.shape)
                    target = emitter.result_tile(out, y_ring)
                    emitter.issue("resize", _image(target), _image(tile), r, q, qx=quant_pair(source), qy=quant_pair(result))
                    emitter.store(out, target)


Axis = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _span(axis: Axis, start: int, count: int) -> tuple[int, int]:
    """(first source index, how many) under results [start, start + count)."""
    low, high = int(axis[0][start : start + count].min()), int(axis[1][start : start + count].max())
    return low, high - low + 1


def _weights(axis: Axis, start: int, count: int, base: int) -> np.ndarray:
    """int32 [count, 4]: both source indices relative to `base`, both weights as float32 bits."""
    part = slice(start, start + count)
    columns = [
        (axis[0][part] - base).astype(np.int32),
        (axis[1][part] - base).astype(np.int32),
        axis[2][part].view(np.int32),
        axis[3][part].view(np.int32),
    ]
    return np.stack(columns, axis=1)


def _resize_tile(emitter: Emitter, axes: list[Axis], view: View) -> tuple[int, int, int]:
    _, channels, height, width = view.shape
    for depth in halvings(channels):
        for columns in halvings(width):
            for rows in tile_sizes(height):
                spans = [max(_span(axes[a], s, n)[1] for s, n in windows((height, width)[a], (rows, columns)[a])) for a in range(2)]
                size = spans[0] * spans[1] * depth + rows * columns * depth + 16 * (rows + columns) + 64
                if 2 * size <= emitter.spm_free and (rows * columns * depth * 4 <= max(8192, height * width * channels) or rows == 1):
                    return rows, columns, depth
    raise CompileError(f"not even one interpolated pixel fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")
