"""Matrix products into tiles: activations × weights, and activations × activations.

The one big idea: as for convolutions, a tile is (rows × columns) of the result and a chunk of the summed dimension; batches
are a loop outside. The right operand takes the part of the weights, whether it is constant or computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.errors import CompileError
from npucc.lowering import cost
from npucc.lowering.convolution import integer_weights, wrap
from npucc.lowering.elementwise import Box, Chain, operand_view
from npucc.lowering.emitter import Emitter, aligned, factor_tiles, parameter_block, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.tiling import halvings, tile_sizes
from npucc.lowering.views import View


@dataclass(frozen=True, slots=True)
class Plan:
    """Result rows, result columns, summed elements per step; the right operand in the outer loop or the left."""

    rows: int
    columns: int
    depth: int
    right_outer: bool


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
        plan = self.choose_plan()
        self.take_buffers(plan)
        for batch in np.ndindex(self.shape[:-2]):
            for rows, columns in self.order(plan):
                self.emit_tile(plan, batch, rows, columns)

    def choose_plan(self) -> Plan:
        """The cheapest plan that fits. Raises CompileError if even the smallest tile does not."""
        step = self.emitter.target.cols
        options = sorted(
            {self.columns, *(min(self.columns, -(-n // step) * step) for n in tile_sizes(self.columns)), *halvings(min(self.columns, step))},
            reverse=True,
        )
        for depth in halvings(self.depth):
            plans = [plan for columns in options for rows in tile_sizes(self.rows) if self.fits(plan := Plan(rows, columns, depth, True))]
            if plans:
                return min((replace(plan, right_outer=outer) for plan in plans for outer in (True, False)), key=self.estimate)
        raise CompileError(
            f"not even a one-element tile of a matrix product fits in {self.emitter.spm_free} bytes of scratchpad",
            hint="raise spm_bytes of the target",
        )

    def _box(self, batch: tuple[int, ...], rows: tuple[int, int], columns: tuple[int, int]) -> Box:
        rank = len(self.shape)
        return Box((*batch, rows[0], columns[0]), (*(1,) * (rank - 2), rows[1], columns[1]), tuple(range(rank)))

    def _first_box(self, plan: Plan) -> Box:
        return self._box((0,) * (len(self.shape) - 2), (0, plan.rows), (0, plan.columns))

    def sizes(self, plan: Plan) -> dict[str, int]:
        box = self._first_box(plan)
        return {
            "a": 0 if self.emitter.tile(self.left).space == "spm" else plan.rows * plan.depth * DTYPES[self.left.dtype],
            "b": 0 if self.weights is None and self.emitter.tile(self.right).space == "spm" else plan.depth * plan.columns,
            "p": 4 * (1 + len(self.factors)) * plan.columns,
            "y": plan.rows * plan.columns * DTYPES[self.result.dtype],
            "e": self.chain.bytes_per_slot(box) + 64 * len(self.chain.operands()),
        }

    def slots(self, plan: Plan) -> dict[str, int]:
        chunks, batches = -(-self.depth // plan.depth), int(np.prod(self.shape[:-2]))
        left = 1 if -(-self.rows // plan.rows) * chunks * batches == 1 else 2
        right = 1 if -(-self.columns // plan.columns) * chunks * (batches if self.weights is None or self.right_batches else 1) == 1 else 2
        return {"a": left, "b": right, "p": 2, "y": 2, "e": 2}

    def fits(self, plan: Plan) -> bool:
        target = self.emitter.target
        single = plan.rows == 1 and plan.columns <= target.cols
        if 4 * plan.rows * plan.columns > (target.acc_bytes if single else target.acc_bytes // 2):
            return False
        sizes, slots = self.sizes(plan), self.slots(plan)
        return sum(aligned(sizes[key], target) * slots[key] for key in sizes) <= self.emitter.spm_free

    def estimate(self, plan: Plan) -> float:
        """Cycles of one batch."""
        target, sizes, width = self.emitter.target, self.sizes(plan), DTYPES[self.left.dtype]
        rows, columns, chunks = -(-self.rows // plan.rows), -(-self.columns // plan.columns), -(-self.depth // plan.depth)
        again, run = chunks > 1, plan.columns * DTYPES[self.result.dtype]
        a_loads = rows * chunks * (columns if (plan.right_outer or again) and rows * chunks > 1 else 1)
        b_loads = columns * chunks * (rows if (not plan.right_outer or again) and columns * chunks > 1 else 1)
        p_loads = columns * (rows if not plan.right_outer and columns > 1 else 1)
        loads = (
            cost.Transfers(a_loads, sizes["a"], plan.depth * (1 if again else plan.rows) * width),
            cost.Transfers(b_loads, sizes["b"], sizes["b"] if self.weights is not None else plan.columns),
            cost.Transfers(p_loads, sizes["p"], sizes["p"]),
            *(cost.Transfers(rows * columns, size, run) for size in self.chain.operand_bytes(self._first_box(plan))),
        )
        stored = 0 if self.emitter.tile(self.view).space == "spm" else sizes["y"]
        vector = cost.vector_cycles(target, plan.rows * plan.columns) * (1 + len(self.chain.nodes))
        matrix = rows * columns * chunks * cost.matrix_cycles(target, plan.rows, plan.depth, plan.columns, 1, width=width)
        return cost.tiled_cycles(target, matrix=matrix, vector=vector, loads=loads, stores=cost.Transfers(rows * columns, stored, run))

    def take_buffers(self, plan: Plan) -> None:
        sizes, slots = self.sizes(plan), self.slots(plan)
        self.rings = {key: self.emitter.ring(sizes[key], slots[key]) for key in ("a", "b", "p", "y")}
        self.acc_ring = self.emitter.acc_ring(4 * plan.rows * plan.columns)
        self.chain.prepare(self._first_box(plan), 2)

    def order(self, plan: Plan) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        rows, columns = windows(self.rows, plan.rows), windows(self.columns, plan.columns)
        if plan.right_outer:
            yield from ((r, c) for c, r in product(columns, rows))
        else:
            yield from product(rows, columns)

    def emit_tile(self, plan: Plan, batch: tuple[int, ...], rows: tuple[int, int], columns: tuple[int, int]) -> None:
        emitter = self.emitter
        accumulator = Tile.dense("acc", self.acc_ring.next(), "s32", (rows[1], columns[1]))
        parameters = self._parameters(batch, columns)
        for low, count in windows(self.depth, plan.depth):
            a = emitter.load_once("a", (batch, rows, low), self._window(self.left, batch, rows, (low, count)), self.rings["a"])
            b = self._right_tile(batch, rows[1], columns, (low, count))
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
            return self.emitter.load_once("b", window, window, self.rings["b"])
        key = (self._right_batch(batch), columns, chunk)
        if key not in self.weight_tiles:
            matrix = self.weights[key[0]]
            self.weight_tiles[key] = self.emitter.weights(matrix[chunk[0] : sum(chunk), columns[0] : sum(columns)], rows)
        return self.emitter.load_weights(key, self.weight_tiles[key], self.rings["b"], in_array=True)

    def _parameters(self, batch: tuple[int, ...], columns: tuple[int, int]) -> Tile:
        key = ("p", self._right_batch(batch) if self.weights is not None else (), columns)
        if key not in self.blocks:
            span = slice(columns[0], sum(columns))
            self.blocks[key] = parameter_block(self.emitter, self.biases[key[1]][span], self.factors[:, span])
        return self.emitter.load_once("p", key, self.blocks[key], self.rings["p"])


def _matrix(tile: Tile) -> Tile:
    """The last two dimensions of a tile whose others have size 1."""
    return replace(tile, shape=tile.shape[-2:], strides=tile.strides[-2:])
