"""npuasm text and programs are two spellings of one value; every mistake is placed and explained."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isa import TABLE, Instruction, InstructionSpec, Loop, ParseError, Program, format_instruction, format_program, mistakes, parse_program
from isa.tokens import print_float32, read_float32
from tests.isa.strategies import float32, instructions, program_of, programs

EXAMPLE = Path(__file__).parents[2] / "examples" / "matmul.npuasm"
HEADER = ".npu 1\n.target edge\n.memory dram=0x1000\n"
LAYER = HEADER + '.layer "a" conv macs=0\n'

CANONICAL = """\
.npu 1
.source "model.onnx"
.target edge rows=16 shadow_weights=false pj_mac=0.123456789
.memory dram=0x1200000 constants=0x400000+0x2f000
.input  "image" s8[1,3,32,32]{3072,1,96,3} @0x0 scale=0.0392157 zero=-3 type=float32
.output "logits \\"10\\"" s8[1,10] @0x4000 scale=0.1 zero=4 type=int64
.tensor "relu1" s8[1,16,32,32] %0x5000 scale=0.1 zero=4 layer="conv1"

.layer "conv1" conv macs=1234 nodes="Conv_1","Relu_2"
  ld      %0x80000:s8[3,3,64,64], @0x400000:s8[3,3,64,64]                                       signal=mm.0
  loop 4
    ld      %0x0:s8[16,58,64], @0x0+0xc400*i:s8[16,57,64]{3712,64,1}                            wait=mm.0 signal=mm.0
    loop 2
      requant %0xc000-0x10*j:s8[14,56,64], $0x0:s32[14,56,64] scale=1e-05 zero=-128
    end
  end
  fill    %0x0:s8[]

.layer "empty layer" "two words" macs=0
"""


def test_canonical_text_is_a_fixed_point() -> None:
    assert format_program(parse_program(CANONICAL)) == CANONICAL


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(programs())
def test_programs_round_trip(program: Program) -> None:
    text = format_program(program)
    assert parse_program(text) == program
    assert format_program(parse_program(text)) == text


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_instructions_round_trip(spec: InstructionSpec, data: st.DataObject) -> None:
    instruction: Instruction = data.draw(instructions(spec))
    program = program_of((instruction,))
    assert parse_program(format_program(program)) == program


@given(float32)
def test_floats_round_trip(value: float) -> None:
    assert repr(read_float32(print_float32(value), "x")) == repr(value)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "-0.0", "1e-45", "3.4028235e+38"])
def test_special_floats_round_trip(text: str) -> None:
    assert print_float32(read_float32(text, "x")) == text


def test_minus_zero_is_not_the_default() -> None:
    program = parse_program(LAYER + "fill %0x0:f32[4] value=-0.0")
    assert "value=-0.0" in format_program(program)


def test_defaults_comments_and_layout_do_not_matter() -> None:
    plain = parse_program(LAYER + "requant %0x0:s8[4,8], $0x0:s32[4,8] zero=-3")
    written = parse_program(LAYER + "\n ; nothing\r\n\trequant  %0:s8[4,8]{8,1} ,$0x0:s32[4,8] clamp=-128,127 zero=-0x3 scale=1 ; same\r\n")
    assert written == plain


def test_lines_are_kept_but_not_compared() -> None:
    program, moved = parse_program(LAYER + "fill %0x0:s8[4]"), parse_program(LAYER + "\n\nfill %0x0:s8[4]")
    assert (program.layers[0].body[0].line, moved.layers[0].body[0].line) == (5, 7)
    assert program == moved


def test_hand_written_example_is_read() -> None:
    assert len(parse_program(EXAMPLE.read_text(encoding="utf-8")).layers[0].body) == 20


def test_instruction_as_one_line() -> None:
    instruction = parse_program(LAYER + "add %0x0:s8[4], %0x4:s8[4] qa=0.5,3 imm=2 wait=mm.0,ld.1 signal=st.0").layers[0].body[0]
    assert isinstance(instruction, Instruction)
    assert format_instruction(instruction) == "add     %0x0:s8[4], %0x4:s8[4] qa=0.5,3 imm=2.0 wait=mm.0,ld.1 signal=st.0"


ERRORS = {
    "": "f: the program has no .npu line\n  hint: begin with a line such as: .npu 1",
    ".npu 1": "f: the program has no .target line\n  hint: begin with a line such as: .target edge",
    ".npu 1\n.target edge": "f: the program has no .memory line\n  hint: begin with a line such as: .memory dram=0x1000 constants=0x0+0x400",
    ".npu 2": "f:1:6: version '2' of npuasm\n  hint: this reader knows version 1",
    ".npu": "f:1:5: the end of the line is out of place\n  hint: expected a number",
    ".target edge": "f:1:1: .target before .npu\n  hint: begin the text with: .npu 1",
    ".npu 1\n.inptu": "f:2:1: unknown directive '.inptu'\n  hint: did you mean '.input'?",
    ".npu 1\n.target edge rws=3": "f:2:14: unknown field 'rws' of .target\n  hint: did you mean 'rows'?",
    ".npu 1\n.target edge rows=x": "f:2:19: rows is 'x'\n  hint: expected a whole number such as 64, -3 or 0x40",
    ".npu 1\n.target edge rows=0": "f:2:1: rows is 0\n  hint: it must be at least 1, and below 2**48",
    ".npu 1\n.target edge family=foo": "f:2:1: family is 'foo'\n  hint: use 'systolic' or 'mac'",
    ".npu 1\n.memory constants=0+0": "f:2:1: .memory lacks dram=\n  hint: its fields are dram, constants",
    ".npu 1\n.memory drm=0": "f:2:9: .memory has no field 'drm'\n  hint: did you mean 'dram'?",
    ".npu 1\n.memory dram=0 constants=5": "f:2:26: '5' is not ADDRESS+SIZE\n  hint: write it as constants=0x400000+0x2f000",
    HEADER + ".target edge": "f:4:1: a second .target line\n  hint: keep one of them",
    HEADER + '.input "a" s8[1]{1,2} @0 scale=1 zero=0': (
        "f:4:18: 2 strides for 1 dimensions in 's8[1]{1,2}'\n  hint: give one byte stride per dimension, or none at all"
    ),
    HEADER + '.input "a" s8[1] @0 zero=0': "f:4:1: .input lacks scale=\n  hint: its fields are scale, zero, layer, type",
    HEADER + '.input "a" s8[1] $0 scale=1 zero=0': "f:4:18: .input lies at '$0'\n  hint: give a plain address in dram (@) or spm (%)",
    HEADER + '.input "a" s8[1] @0 scale=1 zero=0 type=float': "f:4:41: unknown outside type 'float'\n  hint: did you mean 'float64'?",
    HEADER + '.input "a" s8[1] @0 scale=nan zero=0': (
        "f:4:27: scale is 'nan'\n  hint: expected a number above 0: what one step of the stored integers is worth"
    ),
    HEADER + '.input "a" s8[1] @0 scale=1 zero=0\n' * 2: "f:5:8: a second .input named 'a'\n  hint: names are unique among each kind",
    HEADER + '.input "a s8[1] @0': (
        "f:4:8: the string '\"a s8[1] @0' is not closed\n  hint: end it with a double quote on the same line; write a quote inside as \\\""
    ),
    HEADER + "ld %0x0:s8[3], @0x0:s8[3]": "f:4:1: 'ld' outside a layer\n  hint: open one with a line: .layer \"name\" op macs=0",
    LAYER + '.source "x"': "f:5:1: .source after the first .layer\n  hint: move it above the layers",
    LAYER + "lod %0x0:s8[3], @0x0:s8[3]": "f:5:1: unknown instruction 'lod'\n  hint: did you mean 'ld'?",
    LAYER + "  nop": (
        "f:5:3: unknown instruction 'nop'\n  hint: known: ld, st, gather, conv, dwconv, matmul, requant, add, sub, mul, div, max, min, cmp, select, "
        "cvt, sqrt, lut, maxpool, avgpool, reduce, resize, fill, take, host, give, loop, end"
    ),
    LAYER + "ld": "f:5:1: ld has 0 operands, expected 2\n  hint: its form is: ld y, x",
    LAYER + "ld %0x0:s8[3]": "f:5:1: ld has 1 operand, expected 2\n  hint: its form is: ld y, x",
    LAYER + "fill %0x0:s8[3], %0x0:s8[3]": "f:5:1: fill has 2 operands, expected 1\n  hint: its form is: fill y",
    LAYER + "matmul $0x0:s32[3,3], %0x0:s8[3,3]": "f:5:1: matmul has 2 operands, expected 3 to 4\n  hint: its form is: matmul y, a, b, c?",
    LAYER + "ld %0x0:s8[3] @0x0:s8[3]": (
        "f:5:15: '@0x0:s8[3]' is out of place\n  hint: expected a comma or an attribute such as pad=1,1,1,1 or the end of the line"
    ),
    LAYER + "ld %0x0:s7[3], @0x0:s8[3]": "f:5:9: unknown element type 's7'\n  hint: known: s8, u8, s16, s32, s64, f32, u16, u32, u64, f16, f64",
    LAYER + "ld @0x0:s8[3], @0x0:s8[3]": "f:5:4: operand y of ld is in dram\n  hint: it must be in % (spm)",
    LAYER + "requant %0x0:s32[3], $0x0:s32[3]": "f:5:9: operand y of requant has element type s32\n  hint: it must be s8 or s16",
    LAYER + "fill %0x0": "f:5:10: '%0x0' lacks its type\n  hint: write %0x0:DTYPE[SIZES], such as %0x0:s8[16,64]",
    LAYER + "fill %0x0:s8[1,1,1,1,1,1,1,1,1]": "f:5:14: more than 8 sizes\n  hint: a tile has at most 8 dimensions",
    LAYER + "fill %0x0:s8[0]": "f:5:14: a size is '0'\n  hint: expected a whole number from 1 to 2**48 - 1",
    LAYER + "fill %0x0:s8[9,99999999999999999999]": "f:5:16: a size is '99999999999999999999'\n  hint: expected a whole number from 1 to 2**48 - 1",
    LAYER + "fill %0x0:s8[99999999,99999999]": "f:5:11: 's8[99999999,99999999]' has 2**48 elements or more\n  hint: no memory is that large",
    LAYER + "fill %-4:s8[3]": "f:5:7: the address in '%-4' is not a number\n  hint: write it as 0x1f00 or in decimals; it cannot be negative",
    LAYER + "fill %0x4*i:s8[3]": "f:5:10: '*i' after the address\n  hint: a step is written +0x40*i or -0x40*i, one per loop variable",
    LAYER + "fill %0x4+0x4*i:s8[3]": "f:5:15: loop variable 'i' is not in scope\n  hint: there is no loop around this line",
    LAYER + "loop 2\nfill %0x4+0x4*j:s8[3]": "f:6:15: loop variable 'j' is not in scope\n  hint: the loop variables here are i",
    LAYER + "loop 2\nfill %0x4+0x4*i+0x4*i:s8[3]": (
        "f:6:21: 'i' stands twice in '%0x4+0x4*i+0x4*i'\n  hint: loop variables are i, j, k, l, m, n, o, p, the outermost loop first"
    ),
    LAYER + "loop 2\nfill %0x4+0x4*z:s8[3]": (
        "f:6:15: 'z' is not a loop variable in '%0x4+0x4*z'\n  hint: loop variables are i, j, k, l, m, n, o, p, the outermost loop first"
    ),
    LAYER + "loop 2": "f:5:1: this loop has no end\n  hint: close it with a line: end",
    LAYER + "end": "f:5:1: end without loop\n  hint: remove it, or open the loop with a line: loop COUNT",
    LAYER + "loop 0": "f:5:6: the loop count is '0'\n  hint: expected a whole number from 1 to 2**48 - 1",
    LAYER + "loop 1000001": "f:5:6: the loop count is 1000001\n  hint: at most 1000000",
    LAYER + "loop 1000000\nloop 6\nfill %0x0:s8[3]": (
        "f:7:1: the program executes more than 2000000 instructions\n  hint: use larger tiles or fewer iterations"
    ),
    LAYER + "loop 1\n" * 9: "f:13:1: loops are nested more than 8 deep\n  hint: merge some of them",
    LAYER + "fill %0x0:s8[3] valu=3": "f:5:17: fill has no attribute 'valu'\n  hint: did you mean 'value'?",
    LAYER + "fill %0x0:s8[3] wiat=ld.0": ("f:5:17: fill has no attribute 'wiat'\n  hint: did you mean 'wait'?"),
    LAYER + "fill %0x0:s8[3] value=abc": "f:5:23: value is 'abc'\n  hint: expected a float such as 0.5, 1e-05, inf or nan",
    LAYER + "fill %0x0:s8[3] value=1e99": "f:5:23: value is '1e99'\n  hint: expected a number within float32's range, or inf",
    LAYER + "fill %0x0:s8[3] value=1 value=2": (
        "f:5:25: value stands twice\n  hint: keep one of them; several events are separated by commas: wait=ld.0,vec.0"
    ),
    LAYER + "maxpool %0x0:s8[7,8,4], %0x800:s8[7,8,4] kernel=3": "f:5:49: kernel has 1 value\n  hint: expected 2: kernel=0,0",
    LAYER + "add %0x0:s8[4], %0x4:s8[4] qa=0.5": "f:5:31: qa has 1 value\n  hint: expected 2: qa=scale,zero",
    LAYER + "add %0x0:s8[4], %0x4:s8[4] qa=0.5,x": "f:5:35: the zero point of qa is 'x'\n  hint: expected a whole number such as 64, -3 or 0x40",
    LAYER + "cmp %0x0:u8[3], %0x4:s8[3] op=lte": "f:5:31: op is 'lte'\n  hint: did you mean 'lt'?",
    LAYER + "fill %0x0:s8[3] wait=foo.1": (
        "f:5:22: unknown queue in event 'foo.1'\n  hint: write QUEUE.NUMBER, such as ld.0; known: ld, mm, vec, st, host"
    ),
    LAYER + "fill %0x0:s8[3] wait=ld": "f:5:25: the number of event 'ld' is ''\n  hint: expected a whole number such as 64, -3 or 0x40",
    LAYER + "fill %0x0:s8[3] wait=mm.0,ld.256": (
        "f:5:27: event 'ld.256' is out of range\n  hint: events are numbered 0 to 255 between each pair of queues"
    ),
    LAYER + "é": "f:5:1: 'é' cannot start a line\n  hint: a line is a directive such as .layer, an instruction such as ld, a loop, or end",
    HEADER + '.layer "a" conv nodes=x': (
        'f:4:23: \'x\' is not a list of strings\n  hint: expected strings in double quotes, such as "Conv_1","Relu_2"'
    ),
    HEADER + '.layer "a\\q" x': 'f:4:10: \'"a\\\\q"\' is not a string\n  hint: expected double quotes, with \\" \\\\ \\n \\u0041 as the escapes',
}


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: text.removeprefix(LAYER).removeprefix(HEADER)[:40] or "empty")
def test_mistakes_are_explained(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_program(text, file="f")
    assert str(caught.value) == ERRORS[text]


def test_all_mistakes_are_told_at_once() -> None:
    """In the order of the text, and none that only follows from another: a layer or loop that can't be read is still one."""
    text = (
        '.npu 2\n.sorce "x"\n.target edge rws=3\n.memory dram=x\n.layer "a test\n  loop x\n    ld %0x0+0x8*i:s8[8], @0x0:s8[8] sginal=mm.0\n'
        "    ld %0x0+0x8*i:s8[8], @0x0:s8[8] signal=mm.0\n    fil %0x0:s8[8]\n  end\n"
    )
    found = mistakes(text, file="f")
    assert [error.line for error in found] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert all(error.column and error.hint for error in found)
    assert mistakes(CANONICAL) == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_text_never_crashes(data: st.DataObject) -> None:
    """Any text is read or refused with a ParseError."""
    position = data.draw(st.integers(0, len(CANONICAL)))
    length, inserted = data.draw(st.integers(0, 30)), data.draw(st.text(max_size=6))
    text = CANONICAL[:position] + inserted + CANONICAL[position + length :]
    try:
        program = parse_program(text)
    except ParseError:
        return
    assert parse_program(format_program(program)) == program


def test_long_texts_keep_their_line_numbers() -> None:
    """The text is read in pieces; loops and positions go across them."""
    lines = ["loop 2", *["  fill %0x0+0x4*i:s8[4] ; a comment that makes the line longer", ""] * 5000, "end", "oops"]
    with pytest.raises(ParseError, match=r"10007:1: unknown instruction 'oops'"):
        parse_program(LAYER + "\n".join(lines))
    (loop,) = parse_program(LAYER + "\n".join(lines[:-1])).layers[0].body
    assert isinstance(loop, Loop)
    assert [item.line for item in loop.body] == list(range(6, 10_006, 2))


def test_size_is_bounded() -> None:
    with pytest.raises(ParseError, match="too many to read"):
        parse_program("\n" * 200_000)
    with pytest.raises(ParseError, match="the line has 70000 characters"):
        parse_program(".npu 1\n;" + "x" * 69_999)


def test_six_thousand_lines_are_read_quickly() -> None:
    body = "".join(
        f"  conv $0x{k:x}:s32[14,56,64], %0x{k:x}:s8[16,58,64], %0x8{k:04x}:s8[3,3,64,64], %0x9{k:04x}:s32[64] pad=1,1,0,1 wait=ld.0 signal=vec.0\n"
        for k in range(6000)
    )
    parse_program(LAYER)
    start = time.process_time()
    assert len(parse_program(LAYER + body).layers[0].body) == 6000
    assert time.process_time() - start < 1.5
