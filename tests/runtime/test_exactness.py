"""The same bytes with any BLAS, and with or without the shortcut from the BLAS straight to requant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isa.program import Instruction, TensorRecord, Tile
from runtime import Machine
from runtime.binder import Binder
from tests.runtime.harness import execute, instruction, layer, program

#: largest sums of equal signs, and sums that cancel: any lost bit of a partial sum shows
DIGEST = """
import hashlib
import numpy as np
from tests.runtime.harness import execute
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for depth in (64, 512, 1024):
    for choices in ([-128], [-128, 127], range(-128, 128)):
        x = rng.choice(np.array(choices, np.int8), (6, 6, depth))
        w = rng.choice(np.array(choices, np.int8), (3, 3, depth, 40))
        for constant in ((), ("w",)):
            y = execute("conv", {"x": x, "w": w}, result=((4, 4, 40), "s32"), constant=constant)
            digest.update(y.tobytes())
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64), (3, 3), (0, 1))
        assert (y == np.einsum("hwckl,klcn->hwn", windows, w.astype(np.int64), optimize=True)).all()
        a = rng.integers(-(2**15), 2**15, (33, depth)).astype(np.int16)
        digest.update(execute("matmul", {"a": a, "b": w[0, 0]}, result=((33, 40), "s32")).tobytes())
print(digest.hexdigest())
"""
BLAS = ({"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "2"}, {"OPENBLAS_CORETYPE": "Prescott"}, {"OPENBLAS_CORETYPE": "Haswell"})


def test_the_same_bytes_with_one_thread_or_two_and_with_slower_kernels() -> None:
    """OPENBLAS_CORETYPE chooses kernels that sum in another order (and none of the fast ones); other BLAS libraries ignore it."""
    found = set()
    for setting in BLAS:
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, timeout=120,
            cwd=Path(__file__).parents[2], env={**environment, "OMP_NUM_THREADS": setting.get("OPENBLAS_NUM_THREADS", "1"), **setting},
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("constant", [(), ("w",)])
def test_one_float32_product_would_lose_bits(constant: tuple[str, ...]) -> None:
    """2,304 products of 127 · -128 pass 2**24; the last one is odd. What numpy gives in float32 is wrong, in whatever order it adds."""
    x, w = np.full((3, 3, 256), 127, np.int8), np.full((3, 3, 256, 1), -128, np.int8)
    x[0, 0, 0], w[0, 0, 0, 0] = 1, 1
    exact = -2303 * 127 * 128 + 1
    assert int(np.float32(exact)) != exact
    assert execute("conv", {"x": x, "w": w}, result=((1, 1, 1), "s32"), constant=constant).item() == exact


# ---- from the product to requant without accumulators ------------------------------------------------------------------

CHANNELS = 4
BIAS, SCALE, WEIGHTS = 0x100, 0x140, 0x180
X = Tile.dense("spm", 0x1000, "s8", (2, 3, CHANNELS))
SUMS = Tile.dense("acc", 0, "s32", (2, 3, CHANNELS))


def loads() -> list[Instruction]:
    weights, sizes = (1, 1, CHANNELS, CHANNELS), (CHANNELS,)
    return [
        instruction("ld", Tile.dense("spm", BIAS, "s32", sizes), Tile.dense("dram", BIAS, "s32", sizes)),
        instruction("ld", Tile.dense("spm", SCALE, "f32", sizes), Tile.dense("dram", SCALE, "f32", sizes)),
        instruction("ld", Tile.dense("spm", WEIGHTS, "s8", weights), Tile.dense("dram", WEIGHTS, "s8", weights)),
        instruction("ld", X, Tile.dense("dram", 0x1000, "s8", X.shape)),
    ]


def conv(y: Tile = SUMS, *, bias: bool = True, accumulate: int = 0) -> Instruction:
    operands = (Tile.dense("spm", BIAS, "s32", (CHANNELS,)),) * bias
    return instruction("conv", y, X, Tile.dense("spm", WEIGHTS, "s8", (1, 1, CHANNELS, CHANNELS)), *operands, accumulate=accumulate)


def dwconv(y: Tile = SUMS) -> Instruction:
    """Every channel times two of the weights; the second column of taps meets the padding."""
    w, bias = Tile.dense("spm", WEIGHTS, "s8", (1, 2, CHANNELS)), Tile.dense("spm", BIAS, "s32", (CHANNELS,))
    return instruction("dwconv", y, X, w, bias, pad=(0, 0, 0, 1))


def requant(place: int, a: Tile = SUMS) -> Instruction:
    """Into the place-th result."""
    y = Tile.dense("spm", 0x2000 + place * 256, "s8", a.shape)
    return instruction("requant", y, a, Tile.dense("spm", SCALE, "f32", a.shape[-1:]), zero=3)


def outcomes(body: list[Instruction], monkeypatch: pytest.MonkeyPatch, *, bias: Any) -> tuple[list[Any], int]:
    """The eight places of results, equal with the shortcut and without; how many sums were never stored."""
    dram = np.zeros(0x2000, np.uint8)
    rng = np.random.default_rng(1)
    for address, content in (
        (BIAS, np.array(bias, np.int32)),
        (SCALE, np.full(CHANNELS, 0.01, np.float32)),
        (WEIGHTS, rng.integers(-128, 127, (CHANNELS, CHANNELS)).astype(np.int8)),
    ):
        dram[address : address + content.nbytes] = content.reshape(-1).view(np.uint8)
    output = TensorRecord("y", Tile.dense("dram", 0x4000, "s8", (8, 256)), 1.0, 0)
    results = Tile.dense("spm", 0x2000, "s8", (8, 256))
    record = TensorRecord("x", Tile.dense("dram", 0x1000, "s8", X.shape), 1.0, 0)
    built = program(
        layer("only", *loads(), instruction("fill", results), *body, instruction("st", output.tile, results)),
        inputs=(record,), outputs=(output,), constants=(0, 0x1000),
    )  # fmt: skip
    feed = {"x": rng.integers(-128, 127, X.shape).astype(np.float32)}
    unstored: list[int] = []
    finish = Binder.finish

    def counting(binder: Binder) -> None:
        finish(binder)
        unstored.append(sum(not sums.stored for _, _, sums in binder.takers))

    with monkeypatch.context() as patch:
        patch.setattr(Binder, "finish", counting)
        machine = Machine(built, dram[:0x1000].tobytes(), engine="numpy")
        found = [machine.run(feed).raw["y"].tolist() for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Binder, "_float_sums", lambda *_: None)
        plain = Machine(built, dram[:0x1000].tobytes()).run(feed).raw["y"].tolist()
    assert found == [plain, plain]
    return plain, unstored[0]


SMALL = [1000, -1000, 0, 77]
FLAT = Tile.dense("acc", 0, "s32", (6, CHANNELS))
PADDED = Tile("acc", 0, "s32", (2, 3, CHANNELS), (64, 20, 4))
LATER = Tile.dense("acc", 0x400, "s32", (2, 3, CHANNELS))
PROGRAMS: dict[str, tuple[list[Instruction], int]] = {
    "one reader": ([conv(), requant(0)], 1),
    "no bias": ([conv(bias=False), requant(0)], 1),
    "another shape of the same bytes": ([conv(), requant(0, FLAT)], 1),
    "rows of another length of the same bytes": ([conv(), requant(0, Tile.dense("acc", 0, "s32", (12, 2)))], 0),
    "overwritten after the reader": ([conv(), requant(0), conv(bias=False), requant(1)], 2),
    "two readers": ([conv(), requant(0), requant(1)], 0),
    "a reader after another product": ([conv(), requant(0), conv(LATER, bias=False), requant(1, LATER), requant(2)], 1),
    "a product in between": ([conv(), conv(LATER, bias=False), requant(0), requant(1, LATER)], 1),
    "a reader of a part": ([conv(), requant(0), requant(1, Tile.dense("acc", 0, "s32", (2, CHANNELS)))], 0),
    "only a part is read": ([conv(), requant(0, Tile.dense("acc", 0, "s32", (2, CHANNELS)))], 0),
    "accumulated upon later": ([conv(), requant(0), conv(bias=False, accumulate=1), requant(1)], 0),
    "depthwise": ([dwconv(), requant(0)], 1),
    "depthwise, two readers": ([dwconv(), requant(0), requant(1)], 0),
    "depthwise, a padded tile": ([dwconv(PADDED), requant(0, PADDED)], 0),
    "a padded tile": ([conv(PADDED), requant(0, PADDED)], 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sums_reach_requant_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, expected = PROGRAMS[name]
    found, unstored = outcomes(body, monkeypatch, bias=SMALL)
    assert unstored == expected
    assert len(set(found[0])) > 2


def test_a_bias_that_makes_the_sum_wrap_is_not_added_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    found, unstored = outcomes([conv(), requant(0)], monkeypatch, bias=[2**31 - 1, -(2**31), 2**31 - 1, -(2**31)])
    assert unstored == 0
    assert {-128, 127} <= set(found[0][: 6 * CHANNELS : CHANNELS]) or {-128, 127} <= set(found[0][1 : 6 * CHANNELS : CHANNELS])
