"""npuasm, the text form: `parse_program` and `format_program`, each the inverse of the other.

The one big idea: the grammar (`grammar.lark`) knows lines and tokens only; names, counts and kinds come from the table in `isa.spec`
(`reader.py`). Lines stand alone, so a text is read chunk by chunk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lark import Lark
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from isa import tokens
from isa.errors import ParseError
from isa.program import Instruction, Layer, Loop, Program, TensorRecord
from isa.reader import VERSION, Reader, unknown_instruction
from isa.spec import SPEC
from isa.target import Target
from isa.tokens import did_you_mean, nearest, quoted

MAXIMUM_TEXT = 64 << 20  # characters
MAXIMUM_LINES = 200_000
MAXIMUM_LINE = 1 << 16  # characters
CHUNK = 1 << 16  # characters that are read at once, at least
SHOWN_MISTAKES = 20  # after so many `mistakes` looks no further
DIRECTIVES = {".npu": "VERSION", ".source": "SOURCE", ".target": "TARGET", ".memory": "MEMORY",
              ".input": "INPUT", ".output": "OUTPUT", ".tensor": "TENSOR", ".layer": "LAYER"}  # fmt: skip
#: what `mistakes` puts in place of a line that others depend on
STAND_INS = {".npu": f".npu {VERSION}", ".target": ".target edge", ".memory": ".memory dram=0x0", ".layer": '.layer "" any', "loop": "loop 1"}
#: terminal of the grammar → what to call it in a message
TERMINALS = {
    "NUMBER": "a number", "STRING": "a string in double quotes", "NAME": "a name", "TILE": "a tile such as %0x0:s8[16,64]",
    "TYPE": "a type such as s8[1,3,32,32]", "ADDRESS": "an address such as @0x4000", "ATTRIBUTE": "an attribute such as pad=1,1,1,1",
    "COMMA": "a comma", "_NEWLINE": "the end of the line", "LOOP": "'loop'", "END": "'end'",
}  # fmt: skip
_VISIBLE = re.compile(r"\"[^\"\n]*\"?|[^\s;]+")


@cache
def _grammar() -> Lark:
    text = (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8")
    return Lark(text, parser="lalr", lexer="contextual", maybe_placeholders=False, keep_all_tokens=False)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_program(text: str, *, file: str = "") -> Program:
    """Read a whole program. Raises ParseError at the first mistake, with its line and column."""
    _bound_size(text, file)
    reader = Reader(file)
    for above, chunk in _chunks(text):
        try:
            tree = _grammar().parse(chunk)
        except UnexpectedInput as error:
            raise _syntax_error(error, chunk, file, above) from None
        reader.read(tree, above)
    return reader.program()


def mistakes(text: str, *, file: str = "") -> list[ParseError]:
    """What `parse_program` would say line after line, were the lines with mistakes right. Ends where it can't be known what was meant."""
    lines, found, seen = text.split("\n"), list[ParseError](), set[int]()
    while len(found) < SHOWN_MISTAKES:
        try:
            parse_program("\n".join(lines), file=file)
        except ParseError as error:
            found.append(error)
            word = lines[error.line - 1].split()[0] if error.line and lines[error.line - 1].strip() else ""
            if word.startswith("."):
                word = nearest(word, DIRECTIVES)
            if not word or error.line in seen:
                break
            seen.add(error.line)
            lines[error.line - 1] = STAND_INS.get(word, "")
        else:
            break
    return sorted(found, key=lambda error: error.line)


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """(number of lines above, some whole lines): each line stands alone, so a mistake is met before all of a huge text is in memory."""
    lines = text.split("\n")
    first = size = 0
    for number, line in enumerate(lines):
        size += len(line)
        if size > CHUNK or number == len(lines) - 1:
            yield first, "\n".join(lines[first : number + 1])
            first, size = number + 1, 0


def _bound_size(text: str, file: str) -> None:
    if len(text) > MAXIMUM_TEXT or text.count("\n") >= MAXIMUM_LINES:
        raise ParseError(
            f"the text has {len(text)} characters in {text.count(chr(10)) + 1} lines, too many to read",
            file=file, hint=f"at most {MAXIMUM_TEXT} characters and {MAXIMUM_LINES} lines; use loops",
        )  # fmt: skip
    if len(text) > MAXIMUM_LINE:
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > MAXIMUM_LINE:
                raise ParseError(f"the line has {len(line)} characters", file=file, line=number, hint=f"a line has at most {MAXIMUM_LINE} characters")


def _syntax_error(error: UnexpectedInput, text: str, file: str, above: int) -> ParseError:
    """Say what stands there and what the grammar would have taken."""
    given: int | None = error.pos_in_stream  # None or -1 at the end of the text
    position = len(text) if given is None or given < 0 else given
    line, column = text.count("\n", 0, position) + 1, position - (text.rfind("\n", 0, position) + 1) + 1
    expected: set[str] = set()
    if isinstance(error, UnexpectedToken):
        expected = set(error.accepts or error.expected)
        if error.token.type == "$END":
            line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
            position = len(text)
    elif isinstance(error, UnexpectedCharacters):
        expected = set(error.allowed or ())
    match = _VISIBLE.match(text, position)
    found = match[0] if match else ""
    before = text[position - column + 1 : position].split()
    if before and before[0].isidentifier() and before[0] not in (*SPEC, "loop", "end"):
        column = text[position - column + 1 : position].index(before[0]) + 1
        message, hint = unknown_instruction(before[0])
    else:
        message, hint = _describe_syntax(found, expected, starts_line=not before)
    return ParseError(message, file=file, line=above + line, column=column, hint=hint)


def _describe_syntax(found: str, expected: set[str], *, starts_line: bool) -> tuple[str, str]:
    if starts_line and found.startswith("."):
        return f"unknown directive {quoted(found)}", did_you_mean(found, DIRECTIVES)
    if starts_line and found:
        return f"{quoted(found)} cannot start a line", "a line is a directive such as .layer, an instruction such as ld, a loop, or end"
    if found.startswith('"') and not (len(found) > 1 and found.endswith('"')):
        return f"the string {quoted(found)} is not closed", 'end it with a double quote on the same line; write a quote inside as \\"'
    names = sorted(TERMINALS.get(name, name) for name in expected if name not in ("COMMENT", "SPACE", "$END"))
    return f"{quoted(found) if found else 'the end of the line'} is out of place", f"expected {' or '.join(names)}" if names else "remove it"


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

EVENT_COLUMN = 96


def format_program(program: Program) -> str:
    """The text of a program; `parse_program` of it gives an equal program."""
    return "\n".join((*_format_header(program), *(line for layer in program.layers for line in _format_layer(layer)), ""))


def _format_header(program: Program) -> Iterator[str]:
    yield f".npu {VERSION}"
    if program.source:
        yield f".source {tokens.print_string(program.source)}"
    yield " ".join((".target", tokens.print_word(program.target.name), *_format_target_fields(program.target)))
    yield (
        f".memory dram={tokens.print_address(program.dram_bytes)} "
        f"constants={tokens.print_address(program.constants_address)}+{tokens.print_address(program.constants_bytes)}"
    )
    for directive, records in ((".input ", program.inputs), (".output", program.outputs), (".tensor", program.tensors)):
        for record in records:
            yield f"{directive} {_format_record(record, outside=directive != '.tensor')}"


def _format_target_fields(target: Target) -> Iterator[str]:
    for field in dataclasses.fields(Target):
        value = getattr(target, field.name)
        if field.name == "name" or value == field.default:
            continue
        if isinstance(value, bool):
            yield f"{field.name}={str(value).lower()}"
        else:
            yield f"{field.name}={tokens.print_word(value) if isinstance(value, str) else repr(value)}"


def _format_record(record: TensorRecord, *, outside: bool) -> str:
    text = f"{tokens.print_string(record.name)} {tokens.print_type(record.tile)} {tokens.print_place(record.tile)}"
    text += f" scale={tokens.print_float32(record.scale)} zero={record.zero}"
    if record.layer:
        text += f" layer={tokens.print_string(record.layer)}"
    return text + (f" type={record.dtype}" if outside or record.dtype != "float32" else "")


def _format_layer(layer: Layer) -> Iterator[str]:
    nodes = f" nodes={','.join(map(tokens.print_string, layer.nodes))}" if layer.nodes else ""
    yield ""
    yield f".layer {tokens.print_string(layer.name)} {tokens.print_word(layer.op)} macs={layer.macs}{nodes}"
    yield from _format_body(layer.body, "  ")


def _format_body(body: tuple[Instruction | Loop, ...], indent: str) -> Iterator[str]:
    for item in body:
        if isinstance(item, Loop):
            yield f"{indent}loop {item.count}"
            yield from _format_body(item.body, indent + "  ")
            yield f"{indent}end"
        else:
            yield indent + format_instruction(item, width=EVENT_COLUMN - len(indent))


def format_instruction(instruction: Instruction, *, width: int = 0) -> str:
    """One instruction as a line; its events start at column `width` where there is room."""
    text = f"{instruction.name:<7} {', '.join(map(tokens.print_tile, instruction.tiles))}".rstrip()
    spec, values = SPEC[instruction.name], dict(instruction.attributes)
    for attribute in spec.attributes:
        if attribute.name in values and not tokens.is_default(values[attribute.name], attribute):
            text += f" {attribute.name}={tokens.print_value(values[attribute.name])}"
    events = [f"{key}={tokens.print_events(given)}" for key, given in (("wait", instruction.waits), ("signal", instruction.signals)) if given]
    return " ".join((text.ljust(width - 1), *events)) if events else text
