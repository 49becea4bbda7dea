"""How a tile of weights is stored: as it is, or in the packed format that costs least.

The one big idea: only the values tell. Zeros that pruning made and zeros that an imported model came with look alike, and so do weights
that fit in 4 bits. A format is used where it holds the very same values in fewer DRAM bursts, or lets the array skip.
"""

from __future__ import annotations

import numpy as np

from isa.packing import Packing, matrix_shape
from isa.target import Target
from runtime.costs import Product, matrix_cost
from runtime.packing import array_block, packings
from runtime.skipping import kept_packing, packed_cost

#: bits that the bitmap of packed weights takes of each weight's eight: with a smaller share of zeros nothing is gained
FEWEST_ZEROS = 1 / 8


def packed(values: np.ndarray, target: Target, pixels: int = 0) -> tuple[Packing, np.ndarray] | None:
    """The packing of s8 weights [..., N] and its bytes; None where they are better stored as they are.

    `pixels`: how many results of each output an array that can take them packed computes with them; 0 if it can't.
    """
    if not target.formats or values.ndim < 2:
        return None
    zeros = values.size - int(np.count_nonzero(values))
    formats = target.formats if zeros > FEWEST_ZEROS * values.size else tuple(word for word in target.formats if word == "s4")
    bursts = -(-values.size // target.dram_burst_bytes)
    best: tuple[tuple[int, int], Packing, np.ndarray] | None = None
    for packing, stored in packings(values, formats, array_block(target)):
        cycles = matrix_cycles(values, target, pixels, packing)
        saves = -(-len(stored) // target.dram_burst_bytes) < bursts or cycles < matrix_cycles(values, target, pixels, None)
        if saves and (best is None or (cycles, len(stored)) < best[0]):
            best = ((cycles, len(stored)), packing, stored)
        if best is not None and target.skip == "none":
            break  # they come smallest first
    return None if best is None else best[1:]


def matrix_cycles(values: np.ndarray, target: Target, pixels: int, packing: Packing | None) -> int:
    """Cycles of the array with weights stored so; 0 where it makes no difference."""
    if not pixels or target.skip == "none":
        return 0
    depth, outputs = matrix_shape(values.shape)
    if not kept_packing(packing, target):
        return matrix_cost(Product(pixels, depth, outputs), target).cycles
    return packed_cost(Product(pixels, depth, outputs, packing=packing), target, values.reshape(depth, outputs)).cycles
