"""Cycles of arrays that skip zeros: by hand, and against a walk over all lanes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import isa
from isa.packing import Packing
from isa.target import Target
from runtime import Machine, RuntimeFault, simulate
from runtime.costs import Product, Windows, Work, matrix_cost
from runtime.packing import pack, packings
from runtime.skipping import packed_cost
from tests.runtime.test_timing import CUBE, SYSTOLIC

rng = np.random.default_rng(3)
WS = replace(SYSTOLIC, skip="structured", weight_formats="nm:2:4 block")
MAC = replace(CUBE, skip="structured", weight_formats="nm:2:4 block")
PRODUCT = Product(10, 16, 12, packing=Packing("nm", (2, 4)))


def test_nm_by_hand() -> None:
    """4×8 array, 10 pixels, K = 16 of which 8 are kept, N = 12 in two strips of 8 and 4 columns: 2 folds each instead of 4."""
    found = packed_cost(PRODUCT, WS, None)
    assert (found.cycles, found.fill, found.saved) == (4 * 10 + 2 * 4 + 8 - 2, 14, 4 * 10)
    inputs, weights, sums = 10 * 16 * 2, 16 * 12 * 5 // 8, 10 * 12 * 4
    assert found.work == Work(macs=10 * 8 * 12, skipped_macs=10 * 8 * 12, spm_bytes=inputs + weights, acc_bytes=sums * 3)
    assert packed_cost(PRODUCT, replace(WS, shadow_weights=False), None).cycles == 4 * (10 + 2 * 4 + 8 - 2)
    assert packed_cost(replace(PRODUCT, width=2), WS, None).cycles == 2 * found.cycles
    mac = packed_cost(PRODUCT, MAC, None)  # 4×8×2: 3 tiles of pixels, 2 of columns, 8 kept rows in 4 steps
    assert (mac.cycles, mac.fill, mac.saved) == (3 * 2 * 4 + 5, 5, 3 * 2 * 4)
    assert mac.work == Work(macs=960, skipped_macs=960, spm_bytes=inputs + weights * 3, acc_bytes=sums)
    assert packed_cost(PRODUCT, SYSTOLIC, None) == matrix_cost(PRODUCT, SYSTOLIC)
    assert packed_cost(replace(PRODUCT, groups=2), WS, None).cycles == 2 * 4 * 10 + 14
    assert packed_cost(replace(PRODUCT, groups=2), MAC, None).cycles == 2 * 3 * 2 * 4 + 5
    wide = replace(WS, rows=32, cols=32)  # two results side by side: 192 rows, of which 96 are kept, in 3 folds of half the steps
    pair = Product(784, 144, 16, windows=Windows(28, (3, 3)), packing=Packing("nm", (2, 4)))
    assert packed_cost(pair, wide, None).cycles == 3 * 392 + 94
    assert packed_cost(pair, wide, None).work.macs == 784 * 72 * 16
    odd = replace(pair, depth=18)  # neighbours of 2 channels and two inputs do not stay together under a patch
    assert packed_cost(odd, wide, None).cycles == 784 + 94


def test_blocks_by_hand() -> None:
    """K = 16 in block rows of 2; the first strip of 8 columns keeps 3 of them (6 rows: 2 folds of 4), the second none."""
    weights = np.zeros((16, 12), np.int8)
    weights[[0, 5, 14], [1, 7, 3]] = 1
    product = replace(PRODUCT, packing=Packing("block", (2, 8, 48)))
    found = packed_cost(product, WS, weights)
    assert (found.cycles, found.work.macs) == (2 * 10 + 14, 10 * 6 * 8)
    assert found.work.spm_bytes == 10 * 6 + (2 + 48)
    assert found.work.acc_bytes == 10 * 8 * 4 * 3 + 10 * 4 * 4
    assert packed_cost(product, MAC, weights).cycles == 3 * 3 + 5
    assert packed_cost(product, WS, None) == matrix_cost(product, WS)  # unknown weights: the most that it can be


def lanes(p: Product, t: Target, weights: np.ndarray[Any, Any], inputs: np.ndarray[Any, Any]) -> tuple[int, int]:
    """(cycles, products), lane by lane."""
    cycles, macs = t.pipeline_depth, 0
    for top in range(0, p.pixels, t.rows):
        for left in range(0, p.outputs, t.cols):
            slowest = 1
            for pixel in range(top, min(top + t.rows, p.pixels)):
                for output in range(left, min(left + t.cols, p.outputs)):
                    for lane in range(t.depth):
                        count = sum(bool(inputs[pixel, k]) and bool(weights[k, output]) for k in range(lane, p.depth, t.depth))
                        slowest, macs = max(slowest, count), macs + count
            cycles += slowest
    return cycles, macs


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_lanes_against_a_walk(depth: int) -> None:
    weights = rng.integers(-3, 4, (16, 12)).astype(np.int8) * (rng.random((16, 12)) < 0.3)
    inputs = rng.random((10, 16)) < 0.5
    everything = np.ones_like(weights), np.ones_like(inputs)
    product = replace(PRODUCT, packing=Packing("mask", (int(np.count_nonzero(weights)),)))
    target = replace(CUBE, depth=depth)
    for skip, walked in (("weights", (weights, everything[1])), ("activations", (everything[0], inputs)), ("both", (weights, inputs))):
        found = packed_cost(product, replace(target, skip=skip), weights, None if skip == "weights" else inputs)
        assert (found.cycles, found.work.macs) == lanes(product, target, *walked)
        assert found.cycles + found.saved == matrix_cost(product, target).cycles
        assert found.work.macs + found.work.skipped_macs == product.macs
    bound = packed_cost(product, replace(target, skip="both"), weights)
    assert bound == packed_cost(product, replace(target, skip="weights"), weights)
    plain = replace(product, packing=None)
    assert packed_cost(plain, replace(target, skip="both"), weights, inputs).cycles == lanes(product, target, everything[0], inputs)[0]


TEXT = """
.npu 1
.target t family={family} rows=4 cols=8 depth={depth} spm_bytes=8192 acc_bytes=4096 weight_formats="nm:2:4 mask" skip={skip}
.memory dram=0x2000 constants=0x1000+{size}
.input  "x" s8[1,16,4,4]{{{{256,1,64,16}}}} @0x0 scale=0.01 zero=-5
.output "y" s8[1,8,4,4]{{{{128,1,32,8}}}} @0x400 scale=2.0 zero=0
.layer "conv" conv macs=18432
  ld      %0x100:s8[3,3,16,8]{packing}, @0x1000:s8[3,3,16,8]{packing}
  ld      %0x1000:s8[4,4,16], @0x0:s8[4,4,16]                                                               signal=mm.0
  conv    $0x0:s32[4,4,8], %0x1000:s8[4,4,16], %0x100:s8[3,3,16,8]{packing} pad=1,1,1,1 zero=-5   wait=ld.0 signal=vec.0
  requant %0x0:s8[4,4,8], $0x0:s32[4,4,8] scale=0.01                                                        wait=mm.0 signal=st.0
  st      @0x400:s8[4,4,8], %0x0:s8[4,4,8]                                                                  wait=vec.0
"""


def package(skip: str, word: str) -> tuple[isa.Package, np.ndarray[Any, Any]]:
    weights = rng.integers(1, 100, (36, 4, 8))
    weights[np.argsort(rng.random(weights.shape), axis=1) < 2] = 0
    matrix = weights.reshape(144, 8).astype(np.int8)
    packing = next(packings(matrix.reshape(3, 3, 16, 8), (word,), (4, 8)))
    stored = pack(matrix.reshape(3, 3, 16, 8), packing)
    family, depth = ("systolic", 1) if skip == "structured" else ("mac", 2)
    text = TEXT.format(family=family, depth=depth, skip=skip, size=len(stored), packing=f"{{{packing.text()}}}").replace("{{", "{").replace("}}", "}")
    return isa.pack_text(text, stored.tobytes()), matrix


def test_timeline_of_a_structured_program() -> None:
    """144 rows, 72 kept: 18 folds of max(16, 4) cycles instead of 36; everything else as for the dense array."""
    sparse, _ = package("structured", "nm:2:4")
    isa.check(sparse.program)
    timeline = simulate(sparse.program, sparse.constants)
    conv = next(index for index, step in enumerate(timeline.steps) if step.line.instruction.name == "conv")
    assert timeline.ends[conv] - timeline.starts[conv] == 18 * 16 + 14
    layer = timeline.layers[0]
    assert (layer.matrix, layer.saved, layer.ideal) == (18 * 16 + 14, 18 * 16, 16 * 72 * 8 // 32)
    assert layer.cycles == timeline.total_cycles
    dense = simulate(replace(sparse.program, target=replace(sparse.program.target, skip="none")))
    assert dense.total_cycles == timeline.total_cycles + layer.saved
    report = Machine(sparse).report
    assert report.array_utilization == pytest.approx(2 * report.array_utilization_unskipped, rel=0.05)
    assert (report.macs, report.skipped_macs, report.at_most) == (9216, 9216, False)


def test_a_run_costs_what_its_zeros_say() -> None:
    """The zeros of this input, the padding among them; other values, same bytes as without skipping."""
    sparse, weights = package("both", "mask")
    machine = Machine(sparse)
    x = rng.normal(size=(1, 16, 4, 4)).astype(np.float32) * (rng.random((1, 16, 4, 4)) < 0.4)
    run = machine.run({"x": x})
    stored = np.pad(np.clip(np.rint(x[0].transpose(1, 2, 0) / np.float32(0.01)) - 5, -128, 127), ((1, 1), (1, 1), (0, 0)), constant_values=-5)
    inputs = np.array([stored[i : i + 3, j : j + 3].reshape(-1) != -5 for i in range(4) for j in range(4)])
    product = Product(16, 144, 8)
    cycles, macs = lanes(product, sparse.program.target, weights, inputs)
    assert (run.report.matrix_cycles, run.report.macs) == (cycles, macs)
    assert (machine.report.at_most, run.report.at_most) == (True, False)
    assert machine.ran.total_cycles == run.cycles
    assert run.cycles < machine.report.cycles < Machine(plain(sparse)).report.cycles
    assert machine.run({"x": np.zeros_like(x)}).report.macs == 0
    assert machine.run({"x": x}, order="random", seed=2).report == run.report
    np.testing.assert_array_equal(Machine(plain(sparse)).run({"x": x}).raw["y"], run.raw["y"])


def plain(sparse: isa.Package) -> isa.Package:
    """The same package on a target that skips nothing."""
    return replace(sparse, program=replace(sparse.program, target=replace(sparse.program.target, skip="none")))


def test_weights_that_are_overwritten_are_unknown() -> None:
    """After another instruction wrote over the packed bytes, nobody counts on their zeros."""
    sparse, _ = package("weights", "mask")
    changed = sparse.text.replace("  conv ", "  fill    %0x100:u8[8] wait=ld.5 signal=mm.1\n  conv ")
    changed = changed.replace("wait=ld.0 signal=vec.0", "wait=ld.0,vec.1 signal=vec.0").replace("signal=mm.0\n  fill", "signal=mm.0,vec.5\n  fill")
    other = isa.parse_program(changed)
    isa.check(other)
    dense = simulate(replace(other, target=replace(other.target, skip="none"))).layers[0].matrix
    assert simulate(sparse.program, sparse.constants).layers[0].matrix < dense
    assert simulate(other, sparse.constants).layers[0].matrix == dense
    with pytest.raises(RuntimeFault, match="the bitmap tells of"):
        Machine(other, sparse.constants).run({"x": np.zeros((1, 16, 4, 4), np.float32)})


def test_impossible_targets_are_refused() -> None:
    for fields, told in (
        ({"skip": "both"}, "lock step"), ({"skip": "structured", "dataflow": "os"}, "weight stationary"),
        ({"weight_formats": "nm:2"}, "names 'nm:2'"),
        ({"skip": "some"}, "skip is 'some'"),
    ):  # fmt: skip
        with pytest.raises(isa.TargetError) as error:
            Target("t", **fields)  # type: ignore[arg-type]
        assert told in str(error.value)
