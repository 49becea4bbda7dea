"""The checker lets every legal program pass, and says what is wrong with the others."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isa import SPEC, TABLE, CheckError, Event, Instruction, InstructionSpec, Loop, Tile, check, findings, parse_program, unroll
from isa.finding import Finding
from runtime import Machine
from tests.isa.strategies import TARGET, instructions, program_of, surround

EXAMPLE = (Path(__file__).parents[2] / "examples" / "matmul.npuasm").read_text(encoding="utf-8")
HEADER = ".npu 1\n.target t spm_bytes=4096 acc_bytes=1024 dram_bytes=65536\n.memory dram=0x1000 constants=0x800+0x100\n"
LAYER = HEADER + '.layer "a" test macs=0\n'  # line 4: bodies begin on line 5


def found(text: str) -> list[Finding]:
    return findings(parse_program(text))


# ── legal programs ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_legal_instructions_pass(spec: InstructionSpec, data: st.DataObject) -> None:
    assert findings(surround(data.draw(instructions(spec)))) == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instructions())
def test_what_the_checker_passes_the_machine_runs(instruction: Instruction) -> None:
    program = surround(instruction)
    # resize reads positions and gather indices from memory, which only values can get wrong; the host is another machine
    if instruction.name not in ("resize", "gather") and SPEC[instruction.name].queue != "host":
        Machine(program, bytes(program.constants_bytes)).run({}, order="random")


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
def test_examples_of_the_table_pass(spec: InstructionSpec) -> None:
    text = re.sub(r" (wait|signal)=\S+", "", spec.example)
    program = parse_program(f'.npu 1\n.target edge\n.memory dram=0x80000\n.layer "a" test\n{text}')
    (instruction,) = program.layers[0].body
    assert isinstance(instruction, Instruction)
    constants = 0x40000 if spec.name in ("ld", "take", "gather") else 0  # what is loaded exists
    assert findings(replace(surround(instruction), dram_bytes=0x80000, constants_bytes=constants)) == []


def test_hand_written_example_passes() -> None:
    check(parse_program(EXAMPLE))


def event_lists(text: str) -> list[tuple[int, int, int]]:
    """(start, end, index within the list) of every event of every wait= and signal= outside comments."""
    places = []
    for match in re.finditer(r"^[^;\n]*?(?:wait|signal)=.*$", text, re.MULTILINE):
        for listed in re.finditer(r"(?:wait|signal)=(\S+)", match[0]):
            places += [(match.start() + listed.start(), match.start() + listed.end(), index) for index in range(listed[1].count(",") + 1)]
    return places


@pytest.mark.parametrize("place", event_lists(EXAMPLE), ids=lambda place: f"{EXAMPLE.count(chr(10), 0, place[0]) + 1}.{place[2]}")
def test_every_event_of_the_example_is_needed(place: tuple[int, int, int]) -> None:
    """Without any single wait or signal, the double-buffered product is refused."""
    start, end, index = place
    key, _, events = EXAMPLE[start:end].partition("=")
    left = [event for position, event in enumerate(events.split(",")) if position != index]
    assert found(EXAMPLE[:start] + (f"{key}={','.join(left)}" if left else "") + EXAMPLE[end:])


@pytest.mark.parametrize(("giver", "taker"), [("ld", "mm"), ("mm", "ld"), ("mm", "vec"), ("vec", "mm"), ("vec", "st"), ("st", "vec")])
def test_every_channel_of_the_example_is_needed(giver: str, taker: str) -> None:
    """Without all events between two queues nothing gets stuck, but there is a race."""
    program = parse_program(EXAMPLE)
    body = tuple(without_channel(item, giver, taker) for item in program.layers[0].body)
    remarks = findings(replace(program, layers=(replace(program.layers[0], body=body),)))
    assert remarks
    assert all("may still be" in remark.message for remark in remarks)


def without_channel(item: Instruction | Loop, giver: str, taker: str) -> Instruction | Loop:
    if isinstance(item, Loop):
        return replace(item, body=tuple(without_channel(inner, giver, taker) for inner in item.body))
    mine = SPEC[item.name].queue
    waits = tuple(event for event in item.waits if (mine, event.queue) != (taker, giver))
    return replace(item, waits=waits, signals=tuple(event for event in item.signals if (mine, event.queue) != (giver, taker)))


# ── illegal lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

POOL = "%0x0:s8[4,4,8], %0x400:s8[4,4,8]"
LINES = {
    "fill %0xffe:s8[4]": "operand y, %0xffe, reaches from 0xffe to 0x1002, outside the 4096 bytes of spm",
    "loop 4\nfill %0x0+0x400*i:s8[0x400]\nfill %0xc00-0x401*i:s8[0x400]\nend": (
        "operand y, %0xc00-0x401*i, reaches from -0x3 to 0x1000, outside the 4096 bytes of spm"
    ),
    "st @0xfff:s8[2], %0x0:s8[2]": "operand y, @0xfff, reaches from 0xfff to 0x1001, outside the 4096 bytes of dram",
    "matmul $0x3fc:s32[1,2], %0x0:s8[1,1], %0x1:s8[1,2]": "operand y, $0x3fc, reaches from 0x3fc to 0x404, outside the 1024 bytes of acc",
    "st @0x8ff:s8[2], %0x0:s8[2]": "operand y, @0x8ff, writes into the constants",
    f"maxpool {POOL} pad=0,0,8192,8192": "x has 537395328 elements with its padding",
    "reduce %0x0:s32[1], %0x10:s8[4] zero=2147483648": "zero is 2147483648",
    "fill %0x0:s8[4]{0}": "operand y, %0x0:s8[4]{0}, writes some bytes twice",
    "fill %0x0:s32[2,2]{8,8}": "operand y, %0x0:s32[2,2]{8,8}, writes some bytes twice",
    "requant %0x0:s8[4], $0x0:s32[4]{6}": "operand a, $0x0, is not aligned",
    "requant %0x0:s8[4], $0x0:s32[4] zero=2147483649": "zero is 2147483649",
    "fill %0x2:s32[4]": "operand y, %0x2, is not aligned",
    "ld %0x0:s8[4], @0x0:s8[5]": "operand x has shape [5], but operand y has [4]",
    "ld %0x0:s8[4], @0x0:u8[4]": "operand y holds s8, but operand x holds u8",
    "ld %0x0:s8[1,1,1,1,1,1], @0x0:s8[1,1,1,1,1,1]": "the tiles have 6 dimensions",
    "matmul $0x0:s32[4,4], %0x0:s8[4,3], %0x100:s8[4,4]": "size k is 4 in operand b, but 3 in operand a",
    "matmul $0x0:s32[4], %0x0:s8[4,3], %0x100:s8[3,4]": "operand y has 1 dimension, [4]",
    "requant %0x0:s8[4,8], $0x0:s32[4,8], %0x100:f32[4]": "size n is 4 in operand s, but 8 in operand y",
    "resize %0x0:s8[4,4,8], %0x100:s8[2,2,8], %0x200:s32[4,3], %0x300:s32[4,4]": "operand r has size 3 where the table says 4",
    "lut %0x0:s8[4], %0x10:s8[4], %0x20:s16[256]": "operand y holds s8, but operand t holds s16",
    "reduce %0x0:s32[2,8], %0x100:s8[4,8]": "operand y has shape [2,8], but operand x has [4,8]",
    "reduce %0x0:s16[1,8], %0x100:s8[4,8]": "op=sum writes into s16",
    "reduce %0x0:s8[1,8], %0x100:s16[4,8] op=max": "op=max of s16 writes into s8",
    "reduce %0x0:s32[1,8], %0x100:s8[4,8] accumulate=2": "accumulate is 2",
    f"maxpool {POOL} kernel=2,1": "the last window ends at row 5 of an input of 4 rows plus 0 of padding",
    f"maxpool {POOL} kernel=2,2 pad=0,0,1,0": "the last window ends at column 5 of an input of 4 columns plus 0 of padding",
    f"maxpool {POOL} kernel=0,1": "kernel is (0, 1)",
    f"maxpool {POOL} stride=1,0": "stride is (1, 0)",
    f"maxpool {POOL} pad=0,0,-1,0": "pad is (0, 0, -1, 0)",
    f"maxpool {POOL} pad=1,0,0,0": "the window of output row 0 lies wholly in the padding",
    f"avgpool {POOL} stride=1,2 pad=0,0,0,3": "the window of output column 3 lies wholly in the padding",
    "maxpool %0x0:s8[1,1,8], %0x400:s8[2,1,8] kernel=2,1 dilation=4,1 pad=1,0,2,0": "a window steps over all 2 rows of x",
    "conv $0x0:s32[2,2,4], %0x0:s8[3,3,4], %0x100:s8[3,3,4,4] pad=0,0,1,0": (
        "the last window ends at column 4 of an input of 3 columns plus 0 of padding"
    ),
    "conv $0x0:s32[2,2,4], %0x0:s8[2,2,5], %0x100:s8[1,1,2,4] groups=2": "x has 5 channels, but w has 2 in each of 2 groups",
    "conv $0x0:s32[2,2,5], %0x0:s8[2,2,4], %0x100:s8[1,1,2,5] groups=2": "5 output channels do not split into 2 groups",
    "matmul $0x0:s32[2,2], %0x0:s8[2,2], %0x10:s8[2,2], %0x20:s32[2] accumulate=1": "accumulate=1 and the bias c exclude each other",
    "matmul $0x0:s32[2,2], %0x0:s8[2,2], %0x10:s8[2,2] za=200": "za is 200, but operand a holds s8",
    "fill %0x0:s8[4] value=0.5": "value is 0.5, but operand y holds s8",
    "fill %0x0:u8[4] value=-1": "value is -1.0, but operand y holds u8",
    "fill %0x0:s32[4] value=nan": "value is nan, but operand y holds s32",
    "requant %0x0:s8[4], $0x0:s32[4] clamp=5,4": "clamp is (5, 4)",
    "add %0x0:s8[4], %0x10:s8[4] qa=nan,0": "qa is (nan, 0)",
    "add %0x0:s8[4], %0x1:s8[4]": "the result %0x0 overlaps operand a, %0x1",
    "cvt %0x0:f32[4], %0x0:s8[4]": "the result %0x0 overlaps operand x, %0x0",
    "loop 2\nadd %0x0:s8[4], %0x4-0x4*i:s8[4]{0}\nend": "the result %0x0 overlaps operand a, %0x4-0x4*i",
    "fill %0x0:s8[4] wait=vec.0": "event vec.0 connects the vec queue with itself",
}


@pytest.mark.parametrize("body", LINES)
def test_illegal_lines_are_explained(body: str) -> None:
    remarks = found(LAYER + body)
    assert [remark.message for remark in remarks] == [LINES[body]]
    assert remarks[0].line == 5 + body.count("\n", 0, body.index("%0xc00") if "%0xc00" in body else body.index(" %") if "loop" in body else 0)
    assert remarks[0].hint


def test_elementwise_results_may_replace_their_operands() -> None:
    assert found(LAYER + "fill %0x0:s8[8]\nadd %0x0:s8[8], %0x0:s8[8], %0x0:s8[8]\nlut %0x0:s8[8], %0x0:s8[8], %0x0:s8[8]") == [
        Finding(
            7,
            0,
            "the result %0x0 overlaps operand t, %0x0",
            "give the result bytes of its own; only elementwise instructions may write exactly where they read",
        )
    ]


def test_alignment_is_the_targets() -> None:
    text = LAYER.replace("spm_bytes", "alignment=16 spm_bytes")
    assert [remark.message for remark in found(text + "fill %0x8:s8[8]\nloop 2\nfill %0x10+0x18*i:s8[8]\nend")] == [
        "operand y, %0x8, is not aligned",
        "operand y, %0x10+0x18*i, is not aligned",
    ]


PROGRAMS = {
    '.input "a" s8[4] @0xffd scale=1 zero=0': ".input 'a' reaches from 0xffd to 0x1001, outside the 4096 bytes of dram",
    '.input "a" s8[4] @0x7fd scale=1 zero=0': ".input 'a' overlaps the constants",
    '.output "a" s8[4] @0x0 scale=1 zero=0': "output 'a' is not written whole by any instruction",
    '.tensor "a" s8[4] %0xffd scale=1 zero=0': ".tensor 'a' reaches from 0xffd to 0x1001, outside the 4096 bytes of spm",
    '.tensor "a" s8[4] %0x0 scale=1 zero=0 layer="b"': ".tensor 'a' names layer 'b', which does not exist",
}


@pytest.mark.parametrize("line", PROGRAMS)
def test_illegal_headers_are_explained(line: str) -> None:
    assert [remark.message for remark in found(f"{HEADER}{line}\n")] == [PROGRAMS[line]]


def test_memory_must_fit_the_target() -> None:
    assert [remark.message for remark in found(".npu 1\n.target t dram_bytes=64\n.memory dram=100 constants=90+20")] == [
        "the program uses 100 bytes of DRAM, target 't' has 64",
        "the constants do not lie within the DRAM that .memory states",
    ]


# ── programs that no text can spell ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_programs_built_in_python_are_quoted() -> None:
    tile = Tile.dense("spm", 0, "s8", (4,))
    wrong = (
        (Instruction("ld", (tile, tile)), "`ld %0x0:s8[4], %0x0:s8[4]`: operand x of ld is in spm"),
        (Instruction("fill", (tile, tile)), "`fill %0x0:s8[4], %0x0:s8[4]`: fill has 2 operands, expected 1"),
        (Instruction("fill", (tile,), (("valu", 1.0),)), "`fill %0x0:s8[4]`: fill has no attribute 'valu'"),
        (Instruction("fill", (tile,), signals=(Event("mm", 256),)), "`fill %0x0:s8[4] signal=mm.256`: unknown event mm.256"),
        (Instruction("fill", (replace(tile, steps=(4,)),)), "`fill %0x0+0x4*i:s8[4]`: operand y of fill is %0x0+0x4*i:s8[4]"),
        (Instruction("cmp", (replace(tile, dtype="u8"), tile), (("op", "is"),)), "`cmp %0x0:u8[4], %0x0:s8[4] op=is`: op is 'is'"),
        (Instruction("fold", (tile,)), "unknown instruction 'fold'"),
        (Loop(0, ()), "a loop of 0 iterations over 0 lines at depth 0"),
    )
    for item, message in wrong:
        assert [remark.message for remark in findings(program_of((item,)))] == [message]


def test_executed_instructions_are_limited() -> None:
    nest = Loop(3000, (Loop(3000, (Instruction("fill", (Tile.dense("spm", 0, "s8", (4,)),)),)),))
    assert [remark.message for remark in findings(program_of((nest,)))] == ["the program executes more than 2000000 instructions"]


def test_check_raises_the_first_and_lists_more() -> None:
    with pytest.raises(CheckError) as caught:
        check(parse_program(LAYER + "fill %0xfff:s8[4]\n" * 8), file="a.npuasm")
    lines = str(caught.value).splitlines()
    assert lines[0] == "a.npuasm:5: operand y, %0xfff, reaches from 0xfff to 0x1003, outside the 4096 bytes of spm"
    assert lines[1] == "  hint: the limit is spm_bytes of the target: use a smaller tile or a lower address %"
    assert lines[2].startswith("  also: 6: operand y, %0xfff, reaches")
    assert lines[-1] == "  … and 3 more"


def test_twenty_thousand_instructions_are_checked_quickly() -> None:
    text = re.sub(r"@(0x\w+)\+0x\w+\*i", r"@\1", EXAMPLE).replace("loop 2", "loop 2500")
    program = parse_program(text)
    assert sum(1 for _ in unroll(program.layers[0].body)) > 20_000
    start = time.process_time()
    remarks = findings(program)
    assert time.process_time() - start < 2
    assert [remark.message for remark in remarks] == ["output 'y' is not written whole by any instruction"]
    assert TARGET.name == "test"
