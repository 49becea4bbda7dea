"""What a legal program may do but has no reason to: the marks of an address that is wrong within its memory.

The one big idea: each write makes a *value*, bytes that belong together. Someone reads a value before it is gone; when part of it is
overwritten, the rest is not read any more (a `fill` is a background and may be); one operand, or one output of the program, does not mix
values of different make (loaded, computed, constant; element types). Constants are loaded in whole blocks, and all of them are; on the chip
they are read in whole blocks too (a bias, its scales, a slice of weights), each always as the same type, and all of them are.

The rules of `isa.check` let such programs pass, for they give the same bytes in every order, and by hand one may write a line buffer whose rows
are replaced one by one. The compiler's programs keep the discipline, so a wrong address in one of them shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isa.finding import Finding, finding
from isa.geometry import Footprint, overlaps
from isa.order import Access, Step, dynamic_steps
from isa.program import DTYPES, QUEUES, Instruction, Program, Tile, address_at
from isa.tokens import print_address, print_place

PADDING = 64  # constants that nobody loads are taken to be padding up to here, in bytes
INPUT, BACKGROUND = "input", "fill"

Numbers = npt.NDArray[np.int32]
#: constants in DRAM: from, to, the bytes between, what they are taken for; and a line that does
Blocks = dict[tuple[int, int, Footprint, str], Instruction]


@dataclass(slots=True)
class _Value:
    """What one write made: by whom, of which make, how many bytes of it are left, and whether any were read."""

    instruction: Instruction | None
    make: tuple[str, ...]
    left: int
    read: bool = False
    broken: bool = False
    moved: int | None = None  # of constants that lie here as they lie in DRAM: how far below


def suspicions(program: Program) -> list[Finding]:
    """Signs of wrong addresses, each line once. Expects a program that `findings` passes. Takes four bytes per byte of its memories."""
    walk = _Walk(program)
    for step, iterations in dynamic_steps(program):
        walk.advance(step, iterations)
    walk.finish()
    return walk.found


class _Walk:
    def __init__(self, program: Program):
        self.program = program
        sizes = {"dram": program.dram_bytes, "spm": program.target.spm_bytes, "acc": program.target.acc_bytes}
        self.owners = {space: np.zeros(size, np.int32) for space, size in sizes.items()}  # number of the value that each byte belongs to
        self.values = [_Value(None, (), 0)]  # number 0: nobody's
        self.loaded: Blocks = {}  # constants as they are loaded
        self.used: Blocks = {}  # and as they are read once they are on the chip
        self.found: list[Finding] = []
        self.reported: set[tuple[str, int]] = set()
        for record in program.inputs:
            self.write(record.tile, record.tile.address, None, (INPUT,))

    def advance(self, step: Step, iterations: tuple[int, ...]) -> None:
        """One instruction: what it reads, then what it writes."""
        source: tuple[Access, int] | None = None
        for access in step.accesses:
            address = address_at(access.tile, iterations) if access.tile.steps else access.tile.address
            if access.reads and self.holds_constants(access.tile, address):
                source = (access, address)
                self.loaded.setdefault(_block(access, address, ""), step.instruction)
            elif access.reads:
                self.read(access, address, step.instruction)
        for access in step.accesses:
            if access.writes:
                address = address_at(access.tile, iterations) if access.tile.steps else access.tile.address
                queue = BACKGROUND if step.instruction.name == "fill" else QUEUES[step.queue]
                make = (queue, access.tile.dtype, "constant" if source else "")
                moved = _distance(source, access.tile, address) if source else None
                if source and moved is None:
                    self.used.setdefault(_block(*source, ""), step.instruction)
                self.write(access.tile, address, step.instruction, make, moved)

    def holds_constants(self, tile: Tile, address: int) -> bool:
        first = self.program.constants_address
        return tile.space == "dram" and first <= address < first + self.program.constants_bytes

    def read(self, access: Access, address: int, instruction: Instruction) -> None:
        values = self.values_of(access.tile, address)
        for value in values:
            if value.moved is not None:
                self.used.setdefault(_block(access, address + value.moved, access.tile.dtype), instruction)
        self.require_one_make(values, instruction, f"{instruction.name} reads {print_place(access.tile)}")

    def values_of(self, tile: Tile, address: int) -> list[_Value]:
        """What the bytes of a tile belong to, each from now on read."""
        values = [self.values[number] for number in np.unique(_bytes_of(self.owners[tile.space], tile, address)).tolist() if number]
        for value in values:
            value.read = True
        return values

    def require_one_make(self, values: list[_Value], instruction: Instruction, reader: str) -> None:
        values = [value for value in values if value.make[0] != BACKGROUND]
        makes = {value.make for value in values}
        if len(makes) > 1:
            told = " and ".join(sorted(" ".join(filter(None, make)) for make in makes))
            self.report("mix", instruction, f"{reader} across bytes that were made differently ({told})")
        if any(value.broken for value in values):
            self.report("rest", instruction, f"{reader}, where the rest of a partly overwritten value is left")

    def write(self, tile: Tile, address: int, instruction: Instruction | None, make: tuple[str, ...], moved: int | None = None) -> None:
        view = _bytes_of(self.owners[tile.space], tile, address)
        for number, count in zip(*(each.tolist() for each in np.unique(view, return_counts=True)), strict=True):
            old = self.values[number]
            old.left -= count
            old.broken = True
            if old.left == 0:
                self.require_read(old)
        view[...] = len(self.values)
        self.values.append(_Value(instruction, make, view.size, moved=moved))

    def require_read(self, value: _Value) -> None:
        if value.instruction is not None and not value.read:
            place = print_place(value.instruction.tiles[0])
            self.report("unread", value.instruction, f"{value.instruction.name} writes {place}, but nobody reads it")

    def finish(self) -> None:
        """At the end: results count as read, everything else must have been."""
        for record in (*self.program.outputs, *self.program.tensors):
            values = self.values_of(record.tile, record.tile.address)
            written = [value.instruction for value in values if value.instruction is not None]
            if record in self.program.outputs and written:
                self.require_one_make(values, written[-1], f"the caller reads output {record.name!r}")
        for value in self.values:
            if value.left > 0:
                self.require_read(value)
        first, stop = self.program.constants_address, self.program.constants_address + self.program.constants_bytes
        remarks = list(_block_remarks("load", self.loaded, first, stop)) or list(_block_remarks("read", self.used, first, stop))
        for message, instruction in remarks:
            self.report("constants", instruction, message)

    def report(self, rule: str, instruction: Instruction, message: str) -> None:
        if (rule, id(instruction)) not in self.reported:
            self.reported.add((rule, id(instruction)))
            self.found.append(finding(instruction, message, "compare the address and the strides with those of the neighbouring lines"))


def _bytes_of(owners: Numbers, tile: Tile, address: int) -> Numbers:
    """The entries of a tile's bytes, as a view [*shape, bytes per element]; what a stride of 0 repeats stands there once."""
    tile = tile.storage
    shape = tuple(size if stride else 1 for size, stride in zip(tile.shape, tile.strides, strict=True))
    strides = tuple(stride * owners.itemsize for stride in (*tile.strides, 1))
    return np.lib.stride_tricks.as_strided(owners[address:], (*shape, DTYPES[tile.dtype]), strides)


def _block(access: Access, address: int, dtype: str) -> tuple[int, int, Footprint, str]:
    return address + access.footprint.low, address + access.footprint.high, access.footprint, dtype


def _distance(source: tuple[Access, int], result: Tile, address: int) -> int | None:
    """From the result of a load up to its source, where both are dense; None elsewhere."""
    tile, place = source[0].tile, source[1]
    alike = tile.shape == result.shape and tile.dtype == result.dtype
    return place - address if alike and tile.is_dense and result.is_dense else None


def _block_remarks(verb: str, blocks: Blocks, first: int, stop: int) -> Iterator[tuple[str, Instruction]]:
    """Blocks of constants that share some of their bytes, and constants (between `first` and `stop`) that belong to no block."""
    end, widest, last = first, None, None  # up to where, the block that reaches so far, the line before
    for (low, high, bytes_of_block, _), instruction in sorted(blocks.items(), key=lambda item: item[0][:2]):
        start = low - bytes_of_block.low
        place = print_address(low)
        if low < end and (widest is None or overlaps(*widest, bytes_of_block, start)):
            yield f"{instruction.name} {verb}s constants from {place}, in the middle of a block that another line {verb}s", instruction
        if low >= end + PADDING:
            yield f"nobody {verb}s the constants from {print_address(end)} to {place}, just before those that this line {verb}s", instruction
        if high >= end:
            end, widest = high, (bytes_of_block, start)
        last = instruction
    if last is not None and stop >= end + PADDING:
        yield f"nobody {verb}s the constants from {print_address(end)} to {print_address(stop)}, just after those that this line {verb}s", last
