"""Which array should the chip have? Compile one network for several targets and compare cycles and energy.

    python examples/own_target.py

A target is a dozen numbers. Here they are changed in Python; `npucc targets edge > mine.toml` gives a file to edit instead.
The results of the network are the same on every target, to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import npucc
from isa import load_target
from npucc import demo

edge = load_target("edge")
targets = [
    replace(edge, name="16x16", rows=16, cols=16),
    edge,
    replace(edge, name="64x64", rows=64, cols=64),
    replace(edge, name="no shadow weights", shadow_weights=False),
    replace(edge, name="64 KiB scratchpad", spm_bytes=1 << 16),
    load_target("cube"),
]
image = np.zeros((1, 3, 32, 32), np.float32)
stored = set()

print(f"{'target':<20}{'cycles':>10}{'utilization':>14}{'energy':>12}")
for target in targets:
    result = npucc.compile(demo.MODEL, target, calibration=demo.CALIBRATION).run({"image": image})
    stored.add(result.raw["logits"].tobytes())
    print(f"{target.name:<20}{result.cycles:>10}{result.utilization:>14.1%}{result.energy_pj / 1e6:>9.1f} µJ")

assert len(stored) == 1, "the target changed the result"
