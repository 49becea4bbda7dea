"""Matrix products into tiles: activations × weights, and activations × activations.

The one big idea: as for convolutions, a tile is (rows × columns) of the result and a chunk of the summed dimension; batches
are a loop outside. The right operand takes the part of the weights, whether it is constant or computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.errors import CompileError
from npucc.lowering import cost
from npucc.lowering.buffers import Block, Buffer, operand_buffer, pack_blocks
from npucc.lowering.convolution import integer_weights, wrap
from npucc.lowering.elementwise import Box, Chain, operand_view
from npucc.lowering.emitter import Emitter, factor_tiles, parameter_rows, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.search import Choice, Search, Work
from npucc.lowering.tiling import halvings, output_sizes, tile_sizes
from npucc.lowering.views import View
from npucc.lowering.weights import cheapest


@dataclass(frozen=True, slots=True)
class Plan:
    """Result rows, result columns, summed elements per step; the right operand in the outer loop or the left."""

    rows: int
    columns: int
    depth: int
    together: int = 0  # tiles of columns whose parameters and weights are one transfer; 0: each for itself
    right_outer: bool = True


def lower_matmul(emitter: Emitter, group: Group) -> None:
    """A matrix product layer with its epilogue."""
    _Lowering(emitter, group).run()


class _Lowering:
    def __init__(self, emitter: Emitter, group: Group) -> None:
        graph, node = emitter.graph, group.anchor
        self.emitter = emitter
        self.shape = graph.tensors[group.result].shape
        self.view = emitter.placement.views[group.result]
        self.chain = Chain(emitter, group.nodes[1:], self.shape, node.outputs[0])
        self.source, self.result = graph.quant(node.inputs[0]), graph.quant(node.outputs[0])
        self.bounds = arithmetic.clamp_bounds(getattr(node.attributes, "clamp", None), self.result)
        self.left = self._batched(operand_view(emitter, node.inputs[0]))
        self.weights: np.ndarray | None = None
        right = graph.tensors[node.inputs[1]]
        if right.is_constant:
            assert right.data is not None
            data = right.data.astype(np.int8)
            self.right_batches = data.shape[:-2]
            self.weights = data
            self.packs = any(cheapest(data[index], emitter.target, self.shape[-2]) for index in np.ndindex(self.right_batches))
            skips = emitter.target.skips_inputs  # then the array must know which value is the zero
            folded = [integer_weights(emitter, node, data[index], axis=1, fold_zero=not skips) for index in np.ndindex(self.right_batches)]
            self.biases = {index: wrap(part[1]) for index, part in zip(np.ndindex(self.right_batches), folded, strict=True)}
            self.factors = folded[0][2]
            self.zeros = (self.source.zero if skips else 0, 0)
        else:
            self.right = self._batched(operand_view(emitter, node.inputs[1]))
            self.biases = {(): np.zeros(self.shape[-1], np.int32)}
            if len(node.inputs) > 2 and node.inputs[2]:
                bias = graph.tensors[node.inputs[2]].data
                assert bias is not None
                self.biases = {(): bias.astype(np.int32).reshape(-1)}
            factor = arithmetic.product_factor(self.source, graph.quant(node.inputs[1]), self.result, emitter.target.requantize)
            self.factors = factor.spread(self.shape[-1]).rows
            self.zeros = (self.source.zero, graph.quant(node.inputs[1]).zero)
        self.rows, self.depth, self.columns = self.shape[-2], self.left.shape[-1], self.shape[-1]
        self._merge_batches()
        self.blocks: dict[object, View] = {}
        self.weight_tiles: dict[object, Tile] = {}

    def _batched(self, view: View) -> View:
        """With the batch dimensions of the result (broadcast ones repeat)."""
        return view.broadcast((*self.shape[:-2], *view.shape[-2:]))

    def _merge_batches(self) -> None:
        """Against one weight matrix, batch rows are rows of one long product, where the views and the epilogue allow it."""
        if self.weights is None or any(n != 1 for n in self.right_batches) or self.chain.nodes or len(self.shape) < 3:
            return
        count = int(np.prod(self.shape[:-1]))
        left, result = self.left.reshape((count, self.depth)), self.view.reshape((count, self.columns))
        if left is None or result is None:
            return
        self.left, self.view, self.shape, self.rows = left, result, (count, self.columns), count
        self.weights = self.weights.reshape(self.weights.shape[-2:])
        self.biases = {(): next(iter(self.biases.values()))}
        self.right_batches = ()

    def run(self) -> None:
        choice = self.choose_plan()
        self.take_buffers(choice)
        for batch in np.ndindex(self.shape[:-2]):
            for rows, columns in self.order(choice.plan):
                self.emit_tile(choice.plan, batch, rows, columns)

    def choose_plan(self) -> Choice[Plan]:
        """The quickest plan that fits. Raises CompileError if even the smallest tile does not."""
        search = Search(self.emitter.target, self.emitter.spm_free, self._work, self.buffers)
        for depth in halvings(self.depth):
            if choice := search.quickest(self._plans(depth)):
                return choice
        raise CompileError(
            f"not even a one-element tile of a matrix product fits in {self.emitter.spm_free} bytes of scratchpad",
            hint="raise spm_bytes of the target",
        )

    def _plans(self, depth: int) -> Iterator[Plan]:
        """Those whose sums fit in the accumulators, twice if they are more than one row of the array."""
        target = self.emitter.target
        for columns in output_sizes(self.columns, target.cols):
            for together in self._together_options(columns, depth):
                for rows in tile_sizes(self.rows):
                    room = target.acc_bytes // (1 if rows == 1 and columns <= target.cols else 2)
                    if 4 * rows * columns <= room:
                        yield from (Plan(rows, columns, depth, together, outer) for outer in (True, False))

    def _box(self, batch: tuple[int, ...], rows: tuple[int, int], columns: tuple[int, int]) -> Box:
        rank = len(self.shape)
        return Box((*batch, rows[0], columns[0]), (*(1,) * (rank - 2), rows[1], columns[1]), tuple(range(rank)))

    def _first_box(self, plan: Plan) -> Box:
        return self._box((0,) * (len(self.shape) - 2), (0, plan.rows), (0, plan.columns))

    def _together_options(self, columns: int, depth: int) -> list[int]:
        """How many tiles' parameters and weights are one transfer; 0 where weights are packed, computed, or outlive their parameters."""
        if self.weights is None or depth < self.depth or self.packs:
            return [0]
        return sorted({1, self._block(columns).together(-(-self.columns // columns))}, reverse=True)

    def _block(self, columns: int) -> Block:
        """The constants of that many columns, over the whole depth."""
        return Block(4 * (1 + len(self.factors)) * columns, self.depth * columns, self.emitter.target)

    def buffers(self, plan: Plan) -> dict[str, Buffer]:
        """What each kind of tile asks for, those first that gain most from more slots."""
        target, batches, narrow = self.emitter.target, math.prod(self.shape[:-2]), DTYPES[self.result.dtype]
        chunks, rows = -(-self.depth // plan.depth), batches * -(-self.rows // plan.rows)
        tiles = rows * -(-self.columns // plan.columns)
        a = 0 if self.emitter.tile(self.left).space == "spm" else plan.rows * plan.depth * DTYPES[self.left.dtype]
        run = plan.depth * (plan.rows if chunks == 1 else 1) * DTYPES[self.left.dtype]
        y = plan.rows * plan.columns * narrow
        stored = 0 if self.emitter.tile(self.view).space == "spm" else y
        y = y if stored or self.chain.nodes else 0  # else the results are requantized to where they stay
        a_transfers = rows if chunks == 1 and not plan.right_outer else tiles * chunks
        return {
            **self._right_buffers(plan, batches if plan.right_outer else rows, chunks),
            "a": Buffer(a, rows * chunks, a_transfers, cost.dma_cycles(target, a, run)),
            "y": Buffer(y, tiles, tiles, cost.dma_cycles(target, stored, plan.columns * narrow), "st"),
            "e": operand_buffer(self.chain, self._first_box(plan), tiles, plan.columns * narrow, target),
        }

    def _right_buffers(self, plan: Plan, times: int, chunks: int) -> dict[str, Buffer]:
        """Parameters and the right operand, in one buffer or two; all columns of it are needed that many times."""
        target, block, columns = self.emitter.target, self._block(plan.columns), -(-self.columns // plan.columns)
        own = math.prod(self.shape[:-2] if self.weights is None else self.right_batches)  # different right operands
        if plan.together:
            size, groups = plan.together * block.bytes, -(-columns // plan.together)
            return {"b": Buffer(size, own * groups, times * groups, cost.dma_cycles(target, size, size))}
        parameters, p = columns * (own if self.weights is not None else 1), block.parameters
        b = 0 if self.weights is None and self.emitter.tile(self.right).space == "spm" else plan.depth * plan.columns
        b_transfers = columns * times if chunks == 1 else columns * chunks * math.prod(self.shape[:-2]) * -(-self.rows // plan.rows)
        b_cycles = cost.dma_cycles(target, b, b if self.weights is not None else plan.columns)
        return {
            "p": Buffer(p, parameters, columns * times, cost.dma_cycles(target, p, p)),
            "b": Buffer(b, own * columns * chunks, b_transfers, b_cycles),
        }

    def _work(self, plan: Plan) -> Work:
        target, batches = self.emitter.target, math.prod(self.shape[:-2])
        tiles, chunks = batches * -(-self.rows // plan.rows) * -(-self.columns // plan.columns), -(-self.depth // plan.depth)
        vector = cost.vector_cycles(target, plan.rows * plan.columns) * (1 + len(self.chain.nodes))
        matrix = chunks * cost.matrix_cycles(target, plan.rows, plan.depth, plan.columns, 1, width=DTYPES[self.left.dtype])
        return Work(tiles, matrix, vector)

    def take_buffers(self, choice: Choice[Plan]) -> None:
        plan, slots = choice.plan, choice.slots
        self.rings = {name: self.emitter.ring(buffer.bytes, slots[name]) for name, buffer in choice.buffers.items() if name != "e"}
        self.acc_ring = self.emitter.acc_ring(4 * plan.rows * plan.columns)
        self.chain.prepare(self._first_box(plan), slots["e"])

    def order(self, plan: Plan) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        rows, columns = windows(self.rows, plan.rows), windows(self.columns, plan.columns)
        if plan.right_outer:
            yield from ((r, c) for c, r in product(columns, rows))
        else:
            yield from product(rows, columns)

    def emit_tile(self, plan: Plan, batch: tuple[int, ...], rows: tuple[int, int], columns: tuple[int, int]) -> None:
        emitter = self.emitter
        accumulator = Tile.dense("acc", self.acc_ring.next(), "s32", (rows[1], columns[1]))
        parameters, weights = self._block_of(plan, batch, columns) if plan.together else (self._parameters(batch, columns), None)
        for low, count in windows(self.depth, plan.depth):
            a = emitter.load_once(self._window(self.left, batch, rows, (low, count)), self.rings["a"])
            b = weights or self._right_tile(batch, rows[1], columns, (low, count))
            bias = (Tile("spm", parameters.address, "s32", (columns[1],), (4,)),) if low == 0 else ()
            emitter.issue("matmul", accumulator, _matrix(a), _matrix(b), *bias, za=self.zeros[0], zb=self.zeros[1], accumulate=int(low > 0))
        box = self._box(batch, rows, columns)
        window = box.of(self.view, self.shape)
        in_place = emitter.result_tile(window, None) if emitter.tile(window).space == "spm" else None
        working = in_place if in_place is not None and not self.chain.nodes else spm_tile(self.rings["y"].next(), self.result.dtype, window.shape)
        mode = emitter.target.requantize
        emitter.issue("requant", _matrix(working), accumulator, *factor_tiles(parameters, mode), mode=mode, zero=self.result.zero, clamp=self.bounds)
        finished = self.chain.apply(box, working, self.rings["y"], in_place) if self.chain.nodes else working
        emitter.store(window, finished)

    def _window(self, view: View, batch: tuple[int, ...], rows: tuple[int, int], columns: tuple[int, int]) -> View:
        ones = (1,) * len(batch)
        window = view.window((*batch, rows[0], columns[0]), (*ones, rows[1], columns[1]))
        return replace(window, shape=window.shape[-2:], strides=window.strides[-2:])

    def _right_batch(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The result's batch index as an index into the weights' batches."""
        if not self.right_batches:
            return ()
        own = batch[len(batch) - len(self.right_batches) :]
        return tuple(0 if size == 1 else index for index, size in zip(own, self.right_batches, strict=True))

    def _right_tile(self, batch: tuple[int, ...], rows: int, columns: tuple[int, int], chunk: tuple[int, int]) -> Tile:
        if self.weights is None:
            window = self._window(self.right, batch, chunk, columns)
            return self.emitter.load_once(window, self.rings["b"])
        key = (self._right_batch(batch), columns, chunk)
        if key not in self.weight_tiles:
            matrix = self.weights[key[0]]
            self.weight_tiles[key] = self.emitter.weights(matrix[chunk[0] : sum(chunk), columns[0] : sum(columns)], rows)
        return self.emitter.load_weights(key, self.weight_tiles[key], self.rings["b"], in_array=True)

    def _block_of(self, plan: Plan, batch: tuple[int, ...], columns: tuple[int, int]) -> tuple[Tile, Tile]:
        """Parameters and weights of these columns, which came in one transfer."""
        assert self.weights is not None
        emitter, index, (start, count) = self.emitter, self._right_batch(batch), columns
        group, place = divmod(start // plan.columns, plan.together)
        if (index, group) not in self.blocks:
            chosen = windows(self.columns, plan.columns)[group * plan.together : (group + 1) * plan.together]
            parts = [(self._rows_of(index, low, many), self.weights[index][:, low : low + many]) for low, many in chosen]
            self.blocks[index, group] = emitter.constant(pack_blocks(parts, emitter.target), "s8")
        loaded = emitter.load_once(self.blocks[index, group], self.rings["b"])
        address = loaded.address + place * self._block(plan.columns).bytes
        parameters = spm_tile(address, "s32", (1 + len(self.factors), count))
        return parameters, spm_tile(address + self._block(count).offset, "s8", (self.depth, count))

    def _rows_of(self, index: tuple[int, ...], start: int, count: int) -> np.ndarray:
        """int32 [2 or 3, count]: biases and factors."""
        return parameter_rows(self.biases[index][start : start + count], self.factors[:, start : start + count])

    def _parameters(self, batch: tuple[int, ...], columns: tuple[int, int]) -> Tile:
        key = ("p", self._right_batch(batch) if self.weights is not None else (), columns)
        if key not in self.blocks:
            self.blocks[key] = self.emitter.constant(self._rows_of(key[1], *columns), "s32")
        return self.emitter.load_once(self.blocks[key], self.rings["p"])


def _matrix(tile: Tile) -> Tile:
    """The last two dimensions of a tile whose others have size 1."""
    return replace(tile, shape=tile.shape[-2:], strides=tile.strides[-2:])
