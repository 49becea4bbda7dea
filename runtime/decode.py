"""From an instruction's line to its operands and attributes by name, held against the instruction table.

The one big idea: the machine trusts no program. It asks the questions of the static checker about every line that it loads, so that
a kernel only ever sees operands that fit together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isa.program import Instruction, Tile
from isa.shapes import attribute_values, shape_remarks
from isa.signature import operand_count_fault, operand_fault, packing_fault
from isa.spec import SPEC
from runtime.errors import RuntimeFault


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tiles by operand name, the result first; attributes by name, defaults filled in."""

    tiles: dict[str, Tile]
    attributes: dict[str, Any]


def decode(instruction: Instruction) -> Decoded:
    """Raises RuntimeFault when the instruction does not fit the table."""
    spec = SPEC.get(instruction.name)
    if spec is None:
        raise RuntimeFault(f"unknown instruction {instruction.name!r}", line=instruction.line, hint=f"known: {', '.join(SPEC)}")
    fault = operand_count_fault(spec, len(instruction.tiles))
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        fault = fault or operand_fault(spec.name, operand, tile.space, tile.dtype) or packing_fault(spec.name, operand, tile)
    if fault:
        raise RuntimeFault(fault[0], line=instruction.line, hint=fault[1])
    for message, hint in shape_remarks(instruction):
        raise RuntimeFault(f"{spec.name}: {message}", line=instruction.line, hint=hint)
    tiles = {operand.name: tile for operand, tile in zip(spec.operands, instruction.tiles, strict=False)}
    return Decoded(tiles, attribute_values(instruction))
