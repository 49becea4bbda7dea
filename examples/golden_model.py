"""Run a program that was written by hand, without the compiler: `isa` and `runtime` are a golden model for a chip.

    python examples/golden_model.py

The program is matmul.npuasm, beside this file. Nothing of ONNX is needed, and every value is exact.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import isa
from runtime import Machine

random = np.random.default_rng(1)
weights = random.integers(-127, 128, (64, 32)).astype(np.int8)
bias = random.integers(-1000, 1000, 32).astype(np.int32)
scales = random.uniform(0.001, 0.002, 32).astype(np.float32)
a = random.uniform(-6, 6, (64, 64)).astype(np.float32)

path = Path(__file__).parent / "matmul.npuasm"
program = isa.parse_program(path.read_text(encoding="utf-8"), file=path.name)
isa.check(program)  # bounds, capacity, events, races
machine = Machine(program, weights.tobytes() + bias.tobytes() + scales.tobytes())
run = machine.run({"a": a})
print(f"{run.cycles} cycles, {run.report.utilization:.0%} of the peak")

# The same in three lines of numpy: a stored as s8, summed in int32, multiplied once in float32, rounded half to even.
stored = np.clip(np.rint(a / np.float32(0.05)) - 3, -128, 127).astype(np.int32)
sums = (stored + 3) @ weights.astype(np.int32) + bias
wanted = np.clip(np.rint(sums.astype(np.float32) * scales) + 4, -128, 127)
assert np.array_equal(run.raw["y"], wanted)

# Any order that the events allow gives the same bytes.
assert all(np.array_equal(machine.run({"a": a}, order="random", seed=seed).raw["y"], wanted) for seed in range(5))
print("equal to numpy, in program order and in 5 random legal orders")
