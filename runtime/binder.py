"""From steps to closures: every operand of every dynamic instruction becomes an array, once.

The one big idea: in a fixed order of execution, who wrote which bytes last is known before anything runs. So operands that
always hold the same constants are decoded at load time, and an input gathered by one convolution is not gathered again for the
next one that reads the very same bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from isa.geometry import writes_twice
from isa.program import DTYPES, Instruction, Program, TensorRecord, Tile, address_at
from isa.spec import SPEC
from runtime.decode import Decoded, decode
from runtime.errors import RuntimeFault
from runtime.gemm import FloatSums
from runtime.host import Host
from runtime.kernels import KERNELS, Bind
from runtime.memory import NUMPY, Array, Memory, extent, merge
from runtime.packing import unpack
from runtime.scratch import Scratch
from runtime.site import Run, Site, sequence
from runtime.skipping import Meter
from runtime.stream import Step

#: operands that programs load from their constants: weights and right-hand sides, scales, tables
CONSTANT_OPERANDS = ("w", "b", "c", "s", "r", "t")
#: results whose every element depends only on the elements of the operands at the same place: they may be computed in place
ELEMENTWISE = frozenset(spec.name for spec in SPEC.values() if spec.queue != "host" and spec.operands[0].dims.startswith("*d"))


@dataclass(frozen=True, slots=True)
class Located:
    """A tile at the address it has in one dynamic instruction."""

    tile: Tile
    address: int

    @property
    def extent(self) -> tuple[int, int]:
        return extent(self.tile, self.address)


class Writers:
    """Who wrote each byte of a memory last: disjoint intervals in order, each with the number of the writing step."""

    def __init__(self) -> None:
        self.lows: list[int] = []
        self.highs: list[int] = []
        self.steps: list[int] = []

    def write(self, low: int, high: int, step: int) -> None:
        """Bytes [low, high) now come from `step`."""
        first, last = self._range(low, high)
        lows, highs, steps = [low], [high], [step]
        if first < last and self.lows[first] < low:
            lows, highs, steps = [self.lows[first], *lows], [low, *highs], [self.steps[first], *steps]
        if first < last and self.highs[last - 1] > high:
            lows, highs, steps = [*lows, high], [*highs, self.highs[last - 1]], [*steps, self.steps[last - 1]]
        self.lows[first:last], self.highs[first:last], self.steps[first:last] = lows, highs, steps

    def last(self, low: int, high: int) -> int:
        """The latest step that wrote any of the bytes; -1 when none did."""
        first, last = self._range(low, high)
        return max(self.steps[first:last], default=-1)

    def all(self, low: int, high: int) -> list[int]:
        """The steps that wrote the bytes last."""
        first, last = self._range(low, high)
        return self.steps[first:last]

    def only(self, low: int, high: int) -> int:
        """The one step that wrote all of the bytes; -1 when there is no such step."""
        first, last = self._range(low, high)
        return self.steps[first] if last - first == 1 and self.lows[first] <= low and self.highs[first] >= high else -1

    def _range(self, low: int, high: int) -> tuple[int, int]:
        """The intervals [first, last) that touch [low, high)."""
        return bisect_right(self.highs, low), bisect_left(self.lows, high)


class Binder:
    """Binds steps in the order of their execution. With `known_order` false nothing is assumed about what ran before a step."""

    def __init__(
        self, program: Program, memories: dict[str, Memory], memo: dict[Any, Any], *, known_order: bool, host: Host | None = None,
        kernels: Mapping[str, Bind] = KERNELS, meter: Meter | None = None,
    ):  # fmt: skip
        self.program, self.memories, self.memo, self.known_order, self.kernels = program, memories, memo, known_order, kernels
        self.scratch, self.host, self.meter = Scratch(), host, meter
        self.writers = {space: Writers() for space in memories}
        self.loads: dict[int, tuple[Located, Located]] = {}
        self.latest: tuple[int, Located, FloatSums] | None = None  # the last matrix instruction, if its sums are exact in float32
        self.read: set[int] = set()  # who wrote scratchpad bytes that are read there
        self.readers: dict[int, set[int]] = {}  # who reads the accumulators that a step wrote
        self.takers: list[tuple[int, int, FloatSums]] = []  # matrix step, the requant that takes its float sums
        self._decoded: dict[int, Decoded] = {}
        self._constants = (program.constants_address, program.constants_address + program.constants_bytes)

    def bind(self, number: int, step: Step, index: int) -> Run:
        """The closure of the step that executes as the `number`-th and stands `index`-th in the program. Raises RuntimeFault."""
        instruction = step.line.instruction
        decoded = self._decode(instruction)
        attributes = decoded.attributes
        located = {name: Located(tile, address_at(tile, step.iterations)) for name, tile in decoded.tiles.items()}
        views = {name: self.memories[at.tile.space].view(at.tile, at.address, line=instruction.line) for name, at in located.items()}
        if step.line.queue == "host":
            return self._bind_host(number, instruction, views, located, attributes)
        result, *others = located.items()
        snapshots = self._snapshots(instruction, result, others, views)
        known = {} if snapshots or not self.known_order else self._known(dict(others), instruction.line)
        views |= {name: content for name, (_, content) in known.items()}
        unpacking = self._unpacking(instruction, located, views, known)
        window = self._window(instruction, located, attributes) if self.known_order else None
        sums = self._float_sums(instruction, located) if self.known_order else None
        site = Site(instruction, views, attributes, self.scratch, self.memo, known, window, sums=sums)
        try:
            run = self.kernels[instruction.name](site)
        except MemoryError as error:
            site.fault(f"it needs {error}", "use smaller tiles, or pad less")
        if self.meter is not None and (look := self.meter.before(index, decoded, instruction.name, views)) is not None:
            unpacking.append(look)
        self._note_readers([at for name, at in (*others, *([result] if attributes.get("accumulate") else [])) if name not in known])
        self._follow_accumulators(number, site, step.line.queue, located)
        self._record(number, instruction, located)
        return sequence(*unpacking, *(partial(np.copyto, copy, original) for copy, original in snapshots), run)

    def finish(self) -> None:
        """All steps are bound: accumulators that only the taker of the float sums would read need not be stored."""
        for producer, taker, sums in self.takers:
            sums.stored = self.readers[producer] != {taker}

    def unread(self, records: Iterable[TensorRecord]) -> set[int]:
        """The loads of constants that no instruction reads from the scratchpad, nor any of the tensors to look at: they can be left out."""
        named = [extent(record.tile, record.tile.address) for record in records if record.tile.space == "spm"]
        spans = {number: result.extent for number, (result, _) in self.loads.items() if number not in self.read}
        return {number for number, (low, high) in spans.items() if not any(first < high and low < last for first, last in named)}

    def _note_readers(self, operands: Iterable[Located]) -> None:
        for at in operands:
            if at.tile.space == "spm":
                self.read.update(self.writers["spm"].all(*at.extent))

    def _float_sums(self, instruction: Instruction, located: dict[str, Located]) -> FloatSums | None:
        """The float sums that stand for a requant's operand: all of what the last matrix instruction wrote, in the same order."""
        if instruction.name != "requant" or self.latest is None:
            return None
        (producer, y, sums), a = self.latest, located["a"]
        same = a.tile.space == "acc" and a.address == y.address and a.tile.is_dense and y.tile.is_dense
        same = same and (a.tile.elements, a.tile.shape[-1:]) == (y.tile.elements, y.tile.shape[-1:])  # else the bias lies otherwise
        return sums if same and not sums.taken and self.writers["acc"].only(*a.extent) == producer else None

    def _follow_accumulators(self, number: int, site: Site, queue: str, located: dict[str, Located]) -> None:
        """Note who reads which sums, who took them as float32, and what the last matrix instruction offers."""
        result, *others = located.values()
        reads = [at for at in (*others, *((result,) if site.attributes.get("accumulate") else ())) if at.tile.space == "acc"]
        for at in reads:
            for writer in self.writers["acc"].all(*at.extent):
                self.readers.setdefault(writer, set()).add(number)
        if self.latest is not None and site.sums is not None and site.sums.taken:
            self.takers.append((self.latest[0], number, site.sums))
        if queue == "mm":
            self.latest = (number, result, site.offered[0]) if site.offered else None

    def _bind_host(
        self, number: int, instruction: Instruction, views: dict[str, Array], located: dict[str, Located], attributes: dict[str, Any]
    ) -> Run:
        """Instructions of the host queue: at most one tile, read or written."""
        if "y" in located:
            self.writers["dram"].write(*located["y"].extent, number)
        return self.kernels[instruction.name](Site(instruction, views, attributes, self.scratch, self.memo, host=self.host))

    def _decode(self, instruction: Instruction) -> Decoded:
        decoded = self._decoded.get(id(instruction))
        if decoded is None:
            decoded = self._decoded[id(instruction)] = decode(instruction)
            y = decoded.tiles.get("y")
            if y is not None and writes_twice(y.storage.shape, y.storage.strides, DTYPES[y.dtype]):
                told = f"{instruction.name}: elements of the result share bytes"
                raise RuntimeFault(told, line=instruction.line, hint="use strides that keep them apart")
        return decoded

    def _snapshots(
        self, instruction: Instruction, result: tuple[str, Located], others: list[tuple[str, Located]], views: dict[str, Array]
    ) -> list[tuple[Array, Array]]:
        """Replace operands that the result partly overwrites by copies, as (copy, original): an instruction reads before it writes."""
        y = result[1]
        low, high = y.extent
        copies = []
        for name, at in others:
            if at.tile.space != y.tile.space or at.extent[0] >= high or at.extent[1] <= low:
                continue
            same = (at.address, at.tile.strides, at.tile.shape) == (y.address, y.tile.strides, y.tile.shape)
            if same and instruction.name in ELEMENTWISE and views[name].itemsize == views[result[0]].itemsize:
                continue
            original = views[name]
            views[name] = np.empty(original.shape, original.dtype)
            copies.append((views[name], original))
        return copies

    def _unpacking(
        self, instruction: Instruction, located: dict[str, Located], views: dict[str, Array], known: dict[str, tuple[Any, Array]]
    ) -> list[Run]:
        """Replace packed operands by their values; what then must be done before each execution: nothing where the bytes are constants.

        A load that leaves them packed moves the bytes as they are.
        """
        if all(at.tile.packing is not None for at in located.values()):
            return []
        steps = []
        for name, at in located.items():
            if at.tile.packing is None:
                continue
            if name in known:
                views[name] = known[name][1]
            elif at.tile.space == "dram" and self.known_order and self._is_constant(at):
                views[name] = self._unpacked(at, instruction.line)
            else:
                stored, values = views[name], np.empty(at.tile.shape, np.int8)
                views[name] = values
                steps.append(_refresh(values, at.tile, stored, instruction.line))
        return steps

    def _unpacked(self, at: Located, line: int) -> Array:
        """The values of weights that lie packed in the constants, unpacked once."""
        key = ("unpacked", at.address, at.tile.packing, at.tile.shape)
        if key not in self.memo:
            self.memo[key] = unpack(at.tile, self.memories["dram"].view(at.tile, at.address), line=line)
        values: Array = self.memo[key]
        return values

    def _is_constant(self, at: Located) -> bool:
        low, high = at.extent
        return self._constants[0] <= low and high <= self._constants[1]

    def _known(self, operands: dict[str, Located], line: int) -> dict[str, tuple[Any, Array]]:
        """Operands that hold the same constants in every run."""
        found = {}
        for name, at in operands.items():
            if name in CONSTANT_OPERANDS and at.tile.space == "spm" and (constant := self._constant(at, line)) is not None:
                found[name] = constant
        return found

    def _constant(self, at: Located, line: int) -> tuple[Any, Array] | None:
        """(key, content) of a tile whose bytes were all loaded by one instruction from the program's constants, if so.

        Seen where it lies in the constants, or as a copy where the load rearranged it; copies take no more memory than the constants.
        """
        loaded = self.loads.get(self.writers["spm"].only(*at.extent))
        if loaded is None:
            return None
        y, x = loaded
        if x.tile.packing is not None:
            return self._packed_constant(at, y, x, line)
        offset, origin = at.address - y.address, y.extent[0]
        if y.tile.is_dense and x.tile.is_dense and (x.address + offset) % NUMPY[at.tile.dtype].itemsize == 0:
            there = replace(at.tile, space="dram")
            return (x.address + offset, there.dtype, there.shape, there.strides), self.memories["dram"].view(there, x.address + offset)
        key = (x.address, x.tile.strides, y.tile.shape, y.tile.strides, y.tile.dtype, offset, at.tile.dtype, at.tile.shape, at.tile.strides)
        memo = ("content", key)
        if memo not in self.memo:
            spent = self.memo.get("bytes", 0)
            if spent + at.tile.bytes > self._constants[1] - self._constants[0]:
                return None
            self.memo["bytes"] = spent + at.tile.bytes
            image = Memory("spm", y.extent[1] - origin + 8)
            shift = origin % 8  # keep the alignment of the original
            target = image.view(y.tile, y.address - origin + shift)
            np.copyto(target, self.memories["dram"].view(x.tile, x.address))
            covered = image.view(at.tile, at.address - origin + shift)
            self.memo[memo] = covered.copy() if y.tile.elements * NUMPY[y.tile.dtype].itemsize == y.extent[1] - origin else None
        content = self.memo[memo]
        return None if content is None else (key, content)

    def _packed_constant(self, at: Located, y: Located, x: Located, line: int) -> tuple[Any, Array] | None:
        """(key, values) of a tile that is all of what was loaded, packed or unpacked, from packed constants."""
        whole = at.address == y.address and at.tile.shape == x.tile.shape and at.tile.dtype == x.tile.dtype
        if not whole or at.tile.packing != y.tile.packing or (y.tile.packing is None and not (y.tile.is_dense and at.tile.is_dense)):
            return None
        return (x.address, x.tile.packing, x.tile.shape), self._unpacked(x, line)

    def _window(self, instruction: Instruction, located: dict[str, Located], attributes: dict[str, Any]) -> Any:
        """What tells the windows that a conv reads from all others: the tile, the way it is read, and who wrote its bytes last."""
        if instruction.name != "conv":
            return None
        x, w, y = (located[name] for name in ("x", "w", "y"))
        way = (x.address, x.tile.dtype, x.tile.shape, x.tile.strides, w.tile.shape[:3], y.tile.shape[:2])
        way += tuple(attributes[name] for name in ("stride", "dilation", "pad", "zero", "groups"))
        return way, self.writers["spm"].last(*x.extent)

    def _record(self, number: int, instruction: Instruction, located: dict[str, Located]) -> None:
        """Note what the step writes, and whether it is a load of constants."""
        names = list(located)
        result = located[names[0]]
        self.writers[result.tile.space].write(*result.extent, number)
        if instruction.name == "ld" and self._is_constant(located[names[1]]):
            self.loads[number] = (result, located[names[1]])


def _refresh(values: Array, tile: Tile, stored: Array, line: int) -> Run:
    return lambda: np.copyto(values, unpack(tile, stored, line=line))


def written_ranges(steps: Iterable[Step]) -> dict[str, list[tuple[int, int]]]:
    """The bytes of each memory that the steps write, as sorted disjoint [low, high) ranges."""
    ranges: dict[str, set[tuple[int, int]]] = {}
    for step in steps:
        tiles = step.line.instruction.tiles
        if tiles and SPEC[step.line.instruction.name].operands[0].role != "read":
            ranges.setdefault(tiles[0].space, set()).add(extent(tiles[0], address_at(tiles[0], step.iterations)))
    return {space: merge(found) for space, found in ranges.items()}
