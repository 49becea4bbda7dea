"""Convolutions into tiles.

The one big idea: a tile is (rows × columns × output channels) of the result and a chunk of the input channels; nothing is
assumed to fit but one output pixel of one channel with one input channel. A cost model compares all tile shapes that fit,
with weights or pixels in the outer loop, by max(matrix, vector, transfer cycles) plus what the first tile has to wait for.
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
from npucc.lowering.buffers import Block, Buffer, operand_buffer, pack_blocks
from npucc.lowering.elementwise import Box, Chain
from npucc.lowering.emitter import Emitter, Ring, factor_tiles, parameter_rows, spm_tile, windows
from npucc.lowering.layers import Group
from npucc.lowering.search import Choice, Search, Work
from npucc.lowering.tiling import halvings, output_sizes, tile_sizes
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
    together: int = 0  # tiles of output channels whose parameters and weights are one transfer; 0: each for itself
    weights_outer: bool = True


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
        self.groups: dict[int, View] = {}

    def run(self) -> None:
        choice = self.choose_plan()
        self.take_buffers(choice)
        for outputs, pixels in self.order(choice.plan):
            self.emit_tile(choice.plan, outputs, pixels)

    # --- the plan

    def choose_plan(self) -> Choice[Plan]:
        """The quickest plan that fits. Raises CompileError if even the smallest tile does not."""
        search = Search(self.emitter.target, self.emitter.spm_free, self._work, self.buffers)
        for channels in self._channel_options():
            for columns in halvings(self.problem.size[1]):
                if choice := search.quickest(self._plans(channels, columns)):
                    return choice
        raise CompileError(
            f"not even a one-pixel tile fits in {self.emitter.spm_free} bytes of scratchpad and {self.emitter.target.acc_bytes} of accumulators",
            hint="raise spm_bytes or acc_bytes of the target",
        )

    def _plans(self, channels: int, columns: int) -> Iterator[Plan]:
        """Those whose sums fit in the accumulators, twice if they are more than one pixel."""
        for outputs in self._output_options():
            read = self._tied_channels(outputs) if self.tied else channels
            for together in self._together_options(outputs, channels):
                for rows in tile_sizes(self.problem.size[0]):
                    room = self.emitter.target.acc_bytes // (1 if rows == columns == 1 else 2)
                    if 4 * rows * columns * outputs <= room:
                        yield from (Plan(rows, columns, outputs, read, together, outer) for outer in (True, False))

    @property
    def tied(self) -> bool:
        """Grouped: a tile of output channels reads only its own groups' input channels."""
        return self.problem.groups > 1

    def _tied_channels(self, outputs: int) -> int:
        return outputs // (self.problem.outputs // self.problem.groups) * (self.problem.channels // self.problem.groups)

    def _channel_options(self) -> list[int]:
        return [self.problem.channels] if self.tied else halvings(self.problem.channels)

    def _output_options(self) -> list[int]:
        """Output channels per tile, of whole groups."""
        unit = self.problem.outputs // self.problem.groups if self.tied else 1
        return [unit * count for count in output_sizes(self.problem.outputs // unit, 1 if self.tied else self.emitter.target.cols)]

    def _together_options(self, outputs: int, channels: int) -> list[int]:
        """How many tiles' parameters and weights are one transfer; 0 where weights are packed or outlive their parameters."""
        if self.bytes_kept < 1.0 or (channels < self.problem.channels and not self.tied):
            return [0]
        return sorted({1, self._block(outputs).together(-(-self.problem.outputs // outputs))}, reverse=True)

    def _block(self, outputs: int) -> Block:
        """The constants of that many output channels, which read all input channels of their groups."""
        (kh, kw), per_group = self.problem.kernel, self.problem.channels // self.problem.groups
        return Block(4 * (1 + len(self.problem.factors)) * outputs, kh * kw * per_group * outputs, self.emitter.target)

    def buffers(self, plan: Plan) -> dict[str, Buffer]:
        """What each kind of tile asks for, those first that gain most from more slots."""
        problem, target = self.problem, self.emitter.target
        tiles, pixels = -(-problem.outputs // plan.outputs), self.pixel_tiles(plan)
        chunks = 1 if self.tied else -(-problem.channels // plan.channels)
        width, narrow = DTYPES[problem.x.dtype], DTYPES[self.result.dtype]
        x = 0 if self.resident else problem.reach(0, plan.rows) * problem.reach(1, plan.columns) * plan.channels * width
        y = plan.rows * plan.columns * plan.outputs * narrow
        stored = 0 if self.emitter.tile(self.view).space == "spm" else y
        y = y if stored or self.chain.nodes else 0  # else the results are requantized to where they stay
        run = plan.outputs * (plan.columns if plan.outputs == problem.outputs else 1)
        every = tiles * pixels * chunks
        once = chunks == 1 and not (plan.weights_outer or self.tied)
        return {
            **self._constant_buffers(plan, tiles, 1 if plan.weights_outer else pixels, chunks, every),
            "x": Buffer(x, pixels * (tiles if self.tied else chunks), pixels if once else every, cost.dma_cycles(target, x, self._run_length(plan))),
            "y": Buffer(y, tiles * pixels, tiles * pixels, cost.dma_cycles(target, stored, run * narrow), "st"),
            "e": operand_buffer(self.chain, self._box(plan), tiles * pixels, run, target),
        }

    def _constant_buffers(self, plan: Plan, tiles: int, again: int, chunks: int, every: int) -> dict[str, Buffer]:
        """Parameters and weights, in one buffer or two."""
        target, block = self.emitter.target, self._block(plan.outputs)
        if plan.together:
            size, groups = plan.together * block.bytes, -(-tiles // plan.together)
            return {"w": Buffer(size, groups, groups * again, cost.dma_cycles(target, size, size))}
        weights = block.weights * plan.channels // self.problem.channels if chunks > 1 else block.weights
        packed = math.ceil(self.bytes_kept * weights)
        return {
            "p": Buffer(block.parameters, tiles, tiles * again, cost.dma_cycles(target, block.parameters, block.parameters)),
            "w": Buffer(weights, tiles * chunks, tiles * again if chunks == 1 else every, cost.dma_cycles(target, packed, packed)),
        }

    def _box(self, plan: Plan) -> Box:
        """The largest block of the result that a tile makes, moved to the origin."""
        return Box((0,) * 4, (1, min(plan.outputs, self.problem.outputs_per_start), plan.rows, plan.columns), IMAGE_ORDER)

    def pixel_tiles(self, plan: Plan) -> int:
        return self.problem.x.shape[0] * -(-self.problem.size[0] // plan.rows) * -(-self.problem.size[1] // plan.columns)

    def _work(self, plan: Plan) -> Work:
        tiles = self.pixel_tiles(plan) * -(-self.problem.outputs // plan.outputs)
        return Work(tiles, self._matrix_cycles(plan), self._vector_cycles(plan))

    def _matrix_cycles(self, plan: Plan) -> float:
        """Of one tile of results."""
        problem, target, (kh, kw) = self.problem, self.emitter.target, self.problem.kernel
        count, width = plan.rows * plan.columns, DTYPES[problem.x.dtype]
        around = Windows(plan.columns, (kh, kw), problem.strides, problem.dilations)
        if problem.depthwise:
            return cost.depthwise_cycles(target, count, around, plan.outputs, width=width)
        groups = plan.channels // (problem.channels // problem.groups) if self.tied else 1
        depth, outputs = kh * kw * plan.channels // groups, plan.outputs // groups
        chunks = 1 if self.tied else -(-problem.channels // plan.channels)
        return chunks * cost.matrix_cycles(target, count, depth, outputs, groups, width=width, windows=around, kept=self.cycles_kept)

    def _vector_cycles(self, plan: Plan) -> float:
        """Of one tile of results."""
        return cost.vector_cycles(self.emitter.target, plan.rows * plan.columns * plan.outputs) * (1 + len(self.chain.nodes))

    def _run_length(self, plan: Plan) -> int:
        """Contiguous bytes of an input tile's rows in DRAM."""
        channels, width = self.problem.channels, DTYPES[self.problem.x.dtype]
        if plan.channels < channels or self.problem.x.strides[1] != width:
            return plan.channels * width if self.problem.x.strides[1] == width else width
        columns = self.problem.reach(1, plan.columns)
        whole = columns == self.problem.x.shape[3]
        return channels * columns * (self.problem.reach(0, plan.rows) if whole else 1) * width

    # --- the instructions

    def take_buffers(self, choice: Choice[Plan]) -> None:
        plan, slots = choice.plan, choice.slots
        rings = {name: self.emitter.ring(buffer.bytes, slots[name]) for name, buffer in choice.buffers.items() if name != "e"}
        self.w_ring, self.p_ring, self.y_ring = rings["w"], rings.get("p"), rings["y"]
        self.x_ring = None if self.resident else rings["x"]
        self.acc_ring = self.emitter.acc_ring(4 * plan.rows * plan.columns * plan.outputs)
        self.chain.prepare(self._box(plan), slots["e"])

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
        chunks = [(start, count)] if self.tied else windows(self.problem.channels, plan.channels)
        if plan.together:
            parameters, weights = self._block_of(plan, start, count)
            self._emit_matrix(accumulator, parameters, weights, outputs, pixels, chunks[0])
        else:
            parameters = self._parameters(start, count)
            for chunk in chunks:
                self._emit_matrix(accumulator, parameters, None, outputs, pixels, chunk)
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

    def _block_of(self, plan: Plan, start: int, count: int) -> tuple[Tile, Tile]:
        """Parameters and weights of the output channels [start, start + count), which came in one transfer."""
        problem, emitter = self.problem, self.emitter
        group, place = divmod(start // plan.outputs, plan.together)
        if group not in self.groups:
            parts = [(self._rows(low, many), self._slice(low, many)) for low, many in windows(problem.outputs, plan.outputs)]
            chosen = parts[group * plan.together : (group + 1) * plan.together]
            self.groups[group] = emitter.constant(pack_blocks(chosen, emitter.target), "s8")
        loaded = emitter.load_once(self.groups[group], self.w_ring)
        address = loaded.address + place * self._block(plan.outputs).bytes
        parameters = spm_tile(address, "s32", (1 + len(problem.factors), count))
        shape = self._slice(start, count).shape
        return parameters, spm_tile(address + self._block(count).offset, "s8", shape)

    def _rows(self, start: int, count: int) -> np.ndarray:
        """int32 [2 or 3, count]: biases and factors."""
        return parameter_rows(self.problem.bias[start : start + count], self.problem.factors[:, start : start + count])

    def _slice(self, start: int, count: int) -> np.ndarray:
        """The weights of some output channels, all input channels."""
        weights = self.problem.weights[..., start : start + count]
        return weights[:, :, 0] if self.problem.depthwise else weights

    def _parameters(self, start: int, count: int) -> Tile:
        """Bias and factors of a tile's output channels."""
        assert self.p_ring is not None
        if start not in self.parameters:
            self.parameters[start] = self.emitter.constant(self._rows(start, count), "s32")
        return self.emitter.load_once(self.parameters[start], self.p_ring)

    def _emit_matrix(
        self, accumulator: Tile, parameters: Tile, w: Tile | None, outputs: tuple[int, int], pixels: tuple[int, int, int, int, int],
        chunk: tuple[int, int],
    ) -> None:  # fmt: skip
        """Add one chunk of input channels to the sums. `w`: the weights, where they are loaded already."""
        problem = self.problem
        start, count = outputs
        low, channels = chunk
        if self.tied:
            per_group = problem.outputs // problem.groups
            wide = problem.channels // problem.groups
            low, channels = start // per_group * wide, count // per_group * wide
        if w is None:
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
        tile = self.emitter.load_once(window, self.x_ring or Ring(()))
        return Tile(tile.space, tile.address, tile.dtype, tile.shape[1:], tile.strides[1:]), pad

    def _padding_tile(self, height: int, width: int, channels: int) -> Tile:
        """For windows that lie wholly in the padding: a tile of the zero point."""
        if self.x_ring is None:
            self.x_ring = self.emitter.ring(height * width * channels * DTYPES[self.problem.x.dtype], 1)
        tile = spm_tile(self.x_ring.next(), self.problem.x.dtype, (height, width, channels))
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
