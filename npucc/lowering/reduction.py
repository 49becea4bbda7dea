"""Reductions over whole dimensions.

The one big idea: every sum is over integers, so the input may be cut anywhere: partial results are accumulated in the
scratchpad, block by block, and turned into the result once.
"""

from __future__ import annotations

import math
from dataclasses import replace

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.lowering.elementwise import boxes, largest_box
from npucc.lowering.emitter import Emitter, spm_tile
from npucc.lowering.layers import Group


def lower_reduce(emitter: Emitter, group: Group) -> None:
    """Sum, mean, max or min over whole dimensions: partial results are accumulated over blocks of the input."""
    node, graph = group.anchor, emitter.graph
    axes = set(node.attributes.axes)  # type: ignore[attr-defined]
    x, view = emitter.placement.views[node.inputs[0]], emitter.placement.views[group.result]
    source, result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
    kind = node.op.removeprefix("reduce_")
    sums = kind in ("mean", "sum")
    order = x.order()
    element = DTYPES[view.dtype]
    kept = largest_box(view.shape, view.order(), lambda sizes: 16 * math.prod(sizes) <= emitter.spm_free // 4)
    partial_ring = emitter.ring(math.prod(kept.sizes) * (DTYPES["s32"] if sums else element), 2)
    y_ring = emitter.ring(math.prod(kept.sizes) * element, 2)

    def block_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x.shape[d] if d in axes else size for d, size in enumerate(sizes))

    block = largest_box(block_shape(kept.sizes), order, lambda sizes: 2 * math.prod(sizes) * DTYPES[x.dtype] + 64 <= emitter.spm_free)
    x_ring = emitter.ring(math.prod(block.sizes) * DTYPES[x.dtype], 2)
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
            factor = arithmetic.mean_factor(source, result, count if kind == "mean" else 1, emitter.target.requantize)
            emitter.vector("requant", target, partial, mode=factor.mode, **factor.attributes, zero=result.zero)
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
