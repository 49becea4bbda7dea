"""The table is consistent with itself."""

from __future__ import annotations

import pytest

from isa import SPEC, TABLE, InstructionSpec
from isa.manual import TIMING
from isa.program import DTYPES, QUEUES, SPACES
from isa.tokens import print_value, read_value

every_instruction = pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)


def test_mnemonics_are_unique() -> None:
    assert len(SPEC) == len(TABLE)
    assert not {"loop", "end"} & set(SPEC)


@every_instruction
def test_record_is_complete(spec: InstructionSpec) -> None:
    assert spec.queue in QUEUES
    assert spec.effect
    assert spec.timing in TIMING
    assert spec.example.startswith(spec.name + " ")
    if spec.queue == "host":
        assert len(spec.operands) <= 1
        return
    assert spec.operands[0].role in ("write", "update"), "the result comes first"
    assert all(operand.role == "read" for operand in spec.operands[1:])


@every_instruction
def test_operands_are_possible(spec: InstructionSpec) -> None:
    names = [operand.name for operand in spec.operands]
    assert len(set(names)) == len(names)
    optional = [operand.optional for operand in spec.operands]
    assert optional == sorted(optional), "operands that may be left out come last"
    for operand in spec.operands:
        assert set(operand.spaces) <= set(SPACES)
        assert set(operand.dtypes) <= set(DTYPES)
        assert operand.dims in ("*d", "*r", "*dn") or operand.dims.isalnum()


@every_instruction
def test_attributes_spell_their_defaults(spec: InstructionSpec) -> None:
    for attribute in spec.attributes:
        assert attribute.name not in ("wait", "signal")
        assert read_value(print_value(attribute.default), attribute) == attribute.default
        assert bool(attribute.words) == (attribute.kind == "word")


@every_instruction
def test_update_has_accumulate(spec: InstructionSpec) -> None:
    """A result that is read as well is read only when the program says so."""
    accumulates = any(attribute.name == "accumulate" for attribute in spec.attributes)
    assert accumulates == any(operand.role == "update" for operand in spec.operands)
