"""What a tile would cost: the machine's own timing equations, asked before any instruction exists."""

from __future__ import annotations

import math

from isa.target import Target


def matrix_cycles(target: Target, pixels: int, depth: int, outputs: int, groups: int) -> int:
    """Matrix engine cycles of one tile."""
    if target.family == "mac":
        return groups * math.ceil(pixels / target.rows) * math.ceil(outputs / target.cols) * math.ceil(depth / target.depth) + target.pipeline_depth
    folds = math.ceil(depth / target.rows) * math.ceil(outputs / target.cols) * groups
    return target.rows + folds * max(pixels, target.rows) + target.rows + target.cols - 2


def depthwise_cycles(target: Target, pixels: int, taps: int, channels: int) -> int:
    """Matrix engine cycles of one depthwise tile."""
    if target.family == "mac":
        return math.ceil(pixels / target.rows) * math.ceil(channels / target.cols) * math.ceil(taps / target.depth) + target.pipeline_depth
    packed = max(1, min(target.rows // taps, target.cols))
    folds = math.ceil(channels / packed) * math.ceil(taps / target.rows)
    return target.rows + folds * max(pixels, target.rows) + target.rows + target.cols - 2


def dma_cycles(target: Target, size: int, run: int) -> float:
    """Cycles on the DRAM channel for `size` bytes in contiguous runs of `run` bytes."""
    if size == 0:
        return 0.0
    run = max(min(run, size), 1)
    burst = target.dram_burst_bytes
    return math.ceil(size / run) * math.ceil(run / burst) * burst / target.dram_bytes_per_cycle


def vector_cycles(target: Target, elements: int) -> float:
    """Vector engine cycles of one pass over a tile."""
    return target.vec_startup + math.ceil(elements / target.vec_lanes)
