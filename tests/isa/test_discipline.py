"""Wrong addresses leave marks in programs that the checker passes; right programs have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from isa import parse_program
from isa.discipline import suspicions
from tests.isa.test_check import found

EXAMPLE = (Path(__file__).parents[2] / "examples" / "matmul.npuasm").read_text(encoding="utf-8")
HEADER = (
    ".npu 1\n.target t spm_bytes=4096 acc_bytes=1024 dram_bytes=65536\n.memory dram=0x1000 constants=0x800+{size}\n"
    '.output "y" s8[8] @0x0 scale=1 zero=0\n.layer "a" test macs=0\n'  # bodies begin on line 6
)
LOAD = "ld %0x0:s8[0x40], @0x800:s8[0x40] signal=vec.0\n"
STORE = "st @0x0:s8[8], %0x200:s8[8] wait=vec.0\n"
NEXT = "compare the address and the strides with those of the neighbouring lines"

CLEAN = {
    "a background that is written over in part": LOAD + "fill %0x200:s8[8]\nadd %0x202:s8[4], %0x0:s8[4] wait=ld.0 signal=st.0\n" + STORE,
    "a value made of several": LOAD + "add %0x200:s8[4], %0x0:s8[4] wait=ld.0\nadd %0x204:s8[4], %0x4:s8[4] signal=st.0\n" + STORE,
    "a value that replaces another": LOAD
    + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0\nadd %0x200:s8[8], %0x200:s8[8], %0x8:s8[8] signal=st.0\n"
    + STORE,
    "the columns of a matrix of constants, some at a time": "ld %0x0:s8[8,16], @0x800:s8[8,16]{32,1}\n"
    "ld %0x80:s8[8,16], @0x810:s8[8,16]{32,1} signal=vec.0\nadd %0x200:s8[8], %0x0:s8[8], %0x80:s8[8] wait=ld.0 signal=st.0\n" + STORE,
}
WRONG = {
    "the rest of an older value": (
        LOAD + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0\ncvt %0x300:s8[8], %0x200:s8[8]\nadd %0x201:s8[8], %0x300:s8[8] signal=st.0\n" + STORE,
        ["10: st reads %0x200, where the rest of a partly overwritten value is left"],
    ),
    "nobody reads it": (
        LOAD + "add %0x300:s8[8], %0x0:s8[8] wait=ld.0\nadd %0x200:s8[8], %0x0:s8[8] signal=st.0\n" + STORE,
        ["7: add writes %0x300, but nobody reads it"],
    ),
    "gone before it was read": (
        LOAD + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0\nadd %0x200:s8[8], %0x8:s8[8] signal=st.0\n" + STORE,
        ["7: add writes %0x200, but nobody reads it"],
    ),
    "differently made": (
        LOAD + "add %0x40:s8[8], %0x0:s8[8] wait=ld.0\nadd %0x200:s8[8], %0x3c:s8[8] signal=st.0\n" + STORE,
        ["8: add reads %0x3c across bytes that were made differently (ld s8 constant and vec s8)"],
    ),
    "the middle of a block": (
        "ld %0x0:s8[0x80], @0x800:s8[0x80]\nld %0x80:s8[0x81], @0x87f:s8[0x81] signal=vec.0\n"
        "add %0x200:s8[8], %0x0:s8[8], %0x80:s8[8] wait=ld.0 signal=st.0\n" + STORE,
        ["7: ld loads constants from 0x87f, in the middle of a block that another line loads"],
    ),
    "the middle of a block on the chip": (
        LOAD + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0\nadd %0x200:s8[8], %0x200:s8[8], %0x4:s8[8] signal=st.0\n" + STORE,
        ["8: add reads constants from 0x804, in the middle of a block that another line reads"],
    ),
    "a block on the chip that nobody reads": (
        LOAD.replace("0x40", "0x100") + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0 signal=st.0\n" + STORE,
        ["7: nobody reads the constants from 0x808 to 0x900, just after those that this line reads"],
    ),
    "an output of two writers": (
        LOAD + "add %0x200:s8[8], %0x0:s8[8] wait=ld.0 signal=st.0\n" + STORE + "st @0x4:s8[8], %0x200:s8[8]\n",
        ["9: the caller reads output 'y', where the rest of a partly overwritten value is left"],
    ),
    "constants that nobody loads": (
        "ld %0x0:s8[0x80], @0x840:s8[0x80] signal=vec.0\nadd %0x200:s8[8], %0x0:s8[8] wait=ld.0 signal=st.0\n" + STORE,
        [
            "6: nobody loads the constants from 0x800 to 0x840, just before those that this line loads",
        ],
    ),
    "constants that nobody loads, at the end": (
        "ld %0x0:s8[0x80], @0x800:s8[0x80] signal=vec.0\nadd %0x200:s8[8], %0x0:s8[8] wait=ld.0 signal=st.0\n" + STORE,
        ["6: nobody loads the constants from 0x880 to 0x900, just after those that this line loads"],
    ),
}


def whole(body: str) -> str:
    """The text of a program, with as many constants as it loads."""
    return HEADER.format(size="0x40" if LOAD in body else "0x100") + body


@pytest.mark.parametrize("name", CLEAN)
def test_right_programs_have_no_marks(name: str) -> None:
    assert found(whole(CLEAN[name])) == []
    assert suspicions(parse_program(whole(CLEAN[name]))) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_addresses_leave_marks(name: str) -> None:
    text, messages = WRONG[name]
    assert found(whole(text)) == []
    assert [str(each) for each in suspicions(parse_program(whole(text)))] == [f"{message}\n  hint: {NEXT}" for message in messages]


def test_the_hand_written_example_has_no_marks() -> None:
    assert suspicions(parse_program(EXAMPLE)) == []
