"""What a tile would cost: the machine's own timing equations, asked before any instruction exists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from isa.target import Target
from runtime.costs import Product, Windows, matrix_cost


@lru_cache(maxsize=1 << 16)
def matrix_cycles(
    target: Target, pixels: int, depth: int, outputs: int, groups: int = 1, *, width: int = 1, windows: Windows | None = None, kept: float = 1.0
) -> float:
    """Matrix engine cycles of one tile whose inputs have `width` bytes; of those that do not only fill the array, the share `kept` is not skipped."""
    found = matrix_cost(Product(pixels, depth, outputs, groups, width, windows=windows), target)
    return found.fill + kept * (found.cycles - found.fill)


@lru_cache(maxsize=1 << 16)
def depthwise_cycles(target: Target, pixels: int, windows: Windows, channels: int, *, width: int = 1) -> int:
    """Matrix engine cycles of one depthwise tile whose inputs have `width` bytes."""
    return matrix_cost(Product(pixels, math.prod(windows.kernel), 1, channels, width, depthwise=True, windows=windows), target).cycles


def dma_cycles(target: Target, size: int, run: int) -> int:
    """Cycles on the DRAM channel for `size` bytes in contiguous runs of `run` bytes."""
    if size == 0:
        return 0
    run = max(min(run, size), 1)
    burst = target.dram_burst_bytes
    return max(1, math.ceil(math.ceil(size / run) * math.ceil(run / burst) * burst / target.dram_bytes_per_cycle))


def vector_cycles(target: Target, elements: int) -> float:
    """Vector engine cycles of one pass over a tile."""
    return target.vec_startup + math.ceil(elements / target.vec_lanes)


@dataclass(frozen=True, slots=True)
class Transfers:
    """So many transfers of `size` bytes each, in contiguous runs of `run` bytes on the DRAM side."""

    count: int
    size: int
    run: int

    def channel(self, target: Target) -> int:
        """Cycles that one holds the DRAM channel."""
        return dma_cycles(target, self.size, self.run)

    def queue(self, target: Target) -> int:
        """Cycles that one holds its queue: the next is requested when it begins to stream, so none takes less than the latency."""
        return max(target.dram_latency, self.channel(target)) if self.size else 0


def tiled_cycles(target: Target, *, matrix: float, vector: float, loads: Sequence[Transfers], stores: Transfers) -> float:
    """Cycles of a layer in `stores.count` tiles: the busiest engine's, plus what the first tile waits for and the last one leaves behind.

    `matrix`: of all tiles, `vector`: of each one.
    """
    queue = sum(each.count * each.queue(target) for each in loads)
    channel = sum(each.count * each.channel(target) for each in (*loads, stores))
    busiest = max(matrix, stores.count * vector, queue, stores.count * stores.queue(target), channel)
    return busiest + sum(each.queue(target) for each in loads) + vector + stores.channel(target) + 2 * target.dram_latency
