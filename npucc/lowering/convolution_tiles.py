"""Convolutions into tiles.

The one big idea: a tile is (rows × columns × output channels) of the result and a chunk of the input channels; nothing is
assumed to fit but one output pixel of one channel with one input channel. A cost model compares all tile shapes that fit,
with weights or pixels in the outer loop (`cost.tiled_cycles`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from isa.program import DTYPES, Tile
from npucc import arithmetic
from npucc.errors import CompileError
from npucc.lowering import cost
from npucc.lowering.elementwise import Box, Chain
from npucc.lowering.emitter import Emitter, Ring, aligned, factor_tiles, parameter_block, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.tiling import halvings, tile_sizes
from npucc.lowering.views import View
from npucc.lowering.weights import kept_shares
from runtime.costs import Windows


@dataclass(frozen=True, eq=False)
class Convolution:
    """One correlation over an NCHW view. Results go to rows start + i·step (columns alike) of the layer's result; with several `starts`, the
    output channels are those of the first start, then those of the next, all computed from the same windows."""

    x: View
    zero: int
    weights: np.ndarray  # int8 [kh, kw, channels per group, output channels]
    bias: np.ndarray  # int32 [output channels], the input's zero point folded in
    factors: np.ndarray  # int32 [1 or 2, output channels], the rows of `arithmetic.Factor`
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int]  # top, left (below and right: whatever the result size asks for)
    groups: int
    size: tuple[int, int]  # rows and columns computed
    starts: tuple[tuple[int, int], ...] = ((0, 0),)
    steps: tuple[int, int] = (1, 1)
    first_output: int = 0  # of the layer's output channels

    @property
    def outputs(self) -> int:
        return int(self.weights.shape[3])

    @property
    def outputs_per_start(self) -> int:
        return self.outputs // len(self.starts)

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def kernel(self) -> tuple[int, int]:
        return int(self.weights.shape[0]), int(self.weights.shape[1])

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels == self.outputs

    def reach(self, axis: int, count: int) -> int:
        """Input rows (axis 0) or columns (1) under `count` results, at most all of them."""
        span = (count - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1
        return min(span, self.x.shape[2 + axis])

    def source(self, axis: int, start: int, count: int) -> tuple[int, int, int, int]:
        """(first input row, rows, padding before, padding after) for results [start, start + count)."""
        low = start * self.strides[axis] - self.pads[axis]
        high = low + (count - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1
        size = self.x.shape[2 + axis]
        if low >= size:  # wholly in the padding below: no rows, which the caller replaces by one of padding
            return 0, 0, 0, max(high - low - 1, 0)
        first, last = max(low, 0), max(min(high, size), 1)
        return first, last - first, first - low, max(high - last, 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """Tile sizes: result rows, columns, output channels, input channels per step; weights in the outer loop or pixels."""

    rows: int
    columns: int
    outputs: int
    channels: int
    weights_outer: bool


def lower_convolutions(emitter: Emitter, group: Group, problems: list[Convolution]) -> None:
    """Each problem in turn, with the layer's epilogue on every finished tile."""
    for problem in problems:
        mark = emitter.mark()
        _Lowering(emitter, group, problem).run()
        emitter.reset(mark)


class _Lowering:
    """One convolution of one layer: its plan, its buffers, its instructions."""

    def __init__(self, emitter: Emitter, group: Group, problem: Convolution) -> None:
        self.emitter, self.problem = emitter, problem
        self.shape = emitter.graph.tensors[group.result].shape
        self.view = emitter.placement.views[group.result]
        self.chain = Chain(emitter, group.nodes[1:], self.shape, group.anchor.outputs[0])
        self.bounds = arithmetic.clamp_bounds(getattr(group.anchor.attributes, "clamp", None), emitter.graph.quant(group.anchor.outputs[0]))
        self.result = emitter.graph.quant(group.anchor.outputs[0])
        self.resident = emitter.tile(problem.x).space == "spm"
        self.weights: dict[tuple[int, int], Tile] = {}
        around = Windows(problem.size[1], problem.kernel, problem.strides, problem.dilations)
        self.cycles_kept, self.bytes_kept = kept_shares(problem.weights, emitter.target, 0 if self.tied else math.prod(problem.size), around)
        self.parameters: dict[int, View] = {}

    def run(self) -> None:
        plan = self.choose_plan()
        self.take_buffers(plan)
        for outputs, pixels in self.order(plan):
            self.emit_tile(plan, outputs, pixels)

    # --- the plan

    def choose_plan(self) -> Plan:
        """The cheapest plan that fits. Raises CompileError if even the smallest tile does not."""
        problem = self.problem
        for channels in self._channel_options():
            for columns in halvings(problem.size[1]):
                plans = [
                    plan
                    for outputs in self._output_options()
                    for rows in tile_sizes(problem.size[0])
                    if self.fits(plan := Plan(rows, columns, outputs, channels if not self.tied else self._tied_channels(outputs), True))
                ]
                if plans:
                    return min((replace(plan, weights_outer=outer) for plan in plans for outer in (True, False)), key=self.estimate)
        raise CompileError(
            f"not even a one-pixel tile fits in {self.emitter.spm_free} bytes of scratchpad and {self.emitter.target.acc_bytes} of accumulators",
            hint="raise spm_bytes or acc_bytes of the target",
        )

    @property
    def tied(self) -> bool:
        """Grouped: a tile of output channels reads only its own groups' input channels."""
        return self.problem.groups > 1

    def _tied_channels(self, outputs: int) -> int:
        return outputs // (self.problem.outputs // self.problem.groups) * (self.problem.channels // self.problem.groups)

    def _channel_options(self) -> list[int]:
        return [self.problem.channels] if self.tied else halvings(self.problem.channels)

    def _output_options(self) -> list[int]:
        """Output channels per tile: all, or multiples of the array's columns (of whole groups)."""
        unit = self.problem.outputs // self.problem.groups if self.tied else 1
        total = self.problem.outputs // unit
        step = 1 if self.tied else self.emitter.target.cols
        return [
            unit * count
            for count in sorted(
                {total, *(min(total, -(-size // step) * step) for size in tile_sizes(total)), *halvings(min(total, step))}, reverse=True
            )
        ]

    def sizes(self, plan: Plan) -> dict[str, int]:
        """Bytes of one slot of each buffer."""
        problem, (kh, kw) = self.problem, self.problem.kernel
        per_group = plan.channels if not self.tied else problem.channels // problem.groups
        pixels, box = plan.rows * plan.columns, self._box(plan)
        return {
            "x": 0 if self.resident else problem.reach(0, plan.rows) * problem.reach(1, plan.columns) * plan.channels * DTYPES[problem.x.dtype],
            "w": kh * kw * per_group * plan.outputs,
            "p": 4 * (1 + len(problem.factors)) * plan.outputs,
            "y": pixels * plan.outputs * DTYPES[self.result.dtype],
            "e": self.chain.bytes_per_slot(box) + 64 * len(self.chain.operands()),
        }

    def _box(self, plan: Plan) -> Box:
        """The largest block of the result that a tile makes, moved to the origin."""
        return Box((0,) * 4, (1, min(plan.outputs, self.problem.outputs_per_start), plan.rows, plan.columns), IMAGE_ORDER)

    def slots(self, plan: Plan) -> dict[str, int]:
        """One slot where a buffer is filled once, else two that take turns."""
        chunks = -(-self.problem.channels // plan.channels) if not self.tied else 1
        tiles = -(-self.problem.outputs // plan.outputs)
        pixels = self.pixel_tiles(plan)
        return {
            "x": 1 if pixels * chunks * (tiles if self.tied else 1) == 1 else 2,
            "w": 1 if tiles * chunks == 1 else 2,
            "p": 1 if tiles == 1 else 2,
            "y": 2,
            "e": 2,
        }

    def pixel_tiles(self, plan: Plan) -> int:
        return self.problem.x.shape[0] * -(-self.problem.size[0] // plan.rows) * -(-self.problem.size[1] // plan.columns)

    def fits(self, plan: Plan) -> bool:
        target = self.emitter.target
        accumulators = 4 * plan.rows * plan.columns * plan.outputs
        single = plan.rows == 1 and plan.columns == 1
        if accumulators > (target.acc_bytes if single else target.acc_bytes // 2):
            return False
        sizes, slots = self.sizes(plan), self.slots(plan)
        return sum(aligned(sizes[key], target) * slots[key] for key in sizes) <= self.emitter.spm_free

    def estimate(self, plan: Plan) -> float:
        """Cycles of the layer."""
        problem, target, sizes = self.problem, self.emitter.target, self.sizes(plan)
        pixels, tiles = self.pixel_tiles(plan), -(-problem.outputs // plan.outputs)
        chunks, stores = 1 if self.tied else -(-problem.channels // plan.channels), pixels * tiles
        alone = pixels * chunks == 1 or (chunks == 1 and (tiles == 1 or not plan.weights_outer))
        x_loads = stores if self.tied else pixels * chunks * (1 if alone else tiles)
        w_loads = tiles * chunks * (1 if (plan.weights_outer and chunks == 1) or tiles * chunks == 1 else pixels)
        p_loads = tiles * (1 if plan.weights_outer or tiles == 1 else pixels)
        packed, run = math.ceil(self.bytes_kept * sizes["w"]), self._stored_run(plan)
        loads = (
            cost.Transfers(x_loads, sizes["x"], self._run_length(plan)),
            cost.Transfers(w_loads, packed, packed),
            cost.Transfers(p_loads, sizes["p"], sizes["p"]),
            *(cost.Transfers(stores, size, run) for size in self.chain.operand_bytes(self._box(plan))),
        )
        stored = 0 if self.emitter.tile(self.view).space == "spm" else sizes["y"]
        vector = cost.vector_cycles(target, plan.rows * plan.columns * plan.outputs) * (1 + len(self.chain.nodes))
        matrix = stores * chunks * self._matrix_cycles(plan)
        return cost.tiled_cycles(target, matrix=matrix, vector=vector, loads=loads, stores=cost.Transfers(stores, stored, run))

    def _matrix_cycles(self, plan: Plan) -> float:
        """Of one tile and one chunk of its input channels."""
        problem, target = self.problem, self.emitter.target
        count, width, taps = plan.rows * plan.columns, DTYPES[problem.x.dtype], math.prod(problem.kernel)
        around = Windows(plan.columns, problem.kernel, problem.strides, problem.dilations)
        if problem.depthwise:
            return cost.depthwise_cycles(target, count, around, plan.outputs, width=width)
        groups = plan.channels // (problem.channels // problem.groups) if self.tied else 1
        depth, outputs = taps * plan.channels // groups, plan.outputs // groups
        return cost.matrix_cycles(target, count, depth, outputs, groups, width=width, windows=around, kept=self.cycles_kept)

    def _stored_run(self, plan: Plan) -> int:
        """Contiguous bytes of a result tile in DRAM."""
        return plan.outputs * (plan.columns if plan.outputs == self.problem.outputs else 1) * DTYPES[self.result.dtype]

    def _run_length(self, plan: Plan) -> int:
        """Contiguous bytes of an input tile's rows in DRAM."""
        channels, width = self.problem.channels, DTYPES[self.problem.x.dtype]
        if plan.channels < channels or self.problem.x.strides[1] != width:
            return plan.channels * width if self.problem.x.strides[1] == width else width
        columns = self.problem.reach(1, plan.columns)
        whole = columns == self.problem.x.shape[3]
        return channels * columns * (self.problem.reach(0, plan.rows) if whole else 1) * width

    # --- the instructions

    def take_buffers(self, plan: Plan) -> None:
        sizes, slots = self.sizes(plan), self.slots(plan)
        take = self.emitter.ring
        self.x_ring: Ring | None = None if self.resident else take(sizes["x"], slots["x"])
        self.w_ring, self.p_ring, self.y_ring = (take(sizes[key], slots[key]) for key in ("w", "p", "y"))
        self.acc_ring = self.emitter.acc_ring(4 * plan.rows * plan.columns * plan.outputs)
        self.chain.prepare(self._box(plan), 2)

    def order(self, plan: Plan) -> Iterator[tuple[tuple[int, int], tuple[int, int, int, int, int]]]:
        """(output channel tile, pixel tile (batch, row, rows, column, columns)) in the plan's order."""
        outputs = windows(self.problem.outputs, plan.outputs)
        pixels = [
            (batch, row, rows, column, columns)
            for batch in range(self.problem.x.shape[0])
            for row, rows in windows(self.problem.size[0], plan.rows)
            for column, columns in windows(self.problem.size[1], plan.columns)
        ]
        if plan.weights_outer:
            yield from ((n, p) for n in outputs for p in pixels)
        else:
            yield from ((n, p) for p in pixels for n in outputs)

    def emit_tile(self, plan: Plan, outputs: tuple[int, int], pixels: tuple[int, int, int, int, int]) -> None:
        start, count = outputs
        accumulator = Tile.dense("acc", self.acc_ring.next(), "s32", (pixels[2], pixels[4], count))
        parameters = self._parameters(start, count)
        chunks = [(start, count)] if self.tied else windows(self.problem.channels, plan.channels)
        for chunk in chunks:
            self._emit_matrix(accumulator, parameters, outputs, pixels, chunk)
        for low, high in self._by_start(start, start + count):
            self._emit_result(accumulator, parameters, pixels, start, (low, high))

    def _by_start(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The output channels [low, high), cut where others go to other rows and columns."""
        cuts = [low, *(cut for cut in range(0, high, self.problem.outputs_per_start) if cut > low), high]
        return pairwise(cuts)

    def _emit_result(
        self, accumulator: Tile, parameters: Tile, pixels: tuple[int, int, int, int, int], start: int, outputs: tuple[int, int]
    ) -> None:
        """Output channels [low, high) of the accumulators, which begin with channel `start`: requantized, finished and stored."""
        emitter, problem, (batch, row, rows, column, columns), (low, high) = self.emitter, self.problem, pixels, outputs
        (top, left), first = problem.starts[low // problem.outputs_per_start], problem.first_output + low % problem.outputs_per_start
        box = Box(
            (batch, first, top + row * problem.steps[0], left + column * problem.steps[1]), (1, high - low, rows, columns), IMAGE_ORDER,
            (1, 1, *problem.steps),
        )  # fmt: skip
        window = box.of(self.view, self.shape)
        in_place = emitter.result_tile(window, None) if emitter.tile(window).space == "spm" else None
        working = in_place if in_place is not None and not self.chain.nodes else spm_tile(self.y_ring.next(), self.result.dtype, window.shape)
        mode = emitter.target.requantize
        sums, *factors = (channels_of(tile, low - start, high - start) for tile in (accumulator, *factor_tiles(parameters, mode)))
        if working.is_dense:
            sums = replace(sums, shape=(rows * columns, high - low), strides=accumulator.strides[1:])
        emitter.issue("requant", flat_pixels(working), sums, *factors, mode=mode, zero=self.result.zero, clamp=self.bounds)
        finished = self.chain.apply(box, working, self.y_ring, in_place) if self.chain.nodes else working
        emitter.store(window, finished)

    def _parameters(self, start: int, count: int) -> Tile:
        """Bias and factors of a tile's output channels."""
        if start not in self.parameters:
            self.parameters[start] = parameter_block(
                self.emitter, self.problem.bias[start : start + count], self.problem.factors[:, start : start + count]
            )
        return self.emitter.load_once("p", start, self.parameters[start], self.p_ring)

    def _emit_matrix(
        self, accumulator: Tile, parameters: Tile, outputs: tuple[int, int], pixels: tuple[int, int, int, int, int], chunk: tuple[int, int],
    ) -> None:  # fmt: skip
        problem = self.problem
        start, count = outputs
        low, channels = chunk
        if self.tied:
            per_group = problem.outputs // problem.groups
            wide = problem.channels // problem.groups
            low, channels = start // per_group * wide, count // per_group * wide
        source = self._weights(start, count, low, channels, rows_and_columns=pixels[2] * pixels[4])
        w = self.emitter.load_weights((start, low), source, self.w_ring, in_array=not self.tied)
        x, pad = self._source(pixels, low, channels)
        attributes: dict[str, object] = {
            "stride": problem.strides,
            "dilation": problem.dilations,
            "pad": pad,
            "zero": problem.zero if any(pad) or self.emitter.target.skips_inputs else 0,
        }
        first = self.tied or low == 0
        bias = (Tile("spm", parameters.address, "s32", (count,), (4,)),) if first else ()
        if not problem.depthwise:
            attributes["groups"] = channels // (problem.channels // problem.groups) if self.tied else 1
        self.emitter.issue("dwconv" if problem.depthwise else "conv", accumulator, x, w, *bias, accumulate=int(not first), **attributes)  # type: ignore[arg-type]

    def _weights(self, start: int, count: int, low: int, channels: int, *, rows_and_columns: int) -> Tile:
        """A tile's weights among the constants."""
        if (start, low) not in self.weights:
            rows = slice(None) if self.tied else slice(low, low + channels)
            weights = self.problem.weights[:, :, rows, start : start + count]
            self.weights[start, low] = self.emitter.weights(
                weights[:, :, 0] if self.problem.depthwise else weights, 0 if self.tied else rows_and_columns
            )
        return self.weights[start, low]

    def _source(self, pixels: tuple[int, int, int, int, int], low: int, channels: int) -> tuple[Tile, tuple[int, int, int, int]]:
        """The input tile [rows, columns, channels] and its padding."""
        problem = self.problem
        batch, row, rows, column, columns = pixels
        top, height, before, after = problem.source(0, row, rows)
        left, width, ahead, behind = problem.source(1, column, columns)
        pad = (before, ahead, after, behind)
        if height == 0 or width == 0:
            return self._padding_tile(max(height, 1), max(width, 1), channels), pad
        window = problem.x.window((batch, low, top, left), (1, channels, height, width)).permute(IMAGE_ORDER)
        tile = self.emitter.load_once("x", window, window, self.x_ring or Ring((0,)))
        return Tile(tile.space, tile.address, tile.dtype, tile.shape[1:], tile.strides[1:]), pad

    def _padding_tile(self, height: int, width: int, channels: int) -> Tile:
        """For windows that lie wholly in the padding: a tile of the zero point."""
        if self.x_ring is None:
            self.x_ring = self.emitter.ring(height * width * channels * DTYPES[self.problem.x.dtype], 1)
        tile = spm_tile(self.x_ring.next(), self.problem.x.dtype, (height, width, channels))
        self.emitter.forget("x")
        self.emitter.vector("fill", tile, value=float(self.problem.zero))
        return tile


IMAGE_ORDER = (0, 2, 3, 1)


def channels_of(tile: Tile, low: int, high: int) -> Tile:
    """Elements [low, high) of a tile's last dimension."""
    return replace(tile, address=tile.address + low * tile.strides[-1], shape=(*tile.shape[:-1], high - low))


def flat_pixels(tile: Tile) -> Tile:
    """[1, rows, columns, channels] as [rows·columns, channels] where that is dense, else [rows, columns, channels]."""
    _, rows, columns, channels = tile.shape
    if tile.is_dense:
        return Tile.dense(tile.space, tile.address, tile.dtype, (rows * columns, channels))
    return Tile(tile.space, tile.address, tile.dtype, tile.shape[1:], tile.strides[1:])
