"""From an instruction's line to its operands: names, attributes and shapes held against the instruction table.

The one big idea: the machine trusts no program. What the static checker would refuse is refused here too, when a program is loaded,
so that a kernel only ever sees operands that fit together.
"""

from __future__ import annotations

import functools
from typing import Any

from isa.program import Instruction, Tile
from isa.spec import SPEC, InstructionSpec, Operand
from runtime.errors import RuntimeFault

#: integer attributes are zero points, paddings and the like
LARGEST_ATTRIBUTE = 1 << 31


def operands(instruction: Instruction) -> dict[str, Tile]:
    """The tiles by operand name. Raises RuntimeFault when they do not fit the table."""
    spec = SPEC.get(instruction.name)
    if spec is None:
        raise RuntimeFault(f"unknown instruction {instruction.name!r}", line=instruction.line, hint=f"known: {', '.join(SPEC)}")
    least, most = sum(not operand.optional for operand in spec.operands), len(spec.operands)
    if not least <= len(instruction.tiles) <= most:
        raise RuntimeFault(f"{spec.name} has {len(instruction.tiles)} operands", line=instruction.line, hint=f"expected {least} to {most}")
    named = {operand.name: (operand, tile) for operand, tile in zip(spec.operands, instruction.tiles, strict=False)}
    sizes: dict[str, tuple[int, ...]] = {}
    for operand, tile in named.values():
        _check_kind(spec, operand, tile, instruction.line)
        _check_shape(spec, operand, tile, sizes, instruction.line)
    return {name: tile for name, (_, tile) in named.items()}


def _check_kind(spec: InstructionSpec, operand: Operand, tile: Tile, line: int) -> None:
    if tile.space not in operand.spaces or tile.dtype not in operand.dtypes:
        raise RuntimeFault(
            f"{spec.name}: operand {operand.name} is {tile.dtype} in {tile.space}",
            line=line, hint=f"expected {' or '.join(operand.dtypes)} in {' or '.join(operand.spaces)}",
        )  # fmt: skip


def _check_shape(spec: InstructionSpec, operand: Operand, tile: Tile, sizes: dict[str, tuple[int, ...]], line: int) -> None:
    """Match the shape against `dims`, collecting what each letter stands for in `sizes`."""
    group, letters = parse_dims(operand.dims)
    shape = tile.shape
    rest = len(shape) - len(letters)
    if rest < 0 or (rest > 0 and not group):
        raise RuntimeFault(f"{spec.name}: operand {operand.name} has {len(shape)} dimensions", line=line, hint=f"expected [{','.join(operand.dims)}]")
    found = [(group, shape[:rest])] if group else []
    found += [(letter, (size,)) for letter, size in zip(letters, shape[rest:], strict=True)]
    for letter, size in found:
        known = (int(letter),) if letter.isdigit() else sizes.setdefault(letter, size)
        if known != size:
            raise RuntimeFault(
                f"{spec.name}: operand {operand.name}{list(shape)} has {'x'.join(map(str, size))} where {letter} is {'x'.join(map(str, known))}",
                line=line, hint="give every operand the same sizes for the same dimensions",
            )  # fmt: skip


@functools.cache
def parse_dims(dims: str) -> tuple[str, tuple[str, ...]]:
    """("d", ("n",)) of "*dn": the letter of the leading group of any number of dimensions ("" if none), and the letters after it."""
    if dims.startswith("*"):
        return dims[1:2] or "*", tuple(dims[2:])
    return "", tuple(dims)


def attributes(instruction: Instruction) -> dict[str, Any]:
    """Every attribute of the instruction by name, defaults filled in. Raises RuntimeFault for unknown or absurd ones."""
    spec = SPEC[instruction.name]
    values: dict[str, Any] = {attribute.name: attribute.default for attribute in spec.attributes}
    for name, value in instruction.attributes:
        if name not in values:
            raise RuntimeFault(f"{spec.name} has no attribute {name!r}", line=instruction.line, hint=f"known: {', '.join(values) or 'none'}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int) and abs(part) > LARGEST_ATTRIBUTE:
                raise RuntimeFault(f"{spec.name}: {name}={part}", line=instruction.line, hint=f"integers reach {LARGEST_ATTRIBUTE}")
        values[name] = value
    for attribute in spec.attributes:
        value = values[attribute.name]
        if attribute.words and value not in attribute.words:
            raise RuntimeFault(f"{spec.name}: {attribute.name}={value}", line=instruction.line, hint=f"expected {' or '.join(attribute.words)}")
        if attribute.count > 1 and (not isinstance(value, tuple) or len(value) != attribute.count):
            raise RuntimeFault(f"{spec.name}: {attribute.name} does not have {attribute.count} values", line=instruction.line)
    return values
