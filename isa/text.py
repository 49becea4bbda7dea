"""npuasm, the text form: `parse_program` and `format_program`, each the inverse of the other.

The one big idea: the grammar (`grammar.lark`) knows lines and tokens only; names, counts and kinds come from the table in `isa.spec`,
so that an error can name what the table would have taken, with its line and column.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from isa import tokens
from isa.errors import ParseError, TargetError
from isa.program import LOOP_VARIABLES, Event, Instruction, Layer, Loop, Program, TensorRecord, Tile, Value
from isa.signature import operand_count_fault, operand_fault, packing_fault
from isa.spec import SPEC, InstructionSpec
from isa.target import Target, target_from_fields
from isa.tokens import TokenError, did_you_mean, quoted

VERSION = 1
MAXIMUM_TEXT = 64 << 20  # characters
MAXIMUM_LINES = 200_000
MAXIMUM_LINE = 1 << 16  # characters
CHUNK = 1 << 16  # characters that are read at once, at least
MAXIMUM_LOOP_COUNT = 1_000_000
MAXIMUM_DYNAMIC = 2_000_000  # instructions after unrolling
OUTSIDE_DTYPES = (
    "float32", "float16", "float64", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
)  # fmt: skip
DIRECTIVES = {".npu": "VERSION", ".source": "SOURCE", ".target": "TARGET", ".memory": "MEMORY",
              ".input": "INPUT", ".output": "OUTPUT", ".tensor": "TENSOR", ".layer": "LAYER"}  # fmt: skip
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


#: after so many mistakes `mistakes` looks no further
SHOWN_MISTAKES = 20


def parse_program(text: str, *, file: str = "") -> Program:
    """Read a whole program. Raises ParseError at the first mistake, with its line and column."""
    _bound_size(text, file)
    reader = _Reader(file)
    for above, chunk in _chunks(text):
        try:
            tree = _grammar().parse(chunk)
        except UnexpectedInput as error:
            raise _syntax_error(error, chunk, file, above) from None
        reader.read(tree, above)
    return reader.program()


def mistakes(text: str, *, file: str = "") -> list[ParseError]:
    """What `parse_program` would say line after line, were the lines with mistakes left out. Ends where what follows depends on the line."""
    lines, found = text.split("\n"), list[ParseError]()
    while len(found) < SHOWN_MISTAKES:
        try:
            parse_program("\n".join(lines), file=file)
        except ParseError as error:
            found.append(error)
            line = lines[error.line - 1].strip() if error.line else ""
            if not line or line.startswith(".") or line.split()[0] in ("loop", "end"):
                break
            lines[error.line - 1] = ""
        else:
            break
    return found


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
        message, hint = _unknown_instruction(before[0])
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


def _unknown_instruction(mnemonic: str) -> tuple[str, str]:
    return f"unknown instruction {quoted(mnemonic)}", did_you_mean(mnemonic, [*SPEC, "loop", "end"])


class _Block:
    """A layer or loop whose lines are still being read."""

    __slots__ = ("body", "column", "fields", "line", "repeats")

    def __init__(self, line: int, column: int, fields: dict[str, Any], repeats: int):
        self.line, self.column, self.fields, self.repeats = line, column, fields, repeats
        self.body: list[Instruction | Loop] = []


class _Reader:
    """Assembles the lines of one text. `blocks` is the open layer and its open loops."""

    def __init__(self, file: str):
        self.file = file
        self.above = 0  # lines of the text above those that are being read
        self.header: dict[str, Any] = {}
        self.names: set[tuple[str, str]] = set()
        self.records: dict[str, list[TensorRecord]] = {".input": [], ".output": [], ".tensor": []}
        self.layers: list[Layer] = []
        self.blocks: list[_Block] = []
        self.dynamic = 0

    def read(self, tree: Tree[Token], above: int) -> None:
        """Take in some lines; `above` is the number of lines before them."""
        self.above = above
        handlers: dict[str, Callable[[list[Token]], None]] = {
            rule: getattr(self, f"read_{rule}") for rule in ("version", "source", "target", "memory", "tensor", "layer", "loop", "end", "instruction")
        }
        for line in tree.children:
            assert isinstance(line, Tree)
            try:
                handlers[line.data](line.children)  # type: ignore[arg-type]
            except TargetError as error:
                self.fail(line.children[0], error.message, error.hint)  # type: ignore[arg-type]

    def program(self) -> Program:
        """The program, after its last line."""
        self.close_layer()
        for directive, example in ((".npu", ".npu 1"), (".target", ".target edge"), (".memory", ".memory dram=0x1000 constants=0x0+0x400")):
            if directive not in self.header:
                raise ParseError(f"the program has no {directive} line", file=self.file, hint=f"begin with a line such as: {example}")
        address, size = self.header[".memory"]["constants"]
        return Program(
            target=self.header[".target"], inputs=tuple(self.records[".input"]), outputs=tuple(self.records[".output"]),
            tensors=tuple(self.records[".tensor"]), constants_address=address, constants_bytes=size,
            dram_bytes=self.header[".memory"]["dram"], layers=tuple(self.layers), source=self.header.get(".source", ""),
        )  # fmt: skip

    def fail(self, token: Token, message: str, hint: str = "", *, offset: int = 0) -> NoReturn:
        raise ParseError(message, file=self.file, line=self.line_of(token), column=(token.column or 0) + offset, hint=hint)

    def line_of(self, token: Token) -> int:
        """Its line in the whole text."""
        return self.above + (token.line or 0)

    # ── header ──

    def directive(self, token: Token) -> str:
        """Its name, if it may stand here: `.npu` first, one of each, all before the first layer."""
        name = str(token)
        if name in self.header:
            self.fail(token, f"a second {name} line", "keep one of them")
        if name != ".npu" and ".npu" not in self.header:
            self.fail(token, f"{name} before .npu", f"begin the text with: .npu {VERSION}")
        if self.blocks:
            self.fail(token, f"{name} after the first .layer", "move it above the layers")
        return name

    def read_version(self, children: list[Token]) -> None:
        name = self.directive(children[0])
        if children[1] != str(VERSION):
            self.fail(children[1], f"version {quoted(children[1])} of npuasm", f"this reader knows version {VERSION}")
        self.header[name] = VERSION

    def read_source(self, children: list[Token]) -> None:
        self.header[self.directive(children[0])] = self.decode(children[1], tokens.read_string)

    def read_target(self, children: list[Token]) -> None:
        name = self.directive(children[0])
        fields: dict[str, Any] = {"name": self.decode(children[1], tokens.read_word)}
        known = {field.name: str(field.type) for field in dataclasses.fields(Target)}
        for token in children[2:]:
            key, _, text = token.partition("=")
            if key not in known or key in fields:
                message = f"field {key!r} of .target stands twice" if key in fields else f"unknown field {quoted(key)} of .target"
                self.fail(token, message, "" if key in fields else did_you_mean(key, known))
            fields[key] = self.decode(token, lambda _, key=key, text=text: _read_field(key, text, known[key]))  # type: ignore[misc]
        self.header[name] = target_from_fields(fields, file=self.file)

    def read_memory(self, children: list[Token]) -> None:
        name = self.directive(children[0])
        fields = self.fields(children, {"dram": _read_size, "constants": _read_span}, required=("dram",))
        self.header[name] = {"constants": (0, 0), **fields}

    def read_tensor(self, children: list[Token]) -> None:
        directive = self.directive(children[0])
        name = self.decode(children[1], tokens.read_string)
        if (directive, name) in self.names:
            self.fail(children[1], f"a second {directive} named {quoted(name)}", "names are unique among each kind")
        self.names.add((directive, name))
        dtype, shape, strides = self.decode(children[2], tokens.read_type)
        space, address, steps = self.decode(children[3], tokens.read_place)
        if steps or space == "acc":
            self.fail(children[3], f"{directive} lies at {quoted(children[3])}", "give a plain address in dram (@) or spm (%)")
        readers = {"scale": _read_scale, "zero": _read_zero, "layer": _read_name, "type": _read_outside_dtype}
        fields = self.fields(children, readers, required=("scale", "zero"), first=4)
        self.records[directive].append(
            TensorRecord(
                name,
                Tile(space, address, dtype, shape, strides),
                fields["scale"],
                fields["zero"],
                fields.get("layer", ""),
                fields.get("type", "float32"),
            )
        )

    def fields(
        self, children: list[Token], readers: Mapping[str, Callable[[str, int], Any]], *, required: tuple[str, ...] = (), first: int = 1
    ) -> dict[str, Any]:
        """The `key=value` tokens of a directive, each by its reader; unknown, repeated and missing keys are errors."""
        values: dict[str, Any] = {}
        for token in children[first:]:
            key, _, text = token.partition("=")
            if key not in readers:
                self.fail(token, f"{children[0]} has no field {quoted(key)}", did_you_mean(key, readers))
            if key in values:
                self.fail(token, f"field {key!r} of {children[0]} stands twice", "keep one of them")
            values[key] = self.decode(token, lambda _, key=key, text=text: readers[key](text, len(key) + 1))  # type: ignore[misc]
        for key in required:
            if key not in values:
                self.fail(children[0], f"{children[0]} lacks {key}=", f"its fields are {', '.join(readers)}")
        return values

    def decode(self, token: Token, read: Callable[[str], Any]) -> Any:
        try:
            return read(str(token))
        except TokenError as fault:
            self.fail(token, fault.message, fault.hint, offset=fault.offset)

    # ── layers and loops ──

    def read_layer(self, children: list[Token]) -> None:
        if ".npu" not in self.header:
            self.fail(children[0], ".layer before .npu", f"begin the text with: .npu {VERSION}")
        self.close_layer()
        fields = self.fields(children, {"macs": _read_size, "nodes": _read_nodes}, first=3)
        name, op = self.decode(children[1], tokens.read_string), self.decode(children[2], tokens.read_word)
        self.blocks.append(_Block(self.line_of(children[0]), children[0].column or 0, {"name": name, "op": op, "nodes": (), "macs": 0, **fields}, 1))

    def close_layer(self) -> None:
        if len(self.blocks) > 1:
            open_loop = self.blocks[-1]
            raise ParseError("this loop has no end", file=self.file, line=open_loop.line, column=open_loop.column, hint="close it with a line: end")
        for block in self.blocks:
            self.layers.append(Layer(**block.fields, body=tuple(block.body), line=block.line))
        self.blocks = []

    def read_loop(self, children: list[Token]) -> None:
        self.require_layer(children[0])
        if len(self.blocks) > len(LOOP_VARIABLES):
            self.fail(children[0], f"loops are nested more than {len(LOOP_VARIABLES)} deep", "merge some of them")
        count = self.decode(children[1], lambda text: tokens.read_integer(text, "the loop count", low=1))
        if count > MAXIMUM_LOOP_COUNT:
            self.fail(children[1], f"the loop count is {count}", f"at most {MAXIMUM_LOOP_COUNT}")
        self.blocks.append(_Block(self.line_of(children[0]), children[0].column or 0, {"count": count}, self.blocks[-1].repeats * count))

    def read_end(self, children: list[Token]) -> None:
        if len(self.blocks) < 2:
            self.fail(children[0], "end without loop", "remove it, or open the loop with a line: loop COUNT")
        block = self.blocks.pop()
        self.blocks[-1].body.append(Loop(block.fields["count"], tuple(block.body), block.line))

    def require_layer(self, token: Token) -> None:
        if not self.blocks:
            self.fail(token, f"{quoted(str(token))} outside a layer", 'open one with a line: .layer "name" op macs=0')

    # ── instructions ──

    def read_instruction(self, children: list[Token]) -> None:
        mnemonic = children[0]
        spec = SPEC.get(mnemonic)
        if spec is None:
            self.fail(mnemonic, *_unknown_instruction(mnemonic))
        self.require_layer(mnemonic)
        self.dynamic += self.blocks[-1].repeats
        if self.dynamic > MAXIMUM_DYNAMIC:
            self.fail(mnemonic, f"the program executes more than {MAXIMUM_DYNAMIC} instructions", "use larger tiles or fewer iterations")
        count = 1
        while count < len(children) and children[count].type == "TILE":
            count += 1
        fault = operand_count_fault(spec, count - 1)
        if fault:
            self.fail(mnemonic, *fault)
        tiles = tuple([self.read_tile(spec, index, children[index + 1]) for index in range(count - 1)])
        attributes, waits, signals = self.read_attributes(spec, children[count:]) if count < len(children) else ((), (), ())
        self.blocks[-1].body.append(Instruction(spec.name, tiles, attributes, waits, signals, self.line_of(mnemonic)))

    def read_tile(self, spec: InstructionSpec, index: int, token: Token) -> Tile:
        try:
            tile = tokens.read_tile(str(token))
        except TokenError as fault:
            self.fail(token, fault.message, fault.hint, offset=fault.offset)
        depth = len(self.blocks) - 1
        if len(tile.steps) > depth:
            variable = LOOP_VARIABLES[len(tile.steps) - 1]
            scope = f"the loop variables here are {', '.join(LOOP_VARIABLES[:depth])}" if depth else "there is no loop around this line"
            self.fail(token, f"loop variable {variable!r} is not in scope", scope, offset=token.find(f"*{variable}") + 1)
        remark = operand_fault(spec.name, spec.operands[index], tile.space, tile.dtype) or packing_fault(spec.name, spec.operands[index], tile)
        if remark:
            self.fail(token, *remark)
        return tile

    def read_attributes(
        self, spec: InstructionSpec, children: list[Token]
    ) -> tuple[tuple[tuple[str, Value], ...], tuple[Event, ...], tuple[Event, ...]]:
        values: dict[str, Any] = {}
        for token in children:
            try:
                name, value = tokens.read_attribute(spec.name, str(token))
            except TokenError as fault:
                self.fail(token, fault.message, fault.hint, offset=fault.offset)
            if name in values:
                self.fail(token, f"{name} stands twice", "keep one of them; several events are separated by commas: wait=ld.0,vec.0")
            values[name] = value
        waits, signals = values.pop("wait", ()), values.pop("signal", ())
        kept = [
            (attribute.name, values[attribute.name])
            for attribute in (spec.attributes if values else ())
            if attribute.name in values and not tokens.is_default(values[attribute.name], attribute)
        ]
        return tuple(kept), waits, signals


def _read_size(text: str, offset: int) -> int:
    return tokens.read_integer(text, "the number", offset=offset, low=0)


def _read_span(text: str, offset: int) -> tuple[int, int]:
    address, plus, size = text.partition("+")
    if not plus:
        raise TokenError(offset, f"{quoted(text)} is not ADDRESS+SIZE", "write it as constants=0x400000+0x2f000")
    return tokens.read_integer(address, "the address", offset=offset, low=0), tokens.read_integer(
        size, "the size", offset=offset + len(address) + 1, low=0
    )


def _read_scale(text: str, offset: int) -> float:
    return tokens.read_float32(text, "scale", offset=offset)


def _read_zero(text: str, offset: int) -> int:
    return tokens.read_integer(text, "zero", offset=offset)


def _read_name(text: str, offset: int) -> str:
    return tokens.read_string(text, offset=offset)


def _read_nodes(text: str, offset: int) -> tuple[str, ...]:
    return tokens.read_strings(text, offset=offset)


def _read_outside_dtype(text: str, offset: int) -> str:
    if text not in OUTSIDE_DTYPES:
        raise TokenError(offset, f"unknown outside type {quoted(text)}", did_you_mean(text, OUTSIDE_DTYPES))
    return text


def _read_field(key: str, text: str, kind: str) -> int | float | str | bool:
    """A Target field, by the type that the dataclass declares."""
    offset = len(key) + 1
    if kind == "bool":
        if text not in ("true", "false"):
            raise TokenError(offset, f"{key} is {quoted(text)}", "expected true or false")
        return text == "true"
    if kind == "int":
        return tokens.read_integer(text, key, offset=offset)
    if kind == "str":
        return tokens.read_word(text, offset=offset)
    tokens.read_float32(text, key, offset=offset)
    return float(text)


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
