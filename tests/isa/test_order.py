"""Events, deadlock, unwritten memory, and races compared with a slow oracle that spells everything out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isa import SPEC, Event, Instruction, Tile, findings
from isa.geometry import footprint
from isa.order import Coverage, Log
from tests.isa.strategies import program_of
from tests.isa.test_check import LAYER, found
from tests.isa.test_geometry import touched

# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = {
    "ld %0x0:s8[4], @0x800:s8[4]\nst @0x0:s8[4], %0x0:s8[4]": [
        "6: st reads %0x0 while ld (line 5) may still be writing it: no event orders the st queue after the ld queue here\n"
        "  hint: let ld, or a later ld instruction, have signal=st.0, and this one, or an earlier st instruction, wait=ld.0",
    ],
    "fill %0x0:s8[4]\nld %0x2:s8[4], @0x800:s8[4]": [
        "6: ld writes %0x2 while fill (line 5) may still be writing it: no event orders the ld queue after the vec queue here\n"
        "  hint: let fill, or a later vec instruction, have signal=ld.0, and this one, or an earlier ld instruction, wait=vec.0",
    ],
    "fill %0x0:s8[4] signal=st.0\nst @0x0:s8[4], %0x0:s8[4] wait=vec.0\nfill %0x3:s8[1]": [
        "7: fill writes %0x3 while st (line 6) may still be reading it: no event orders the vec queue after the st queue here\n"
        "  hint: let st, or a later st instruction, have signal=vec.0, and this one, or an earlier vec instruction, wait=st.0",
    ],
    "ld %0x0:s8[4], @0x800:s8[4] wait=vec.0\nfill %0x0:s8[4] signal=ld.0": [
        "5: ld waits for event vec.0, which is given only further down: this text order cannot be executed\n"
        "  hint: move the instruction below those that it waits for",
    ],
    "ld %0x0:s8[4], @0x800:s8[4] wait=vec.0 signal=vec.0\nfill %0x8:s8[4] wait=ld.0 signal=ld.0": [
        "5: the ld queue is stuck: ld waits for event vec.0, which is given on line 6, behind another stuck instruction\n"
        "  hint: the queues wait for one another in a circle: break it, or add a signal before it",
        "6: the vec queue is stuck: fill waits for event ld.0, which is given on line 5, behind another stuck instruction\n"
        "  hint: the queues wait for one another in a circle: break it, or add a signal before it",
    ],
    "ld %0x0:s8[4], @0x800:s8[4] wait=vec.0\nfill %0x8:s8[4] wait=mm.7 signal=ld.0": [
        "6: the vec queue is stuck: fill waits for event mm.7, which is never given again\n"
        "  hint: give it: signal=vec.7 on an instruction of the mm queue; or remove this wait",
        "5: the ld queue is stuck: ld waits for event vec.0, which is given on line 6, behind another stuck instruction\n"
        "  hint: the queues wait for one another in a circle: break it, or add a signal before it",
    ],
    "fill %0x0:s8[4] signal=ld.0\nld %0x8:s8[4], @0x800:s8[4] wait=vec.0,vec.0": [
        "6: the ld queue is stuck: ld waits for event vec.0, which is never given again\n"
        "  hint: give it: signal=ld.0 on an instruction of the vec queue; or remove this wait",
    ],
    "fill %0x0:s8[4] signal=ld.0,ld.0": [
        "5: signal=ld.0 of the vec queue is given 2 times more than the ld queue waits for it\n"
        "  hint: add wait=vec.0 to an instruction of the ld queue, or remove the signal",
    ],
    "fill %0x0:s8[2,4]{8,1}\nadd %0x10:s8[12], %0x0:s8[12]": [
        "6: add reads %0x0, but nothing has written the bytes from 0x4 of spm\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
    ],
    "fill %0x0:s8[4]\nadd %0x8:s8[2,4]{8,1}, %0x0:s8[2,4]{4,1}": [
        "6: add reads %0x0, but nothing has written the bytes from 0x4 of spm\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
    ],
    "matmul $0x0:s32[1,1], %0x0:s8[1,1], %0x1:s8[1,1] accumulate=1": [
        "5: matmul reads $0x0, but nothing has written the bytes from 0x0 of acc\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
        "5: matmul reads %0x0, but nothing has written the bytes from 0x0 of spm\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
        "5: matmul reads %0x1, but nothing has written the bytes from 0x1 of spm\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
    ],
    "ld %0x0:s8[4], @0x7ff:s8[4]": [
        "5: ld reads @0x7ff, but nothing has written the bytes from 0x7ff of dram\n"
        "  hint: write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
    ],
}  # fmt: skip


@pytest.mark.parametrize("body", WRONG)
def test_wrong_orders_are_explained(body: str) -> None:
    assert [str(remark) for remark in found(LAYER + body)] == WRONG[body]


RIGHT = (
    "fill %0x0:s8[8,4]{8,1} signal=ld.0\nfill %0x40:s8[4] signal=ld.1\nld %0x4:s8[8,4]{8,1}, @0x800:s8[8,4]",  # interleaved columns
    # through a third queue
    "ld %0x0:s8[4], @0x800:s8[4] signal=vec.0\nadd %0x8:s8[4], %0x0:s8[4] wait=ld.0 signal=st.0\nst @0x0:s8[4], %0x0:s8[4] wait=vec.0",
    "fill %0x0:s8[4] signal=st.0\nst @0x0:s8[2], %0x0:s8[2] wait=vec.0\nadd %0x8:s8[4], %0x0:s8[4]",  # both only read
    "fill %0x0:s8[8,4]{8,1}\nadd %0x80:s8[8,2]{8,1}, %0x0:s8[8,2]{8,1}",  # a part of a strided tile
)


@pytest.mark.parametrize("body", RIGHT)
def test_right_orders_pass(body: str) -> None:
    remarks = [remark for remark in found(LAYER + body) if "more than the ld queue" not in remark.message]
    assert remarks == []


def test_a_second_iteration_is_looked_at() -> None:
    """The first iteration is ordered; the second load overwrites what the first addition may still be reading."""
    body = "loop 2\n  ld %0x0:s8[4], @0x800:s8[4] signal=vec.0\n  add %0x8:s8[4], %0x0:s8[4] wait=ld.0\nend"
    assert [remark.message.partition(":")[0] for remark in found(LAYER + body)] == ["ld writes %0x0 while add (line 7) may still be reading it"]
    assert found(LAYER + body.replace("%0x0", "%0x100+0x100*i")) == []


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

addresses = st.integers(0, 24)
shapes = st.sampled_from([((4,), (1,)), ((8,), (1,)), ((4,), (2,)), ((2, 2), (8, 1)), ((3, 2), (4, 1)), ((2, 2), (5, 3))])


@st.composite
def tiles(draw: Any, space: str, shape: tuple[int, ...] | None = None) -> Tile:
    chosen, strides = draw(shapes) if shape is None else (shape, None)
    dense = Tile.dense(space, draw(addresses), "s8", chosen)
    return dense if strides is None else Tile(space, dense.address, "s8", chosen, strides)


@st.composite
def lines(draw: Any) -> Instruction:
    """A load, a store, a fill, or an addition whose result lies apart from what it reads."""
    name = draw(st.sampled_from(["ld", "st", "fill", "add"]))
    first = draw(tiles("dram" if name == "st" else "spm"))
    if name == "fill":
        return Instruction("fill", (first,))
    if name == "add":
        return Instruction("add", (Tile(first.space, first.address + 64 * draw(st.integers(1, 2)), "s8", first.shape, first.strides), first))
    return Instruction(name, (first, draw(tiles("spm" if name == "st" else "dram", first.shape))))


@st.composite
def orders(draw: Any) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Some instructions, and events between them: (signaller, waiter), for each pair of queues in text order."""
    body = draw(st.lists(lines(), min_size=2, max_size=9))
    edges: list[tuple[int, int]] = []
    latest: dict[tuple[str, str], int] = {}
    for waiter, instruction in enumerate(body):
        mine = SPEC[instruction.name].queue
        for signaller in range(waiter):
            theirs = SPEC[body[signaller].name].queue
            if theirs != mine and signaller >= latest.get((theirs, mine), 0) and draw(st.integers(0, 2)) == 0:
                latest[theirs, mine] = signaller
                edges.append((signaller, waiter))
    return body, edges


def with_events(body: list[Instruction], edges: list[tuple[int, int]]) -> tuple[Instruction, ...]:
    queues = [SPEC[instruction.name].queue for instruction in body]
    return tuple(
        Instruction(
            instruction.name,
            instruction.tiles,
            (),
            tuple(Event(queues[signaller]) for signaller, waiter in edges if waiter == index),
            tuple(Event(queues[waiter]) for signaller, waiter in edges if signaller == index),
        )
        for index, instruction in enumerate(body)
    )


def races(body: list[Instruction], edges: list[tuple[int, int]]) -> bool:
    """Whether two unordered instructions touch a common byte, one of them writing."""
    before: list[set[int]] = []
    for index, instruction in enumerate(body):
        direct = {other for other in range(index) if SPEC[body[other].name].queue == SPEC[instruction.name].queue}
        direct |= {signaller for signaller, waiter in edges if waiter == index}
        before.append(direct.union(*(before[other] for other in direct)))
    sides = [[(tile.space, touched(tile), position == 0) for position, tile in enumerate(instruction.tiles)] for instruction in body]
    return any(
        space == other_space and bool(mine & theirs) and (writes or other_writes)
        for index in range(len(body))
        for other in range(index)
        if other not in before[index]
        for space, mine, writes in sides[index]
        for other_space, theirs, other_writes in sides[other]
    )


@settings(max_examples=400, deadline=None)
@given(orders())
def test_races_are_found_exactly(order: tuple[list[Instruction], list[tuple[int, int]]]) -> None:
    body, edges = order
    program = replace(program_of(with_events(body, edges)), constants_bytes=0)
    remarks = [remark.message for remark in findings(program) if "nothing has written" not in remark.message]
    assert all("may still be" in message for message in remarks)
    assert bool(remarks) == races(body, edges)


# ── the two address maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

intervals = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(intervals, max_size=12), intervals)
def test_coverage_is_a_set(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    coverage, bytes_ = Coverage(), set[int]()
    for low, high in added:
        coverage.add(low, high)
        bytes_ |= set(range(low, high))
    assert coverage.covers(*asked) == (set(range(*asked)) <= bytes_)
    assert coverage.starts == sorted(coverage.starts)
    assert all(end < start for end, start in zip(coverage.ends, coverage.starts[1:], strict=False))


@given(st.lists(intervals, max_size=12), intervals)
def test_log_knows_the_latest_access(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    log, latest, instruction = Log(), dict.fromkeys(range(50), -1), Instruction("fill", ())
    mark = footprint(Tile.dense("spm", 0, "s8", (1,)))
    for number, (low, high) in enumerate(added):
        log.add(low, high, number, low, mark, instruction)
        latest.update(dict.fromkeys(range(low, high), number))
    assert log.latest(*asked) == max(latest[address] for address in range(*asked))
