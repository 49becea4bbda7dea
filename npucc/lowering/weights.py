"""How a tile of weights is stored: as it is, or in the packed format that costs least.

The one big idea: only the values tell. Zeros that pruning made and zeros that an imported model came with look alike, and so do weights
that fit in 4 bits; a format is used where it holds the very same values in fewer DRAM bursts.
"""

from __future__ import annotations

import numpy as np

from isa.packing import Packing
from isa.target import Target
from runtime.packing import array_block, smallest

#: bits that the bitmap of packed weights takes of each weight's eight: with a smaller share of zeros nothing is gained
FEWEST_ZEROS = 1 / 8


def packed(values: np.ndarray, target: Target) -> tuple[Packing, np.ndarray] | None:
    """The packing of s8 weights [..., N] and its bytes; None where they are better stored as they are."""
    if not target.formats or values.ndim < 2:
        return None
    zeros = values.size - int(np.count_nonzero(values))
    formats = target.formats if zeros > FEWEST_ZEROS * values.size else tuple(word for word in target.formats if word == "s4")
    found = smallest(values, formats, array_block(target))
    burst = target.dram_burst_bytes
    return found if found and -(-len(found[1]) // burst) < -(-values.size // burst) else None
