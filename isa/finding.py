"""One remark of the static checker: where, what is wrong, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from isa.program import Instruction
from isa.spec import SPEC
from isa.text import format_instruction


@dataclass(frozen=True, slots=True)
class Finding:
    """`line` and `column` count from 1 in the text that the program was parsed from; 0 means that it has none of its own."""

    line: int
    column: int
    message: str
    hint: str

    def __str__(self) -> str:
        place = ":".join(str(number) for number in (self.line, self.column) if number)
        return (f"{place}: " if place else "") + self.message + (f"\n  hint: {self.hint}" if self.hint else "")


def finding(instruction: Instruction, message: str, hint: str) -> Finding:
    """A finding at an instruction; one that was built in Python has no line and is quoted instead."""
    if not instruction.line and instruction.name in SPEC:
        message = f"`{' '.join(format_instruction(instruction).split())}`: {message}"
    return Finding(instruction.line, 0, message, hint)


def with_columns(findings: Iterable[Finding], text: str) -> list[Finding]:
    """The findings with a column each: that of the first operand or attribute of its line that the message names, else of the instruction."""
    lines = text.split("\n")
    return [replace(each, column=_column(lines[each.line - 1], each.message)) if each.line and not each.column else each for each in findings]


def _column(line: str, message: str) -> int:
    instruction, *words = re.finditer(r"[^\s,]+", line)
    names = ((word, re.escape(re.split("[:=]", word[0])[0])) for word in words)
    named = (word for word, name in names if re.search(rf"(?<![\w.]){name}(?!\w)", message))
    return next(named, instruction).start() + 1
