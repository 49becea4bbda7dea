"""The lines of a program's text, one after the other, become its layers, loops, instructions and records.

The one big idea: a line is read by the record of the instruction table that it names, so each fault can say what the table would have
taken, with line and column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lark import Token, Tree

from isa import tokens
from isa.errors import ParseError, TargetError
from isa.program import LOOP_VARIABLES, Event, Instruction, Layer, Loop, Program, TensorRecord, Tile, Value
from isa.signature import operand_count_fault, operand_fault, packing_fault
from isa.spec import OUTSIDE_TYPES, SPEC, InstructionSpec
from isa.target import Target, target_from_fields
from isa.tokens import TokenError, did_you_mean, quoted

VERSION = 1
MAXIMUM_LOOP_COUNT = 1_000_000
MAXIMUM_DYNAMIC = 2_000_000  # instructions after unrolling


class Block:
    """A layer or loop whose lines are still being read."""

    __slots__ = ("body", "column", "fields", "line", "repeats")

    def __init__(self, line: int, column: int, fields: dict[str, Any], repeats: int):
        self.line, self.column, self.fields, self.repeats = line, column, fields, repeats
        self.body: list[Instruction | Loop] = []


class Reader:
    """Assembles the lines of one text. `blocks` is the open layer and its open loops."""

    def __init__(self, file: str):
        self.file = file
        self.above = 0  # lines of the text above those that are being read
        self.header: dict[str, Any] = {}
        self.names: set[tuple[str, str]] = set()
        self.records: dict[str, list[TensorRecord]] = {".input": [], ".output": [], ".tensor": []}
        self.layers: list[Layer] = []
        self.blocks: list[Block] = []
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
        self.blocks.append(Block(self.line_of(children[0]), children[0].column or 0, {"name": name, "op": op, "nodes": (), "macs": 0, **fields}, 1))

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
        self.blocks.append(Block(self.line_of(children[0]), children[0].column or 0, {"count": count}, self.blocks[-1].repeats * count))

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
            self.fail(mnemonic, *unknown_instruction(mnemonic))
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
    scale = tokens.read_float32(text, "scale", offset=offset)
    if not 0 < scale < math.inf:
        raise TokenError(offset, f"scale is {quoted(text)}", "expected a number above 0: what one step of the stored integers is worth")
    return scale


def _read_zero(text: str, offset: int) -> int:
    return tokens.read_integer(text, "zero", offset=offset)


def _read_name(text: str, offset: int) -> str:
    return tokens.read_string(text, offset=offset)


def _read_nodes(text: str, offset: int) -> tuple[str, ...]:
    return tokens.read_strings(text, offset=offset)


def _read_outside_dtype(text: str, offset: int) -> str:
    if text not in OUTSIDE_TYPES:
        raise TokenError(offset, f"unknown outside type {quoted(text)}", did_you_mean(text, OUTSIDE_TYPES))
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


def unknown_instruction(mnemonic: str) -> tuple[str, str]:
    """Message and hint."""
    return f"unknown instruction {quoted(mnemonic)}", did_you_mean(mnemonic, [*SPEC, "loop", "end"])
