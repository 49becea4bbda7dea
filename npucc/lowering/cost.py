"""What a tile would cost: the machine's own timing equations, asked before any instruction exists."""

from __future__ import annotations

import math
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
