"""What one instruction costs: cycles on its engine, bytes through each memory, operations.

The one big idea: costs are equations over shapes and the target, never over values or addresses, so that a compiler can ask
them before it writes a program. M = output pixels (or rows), K = products per output, N = outputs, G = groups; ⌈⌉ rounds up.

Systolic array of R rows and C columns (K lies along R, N along C), one output matrix:
    weight stationary   F = G⌈K/R⌉⌈N/C⌉ folds of M pixels. SCALE-Sim v2's analytical model (Samajdar et al., ISPASS 2020):
                        F(2R + C + M - 2): load weights R, stream M, skew and drain R + C - 2.
                        With shadow weights the next fold loads behind the current one: R + F·max(M, R) + R + C - 2.
    output stationary   G⌈M/R⌉⌈N/C⌉(K + R + C - 2)
    input stationary    G⌈K/R⌉⌈M/C⌉(2R + C + N - 2)
    convolution         weight stationary with patches (variable windows: VW-SDK, Rhe et al., DATE 2022): the columns of a fold hold the results of
                        a patch of h' × w' neighbouring pixels, and the weights a Toeplitz matrix, by which the inputs under the patch (fewer than
                        h'w' windows, as these overlap) become its results. K is the number of those inputs, the columns are h'w'N,
                        M = ⌈h/h'⌉⌈w/w'⌉. Of groups whose K and columns are small enough, several lie block-diagonally in one fold. The patch is
                        the one with the fewest cycles: 1 × 1 where the outputs fill the columns, larger ones for few outputs, and for
                        depthwise (N = 1, K = taps). The other dataflows have K = taps, N = 1, G = c for depthwise.
MAC array m×n×k (Da Vinci cube: Liao et al., HPCA 2021), pipeline depth D:
    matrix              G⌈M/m⌉⌈N/n⌉⌈K/k⌉ + D
    depthwise           ⌈M/m⌉⌈c/n⌉⌈taps/k⌉ + D: each of the n columns serves one channel
16-bit inputs pass the array as two bytes: everything twice.

Vector engine: startup + ⌈elements/lanes⌉ · passes; pooling passes once per tap, div, sqrt and resize four times.
Host: a fixed latency per segment; its tensors pass the DRAM channel like any transfer.
DMA: on the DRAM side a contiguous run costs whole bursts; a gap shorter than a burst is streamed over, so a group of runs never
costs more than its whole extent in bursts. Dimensions with stride 0 are moved once. Cycles = ⌈bytes so counted / bytes per cycle⌉.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from isa.packing import Packing
from isa.program import DTYPES, Instruction, Tile
from isa.spec import SPEC
from isa.target import Target
from runtime.decode import decode

#: passes over each element of the result (or, for `reduce`, of the input)
VECTOR_PASSES = {"div": 4, "sqrt": 4, "resize": 4}
POOLING = ("maxpool", "avgpool")
#: results of a patch that may share strips of columns, where the outputs alone leave some of the last strip unused
STRIPS = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Counted events; they add up."""

    macs: int = 0
    vector_operations: int = 0
    spm_bytes: int = 0
    acc_bytes: int = 0
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0
    skipped_macs: int = 0  # asked for, but left out by the array

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in WORK_FIELDS))

    def times(self, count: int) -> Work:
        """The same `count` times."""
        return Work(*(getattr(self, name) * count for name in WORK_FIELDS))

    @property
    def dram_bytes(self) -> int:
        return self.dram_read_bytes + self.dram_write_bytes


WORK_FIELDS = ("macs", "vector_operations", "spm_bytes", "acc_bytes", "dram_read_bytes", "dram_write_bytes", "skipped_macs")


@dataclass(frozen=True, slots=True)
class Cost:
    """Cycles that the engine is busy (a DMA: that the DRAM channel is), how many of them fill and drain the array, and the work done.

    `saved`: how many more cycles it would be without skipping.
    """

    cycles: int
    fill: int = 0
    work: Work = field(default_factory=Work)
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Windows:
    """How the windows of a convolution lie side by side: results per row; rows and columns of the kernel, of the step, of the dilation."""

    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def inputs(self, patch: tuple[int, int]) -> int:
        """Distinct inputs under a patch of rows × columns of results."""
        return math.prod(map(_distinct, patch, self.kernel, self.stride, self.dilation))

    def steps(self, pixels: int, patch: tuple[int, int]) -> int:
        """Patches that cover so many results."""
        return _up(pixels // self.columns, patch[0]) * _up(self.columns, patch[1])

    def patches(self, pixels: int, most: int) -> Iterator[tuple[int, int]]:
        """Those of at most so many results; of several that take as many steps the smallest."""
        across = _steps_apart(self.columns, most)
        return ((rows, columns) for rows in _steps_apart(pixels // self.columns, most) for columns in across if rows * columns <= most)


@lru_cache(maxsize=1 << 12)
def _distinct(results: int, kernel: int, stride: int, dilation: int) -> int:
    """Inputs under neighbouring results of a line."""
    return len({result * stride + tap * dilation for result in range(results) for tap in range(kernel)})


@lru_cache(maxsize=1 << 12)
def _steps_apart(size: int, most: int) -> tuple[int, ...]:
    """The distinct ⌈size / n⌉ up to `most`."""
    return tuple(sorted({_up(size, count) for count in range(_up(size, most), size + 1)}))


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix product that an instruction is: `pixels` × `depth` × `outputs`, `groups` times; `width` bytes per input."""

    pixels: int
    depth: int
    outputs: int
    groups: int = 1
    width: int = 1
    depthwise: bool = False
    windows: Windows | None = None  # of a convolution; without it no two results share an input
    packing: Packing | None = None  # of the weights, where the array takes them packed

    @property
    def macs(self) -> int:
        return self.pixels * self.depth * self.outputs * self.groups

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the array reads them."""
        return self.packing.bytes((self.depth, self.outputs * self.groups)) if self.packing else self.depth * self.outputs * self.groups


def cost(instruction: Instruction, target: Target) -> Cost:
    """The cost of an instruction of the table on a target. Raises RuntimeFault when its operands do not fit the table."""
    decoded = decode(instruction)
    queue = SPEC[instruction.name].queue
    if queue == "mm":
        return matrix_cost(product_of(instruction.name, decoded.tiles, decoded.attributes), target)
    if instruction.name == "gather":
        return _gather_cost(decoded.tiles, target)
    if queue in ("ld", "st"):
        return _transfer_cost(decoded.tiles, target)
    if queue == "host":
        return _host_cost(decoded.tiles, target)
    return _vector_cost(instruction.name, decoded.tiles, decoded.attributes, target)


def product_of(name: str, tiles: dict[str, Tile], attributes: dict[str, Any]) -> Product:
    """The matrix product that conv, dwconv or matmul does."""
    if name == "matmul":
        (pixels, depth), outputs = tiles["a"].shape, tiles["b"].shape[1]
        return Product(pixels, depth, outputs, width=DTYPES[tiles["a"].dtype], packing=tiles["b"].packing)
    pixels, taps = math.prod(tiles["y"].shape[:2]), math.prod(tiles["w"].shape[:2])
    width = DTYPES[tiles["x"].dtype]
    kernel: tuple[int, int] = (tiles["w"].shape[0], tiles["w"].shape[1])
    windows = Windows(tiles["y"].shape[1], kernel, tuple(attributes["stride"]), tuple(attributes["dilation"]))
    if name == "dwconv":
        return Product(pixels, taps, 1, tiles["w"].shape[2], width, depthwise=True, windows=windows)
    groups = attributes["groups"]
    return Product(pixels, taps * tiles["w"].shape[2], tiles["w"].shape[3] // groups, groups, width, windows=windows, packing=tiles["w"].packing)


def matrix_cost(product: Product, target: Target) -> Cost:
    """Cycles and traffic of a matrix product on the target's array."""
    compute, fill, work = (_mac_array if target.family == "mac" else _systolic_array)(product, target)
    return Cost((compute + fill) * product.width, fill * product.width, work)


def _mac_array(p: Product, t: Target) -> tuple[int, int, Work]:
    rows, depth = _up(p.pixels, t.rows), _up(p.depth, t.depth)
    columns = _up(p.groups, t.cols) if p.depthwise else p.groups * _up(p.outputs, t.cols)
    input_reads = p.pixels * p.depth * (p.groups if p.depthwise else columns) * p.width
    weight_reads = p.weight_bytes * rows
    return rows * columns * depth, t.pipeline_depth, _matrix_work(p, input_reads + weight_reads, accumulations=1)


def _systolic_array(p: Product, t: Target) -> tuple[int, int, Work]:
    if t.dataflow == "os":
        folds = p.groups * _up(p.pixels, t.rows) * _up(p.outputs, t.cols)
        reads = p.groups * (p.pixels * p.depth * _up(p.outputs, t.cols) * p.width) + p.weight_bytes * _up(p.pixels, t.rows)
        return folds * p.depth, folds * (t.rows + t.cols - 2), _matrix_work(p, reads, accumulations=1)
    depth_folds = _up(p.depth, t.rows)
    if t.dataflow == "is":
        folds = p.groups * depth_folds * _up(p.pixels, t.cols)
        reads = p.groups * p.pixels * p.depth * p.width + p.weight_bytes * _up(p.pixels, t.cols)
        return folds * p.outputs, folds * (2 * t.rows + t.cols - 2), _matrix_work(p, reads, accumulations=depth_folds)
    return _weight_stationary(p, t)


@dataclass(frozen=True, slots=True)
class Folds:
    """How a product lies on a weight-stationary array: parts of the weights held one after the other, steps that each of them streams, inputs
    read in all, and how often each sum is added to."""

    count: int
    steps: int
    reads: int
    accumulations: int

    def cycles(self, t: Target) -> int:
        """From the start of the first fold to that of one after the last."""
        return self.count * (max(self.steps, t.rows) if t.shadow_weights else self.steps + 2 * t.rows + t.cols - 2)


def weight_stationary(p: Product, t: Target, kept: Callable[[int], int] = int) -> Folds:
    """The mapping with the fewest cycles. `kept`: of so many rows of K, those that are not skipped."""
    patches: Iterable[tuple[int, int]] = ((1, 1),)
    if t.patches and p.windows is not None:
        most = STRIPS if p.outputs % t.cols else 1
        patches = p.windows.patches(p.pixels, max(t.cols // p.outputs, most))
    return min((_folds(p, t, patch, kept) for patch in patches), key=lambda folds: (folds.cycles(t), folds.reads))


def _folds(p: Product, t: Target, patch: tuple[int, int], kept: Callable[[int], int]) -> Folds:
    depth, columns, steps = p.depth, math.prod(patch) * p.outputs, p.pixels
    if p.windows is not None and patch != (1, 1):
        depth = p.depth // math.prod(p.windows.kernel) * p.windows.inputs(patch)
        steps = p.windows.steps(p.pixels, patch)
    rows = kept(depth)
    together = max(1, min(t.rows // max(rows, 1), t.cols // columns)) if t.patches else 1
    folds = _up(p.groups, together) * _up(rows, t.rows) * _up(columns, t.cols)
    return Folds(folds, steps, steps * depth * p.groups * _up(columns, t.cols), _up(rows, t.rows))


def _weight_stationary(p: Product, t: Target) -> tuple[int, int, Work]:
    folds = weight_stationary(p, t)
    work = _matrix_work(p, folds.reads * p.width + p.weight_bytes, accumulations=folds.accumulations)
    fill = 2 * t.rows + t.cols - 2
    if t.shadow_weights:
        return folds.cycles(t), fill, work
    return folds.count * folds.steps, folds.count * fill, work


def _matrix_work(p: Product, spm_reads: int, *, accumulations: int) -> Work:
    """Each accumulation writes every output; all but the first read it before."""
    results = p.pixels * p.outputs * p.groups * DTYPES["s32"]
    return Work(macs=p.macs, spm_bytes=spm_reads, acc_bytes=results * (2 * accumulations - 1))


def _vector_cost(name: str, tiles: dict[str, Tile], attributes: dict[str, Any], target: Target) -> Cost:
    elements = tiles["x" if name == "reduce" else "y"].elements
    passes = math.prod(attributes["kernel"]) if name in POOLING else VECTOR_PASSES.get(name, 1)
    moved = {space: sum(moved_bytes(tile) for tile in tiles.values() if tile.space == space) for space in ("spm", "acc")}
    work = Work(vector_operations=elements * passes, spm_bytes=moved["spm"], acc_bytes=moved["acc"])
    return Cost(target.vec_startup + _up(elements, target.vec_lanes) * passes, 0, work)


def _transfer_cost(tiles: dict[str, Tile], target: Target) -> Cost:
    written, read = tiles["y"], tiles["x"]
    dram, spm = (written, read) if written.space == "dram" else (read, written)
    size = moved_bytes(dram)
    cycles = max(1, math.ceil(burst_bytes(dram, target.dram_burst_bytes) / target.dram_bytes_per_cycle))
    to_dram = size if dram is written else 0
    return Cost(cycles, 0, Work(spm_bytes=moved_bytes(spm), dram_read_bytes=size - to_dram, dram_write_bytes=to_dram))


def _gather_cost(tiles: dict[str, Tile], target: Target) -> Cost:
    """Each row of the table is a transfer of its own; the rows that are not asked for cost nothing."""
    rows, table = tiles["y"], tiles["x"]
    row = Tile(table.space, 0, table.dtype, table.shape[1:], table.strides[1:])
    burst = burst_bytes(row, target.dram_burst_bytes) * rows.shape[0]
    work = Work(spm_bytes=moved_bytes(rows) + moved_bytes(tiles["i"]), dram_read_bytes=moved_bytes(row) * rows.shape[0])
    return Cost(max(1, math.ceil(burst / target.dram_bytes_per_cycle)), 0, work)


def _host_cost(tiles: dict[str, Tile], target: Target) -> Cost:
    """A tensor to or from the host passes the DRAM channel; a segment without operands costs its latency."""
    if not tiles:
        return Cost(target.host_latency)
    ((name, tile),) = tiles.items()
    size = moved_bytes(tile)
    cycles = max(1, math.ceil(burst_bytes(tile, target.dram_burst_bytes) / target.dram_bytes_per_cycle))
    to_dram = size if name == "y" else 0
    return Cost(cycles, 0, Work(dram_read_bytes=size - to_dram, dram_write_bytes=to_dram))


def moved_bytes(tile: Tile) -> int:
    """Bytes of a tile; dimensions with stride 0 count once."""
    tile = tile.storage
    return DTYPES[tile.dtype] * math.prod(size for size, stride in zip(tile.shape, tile.strides, strict=True) if stride)


def burst_bytes(tile: Tile, burst: int) -> int:
    """Bytes that the DRAM channel is taken for by a tile: per run whole bursts, but never more than a group's extent in bursts."""
    tile = tile.storage
    extent = DTYPES[tile.dtype]
    total = _up(extent, burst) * burst
    for stride, size in sorted((abs(stride), size) for stride, size in zip(tile.strides, tile.shape, strict=True) if stride and size > 1):
        extent += (size - 1) * stride
        total = min(total * size, _up(extent, burst) * burst)
    return total


def _up(amount: int, unit: int) -> int:
    """⌈amount / unit⌉."""
    return -(-amount // unit)
