"""Random legal instructions and programs, derived from the table.

The one big idea: sizes, element types, memories and attributes are drawn from each instruction's record; only the rules that the
table cannot state (windows, groups, equal types) are repeated here, by choosing so that they hold.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from isa import SPEC, TABLE, Event, Instruction, InstructionSpec, Layer, Loop, Program, Target, TensorRecord, Tile, dense_strides, unroll
from isa.packing import Packing
from isa.program import DTYPES, QUEUES
from isa.spec import OUTSIDE_TYPES, Attribute

CONSTANTS = 0x8000  # bytes of constants, at DRAM address 0
DRAM = 0x20000
SCRATCH = 0xC0000  # scratchpad that instructions under test don't use
TARGET = Target("test", weight_formats="nm:1:4 block mask s4")
#: packings that bytes of zeros are legal in
PACKINGS = [Packing("nm", (1, 4)), Packing("block", (2, 3, 0)), Packing("mask", (0,)), Packing("s4", (0,)), Packing("s4", (2,))]

float32 = st.floats(width=32, allow_nan=False)
names = st.text(st.characters(codec="utf-8"), max_size=12)
words = st.text(string.ascii_letters + string.digits + '_.+- "\\é', max_size=8)


@dataclass
class Allocator:
    """Gives out addresses that do not overlap, per memory."""

    free: dict[str, int] = field(default_factory=lambda: {"spm": 0, "acc": 0, "dram": 0})

    def take(self, space: str, size: int, gap: int) -> int:
        address = -(-self.free[space] // 8) * 8 + 8 * gap
        self.free[space] = address + size
        return address


@st.composite
def tiles(draw: Any, shape: tuple[int, ...], dtype: str, space: str, allocator: Allocator, *, written: bool) -> Tile:
    """A tile of that shape with dense, permuted, padded, reversed or (read only) broadcast strides."""
    strides = dense_strides(shape, dtype)
    if draw(st.booleans()):
        step, changed = DTYPES[dtype], list(strides)
        for dimension in draw(st.permutations(range(len(shape)))):
            choice = draw(st.sampled_from(["tight", "loose", "reverse"] if written else ["tight", "loose", "reverse", "broadcast"]))
            changed[dimension] = {"broadcast": 0, "reverse": -step}.get(choice, step)
            step *= 1 if choice == "broadcast" else shape[dimension] + (choice == "loose")
        strides = tuple(changed)
    low, high = Tile(space, 0, dtype, shape, strides).extent()
    return Tile(space, allocator.take(space, high - low, draw(st.integers(0, 3))) - low, dtype, shape, strides)


def pack_some(draw: Any, spec: InstructionSpec, chosen: list[Tile], values: dict[str, Any]) -> list[Tile]:
    """The same tiles, now and then with packed weights; a load has them packed on both sides, or in DRAM alone."""
    weights = [index for index, operand in enumerate(spec.operands[: len(chosen)]) if operand.packed]
    if not weights or any(chosen[i].dtype != "s8" or len(chosen[i].shape) < 2 for i in weights) or draw(st.booleans()):
        return chosen
    values.update({"zb": 0} if "zb" in values else {})
    packing = draw(st.sampled_from(PACKINGS))
    size, wanted = packing.bytes(chosen[weights[-1]].shape), weights if draw(st.booleans()) else weights[-1:]
    free = (1 << 19) if spec.queue == "mm" else 0x6000  # far from all other tiles
    return [
        replace(Tile.dense(tile.space, free + size * (tile.space == "spm"), "s8", tile.shape), packing=packing) if index in wanted else tile
        for index, tile in enumerate(chosen)
    ]  # fmt: skip


def _value(draw: Any, attribute: Attribute) -> Any:
    small = st.integers(-128, 127)
    if attribute.name == "accumulate":
        return draw(st.integers(0, 1))
    if attribute.name == "clamp":
        return tuple(sorted((draw(small), draw(small))))
    if attribute.name in ("port", "segment"):
        return draw(st.integers(0, 7))
    if attribute.kind == "word":
        return draw(st.sampled_from(attribute.words))
    if attribute.name in ("multiplier", "shift"):
        return draw(st.sampled_from([attribute.default, 0, 31]))
    if attribute.kind == "quant":
        return (draw(st.floats(2.0**-20, 2.0**20, width=32)), draw(small))
    if attribute.name == "value":
        return float(draw(st.integers(0, 127)))
    return draw(float32 if attribute.kind == "float" else small)


def _window(draw: Any, values: dict[str, Any], kernel: tuple[int, int], sizes: dict[str, Any], *, pooling: bool) -> None:
    """Choose stride, dilation, pad and the input sizes u, v so that every window fits (and, pooling, has an element)."""
    two = st.tuples(st.integers(1, 3), st.integers(1, 2))
    values["stride"], values["dilation"] = draw(two), draw(two)
    pads = []
    for axis, (out, source) in enumerate((("h", "u"), ("w", "v"))):
        reach = (sizes[out] - 1) * values["stride"][axis] + (kernel[axis] - 1) * values["dilation"][axis] + 1
        most = min(values["dilation"][axis] * (kernel[axis] - 1), reach - values["dilation"][axis]) if pooling else reach - 1
        before = draw(st.integers(0, max(0, min(3, most))))
        after = draw(st.integers(0, max(0, min(3, most - before)))) if not pooling else 0
        sizes[source] = reach - before - after + draw(st.integers(0, 2))
        pads.append((before, after))
    values["pad"] = (pads[0][0], pads[1][0], pads[0][1], pads[1][1])


def _sizes(draw: Any, spec: InstructionSpec, values: dict[str, Any]) -> dict[str, Any]:
    """A size for every dimension letter; `*d` is a tuple."""
    letters = {letter for operand in spec.operands for letter in operand.dims if letter.isalpha()}
    sizes: dict[str, Any] = {letter: draw(st.integers(1, 4)) for letter in sorted(letters)}
    sizes["*d"] = tuple(draw(st.lists(st.integers(1, 4), min_size=0 if spec.queue == "vec" else 1, max_size=3)))
    sizes["*r"] = tuple(draw(st.sampled_from([1, size])) for size in sizes["*d"])
    if spec.name == "conv":
        values["groups"] = draw(st.integers(1, 3))
        sizes["c"], sizes["n"] = values["groups"] * sizes["g"], values["groups"] * sizes["n"]
    if "kernel" in values:
        values["kernel"] = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    if "pad" in values:
        _window(draw, values, values.get("kernel") or (sizes["k"], sizes["l"]), sizes, pooling="kernel" in values)
    return sizes


def _shape(dims: str, sizes: dict[str, Any]) -> tuple[int, ...]:
    if dims == "*r":
        return tuple(sizes["*r"])
    spread = sizes["*d"] if dims.startswith("*") else ()
    return (*spread, *(int(letter) if letter.isdigit() else sizes[letter] for letter in dims.removeprefix("*d")))


def _dtypes(draw: Any, spec: InstructionSpec, values: dict[str, Any]) -> dict[str, str]:
    dtypes = {operand.name: draw(st.sampled_from(operand.dtypes)) for operand in spec.operands}
    if spec.name in ("ld", "st", "gather", "maxpool"):
        dtypes["x"] = dtypes["y"]
    if spec.name == "lut":
        dtypes["t"] = dtypes["y"]
    if spec.name == "requant":
        dtypes["s"] = "f32" if values["mode"] == "fp32.rne" else "s32"
    if spec.name == "reduce":
        if values["op"] in ("sum", "sumsq"):
            dtypes["y"] = draw(st.sampled_from(["s32", "s64"]))
        else:
            dtypes["x"] = {"s8": "s8", "s16": draw(st.sampled_from(["s8", "u8", "s16"]))}.get(dtypes["y"], dtypes["x"])
    return dtypes


def _takes(draw: Any, spec: InstructionSpec, name: str, before: int, values: dict[str, Any]) -> bool:
    """Whether to give an optional operand; the q31 modes of requant take both of theirs or neither."""
    if (spec.name, name) == ("requant", "r"):
        return bool(values["mode"] != "fp32.rne" and before > 2)
    return bool(draw(st.booleans()))


@st.composite
def instructions(draw: Any, spec: InstructionSpec | None = None) -> Instruction:
    """One legal instruction without events; its tiles do not overlap. DRAM that is read lies in the constants, what is written above."""
    spec = spec or draw(st.sampled_from(TABLE))
    allocator = Allocator()
    values = {attribute.name: _value(draw, attribute) for attribute in spec.attributes}
    if spec.name == "requant":
        defaults = {attribute.name: attribute.default for attribute in spec.attributes}
        unused = ("multiplier", "shift") if values["mode"] == "fp32.rne" else ("scale",)
        values |= {name: defaults[name] for name in unused}
    sizes, dtypes = _sizes(draw, spec, values), _dtypes(draw, spec, values)
    if spec.name == "lut":
        values["shift"] = draw(st.integers(0, 15)) if sizes["e"] > 1 and dtypes["t"] != "f32" else 0
    chosen: list[Tile] = []
    for operand in spec.operands:
        if operand.optional and (values.get("accumulate") or not _takes(draw, spec, operand.name, len(chosen), values)):
            break
        if operand.role != "read" and operand.spaces == ("dram",):
            allocator.free["dram"] = CONSTANTS
        space = draw(st.sampled_from(operand.spaces))
        chosen.append(draw(tiles(_shape(operand.dims, sizes), dtypes[operand.name], space, allocator, written=operand.role != "read")))
    chosen = pack_some(draw, spec, chosen, values)
    kept = tuple((each.name, values[each.name]) for each in spec.attributes if repr(values[each.name]) != repr(each.default))
    return Instruction(spec.name, tuple(chosen), kept)


def surround(instruction: Instruction) -> Program:
    """A legal program that makes everything that the instruction reads, and then executes it."""
    spec = SPEC[instruction.name]
    prelude: list[Instruction] = []
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        low, high = tile.extent()
        if operand.role != "write" and tile.space == "spm":
            prelude.append(Instruction("fill", (Tile.dense("spm", low, "u8", (high - low,)),)))
        elif operand.role != "write" and tile.space == "acc":
            prelude += _fill_accumulators(low, high)
    if prelude and spec.queue != "vec":
        back = Event(spec.queue, 0)
        last = prelude[-1]
        if SPEC[last.name].queue == spec.queue:  # the accumulators' fill stands in the same queue: let it wait for the scratchpad's
            prelude = sorted(prelude, key=lambda each: SPEC[each.name].queue != "vec")
        vector = max(index for index, each in enumerate(prelude) if SPEC[each.name].queue == "vec")
        prelude[vector] = replace(prelude[vector], signals=(*prelude[vector].signals, back))
        instruction = replace(instruction, waits=(Event("vec", 0),))
    elif any(each.name == "matmul" for each in prelude):
        matrix = max(index for index, each in enumerate(prelude) if each.name == "matmul")
        prelude[matrix] = replace(prelude[matrix], signals=(Event("vec", 0),))
        instruction = replace(instruction, waits=(Event("mm", 0),))
    mode = dict(instruction.attributes).get("mode", "fp32.rne")
    return program_of((*prelude, instruction), target=replace(TARGET, requantize=str(mode)))


def _fill_accumulators(low: int, high: int) -> list[Instruction]:
    """Products of ones, over at least the given bytes (whole accumulators from `low` on)."""
    rows = math.ceil((high - low) / 4)
    ones, one = Tile.dense("spm", SCRATCH, "s8", (rows, 1)), Tile.dense("spm", SCRATCH + rows, "s8", (1, 1))
    return [
        Instruction("fill", (Tile.dense("spm", SCRATCH, "s8", (rows + 1,)),), signals=(Event("mm", 1),)),
        Instruction("matmul", (Tile.dense("acc", low, "s32", (rows, 1)), ones, one), waits=(Event("vec", 1),)),
    ]


def program_of(body: tuple[Instruction | Loop, ...], *, target: Target = TARGET) -> Program:
    return Program(target, (), (), (), 0, CONSTANTS, DRAM, (Layer("layer", "test", (), 0, body),))


def with_line_numbers(program: Program) -> list[int]:
    """The line of every dynamic instruction."""
    return [instruction.line for layer in program.layers for instruction, _ in unroll(layer.body)]


# ── whole programs, for the round trip only: they parse, but need not pass the checker ────────────────────────────────────────────────

events = st.lists(st.builds(Event, st.sampled_from(QUEUES), st.integers(0, 255)), max_size=3).map(tuple)


@st.composite
def lines(draw: Any, depth: int) -> Instruction:
    """An instruction with events and loop steps."""
    instruction = draw(instructions())
    steps = st.lists(st.integers(-(2**20), 2**20), max_size=depth).map(lambda given: tuple(given[: _last_nonzero(given)]))
    stepped = tuple(replace(tile, address=abs(tile.address), steps=draw(steps)) for tile in instruction.tiles)
    changed: Instruction = replace(instruction, tiles=stepped, waits=draw(events), signals=draw(events))
    return changed


def _last_nonzero(steps: list[int]) -> int:
    return max((index + 1 for index, step in enumerate(steps) if step), default=0)


@st.composite
def bodies(draw: Any, depth: int = 0) -> tuple[Instruction | Loop, ...]:
    items: list[Instruction | Loop] = []
    for _ in range(draw(st.integers(0, 3))):
        if depth < 3 and draw(st.integers(0, 3)) == 0:
            items.append(Loop(draw(st.integers(1, 100)), draw(bodies(depth + 1))))
        else:
            items.append(draw(lines(depth)))
    return tuple(items)


@st.composite
def records(draw: Any, *, outside: bool) -> TensorRecord:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    tile = replace(draw(tiles(shape, dtype, "dram", Allocator(), written=False)), space=draw(st.sampled_from(["dram", "spm"])))
    scale, zero = draw(st.floats(2.0**-20, 2.0**20, width=32)), draw(st.integers(-128, 127))
    return TensorRecord(draw(names), tile, scale, zero, "" if outside else draw(names), draw(st.sampled_from(OUTSIDE_TYPES)))


layers = st.builds(Layer, names, words, st.lists(names, max_size=3).map(tuple), st.integers(0, 2**40), bodies())
targets = st.builds(
    Target,
    name=words,
    description=names,
    family=st.sampled_from(["systolic", "mac"]),
    rows=st.integers(1, 512),
    shadow_weights=st.booleans(),
    dram_bytes_per_cycle=st.floats(0.1, 1e4),
    pj_mac=st.floats(0, 1e3),
)


@st.composite
def programs(draw: Any) -> Program:
    def unique(outside: bool) -> Any:
        return st.lists(records(outside=outside), max_size=2, unique_by=lambda record: record.name).map(tuple)

    return Program(
        draw(targets), draw(unique(True)), draw(unique(True)), draw(unique(False)),
        draw(st.integers(0, 2**40)), draw(st.integers(0, 2**40)), draw(st.integers(0, 2**40)),
        tuple(draw(st.lists(layers, max_size=3))), draw(names),
    )  # fmt: skip
