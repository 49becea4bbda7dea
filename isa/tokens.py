"""One token of npuasm to the value it spells and back: tiles, attribute values, events, strings.

The one big idea: reading and printing of each kind stand side by side, and what one prints the other reads as the same value.
Mistakes are raised as `TokenError`, whose offset counts characters from the start of the token; `isa.reader` turns them into a ParseError.
"""

from __future__ import annotations

import difflib
import json
import re
import struct
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from isa.packing import FORMATS, Packing, packing_remarks
from isa.program import DTYPES, LOOP_VARIABLES, QUEUES, SPACES, Event, Tile, Value, dense_strides
from isa.spec import SPEC, Attribute, InstructionSpec

INTEGER_LIMIT = 1 << 48
MAXIMUM_DIMENSIONS = 8
MAXIMUM_EVENT = 255
MAXIMUM_EVENTS = 64

SPACE_OF_MARK = {mark: space for space, mark in SPACES.items()}
_INTEGER = re.compile(r"[+-]?(?:0x[0-9a-fA-F]+|[0-9]+)\Z")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|nan)\Z")
_STEP = re.compile(r"([+-])(0x[0-9a-fA-F]+|[0-9]+)\*([a-z])")
_PLACE = re.compile(r"([@%$])(0x[0-9a-fA-F]+|[0-9]+)((?:[+-](?:0x[0-9a-fA-F]+|[0-9]+)\*[a-z])*)\Z")
_TYPE = re.compile(r"([A-Za-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?\Z")
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*\Z")


class TokenError(Exception):
    """A mistake inside one token."""

    def __init__(self, offset: int, message: str, hint: str = ""):
        super().__init__(message)
        self.offset, self.message, self.hint = offset, message, hint


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """`did you mean 'conv'?` when something known is near, else the list of what is known."""
    known = list(known)
    near = nearest(found, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"


def nearest(found: str, known: Iterable[str]) -> str:
    """What was probably meant; "" when nothing known is near."""
    return next(iter(difflib.get_close_matches(found[:64], known, n=1)), "")


def quoted(found: str) -> str:
    """What was found, short enough for a message."""
    return repr(str(found) if len(found) <= 60 else found[:57] + "...")


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_integer(text: str, what: str, *, offset: int = 0, low: int = 1 - INTEGER_LIMIT) -> int:
    """A decimal or 0x number in [low, 2**48)."""
    if not _INTEGER.match(text):
        raise TokenError(offset, f"{what} is {quoted(text)}", "expected a whole number such as 64, -3 or 0x40")
    value = int(text, 16 if "0x" in text[:3] else 10) if len(text) < 40 else INTEGER_LIMIT
    if not low <= value < INTEGER_LIMIT:
        raise TokenError(offset, f"{what} is {quoted(text)}", f"expected a whole number from {low} to 2**48 - 1")
    return value


def read_float32(text: str, what: str, *, offset: int = 0) -> float:
    """A float32 as the Python float that equals it."""
    if not _FLOAT.match(text) or len(text) > 64:
        raise TokenError(offset, f"{what} is {quoted(text)}", "expected a float such as 0.5, 1e-05, inf or nan")
    try:
        return float(struct.unpack("<f", struct.pack("<f", float(text)))[0])
    except OverflowError:
        raise TokenError(offset, f"{what} is {quoted(text)}", "expected a number within float32's range, or inf") from None


@lru_cache(maxsize=65536)
def _print_float32(value: float) -> str:
    with np.errstate(over="ignore"):
        return str(np.float32(value))


def print_float32(value: float) -> str:
    """The shortest decimal that reads back as the same float32."""
    return "-0.0" if value == 0 and str(value)[0] == "-" else _print_float32(float(value))


def print_address(value: int) -> str:
    """In hexadecimals, as addresses, steps and sizes of memories are written."""
    return f"0x{value:x}" if value >= 0 else f"-0x{-value:x}"


def read_numbers(text: str, what: str, *, offset: int, low: int) -> tuple[int, ...]:
    """Comma separated whole numbers, at most eight; "" is ()."""
    if not text:
        return ()
    parts = text.split(",", MAXIMUM_DIMENSIONS + 1)
    if len(parts) > MAXIMUM_DIMENSIONS:
        raise TokenError(offset, f"more than {MAXIMUM_DIMENSIONS} {what}s", f"a tile has at most {MAXIMUM_DIMENSIONS} dimensions")
    numbers = []
    for part in parts:
        numbers.append(read_integer(part, f"a {what}", offset=offset, low=low))
        offset += len(part) + 1
    return tuple(numbers)


# ── strings ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_string(text: str, *, offset: int = 0) -> str:
    """A JSON string in double quotes."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = offset + (error.pos if isinstance(error, json.JSONDecodeError) else 0)
        raise TokenError(place, f"{quoted(text)} is not a string", 'expected double quotes, with \\" \\\\ \\n \\u0041 as the escapes') from None
    if not isinstance(value, str):
        raise TokenError(offset, f"{quoted(text)} is not a string", "put it into double quotes")
    return value


def print_string(value: str) -> str:
    """A JSON string; characters that cannot be seen are escaped."""
    return json.dumps(value, ensure_ascii=not value.isprintable())


def read_strings(text: str, *, offset: int = 0) -> tuple[str, ...]:
    """Comma separated strings; "" is ()."""
    if not text:
        return ()
    if not text.startswith('"'):
        raise TokenError(offset, f"{quoted(text)} is not a list of strings", 'expected strings in double quotes, such as "Conv_1","Relu_2"')
    strings, position, decoder = [], 0, json.JSONDecoder()
    while True:
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise TokenError(offset + position, f"{quoted(text[position:])} is not a string", "put it into double quotes")
        strings.append(value)
        if position == len(text):
            return tuple(strings)
        if text[position] != ",":
            raise TokenError(offset + position, f"{quoted(text[position:])} after a string", "separate strings by commas, without spaces")
        position += 1


def read_word(text: str, *, offset: int = 0) -> str:
    """A bare word or a string."""
    return read_string(text, offset=offset) if text.startswith('"') else text


def print_word(value: str) -> str:
    """Bare where the grammar takes it so, else a string."""
    return value if _BARE.match(value) and value not in ("loop", "end") else print_string(value)


# ── tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_place(text: str) -> tuple[str, int, tuple[int, ...]]:
    """`%0x100+0x40*i` as (space, address, steps)."""
    match = _PLACE.match(text)
    if match is None:
        raise _place_fault(text)
    mark, address, step_text = match.groups()
    steps: dict[int, int] = {}
    for step in _STEP.finditer(text, match.start(3)) if step_text else ():
        depth = LOOP_VARIABLES.find(step[3])
        if depth < 0 or depth in steps:
            wrong = "stands twice" if depth in steps else "is not a loop variable"
            raise TokenError(
                step.start(3), f"{step[3]!r} {wrong} in {quoted(text)}", f"loop variables are {', '.join(LOOP_VARIABLES)}, the outermost loop first"
            )
        steps[depth] = read_integer(step[1] + step[2], "a step", offset=step.start())
    while steps and not steps[max(steps)]:
        del steps[max(steps)]
    length = max(steps, default=-1) + 1
    return SPACE_OF_MARK[mark], read_integer(address, "an address", offset=1, low=0), tuple(steps.get(depth, 0) for depth in range(length))


def _place_fault(text: str) -> TokenError:
    marks = ", ".join(f"{mark} for {space}" for space, mark in SPACES.items())
    if text[:1] not in SPACE_OF_MARK:
        return TokenError(0, f"{quoted(text)} does not name a memory", f"start it with {marks}")
    number = re.match(r"0x[0-9a-fA-F]+|[0-9]+", text[1:])
    if number is None:
        return TokenError(1, f"the address in {quoted(text)} is not a number", "write it as 0x1f00 or in decimals; it cannot be negative")
    end = 1 + number.end()
    while step := _STEP.match(text, end):
        end = step.end()
    return TokenError(end, f"{quoted(text[end:])} after the address", "a step is written +0x40*i or -0x40*i, one per loop variable")


def read_type(text: str, *, offset: int = 0) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """`s8[16,58,64]{3712,64,1}` as (dtype, shape, byte strides)."""
    dtype, shape, layout = _read_layout(text, offset)
    if isinstance(layout, Packing):
        raise TokenError(offset, f"{quoted(text)} is packed", "only weights are packed, and they have no name: give byte strides, or none at all")
    return dtype, shape, layout


def _read_layout(text: str, offset: int) -> tuple[str, tuple[int, ...], tuple[int, ...] | Packing]:
    """(dtype, shape, byte strides or packing)."""
    match = _TYPE.match(text)
    if match is None:
        raise TokenError(
            offset, f"{quoted(text)} is not a tile's type", "expected DTYPE[SIZES] or DTYPE[SIZES]{BYTE STRIDES} without spaces, such as s8[16,58,64]"
        )
    dtype, shape_text, stride_text = match.groups()
    if dtype not in DTYPES:
        raise TokenError(offset, f"unknown element type {quoted(dtype)}", did_you_mean(dtype, DTYPES))
    shape = read_numbers(shape_text, "size", offset=offset + match.start(2), low=1)
    if stride_text is None:
        strides = dense_strides(shape, dtype)
    elif stride_text[:1].isalpha():
        return dtype, shape, _read_packing(stride_text, dtype, shape, offset + match.start(3))
    else:
        strides = read_numbers(stride_text, "stride", offset=offset + match.start(3), low=1 - INTEGER_LIMIT)
    if len(strides) != len(shape):
        raise TokenError(
            offset + match.start(3),
            f"{len(strides)} strides for {len(shape)} dimensions in {quoted(text)}",
            "give one byte stride per dimension, or none at all",
        )
    if Tile("spm", 0, dtype, shape, strides).elements >= INTEGER_LIMIT:
        raise TokenError(offset, f"{quoted(text)} has 2**48 elements or more", "no memory is that large")
    return dtype, shape, strides


def _read_packing(text: str, dtype: str, shape: tuple[int, ...], offset: int) -> Packing:
    """`nm,2,4`."""
    name, _, numbers = text.partition(",")
    if name not in FORMATS:
        raise TokenError(offset, f"unknown weight format {quoted(name)}", did_you_mean(name, FORMATS))
    packing = Packing(name, read_numbers(numbers, f"number of {name}", offset=offset + len(name) + 1, low=0))
    for message, hint in packing_remarks(packing, shape, dtype):
        raise TokenError(offset, message, hint)
    return packing


@lru_cache(maxsize=65536)
def read_tile(text: str) -> Tile:
    """`%0x100+0x40*i:s8[16,58,64]{3712,64,1}`."""
    place, colon, type_text = text.partition(":")
    space, address, steps = read_place(place)
    if not colon:
        raise TokenError(len(place), f"{quoted(text)} lacks its type", f"write {place}:DTYPE[SIZES], such as {place}:s8[16,64]")
    dtype, shape, layout = _read_layout(type_text, len(place) + 1)
    if isinstance(layout, Packing):
        return Tile(space, address, dtype, shape, dense_strides(shape, dtype), steps, layout)
    return Tile(space, address, dtype, shape, layout, steps)


def print_place(tile: Tile) -> str:
    """`%0x100+0x40*i`."""
    steps = "".join(f"{'-' if step < 0 else '+'}0x{abs(step):x}*{LOOP_VARIABLES[depth]}" for depth, step in enumerate(tile.steps) if step)
    return f"{SPACES[tile.space]}{print_address(tile.address)}{steps}"


def print_type(tile: Tile) -> str:
    """`s8[16,58,64]{3712,64,1}`, without the strides where they are dense; of packed weights the packing."""
    strides = "{" + tile.packing.text() + "}" if tile.packing else "" if tile.is_dense else "{" + ",".join(map(str, tile.strides)) + "}"
    return f"{tile.dtype}[{','.join(map(str, tile.shape))}]{strides}"


def print_tile(tile: Tile) -> str:
    """A whole operand."""
    return f"{print_place(tile)}:{print_type(tile)}"


# ── attributes and events ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_value(text: str, attribute: Attribute, *, offset: int = 0) -> Value:
    """The value of one instruction attribute, by the table's kind."""
    name = attribute.name
    if attribute.kind == "word":
        if text not in attribute.words:
            raise TokenError(offset, f"{name} is {quoted(text)}", did_you_mean(text, attribute.words))
        return text
    if attribute.kind == "float":
        return read_float32(text, name, offset=offset)
    if attribute.kind == "int":
        return read_integer(text, name, offset=offset)
    parts = text.split(",", attribute.count + 1)
    if len(parts) != attribute.count:
        expected = "scale,zero" if attribute.kind == "quant" else ",".join("0" * attribute.count)
        raise TokenError(offset, f"{name} has {len(parts)} value{'s' * (len(parts) != 1)}", f"expected {attribute.count}: {name}={expected}")
    if attribute.kind == "quant":
        scale = read_float32(parts[0], f"the scale of {name}", offset=offset)
        return (scale, read_integer(parts[1], f"the zero point of {name}", offset=offset + len(parts[0]) + 1))
    return read_numbers(text, f"value of {name}", offset=offset, low=1 - INTEGER_LIMIT)


def print_value(value: Value) -> str:
    """Floats as float32, everything else as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ",".join(print_value(part) for part in value)
    return print_float32(value) if isinstance(value, float) else str(int(value))


def is_default(value: Value, attribute: Attribute) -> bool:
    """Whether the attribute can be left out; -0.0 is not 0.0."""
    return value == attribute.default and print_value(value) == print_value(attribute.default)


@lru_cache(maxsize=65536)
def read_events(text: str, *, offset: int = 0) -> tuple[Event, ...]:
    """`ld.0,vec.1`."""
    events = []
    for part in text.split(",", MAXIMUM_EVENTS):
        queue, _, number = part.partition(".")
        if queue not in QUEUES:
            raise TokenError(offset, f"unknown queue in event {quoted(part)}", f"write QUEUE.NUMBER, such as ld.0; {did_you_mean(queue, QUEUES)}")
        identity = read_integer(number, f"the number of event {quoted(part)}", offset=offset + len(queue) + 1, low=0)
        if identity > MAXIMUM_EVENT:
            raise TokenError(offset, f"event {quoted(part)} is out of range", f"events are numbered 0 to {MAXIMUM_EVENT} between each pair of queues")
        events.append(Event(queue, identity))
        offset += len(part) + 1
    return tuple(events)


def print_events(events: tuple[Event, ...]) -> str:
    """`ld.0,vec.1`."""
    return ",".join(f"{event.queue}.{event.id}" for event in events)


@lru_cache(maxsize=65536)
def read_attribute(mnemonic: str, text: str) -> tuple[str, Value | tuple[Event, ...]]:
    """`pad=1,1,0,1` of the instruction `mnemonic` as (name, value); wait and signal give events."""
    name, _, value_text = text.partition("=")
    offset = len(name) + 1
    if name in ("wait", "signal"):
        return name, read_events(value_text, offset=offset)
    attribute = attribute_of(SPEC[mnemonic], name)
    if attribute is None:
        known = [*(known.name for known in SPEC[mnemonic].attributes), "wait", "signal"]
        raise TokenError(0, f"{mnemonic} has no attribute {quoted(name)}", did_you_mean(name, known))
    return name, read_value(value_text, attribute, offset=offset)


def attribute_of(spec: InstructionSpec, name: str) -> Attribute | None:
    """The instruction's attribute of that name, or None."""
    for attribute in spec.attributes:
        if attribute.name == name:
            return attribute
    return None
