"""Rolling never changes the program: what the loops unroll to is the straight-line code they were made from."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from isa.program import Instruction, Loop, Tile, address_at, unroll
from npucc.lowering.roll import Item, roll


def load(address: int, source: int) -> Instruction:
    return Instruction("ld", (Tile.dense("spm", address, "s8", (16,)), Tile.dense("dram", source, "s8", (16,))))


def unrolled(items: tuple[Item, ...]) -> list[Instruction]:
    lines = []
    for instruction, iterations in unroll(items):
        tiles = tuple(replace(tile, address=address_at(tile, iterations), steps=()) for tile in instruction.tiles)
        lines.append(replace(instruction, tiles=tiles))
    return lines


addresses = st.integers(0, 6).map(lambda n: n * 16)


@given(st.lists(st.tuples(addresses, addresses), max_size=40))
def test_any_program_unrolls_to_itself(pairs: list[tuple[int, int]]) -> None:
    program = [load(a, b) for a, b in pairs]
    assert unrolled(roll(program)) == program


def test_ping_pong_becomes_one_loop() -> None:
    program = [load(16 * (n % 2), 64 * n) for n in range(8)]
    rolled = roll(program)
    assert len(rolled) == 1
    assert isinstance(rolled[0], Loop)
    assert (rolled[0].count, len(rolled[0].body)) == (4, 2)


def test_loops_nest() -> None:
    program = [load(16 * j, 1000 * i + 64 * j) for i in range(5) for j in range(6)]
    rolled = roll(program)
    assert unrolled(rolled) == program
    assert len(rolled) == 1
    outer = rolled[0]
    assert isinstance(outer, Loop)
    assert isinstance(outer.body[0], Loop)
