"""How a tile of weights is stored: as it is, or in the packed format that costs least.

The one big idea: only the values tell. Zeros that pruning made and zeros that an imported model came with look alike, and so do weights
that fit in 4 bits. A format is used where it holds the very same values in fewer DRAM bursts, or lets the array skip.
"""

from __future__ import annotations

import numpy as np

from isa.packing import Packing, matrix_shape
from isa.target import Target
from runtime.costs import Product, Windows, matrix_cost
from runtime.packing import array_block, pack, packings
from runtime.skipping import kept_packing, packed_cost

#: bits that the bitmap of packed weights takes of each weight's eight: with a smaller share of zeros nothing is gained
FEWEST_ZEROS = 1 / 8


def packed(values: np.ndarray, target: Target, pixels: int = 0) -> tuple[Packing, np.ndarray] | None:
    """The packing of s8 weights [..., N] and its bytes; None where they are better stored as they are.

    `pixels`: how many results of each output an array that can take them packed computes with them; 0 if it can't.
    """
    packing = cheapest(values, target, pixels) if target.formats and values.ndim > 1 else None
    return None if packing is None else (packing, pack(values, packing))


def cheapest(values: np.ndarray, target: Target, pixels: int) -> Packing | None:
    """The packing with the fewest cycles of the array, and of those the fewest bytes; None where it saves neither a burst nor a cycle."""
    zeros, burst = values.size - int(np.count_nonzero(values)), target.dram_burst_bytes
    formats = target.formats if zeros > FEWEST_ZEROS * values.size else tuple(word for word in target.formats if word == "s4")
    options = packings(values, formats, array_block(target))
    if target.skip == "none" or not pixels:
        smallest = next(options, None)
        return smallest if smallest and -(-smallest.bytes(values.shape) // burst) < -(-values.size // burst) else None
    bursts, cycles = -(-values.size // burst), matrix_cycles(values, target, pixels, None)
    priced = ((matrix_cycles(values, target, pixels, each), each.bytes(values.shape), each) for each in options)
    gaining = [each for each in priced if each[0] < cycles or -(-each[1] // burst) < bursts]
    return min(gaining, key=lambda each: each[:2])[2] if gaining else None


def kept_shares(values: np.ndarray, target: Target, pixels: int, windows: Windows) -> tuple[float, float]:
    """(of the array's cycles, of the bytes) of s8 weights [..., N], the share that is left once they are packed: what tiles are chosen by."""
    packing = cheapest(values, target, pixels) if target.formats and values.ndim > 1 else None
    if packing is None:
        return 1.0, 1.0
    bytes_kept = packing.bytes(values.shape) / values.size
    if not pixels:
        return 1.0, bytes_kept
    few, all_of_them = (matrix_cycles(values, target, pixels, each, windows) for each in (packing, None))
    return few / all_of_them, bytes_kept


def matrix_cycles(values: np.ndarray, target: Target, pixels: int, packing: Packing | None, windows: Windows | None = None) -> int:
    """Cycles of the array with weights stored so."""
    depth, outputs = matrix_shape(values.shape)
    if not kept_packing(packing, target):
        return matrix_cost(Product(pixels, depth, outputs, windows=windows), target).cycles
    return packed_cost(Product(pixels, depth, outputs, windows=windows, packing=packing), target, values.reshape(depth, outputs)).cycles
