"""One remark of the static checker: where, what is wrong, what to do."""

from __future__ import annotations

from dataclasses import dataclass

from isa.program import Instruction
from isa.spec import SPEC
from isa.text import format_instruction


@dataclass(frozen=True, slots=True)
class Finding:
    """`line` counts from 1 in the text that the program was parsed from; 0 means that it has no line of its own."""

    line: int
    column: int
    message: str
    hint: str

    def __str__(self) -> str:
        return (f"{self.line}: " if self.line else "") + self.message + (f"\n  hint: {self.hint}" if self.hint else "")


def finding(instruction: Instruction, message: str, hint: str) -> Finding:
    """A finding at an instruction; one that was built in Python has no line and is quoted instead."""
    if not instruction.line and instruction.name in SPEC:
        message = f"`{' '.join(format_instruction(instruction).split())}`: {message}"
    return Finding(instruction.line, 0, message, hint)
