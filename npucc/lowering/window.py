"""Operators that look at a window of an image: pooling and linear interpolation.

The one big idea: a tile is (rows × columns × channels) of the result and the input under it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic, ops
from npucc.errors import CompileError
from npucc.lowering.convolution_tiles import IMAGE_ORDER, Convolution
from npucc.lowering.elementwise import Box, boxes, quant_pair
from npucc.lowering.emitter import Emitter, windows
from npucc.lowering.layers import Group
from npucc.lowering.tiling import halvings, tile_sizes
from npucc.lowering.views import View

LOOP_ORDER = (0, 1, 2, 3)  # batch and channels outside, rows, then columns inside


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
    x_ring = emitter.ring(geometry.reach(0, rows) * geometry.reach(1, columns) * depth * DTYPES[x.dtype], 2)
    y_ring = emitter.ring(rows * columns * depth * DTYPES[view.dtype], 2)
    shared: dict[str, object] = {"kernel": attributes.kernel, "stride": attributes.strides, "dilation": attributes.dilations}
    if node.op == "average_pool":
        count = "window" if attributes.count_include_pad else "inside"
        shared |= {"scale": arithmetic.ratio(source, result), "zx": source.zero, "zy": result.zero, "count": count}
    for box in boxes((batches, channels, height, width), Box((0,) * 4, (1, depth, rows, columns), LOOP_ORDER)):
        batch, low, row, column = box.starts
        _, many, row_count, column_count = box.sizes
        top, tall, before, after = geometry.source(0, row, row_count)
        left, wide, ahead, behind = geometry.source(1, column, column_count)
        if min(tall, wide) == 0:
            raise CompileError("a pooling window lies wholly in the padding", node=node.name, hint="reduce the pads of the pooling node")
        window = x.window((batch, low, top, left), (1, many, tall, wide)).permute(IMAGE_ORDER)
        tile = emitter.load_once(window, x_ring)
        out = replace(box, order=IMAGE_ORDER).of(view, view.shape)
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
                size = (geometry.reach(0, rows) * geometry.reach(1, columns) + rows * columns) * depth * DTYPES[geometry.x.dtype] + 16
                if 2 * size <= emitter.spm_free and (rows * columns * depth * 4 <= max(8192, height * width * channels) or rows == 1):
                    return rows, columns, depth
    raise CompileError(f"not even one pooling window fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")


def _image(tile: Tile) -> Tile:
    """[1, rows, columns, channels] without its batch."""
    return Tile(tile.space, tile.address, tile.dtype, tile.shape[1:], tile.strides[1:])


def lower_interpolate(emitter: Emitter, group: Group) -> None:
    """Interpolation: tiles of result rows and columns, each with its own small table of sources and weights."""
    node, graph = group.anchor, emitter.graph
    attributes = node.attributes
    assert isinstance(attributes, ops.Interpolate)
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    x, view = emitter.placement.views[node.inputs[0]], emitter.placement.views[group.result]
    axes = [arithmetic.interpolation(x.shape[2 + a], attributes.size[a], attributes.scales[a], attributes.coordinates) for a in range(2)]
    rows, columns, depth = _interpolation_tile(emitter, axes, x, view)
    reach = [max(_span(axes[a], start, count)[1] for start, count in windows(attributes.size[a], (rows, columns)[a])) for a in range(2)]
    x_ring = emitter.ring(reach[0] * reach[1] * depth * DTYPES[x.dtype], 2)
    y_ring = emitter.ring(rows * columns * depth * DTYPES[view.dtype], 2)
    row_ring, column_ring = emitter.ring(16 * rows, 2), emitter.ring(16 * columns, 2)
    for box in boxes(view.shape, Box((0,) * 4, (1, depth, rows, columns), LOOP_ORDER)):
        batch, low, row, column = box.starts
        _, many, row_count, column_count = box.sizes
        (top, tall), (left, wide) = _span(axes[0], row, row_count), _span(axes[1], column, column_count)
        window = x.window((batch, low, top, left), (1, many, tall, wide)).permute(IMAGE_ORDER)
        tile = emitter.load_once(window, x_ring)
        r = emitter.load_once(emitter.constant(_weights(axes[0], row, row_count, top), "s32"), row_ring)
        q = emitter.load_once(emitter.constant(_weights(axes[1], column, column_count, left), "s32"), column_ring)
        out = replace(box, order=IMAGE_ORDER).of(view, view.shape)
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


def _interpolation_tile(emitter: Emitter, axes: list[Axis], x: View, y: View) -> tuple[int, int, int]:
    _, channels, height, width = y.shape
    for depth in halvings(channels):
        for columns in halvings(width):
            for rows in tile_sizes(height):
                spans = [max(_span(axes[a], s, n)[1] for s, n in windows((height, width)[a], (rows, columns)[a])) for a in range(2)]
                size = (spans[0] * spans[1] * DTYPES[x.dtype] + rows * columns * DTYPES[y.dtype]) * depth + 16 * (rows + columns) + 64
                if 2 * size <= emitter.spm_free and (rows * columns * depth * 4 <= max(8192, height * width * channels) or rows == 1):
                    return rows, columns, depth
    raise CompileError(f"not even one interpolated pixel fits in {emitter.spm_free} bytes of scratchpad", hint="raise spm_bytes of the target")
