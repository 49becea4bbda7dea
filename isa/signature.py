"""Whether the tiles of an instruction fit its record in the table: how many, in which memories, of which element types.

The one big idea: the parser and the checker ask the same question here, so that a program from text and one built in Python
obey the same table.
"""

from __future__ import annotations

from functools import lru_cache

from isa.packing import packing_remarks
from isa.program import SPACES, Tile
from isa.spec import InstructionSpec, Operand


@lru_cache(maxsize=256)
def _required(operands: tuple[Operand, ...]) -> int:
    return sum(not operand.optional for operand in operands)


def operand_count_fault(spec: InstructionSpec, count: int) -> tuple[str, str] | None:
    """(message, hint) when `count` tiles are too few or too many."""
    required = _required(spec.operands)
    if required <= count <= len(spec.operands):
        return None
    wanted = str(required) if required == len(spec.operands) else f"{required} to {len(spec.operands)}"
    form = ", ".join(operand.name + "?" * operand.optional for operand in spec.operands)
    return f"{spec.name} has {count} operand{'s' * (count != 1)}, expected {wanted}", f"its form is: {spec.name} {form}"


@lru_cache(maxsize=4096)
def operand_fault(mnemonic: str, operand: Operand, space: str, dtype: str) -> tuple[str, str] | None:
    """(message, hint) when a tile's memory or element type is not one that the operand allows."""
    if space not in operand.spaces:
        allowed = " or ".join(f"{SPACES[allowed]} ({allowed})" for allowed in operand.spaces)
        return f"operand {operand.name} of {mnemonic} is in {space}", f"it must be in {allowed}"
    if dtype not in operand.dtypes:
        return f"operand {operand.name} of {mnemonic} has element type {dtype}", f"it must be {' or '.join(operand.dtypes)}"
    return None


def packing_fault(mnemonic: str, operand: Operand, tile: Tile) -> tuple[str, str] | None:
    """(message, hint) when the operand cannot be packed, or not in this way."""
    if tile.packing is None:
        return None
    if not operand.packed:
        return f"operand {operand.name} of {mnemonic} is packed", "only weights are: the tiles of ld, w of conv, b of matmul; unpack it with ld"
    return next(packing_remarks(tile.packing, tile.shape, tile.dtype), None)
