"""Look-ups by computed indices: rows of a table in DRAM, fetched by the load engine.

The one big idea: the table is never loaded; whatever its size, only the rows asked for pass the DRAM channel. Its other dimensions are
merged into rows as far as the strides allow, and looped over where they do not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from isa.program import DTYPES, Tile
from npucc import ops
from npucc.lowering.elementwise import operand_view
from npucc.lowering.emitter import Emitter, windows
from npucc.lowering.layers import Group
from npucc.lowering.tiling import halvings
from npucc.lowering.views import View, merge_dimensions

LONGEST_BLOCK = 512  # indices


def lower_gather(emitter: Emitter, group: Group) -> None:
    """Blocks of indices; for each, one `gather` per run of contiguous table dimensions."""
    node = group.anchor
    assert isinstance(node.attributes, ops.Gather)
    table, indices = (operand_view(emitter, name) for name in node.inputs)
    rows, picked = _as_rows(table, emitter.placement.views[group.result], node.attributes.axis, len(indices.shape))
    if not indices.shape:  # one index: a row of one
        indices = replace(indices, shape=(1,), strides=(4,))
        picked = replace(picked, shape=(1, *picked.shape), strides=(picked.strides[0] * picked.shape[0], *picked.strides))
    count, columns = _block(emitter, picked, DTYPES[table.dtype])
    index_ring = emitter.ring(4 * count, 2)
    value_ring = emitter.ring(count * columns * DTYPES[table.dtype], 2)
    for place, start, size in _index_blocks(indices, count):
        ones = (1,) * len(place)
        window = indices.window((*place, start), (*ones, size))
        index = _flat(emitter.load(window, index_ring), size)
        for lead in np.ndindex(rows.shape[1:-1]):
            for column, width in windows(rows.shape[-1], columns):
                source = rows.window((0, *lead, column), (rows.shape[0], *(1 for _ in lead), width))
                result = picked.window((*place, start, *lead, column), (*ones, size, *(1 for _ in lead), width))
                _fetch(emitter, _matrix(source), _matrix(result), index, value_ring.next())


def _as_rows(table: View, result: View, axis: int, rank: int) -> tuple[View, View]:
    """The table as [entries, …, columns] and the result as [indices…, …, columns], its other dimensions merged alike."""
    others = [d for d in range(len(table.shape)) if d != axis]
    moved = [d if d < axis else d + rank - 1 for d in others]
    shape, (inner, outer) = merge_dimensions([table.shape[d] for d in others], [table.strides[d] for d in others], [result.strides[d] for d in moved])
    if not others:
        inner = outer = (DTYPES[table.dtype],)
    rows = replace(table, shape=(table.shape[axis], *shape), strides=(table.strides[axis], *inner))
    picked = tuple(range(axis, axis + rank))
    return rows, replace(
        result, shape=(*(result.shape[d] for d in picked), *shape), strides=(*(result.strides[d] for d in picked), *outer)
    )


def _block(emitter: Emitter, picked: View, element: int) -> tuple[int, int]:
    """(indices, columns) of a block: two of them fit the scratchpad."""
    for columns in halvings(picked.shape[-1]):
        for count in halvings(LONGEST_BLOCK):
            if 2 * (count * (4 + columns * element) + 16) <= emitter.spm_free:
                return count, columns
    return 1, 1


def _index_blocks(indices: View, count: int) -> list[tuple[tuple[int, ...], int, int]]:
    """(leading position, start, size) of runs along the last dimension of the indices."""
    return [(place, start, size) for place in np.ndindex(indices.shape[:-1]) for start, size in windows(indices.shape[-1], count)]


def _flat(tile: Tile, size: int) -> Tile:
    """The indices as one dimension."""
    step = next((stride for length, stride in zip(tile.shape, tile.strides, strict=True) if length > 1), 4)
    return replace(tile, shape=(size,), strides=(step,))


def _matrix(view: View) -> View:
    """[rows, columns], all other dimensions being 1."""
    long = [d for d in range(len(view.shape) - 1) if view.shape[d] > 1] or [0]
    return replace(view, shape=(view.shape[long[0]], view.shape[-1]), strides=(view.strides[long[0]], view.strides[-1]))


def _fetch(emitter: Emitter, source: View, result: View, index: Tile, slot: int) -> None:
    place, target = emitter.tile(source), emitter.tile(result)
    tile = target if target.space == "spm" else Tile.dense("spm", slot, result.dtype, result.shape)
    emitter.issue("gather", tile, place, index)
    emitter.store(result, tile)
