"""Packed weights: what is packed comes back, what is damaged is refused, and the matrix engine gets the same numbers either way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import isa
from isa.packing import Packing
from isa.program import Tile
from isa.target import Target
from runtime import Machine, RuntimeFault
from runtime.packing import pack, packings, unpack

FORMATS = Target("t", weight_formats="nm:2:4 nm:1:4 nm:4:8 block mask s4").formats
rng = np.random.default_rng(5)


def smallest(values: np.ndarray[Any, Any], formats: tuple[str, ...], block: tuple[int, int]) -> tuple[Packing, np.ndarray[Any, Any]] | None:
    packing = next(packings(values, formats, block), None)
    return None if packing is None else (packing, pack(values, packing))


def tile(shape: tuple[int, ...], packing: Packing) -> Tile:
    strides = Tile.dense("spm", 0, "s8", shape).strides
    return Tile("spm", 0, "s8", shape, strides, (), packing)


def two_of_four(depth: int, outputs: int) -> np.ndarray[Any, Any]:
    """Random weights, two of four neighbours along K not zero."""
    values = rng.integers(1, 128, (-(-depth // 4), 4, outputs))
    values[np.argsort(rng.random(values.shape), axis=1) < 2] = 0
    return values.reshape(-1, outputs)[:depth].astype(np.int8)


def test_bytes() -> None:
    """By hand, 64 weights: 2:4 is 32 values and 32 indices of 2 bits; a mask has a bit per weight."""
    sizes = {"nm,2,4": (32, 8), "nm,1,4": (16, 4), "nm,4,8": (32, 12), "block,8,2,32": (1, 32), "mask,20": (8, 20), "s4,0": (32, 0), "s4,8": (32, 8)}
    for text, expected in sizes.items():
        name, *numbers = text.split(",")
        assert Packing(name, tuple(map(int, numbers))).sections((2, 8, 4)) == expected
    assert Packing("nm", (2, 4)).bytes((3, 3, 64, 64)) == 0.625 * 9 * 64 * 64


def test_layout_by_hand() -> None:
    """A column 0 5 0 -6 | 7 in 2:4: values 5 -6 7 0, places 1 3 0 1 in two bits each, lowest first."""
    column = np.array([[0], [5], [0], [-6], [7]], np.int8)
    stored = pack(column, Packing("nm", (2, 4)))
    assert stored.tolist() == [5, 250, 7, 0, 0b01_00_11_01]
    assert pack(column, Packing("mask", (3,))).tolist() == [0b11010, 5, 250, 7]
    assert pack(column, Packing("block", (3, 1, 5))).tolist() == [0b11, 0, 5, 0, 250, 7]
    assert pack(np.array([[6], [-18], [21]], np.int8), Packing("s4", (2,))).tolist() == [0xD1, 0x1, 6, 21]


@given(st.data())
def test_what_is_packed_comes_back(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple))
    seed, share, factor = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 0.4, 0.7, 0.9, 1.0])), data.draw(st.sampled_from([1, 16]))
    own = np.random.default_rng(seed)
    values = (own.integers(-8, 8, shape) * factor * (own.random(shape) >= share)).astype(np.int8)
    for word in FORMATS:
        found = smallest(values, (word,), (4, 3))
        if found is not None:
            packing, stored = found
            assert len(stored) == packing.bytes(shape) < values.size
            np.testing.assert_array_equal(unpack(tile(shape, packing), stored), values)


def test_smallest() -> None:
    """A format is found where the values have its structure."""
    assert smallest(two_of_four(64, 8), ("nm:2:4", "nm:4:8"), (32, 32))[0].text() == "nm,2,4"  # type: ignore[index]
    assert smallest(rng.integers(1, 100, (64, 8)).astype(np.int8), FORMATS, (32, 32)) is None
    groups = (rng.integers(-7, 8, (64, 8)) * np.repeat(rng.integers(2, 19, (2, 8)), 32, axis=0)).astype(np.int8)
    assert smallest(groups, FORMATS, (32, 32))[0].text() == "s4,32"  # type: ignore[index]
    blocks = np.kron(np.eye(4), np.ones((32, 32))).astype(np.int8) * rng.integers(1, 100, (128, 128)).astype(np.int8)
    assert smallest(blocks, FORMATS, (32, 32))[0].text() == "block,32,32,4096"  # type: ignore[index]


@pytest.mark.parametrize(
    ("packing", "shape", "stored", "told"),
    [
        (Packing("nm", (2, 4)), (4, 1), [5, 6, 0b01_01], "do not rise"),
        (Packing("nm", (2, 4)), (4, 1), [5, 6, 0b00_01], "do not rise"),
        (Packing("nm", (1, 3)), (3, 1), [5, 3], "place 3 among 3"),
        (Packing("nm", (1, 4)), (2, 1), [5, 2], "past the last of 2 rows"),
        (Packing("nm", (1, 4)), (4, 1), [5, 0x80], "past the end"),
        (Packing("block", (2, 2, 4)), (4, 2), [3, 1, 2, 3, 4], "tells of 8 values, 4 are stored"),
        (Packing("mask", (2,)), (4, 1), [1, 7, 7], "tells of 1 values, 2 are stored"),
        (Packing("mask", (2,)), (4, 1), [0x21, 7, 7], "past the end"),
        (Packing("s4", (2,)), (2, 1), [0x77, 20], "140, which is no s8"),
    ],
)
def test_damage_is_a_fault(packing: Packing, shape: tuple[int, ...], stored: list[int], told: str) -> None:
    with pytest.raises(RuntimeFault, match=told):
        unpack(tile(shape, packing), np.array(stored, np.uint8), line=3)


TEXT = """
.npu 1
.target demo rows=8 cols=8 spm_bytes=8192 acc_bytes=4096 weight_formats="nm:2:4 nm:1:4 nm:4:8 block mask s4"
.memory dram=0x2000 constants=0x1000+{size}
.input  "x" s8[1,16,4,4]{{256,1,64,16}} @0x0 scale=0.1 zero=0
.output "y" s8[1,8,2,2]{{32,1,16,8}} @0x400 scale=2.0 zero=0
.layer "conv" conv macs=4608
  ld      %0x100:s8[3,3,16,8]{kept}, @0x1000:s8[3,3,16,8]{packing}
  ld      %0x1000:s8[4,4,16], @0x0:s8[4,4,16]                              signal=mm.0
  conv    $0x0:s32[2,2,8], %0x1000:s8[4,4,16], %0x100:s8[3,3,16,8]{kept}   wait=ld.0 signal=vec.0
  requant %0x0:s8[2,2,8], $0x0:s32[2,2,8] scale=0.01                       wait=mm.0 signal=st.0
  st      @0x400:s8[2,2,8], %0x0:s8[2,2,8]                                 wait=vec.0
"""


@pytest.mark.parametrize("word", FORMATS)
def test_every_way_gives_the_same_bytes(word: str) -> None:
    """Plain weights, unpacked by the load, or by the matrix engine; with constants known and in random order."""
    values = rng.integers(-8, 8, (144, 8)).astype(np.int8)
    values[np.arange(144) % 8 != 2] = 0
    values[32:64, :] = 0
    found = smallest(values.reshape(3, 3, 16, 8), (word,), (8, 8))
    assert found is not None
    packing, stored = found
    x = {"x": rng.normal(size=(1, 16, 4, 4)).astype(np.float32)}
    plain = TEXT.format(size=values.size, kept="", packing="")
    expected = Machine(isa.pack_text(plain, values.tobytes())).run(x).raw["y"]
    for kept in ("", f"{{{packing.text()}}}"):
        package = isa.pack_text(TEXT.format(size=len(stored), kept=kept, packing=f"{{{packing.text()}}}"), stored.tobytes())
        isa.check(package.program)
        assert isa.parse_program(package.text) == package.program
        machine = Machine(package)
        np.testing.assert_array_equal(machine.run(x).raw["y"], expected)
        np.testing.assert_array_equal(machine.run(x, order="random", seed=1).raw["y"], expected)
        assert machine.report.dram_read_bytes == 256 + len(stored)


def test_few_bytes_cannot_stand_for_endless_weights() -> None:
    """A bitmap of one bit for a huge block, and groups far beyond the last row."""
    huge = "s8[3,3,400000000,8]{block,10000000000,8,0}"
    text = TEXT.format(size=720, kept="", packing="").replace("@0x1000:s8[3,3,16,8]", f"@0x1000:{huge}")
    text = text.replace("%0x100:s8[3,3,16,8],", f"%0x100:{huge},")
    with pytest.raises(RuntimeFault, match="can't be read or written"):
        Machine(isa.pack_text(text, bytes(720)))
    assert unpack(tile((3, 1), Packing("s4", (1 << 40,))), np.array([0x21, 0x03, 5], np.uint8)).ravel().tolist() == [5, 10, 15]


def test_what_is_refused() -> None:
    text = TEXT.format(size=720, kept="{nm,2,4}", packing="{nm,2,4}")
    for old, new, told in (
        ("0x1000:s8[3,3,16,8]{nm,2,4}", "0x1000:s8[3,3,16,8]", "y is packed as"),
        ("0x1000:s8[4,4,16],", "0x1000:s8[4,4,16]{nm,2,4},", "operand x of conv is packed"),
        ("{nm,2,4}", "{nm,2}", "the packing is"),
        ("{nm,2,4}", "{nmm,2,4}", "did you mean 'nm'"),
        ("{nm,2,4}", "{mask,1153}", "holds 1153 values"),
        ('"nm:2:4 nm:1:4', '"nm:1:4', "the target knows nm:1:4"),
    ):
        with pytest.raises(isa.IsaError, match=told):
            isa.check(isa.parse_program(text.replace(old, new)))
