"""What an array that skips zeros costs: as `costs`, but from the weights, and from the inputs of a run.

The one big idea: whatever is skipped, the lanes of an array go on together, so a step takes as long as its slowest lane; a mean over lanes
would be a promise that no hardware keeps. M, K, N, R, C, m, n, k as in `costs`; packed weights of one group only, else nothing is skipped.

skip = structured   the rows of K that a strip of C (n) columns keeps are packed one under the other; S = rows kept in each strip.
                    N:M keeps N of each M (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021; on a systolic array Liu et al.,
                    "S2TA", HPCA 2022: each row selects its input among M). Blocks keep the rows of the blocks that are not all zero; each
                    block row is fed from its own address.
    systolic, ws        the folds F of `costs` are ΣS⌈S/R⌉; with N:M, patches and groups lie as in `costs`, N:M of K streamed
    MAC array           ⌈M/m⌉ ΣS⌈S/k⌉ + D
skip = weights, activations, both: on a MAC array, products with a zero weight, a zero input, or either take no cycle. Lane l of the k under
                    an output does the products whose row of K is l modulo k; all m·n·k lanes begin the next m × n outputs together.
                    Σ over those ⌈M/m⌉⌈N/n⌉ steps of max(1, most products left in any lane) + D.
                    Inputs alone: Albericio et al., "Cnvlutin", ISCA 2016; both, the pairs found by intersecting bitmaps: Gondimalla et al.,
                    "SparTen", MICRO 2019, and Parashar et al., "SCNN", ISCA 2017. Weights count as zero where they are packed without zeros.
Inputs are read whole, skipped or not (for blocks: the rows that are kept); packed weights are read packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from isa.packing import Packing
from isa.program import DTYPES, Tile, address_at
from isa.spec import SPEC
from isa.target import Target
from runtime.costs import Cost, Folds, Product, Work, matrix_cost, product_of, weight_stationary
from runtime.decode import Decoded
from runtime.memory import LARGEST_TILE, Array
from runtime.packing import block_map, unpack
from runtime.stream import Step

#: rows of inputs that are compared with the weights at once
CHUNK = 4096
Strips = list[tuple[int, int, int]]


def weights_name(instruction: str) -> str:
    """The operand that holds the weights."""
    return "b" if instruction == "matmul" else "w"


def packed_cost(product: Product, target: Target, weights: Array | None, inputs: Array | None = None) -> Cost:
    """The cost of a product. `weights`: s8 [K, N], if they are known; `inputs`: bool [M, K], which are not zero, if a run has told.

    Without them it is the most that it can be.
    """
    dense = matrix_cost(product, target)
    strips = _strips(product, target, weights) if target.skip == "structured" else None
    if product.depthwise or target.skip == "none" or (product.groups > 1 and strips is None):
        return dense
    if strips is not None:
        skipping = _structured(product, target, strips)
    elif target.skip in ("weights", "activations", "both"):
        kept = weights != 0 if weights is not None and product.packing and product.packing.drops_zeros and target.skip != "activations" else None
        if kept is None and inputs is None:
            return dense
        skipping = _lanes(product, target, kept, inputs, dense.work)
    else:
        return dense
    cycles, fill, work = skipping
    return Cost(cycles * product.width, fill * product.width, work, saved=dense.cycles - cycles * product.width)


# ── structured ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _strips(p: Product, t: Target, weights: Array | None) -> Strips | None:
    """(columns, rows of K that are kept, inputs read) of each strip of columns; None where nothing is known to be skipped."""
    if p.packing is None:
        return None
    widths = [min(t.cols, p.outputs - first) for first in range(0, p.outputs, t.cols)]
    if p.packing.format == "nm":
        return [(width, _kept_of(p.depth, p), p.depth) for width in widths]
    if p.packing.format != "block" or weights is None or p.groups > 1:
        return None
    rows = p.packing.numbers[0]
    used = block_map(weights, rows, t.cols)
    kept = (np.minimum(rows, p.depth - rows * np.arange(len(used))) @ used).tolist()
    return [(width, depth, depth) for width, depth in zip(widths, kept, strict=True)]


def _structured(p: Product, t: Target, strips: Strips) -> tuple[int, int, Work]:
    """(cycles, of them fill, work)."""
    macs = p.groups * p.pixels * sum(width * depth for width, depth, _ in strips)
    reads = p.groups * p.pixels * sum(inputs for _, _, inputs in strips)
    results = [p.groups * p.pixels * width * DTYPES["s32"] for width, _, _ in strips]
    if t.family == "mac":
        rows, fill = _up(p.pixels, t.rows), t.pipeline_depth
        cycles, weights, moved = p.groups * rows * sum(_up(depth, t.depth) for _, depth, _ in strips) + fill, p.weight_bytes * rows, sum(results)
    else:
        folds = [_up(depth, t.rows) for _, depth, _ in strips]
        lying = Folds(p.groups * sum(folds), p.pixels, reads, max(folds))
        moved = sum(size * max(2 * count - 1, 1) for size, count in zip(results, folds, strict=True))
        if p.packing and p.packing.format == "nm":
            lying = weight_stationary(p if _in_line(p) else replace(p, windows=None), t, lambda depth: _kept_of(depth, p))
            reads, moved = lying.reads, sum(results) * (2 * lying.accumulations - 1)
        fill = (2 * t.rows + t.cols - 2) * (1 if t.shadow_weights else lying.count)
        cycles, weights = lying.cycles(t) + (fill if t.shadow_weights else 0), p.weight_bytes
    return cycles, fill, Work(macs=macs, skipped_macs=p.macs - macs, spm_bytes=reads * p.width + weights, acc_bytes=moved)


def _kept_of(depth: int, p: Product) -> int:
    """Of so many rows of K, those that N:M keeps."""
    assert p.packing is not None
    keep, neighbours = p.packing.numbers
    return _up(depth, neighbours) * keep


def _in_line(p: Product) -> bool:
    """Whether the neighbours of N:M stay neighbours under every patch: they are channels of one input."""
    assert p.packing is not None
    return p.windows is not None and p.depth // math.prod(p.windows.kernel) % p.packing.numbers[1] == 0


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lanes(p: Product, t: Target, weights: Array | None, inputs: Array | None, dense: Work) -> tuple[int, int, Work]:
    """(cycles, of them fill, work); `weights` bool [K, N], `inputs` bool [M, K]: what is not zero; None stands for all."""
    if inputs is None:
        assert weights is not None
        most = _slowest(_by_lane(weights, t.depth), t.cols)
        steps, macs = int(np.maximum(most, 1).sum()) * _up(p.pixels, t.rows), p.pixels * int(weights.sum())
    elif weights is None:
        most = _slowest(_by_lane(inputs.T, t.depth), t.rows)
        steps, macs = int(np.maximum(most, 1).sum()) * _up(p.outputs, t.cols), p.outputs * int(inputs.sum())
    else:
        steps, macs = _pairs(p, t, weights, inputs)
    work = Work(macs=macs, skipped_macs=p.macs - macs, spm_bytes=dense.spm_bytes, acc_bytes=dense.acc_bytes)
    return steps + t.pipeline_depth, t.pipeline_depth, work


def _by_lane(used: Array, lanes: int) -> Array:
    """[K, X] → products of each lane [lanes, X]."""
    return np.stack([used[lane::lanes].sum(axis=0) for lane in range(lanes)])


def _slowest(counts: Array, together: int) -> Array:
    """[lanes, X] → the most that any lane has among each `together` neighbours of X."""
    return np.asarray(np.maximum.reduceat(counts.max(axis=0), np.arange(0, counts.shape[1], together)))


def _pairs(p: Product, t: Target, weights: Array, inputs: Array) -> tuple[int, int]:
    """(steps, products) where both zero weights and zero inputs are skipped."""
    right = [weights[lane :: t.depth].astype(np.float32) for lane in range(t.depth)]
    steps = macs = 0
    rows = max(t.rows, CHUNK // t.rows * t.rows)
    for first in range(0, p.pixels, rows):
        left = inputs[first : first + rows]
        most = np.zeros((len(left), p.outputs), np.float32)
        for lane, columns in enumerate(right):
            counts = left[:, lane :: t.depth].astype(np.float32) @ columns
            macs += int(counts.sum(dtype=np.float64))
            np.maximum(most, counts, out=most)
        slowest = np.maximum.reduceat(np.maximum.reduceat(most, np.arange(0, len(left), t.rows), axis=0), np.arange(0, p.outputs, t.cols), axis=1)
        steps += int(np.maximum(slowest, 1).sum(dtype=np.float64))
    return steps, macs


def _up(amount: int, unit: int) -> int:
    return -(-amount // unit)


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Meter:
    """Sees the inputs of every matrix instruction of a run and keeps what it cost, by the number of its step."""

    def __init__(self, target: Target):
        self.target = target
        self.seen: dict[int, Cost] = {}

    def before(self, number: int, decoded: Decoded, name: str, views: Mapping[str, Array]) -> Callable[[], None] | None:
        """What to do before the step with that number; None where its cost is known without."""
        if name not in ("conv", "matmul") or decoded.attributes.get("groups", 1) > 1:
            return None
        product = product_of(name, decoded.tiles, decoded.attributes)
        weights = views[weights_name(name)]

        def look() -> None:
            inputs = _inputs(name, decoded.tiles, decoded.attributes, views)
            self.seen[number] = packed_cost(product, self.target, weights.reshape(-1, weights.shape[-1]), inputs)

        return look


def _inputs(name: str, tiles: Mapping[str, Tile], attributes: Mapping[str, Any], views: Mapping[str, Array]) -> Array:
    """bool [M, K]: which inputs of each output are not zero."""
    if name == "matmul":
        return np.asarray(views["a"] != attributes["za"])
    top, left, bottom, right = attributes["pad"]
    used = np.pad(views["x"] != attributes["zero"], ((top, bottom), (left, right), (0, 0)))
    (height, width), kernel, channels = tiles["y"].shape[:2], tiles["w"].shape[:2], used.shape[2]
    down, across, one = used.strides
    (sh, sw), (dh, dw) = attributes["stride"], attributes["dilation"]
    windows = as_strided(used, (height, width, *kernel, channels), (down * sh, across * sw, down * dh, across * dw, one), writeable=False)
    return windows.reshape(height * width, -1)


class Loaded:
    """Which packed constants lie where in the scratchpad, followed load by load in program order."""

    def __init__(self, constants: bytes, address: int):
        self.constants, self.first = np.frombuffer(constants, np.uint8), address
        self.at: dict[int, tuple[int, Tile]] = {}
        self.costs: dict[tuple[Product, int], Cost] = {}

    def follow(self, step: Step) -> None:
        """Note what a step writes."""
        tiles = step.line.instruction.tiles
        if not tiles or tiles[0].space != "spm":
            return
        result, address = tiles[0], address_at(tiles[0], step.iterations)
        low, high = (bound - result.address + address for bound in result.extent())
        for start in [start for start, (_, tile) in self.at.items() if start < high and low < start + tile.storage.elements]:
            del self.at[start]
        if step.line.instruction.name == "ld" and result.packing is not None:
            self.at[address] = (address_at(tiles[1], step.iterations), result)

    def cost(self, step: Step, product: Product, target: Target) -> Cost:
        """The cost of a matrix instruction; of one place among the constants it is found once."""
        index = [operand.name for operand in SPEC[step.line.instruction.name].operands].index(weights_name(step.line.instruction.name))
        tile = step.line.instruction.tiles[index]
        found = self.stored(tile, address_at(tile, step.iterations))
        key = (product, found[0] if found else -1)
        if key not in self.costs:
            weights = unpack(tile, found[1], line=step.line.instruction.line).reshape(-1, tile.shape[-1]) if found else None
            self.costs[key] = packed_cost(product, target, weights)
        return self.costs[key]

    def stored(self, tile: Tile, address: int) -> tuple[int, Array] | None:
        """(where they come from, the bytes) of the packed weights that a matrix instruction reads, if they are constants."""
        origin, source = self.at.get(address, (0, None))
        if source is None or source.packing != tile.packing or source.shape != tile.shape or tile.packing is None or tile.elements > LARGEST_TILE:
            return None
        low = origin - self.first
        size = tile.packing.bytes(tile.shape)
        return (origin, self.constants[low : low + size]) if low >= 0 and low + size <= len(self.constants) else None


def kept_packing(packing: Packing | None, target: Target) -> bool:
    """Whether an array of this target gains by weights that stay packed."""
    useful = {"structured": ("nm", "block"), "weights": ("nm", "block", "mask"), "both": ("nm", "block", "mask")}.get(target.skip, ())
    return packing is not None and packing.format in useful
