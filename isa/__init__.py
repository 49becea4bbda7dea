"""The instruction set of the virtual NPU: programs as values, as text and as files, their target, and the static checker.

The one big idea: one table (`isa.spec`) says what an instruction is; parser, printer, checker and manual all follow from it.
"""

from isa.check import check, findings
from isa.errors import CheckError, IsaError, PackageError, ParseError, TargetError
from isa.finding import Finding, with_columns
from isa.package import Package, load, pack_text
from isa.program import Event, Instruction, Layer, Loop, Program, TensorRecord, Tile, address_at, dense_strides, unroll
from isa.spec import SPEC, TABLE, InstructionSpec
from isa.target import Target, load_target, target_names
from isa.text import format_instruction, format_program, mistakes, parse_program

__all__ = [
    "SPEC",
    "TABLE",
    "CheckError",
    "Event",
    "Finding",
    "Instruction",
    "InstructionSpec",
    "IsaError",
    "Layer",
    "Loop",
    "Package",
    "PackageError",
    "ParseError",
    "Program",
    "Target",
    "TargetError",
    "TensorRecord",
    "Tile",
    "address_at",
    "check",
    "dense_strides",
    "findings",
    "format_instruction",
    "format_program",
    "load",
    "load_target",
    "mistakes",
    "pack_text",
    "parse_program",
    "target_names",
    "unroll",
    "with_columns",
]
