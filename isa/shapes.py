"""Whether the sizes and attributes of one instruction make sense together: dimension letters, windows, channel groups.

The one big idea: what the table can say (the same letter, the same size) is checked from the table for every instruction alike;
each remaining rule is one small function, listed under the instructions it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from isa.program import Instruction, Tile
from isa.spec import SPEC, Attribute, InstructionSpec, Operand
from isa.tokens import did_you_mean

#: (message, hint)
Remark = tuple[str, str]
MAXIMUM_DMA_DIMENSIONS = 5
ATTRIBUTE_LIMIT = 1 << 31  # whole numbers are those of 32 bits
PADDED_LIMIT = 1 << 28  # elements
#: integer element type → lowest and highest value
RANGES = {
    "s8": (-128, 127),
    "u8": (0, 255),
    "s16": (-(1 << 15), (1 << 15) - 1),
    "s32": (-(1 << 31), (1 << 31) - 1),
    "s64": (-(1 << 63), (1 << 63) - 1),
}


def attribute_values(instruction: Instruction) -> dict[str, Any]:
    """Every attribute of the instruction by name, defaults filled in."""
    values: dict[str, Any] = {attribute.name: attribute.default for attribute in SPEC[instruction.name].attributes}
    values.update(instruction.attributes)
    return values


def shape_remarks(instruction: Instruction) -> Iterator[Remark]:
    """What is wrong with the dimensions and attributes; later checks assume that earlier ones passed."""
    spec = SPEC[instruction.name]
    for check in (attribute_remarks, dimension_remarks):
        remarks = list(check(spec, instruction))
        yield from remarks
        if remarks:
            return
    tiles = {operand.name: tile for operand, tile in zip(spec.operands, instruction.tiles, strict=False)}
    values = attribute_values(instruction)
    for rule in RULES.get(instruction.name, ()):
        yield from rule(tiles, values)


def may_replace(spec: InstructionSpec, operand: Operand) -> bool:
    """Whether the result may lie exactly on this operand: element by element, each read before it is written."""
    return spec.timing == "vector" and operand.dims == spec.operands[0].dims


# ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

LOWEST = {"kernel": 1, "stride": 1, "dilation": 1, "groups": 1, "pad": 0, "accumulate": 0, "port": 0, "segment": 0, "multiplier": 0, "shift": 0}
HIGHEST = {"multiplier": (1 << 31) - 1, "shift": 63, "accumulate": 1, "port": 4095, "segment": 4095}


def attribute_remarks(spec: InstructionSpec, instruction: Instruction) -> Iterator[Remark]:
    """Unknown or repeated names, values of the wrong kind or out of range."""
    known, seen = {attribute.name: attribute for attribute in spec.attributes}, set()
    for name, value in instruction.attributes:
        if name not in known or name in seen:
            yield (
                (f"attribute {name!r} stands twice", "keep one")
                if name in seen
                else (f"{spec.name} has no attribute {name!r}", did_you_mean(name, known))
            )
            continue
        seen.add(name)
        yield from _value_remarks(known[name], value)


def _value_remarks(attribute: Attribute, value: Any) -> Iterator[Remark]:
    name, parts = attribute.name, value if isinstance(value, tuple) else (value,)
    if len(parts) != attribute.count or isinstance(value, tuple) != (attribute.kind in ("ints", "quant")):
        yield f"{name} is {value!r}", f"expected {attribute.count} value{'s' * (attribute.count > 1)} of kind {attribute.kind}"
        return
    for index, part in enumerate(parts):
        wanted = {"word": str, "float": (int, float), "quant": (int, float) if index == 0 else int}.get(attribute.kind, int)
        if not isinstance(part, wanted):  # type: ignore[arg-type]
            yield f"{name} is {value!r}", f"expected {attribute.kind}"
        elif attribute.kind == "word" and part not in attribute.words:
            yield f"{name} is {value!r}", did_you_mean(part, attribute.words)
        elif attribute.kind == "quant" and not math.isfinite(part):
            yield f"{name} is {value!r}", "a scale is finite"
        elif isinstance(part, int) and not -ATTRIBUTE_LIMIT <= part < ATTRIBUTE_LIMIT:
            yield f"{name} is {value!r}", "whole numbers go from -2**31 to 2**31 - 1"
        elif name in LOWEST and part < LOWEST[name]:
            yield f"{name} is {value!r}", f"it is at least {LOWEST[name]}"
        elif name in HIGHEST and part > HIGHEST[name]:
            yield f"{name} is {value!r}", f"it is at most {HIGHEST[name]}"
    if name == "clamp" and not parts[0] <= parts[1]:
        yield f"clamp is {value!r}", "the lowest value comes first"


# ── dimensions ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def dimension_remarks(spec: InstructionSpec, instruction: Instruction) -> Iterator[Remark]:
    """The same letter must have the same size in every operand; `*d` is one letter for any number of dimensions, `*r` is `*d` or 1."""
    sizes: dict[str, tuple[Any, str]] = {}
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        if operand.dims == "*r":
            continue
        letters = operand.dims.removeprefix("*d")
        spread = operand.dims.startswith("*")
        if len(tile.shape) < len(letters) or (len(tile.shape) > len(letters) and not spread):
            yield f"operand {operand.name} has {_count(tile.shape)}", f"it needs {'at least ' * spread}{len(letters)}: [{','.join(letters)}]"
            return
        cut = len(tile.shape) - len(letters)
        found = [("*d", tile.shape[:cut])] if spread else []
        for letter, size in (*found, *zip(letters, tile.shape[cut:], strict=True)):
            expected, owner = (int(letter), "the table") if letter.isdigit() else sizes.setdefault(letter, (size, operand.name))
            if size != expected:
                yield _size_remark(letter, operand.name, size, owner, expected)
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        if operand.dims == "*r":
            yield from _reduced_remarks(operand.name, tile.shape, *sizes["*d"])


def _count(shape: tuple[int, ...]) -> str:
    return f"{len(shape)} dimension{'s' * (len(shape) != 1)}, [{','.join(map(str, shape))}]"


def _size_remark(letter: str, name: str, size: Any, owner: str, expected: Any) -> Remark:
    if letter == "*d":
        found, wanted = ("[" + ",".join(map(str, shape)) + "]" for shape in (size, expected))
        return f"operand {name} has shape {found}, but operand {owner} has {wanted}", "the shapes must be equal; a stride of 0 broadcasts a dimension"
    if letter.isdigit():
        return f"operand {name} has size {size} where the table says {expected}", f"make it {expected}"
    return f"size {letter} is {size} in operand {name}, but {expected} in operand {owner}", "they must be equal"


def _reduced_remarks(name: str, shape: tuple[int, ...], full: tuple[int, ...], owner: str) -> Iterator[Remark]:
    if len(shape) != len(full) or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        yield (
            f"operand {name} has shape [{','.join(map(str, shape))}], but operand {owner} has [{','.join(map(str, full))}]",
            "the ranks must be equal, and each size either the same or 1",
        )


# ── rules of single instructions ─────────────────────────────────────────────────────────────────────────────────────────────────────

Rule = Callable[[Mapping[str, Tile], Mapping[str, Any]], Iterator[Remark]]


def same_dtype(*names: str) -> Rule:
    """The named operands must hold the same element type."""

    def rule(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:  # noqa: ARG001
        first, *others = names
        for other in others:
            if tiles[first].dtype != tiles[other].dtype:
                yield (
                    f"operand {first} holds {tiles[first].dtype}, but operand {other} holds {tiles[other].dtype}",
                    "they must be the same; cvt converts",
                )

    rule.__doc__ = f"Operands {' and '.join(names)} hold the same element type."
    return rule


def dma_dimensions(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:  # noqa: ARG001
    """The DMA engines walk at most five dimensions."""
    if len(tiles["y"].shape) > MAXIMUM_DMA_DIMENSIONS:
        yield f"the tiles have {len(tiles['y'].shape)} dimensions", f"a transfer has at most {MAXIMUM_DMA_DIMENSIONS}; merge some, or use a loop"


def channel_groups(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """c = groups * g, and the output channels split into groups evenly."""
    groups, channels, outputs, per_group = values["groups"], tiles["x"].shape[2], tiles["y"].shape[2], tiles["w"].shape[2]
    if channels != groups * per_group:
        yield f"x has {channels} channels, but w has {per_group} in each of {groups} groups", "x needs groups * g channels"
    if outputs % groups:
        yield f"{outputs} output channels do not split into {groups} groups", "n must be a multiple of groups"


def windows_fit(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """Every window lies within the input tile and its padding, of 2**28 elements together at most."""
    padded = tiles["x"].shape[2]
    for axis, name, sides in ((0, "row", "top and bottom"), (1, "column", "left and right")):
        kernel, stride, dilation, before, after = _window(axis, tiles, values)
        outputs, inputs = tiles["y"].shape[axis], tiles["x"].shape[axis]
        reach = (outputs - 1) * stride + (kernel - 1) * dilation + 1
        padded *= before + inputs + after
        if reach > before + inputs + after:
            yield (
                f"the last window ends at {name} {reach - before} of an input of {inputs} {name}s plus {after} of padding",
                f"{outputs} output {name}s need {reach} input {name}s: enlarge the tile of x or the pad ({sides}), or make y smaller",
            )
    if padded > PADDED_LIMIT:
        yield f"x has {padded} elements with its padding", f"at most {PADDED_LIMIT}; pad less"


def windows_not_empty(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """No window lies wholly in the padding."""
    for axis, name in ((0, "row"), (1, "column")):
        kernel, stride, dilation, before, _ = _window(axis, tiles, values)
        outputs, inputs = tiles["y"].shape[axis], tiles["x"].shape[axis]
        if (kernel - 1) * dilation < before:
            yield f"the window of output {name} 0 lies wholly in the padding", f"leave the empty {name}s out of y"
        elif (outputs - 1) * stride - before >= inputs:
            yield f"the window of output {name} {outputs - 1} lies wholly in the padding", f"leave the empty {name}s out of y"
        elif dilation > inputs and any(_misses(start, kernel, dilation, inputs) for start in _starts(outputs, stride, before)):
            yield f"a window steps over all {inputs} {name}s of x", f"the dilation {dilation} is larger than the tile"


def _starts(outputs: int, stride: int, before: int) -> range:
    """Where the windows begin; of a very long axis the first 65,536."""
    return range(-before, min(outputs, 1 << 16) * stride - before, stride)


def _misses(start: int, kernel: int, dilation: int, inputs: int) -> bool:
    """Whether none of the taps start + k * dilation lies in [0, inputs)."""
    tap = max(0, -(start // dilation))
    return tap >= kernel or start + tap * dilation >= inputs


def _window(axis: int, tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """(kernel, stride, dilation, padding before, padding after) along one axis."""
    kernel = tiles["w"].shape[axis] if "w" in tiles else values["kernel"][axis]
    return kernel, values["stride"][axis], values["dilation"][axis], values["pad"][axis], values["pad"][axis + 2]


def result_holds(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """Sums go to s32 or s64; max and min to a type that holds x's values."""
    result, source, op = tiles["y"].dtype, tiles["x"].dtype, values["op"]
    if op in ("sum", "sumsq") and result not in ("s32", "s64"):
        yield f"op={op} writes into {result}", "use s32 or s64 for sums"
    elif not RANGES[result][0] <= RANGES[source][0] <= RANGES[source][1] <= RANGES[result][1]:
        yield f"op={op} of {source} writes into {result}", f"{result} cannot hold every value of {source}"


def holds(attribute: str, operand: str) -> Rule:
    """The attribute must be a value that the operand's element type can hold."""

    def rule(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
        dtype, value = tiles[operand].dtype, values[attribute]
        low, high = RANGES.get(dtype, (value, value))
        if dtype in RANGES and not (low <= value <= high and value == int(value)):
            yield f"{attribute} is {value!r}, but operand {operand} holds {dtype}", f"give a whole number from {low} to {high}"

    rule.__doc__ = f"`{attribute}` is a value that {operand} can hold."
    return rule


def bias_or_accumulate(bias: str) -> Rule:
    """A sum begins with the bias or with what the result holds, not with both."""

    def rule(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
        if values["accumulate"] and bias in tiles:
            yield f"accumulate=1 and the bias {bias} exclude each other", "give the bias to the first instruction of the sum only"

    rule.__doc__ = f"`accumulate=1` and {bias} exclude each other."
    return rule


def requantizes(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """`fp32.rne` takes s as f32 and no r; the q31 modes take s and r, both s32, or neither; the attributes of the other kind stay away."""
    mode, scale, fixed = values["mode"], tiles.get("s"), values["mode"] != "fp32.rne"
    wanted = "s32" if fixed else "f32"
    if scale is not None and scale.dtype != wanted:
        yield f"mode={mode} with operand s of {scale.dtype}", f"give s as {wanted}, or another mode"
    if fixed and ("s" in tiles) != ("r" in tiles):
        yield f"mode={mode} with s but without r", "give the multipliers s and the shifts r"
    if not fixed and "r" in tiles:
        yield f"mode={mode} with operand r", "only the q31 modes shift"
    for name in ("scale",) if fixed else ("multiplier", "shift"):
        default = next(each.default for each in SPEC["requant"].attributes if each.name == name)
        if values[name] != default:
            yield f"mode={mode} with {name}={values[name]!r}", "fp32.rne has a scale, the q31 modes a multiplier and a shift"


def interpolates(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """An interpolated table (`shift` above 0) has at least 2 entries, integers, and a shift of at most 15."""
    table, shift = tiles["t"], values["shift"]
    if not shift:
        return
    if table.elements < 2 or shift > 15:
        yield f"a table of {table.elements} entries with a shift of {shift}", "an interpolated table needs 2 entries and a shift of 1 to 15"
    if table.dtype == "f32":
        yield "an interpolated table of f32", "its entries must be integers"


def unpacks(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:  # noqa: ARG001
    """y is packed only where x is packed in the same way; unpacked weights are an s8 tile of their own shape."""
    result, source = tiles["y"], tiles["x"]
    if result.packing is not None and result.packing != source.packing:
        yield f"y is packed as {{{result.packing.text()}}}, x is not", "give both the same packing, or none to y"


def unpacked_zero(tiles: Mapping[str, Tile], values: Mapping[str, Any]) -> Iterator[Remark]:
    """Packed weights have no zero point: zb is 0."""
    if tiles["b"].packing is not None and values["zb"]:
        yield f"zb is {values['zb']}, but b is packed", "what is left out of packed weights stands for 0: use zb=0, or unpack b with ld"


RULES: dict[str, tuple[Rule, ...]] = {
    "ld": (same_dtype("y", "x"), dma_dimensions, unpacks),
    "st": (same_dtype("y", "x"), dma_dimensions),
    "gather": (same_dtype("y", "x"),),
    "conv": (channel_groups, windows_fit, holds("zero", "x"), bias_or_accumulate("b")),
    "dwconv": (windows_fit, holds("zero", "x"), bias_or_accumulate("b")),
    "matmul": (holds("za", "a"), holds("zb", "b"), bias_or_accumulate("c"), unpacked_zero),
    "requant": (requantizes,),
    "lut": (same_dtype("y", "t"), interpolates),
    "maxpool": (same_dtype("y", "x"), windows_fit, windows_not_empty),
    "avgpool": (windows_fit, windows_not_empty),
    "reduce": (result_holds,),
    "fill": (holds("value", "y"),),
}
