"""Data movement that no view can express: strided copies from DRAM to DRAM through the scratchpad.

The one big idea: every movement is a list of block copies (and fills); a block copy is a load and a store with strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic, ops
from npucc.errors import CompileError
from npucc.lowering.elementwise import boxes, largest_box, operand_view
from npucc.lowering.emitter import Emitter, spm_tile
from npucc.lowering.layers import Group
from npucc.lowering.placement import FORWARD, concat_windows, same_elements
from npucc.lowering.views import View, reshape_copy


def copy(emitter: Emitter, result: View, source: View) -> None:
    """Element by element, in blocks that fit the scratchpad."""
    mark = emitter.mark()
    order = result.order()
    element = DTYPES[source.dtype]
    box = largest_box(result.shape, order, lambda sizes: 2 * (math.prod(sizes) * element + 8) <= emitter.spm_free)
    ring = emitter.ring(math.prod(box.sizes) * element, 2)
    for block in boxes(result.shape, box):
        tile = emitter.load(source.window(block.starts, block.sizes).permute(order), ring)
        emitter.store(result.window(block.starts, block.sizes).permute(order), tile)
    emitter.reset(mark)


def fill(emitter: Emitter, result: View, value: int) -> None:
    """Every element the same stored value."""
    mark = emitter.mark()
    order = result.order()
    element = DTYPES[result.dtype]
    box = largest_box(result.shape, order, lambda sizes: math.prod(sizes) * element + 8 <= emitter.spm_free)
    shape = tuple(box.sizes[d] for d in order)
    tile = spm_tile(emitter.ring(math.prod(shape) * element, 1).next(), result.dtype, shape)
    emitter.vector("fill", tile, value=float(value))
    for block in boxes(result.shape, box):
        part = tuple(block.sizes[d] for d in order)
        emitter.store(
            result.window(block.starts, block.sizes).permute(order),
            Tile("spm", tile.address, tile.dtype, part, spm_tile(0, tile.dtype, part).strides),
        )
    emitter.reset(mark)


def lower_view(emitter: Emitter, group: Group) -> None:
    """A reshape, transpose, slice or expand whose result must lie elsewhere than its input."""
    node = group.anchor
    result, source = emitter.placement.views[group.result], operand_view(emitter, node.inputs[0])
    moved = FORWARD[node.op](node, source)
    if moved is not None:
        copy(emitter, result, moved)
        return
    pair = reshape_copy(source, result)
    if pair is None:
        raise CompileError(f"no strided copy turns shape {source.shape} into {result.shape}", node=node.name, hint="split the Reshape in two")
    copy(emitter, pair[1], pair[0])


def lower_concat(emitter: Emitter, group: Group) -> None:
    """Copy the inputs that were not computed in place."""
    views = emitter.placement.views
    for name, window in zip(group.anchor.inputs, concat_windows(emitter.graph, group.anchor, views), strict=True):
        source = operand_view(emitter, name)
        if not same_elements(source, window):
            copy(emitter, window, source)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A run of result indices along one dimension that read source indices first, first + step, …; step None: a fill."""

    start: int
    count: int
    first: int
    step: int | None


def segments(indices: Sequence[int]) -> list[_Segment]:
    """Cut an index map into runs with constant steps (−1 marks a fill)."""
    found: list[_Segment] = []
    position = 0
    while position < len(indices):
        first = indices[position]
        end = position + 1
        if first < 0:
            while end < len(indices) and indices[end] < 0:
                end += 1
            found.append(_Segment(position, end - position, 0, None))
        else:
            step = indices[end] - first if end < len(indices) and indices[end] >= 0 else 0
            while end < len(indices) and indices[end] >= 0 and indices[end] - indices[end - 1] == step:
                end += 1
            found.append(_Segment(position, end - position, first, step))
        position = end
    return found


def copy_by_index(emitter: Emitter, result: View, source: View, maps: Sequence[Sequence[int]], value: int) -> None:
    """result[i, j, …] = source[maps[0][i], maps[1][j], …], or the stored value where a map says −1."""
    for combination in product(*(segments(indices) for indices in maps)):
        window = result.window([s.start for s in combination], [s.count for s in combination])
        if any(s.step is None for s in combination):
            fill(emitter, window, value)
        else:
            steps = [s.step or 0 for s in combination]
            copy(emitter, window, source.window([s.first for s in combination], [s.count for s in combination], steps))


def lower_pad(emitter: Emitter, group: Group) -> None:
    """Constant borders are filled; edge, reflect and wrap borders are copies with strides 0, −1 and 1."""
    node = group.anchor
    attributes = node.attributes
    assert isinstance(attributes, ops.Pad)
    source, result = operand_view(emitter, node.inputs[0]), emitter.placement.views[group.result]
    maps = [
        pad_indices(size, before, after, attributes.mode)
        for size, before, after in zip(source.shape, attributes.before, attributes.after, strict=True)
    ]
    value = int(arithmetic.quantize(np.array([attributes.value], np.float32), emitter.graph.quant(node.outputs[0]))[0])
    copy_by_index(emitter, result, source, maps, value)


def pad_indices(size: int, before: int, after: int, mode: str) -> list[int]:
    """The source index of each padded index; −1 for a constant. Raises CompileError for an unknown mode."""
    index = np.arange(-before, size + after)
    if mode == "constant":
        return [int(i) if 0 <= i < size else -1 for i in index]
    if mode == "edge":
        return [int(i) for i in np.clip(index, 0, size - 1)]
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = np.abs(index) % period
        return [int(i) for i in np.where(folded >= size, period - folded, folded)] if size > 1 else [0] * len(index)
    if mode == "wrap":
        return [int(i) for i in index % size]
    raise CompileError(f"padding mode {mode!r} is not known", hint="use constant, edge, reflect or wrap")


def lower_resize(emitter: Emitter, group: Group) -> None:
    """Whole factors repeat rows and columns by stride 0; other factors are copied run by run."""
    node = group.anchor
    attributes = node.attributes
    assert isinstance(attributes, ops.Resize)
    source, result = operand_view(emitter, node.inputs[0]), emitter.placement.views[group.result]
    rows, columns = (
        arithmetic.nearest_indices(
            source.shape[2 + a], attributes.size[a], attributes.scales[a], attributes.coordinates, attributes.nearest_mode
        ).tolist()
        for a in range(2)
    )
    factors = [_repeat_factor(indices, source.shape[2 + a]) for a, indices in enumerate((rows, columns))]
    if all(factors):
        copy(emitter, _split_spatial(result, factors), _repeat_spatial(source, factors))
    else:
        copy_by_index(emitter, result, source, [range(source.shape[0]), range(source.shape[1]), rows, columns], 0)


def _repeat_factor(indices: Sequence[int], size: int) -> int:
    """f if the map is 0…0 1…1 2…2 with f of each, else 0."""
    factor = len(indices) // size
    return factor if factor and list(indices) == [i // factor for i in range(size * factor)] else 0


def _split_spatial(view: View, factors: Sequence[int]) -> View:
    """[N, C, H·f, W·g] as [N, C, H, f, W, g]."""
    n, c, h, w = view.shape
    (sn, sc, sh, sw), (f, g) = view.strides, factors
    return replace(view, shape=(n, c, h // f, f, w // g, g), strides=(sn, sc, sh * f, sh, sw * g, sw))


def _repeat_spatial(view: View, factors: Sequence[int]) -> View:
    n, c, h, w = view.shape
    sn, sc, sh, sw = view.strides
    return replace(view, shape=(n, c, h, factors[0], w, factors[1]), strides=(sn, sc, sh, 0, sw, 0))
