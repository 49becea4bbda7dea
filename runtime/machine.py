"""The virtual NPU: load a program once, run it often.

The one big idea: loading turns the program into a flat list of closures over the machine's memories; running writes the inputs,
calls them in order, and reads the outputs. Values never depend on timing, and cycles never on values, so both are had apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from isa.program import Instruction, Program, TensorRecord, address_at
from runtime import boundary
from runtime.binder import Binder, written_ranges
from runtime.decode import decode
from runtime.errors import RuntimeFault
from runtime.host import Host, HostEngine
from runtime.kernels import kernels_of
from runtime.memory import Array, Memory, extent
from runtime.parallel import run_in_processes
from runtime.report import Report, make_report
from runtime.result import Result
from runtime.skipping import Meter
from runtime.stream import program_order, random_order, unrolled
from runtime.timing import Timeline, simulate

#: which named tensors to keep: all, some, or a function that takes (record, stored values) when the tensor's layer is complete
Dump = bool | Collection[str] | Callable[[TensorRecord, Array], None] | None


class Packaged(Protocol):
    """Anything that holds a program and the bytes of its constants, such as `isa.Package`."""

    @property
    def program(self) -> Program: ...
    @property
    def constants(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine right after one execution of an instruction, everything before it in line order done.

    `executed` instructions took until `cycle`; `operands` are that instruction's tiles, `memories` all bytes by space.
    """

    instruction: Instruction
    executed: int
    cycle: int
    operands: dict[str, Array]
    memories: dict[str, Array]


def _nothing() -> None:
    """A load that nobody reads."""


class Machine:
    """The NPU that a program's target describes, with the program loaded. One machine runs one inference at a time."""

    def __init__(self, program: Program | Packaged, constants: bytes | None = None, *, host: HostEngine | None = None, engine: str | None = None):
        """Load a package, or a program and its constants; `host` runs its host segments. Raises RuntimeFault when the program can't be run.

        `engine` is "numpy" or "numba" (the same bytes, sooner); without it numba is used if it is installed, see `kernels.kernels_of`.
        """
        if isinstance(program, Program):
            self.program, self.constants = program, constants or b""
        else:
            self.program, self.constants = program.program, program.constants
        program = self.program
        self._memo: dict[Any, Any] = {}  # what is made of constants, for program order
        self.host, self.engine, self._kernels = Host(host), engine, kernels_of(engine)
        self._check_sizes()
        target = program.target
        self._meter = Meter(target) if target.skips_inputs else None
        sizes = {"dram": program.dram_bytes, "spm": target.spm_bytes, "acc": target.acc_bytes}
        self.memories = {space: Memory(space, size) for space, size in sizes.items()}
        self.steps = unrolled(program)
        self._inputs = [(record, self._view(record)) for record in program.inputs]
        self._load_constants()
        self._outputs = [(record, self._view(record)) for record in program.outputs]
        self._named = {number: tuple((record, self._view(record)) for record in records) for number, records in self._tensors_by_layer().items()}
        self._order = program_order(self.steps)
        self._closures = self._bind(self._order, known_order=not self._constants_change)

    def run(self, inputs: Mapping[str, Any], *, order: str = "program", seed: int = 0, dump: Dump = None) -> Result:
        """One inference on {name: array of the model's shape}; the same inputs give the same bytes.

        `order="random"` executes one of the orders that queues and events allow, chosen by `seed`; `dump` then must be None.
        Raises RuntimeFault for inputs that do not fit.
        """
        if order not in ("program", "random"):
            raise RuntimeFault(f"unknown order {order!r}", hint="use 'program' or 'random'")
        self._write_inputs(inputs)
        tensors: dict[str, Array] = {}
        if order == "random":
            if dump is not None and dump is not False:
                raise RuntimeFault("tensors can't be kept in random order", hint="layers overlap there; use order='program'")
            for closure in self._bind(random_order(self.steps, seed), known_order=False):
                closure()
        elif dump is None or dump is False:
            for closure in self._closures:
                closure()
        else:
            self._run_layers(self._collector(dump, tensors))
        raw = {record.name: view.copy() for record, view in self._outputs}
        outputs = {record.name: boundary.to_real(record, raw[record.name]) for record, _ in self._outputs}
        return Result(outputs, raw, tensors, self._report_of_run())

    def run_until(self, inputs: Mapping[str, Any], line: int, *, turn: int = 1) -> Stop:
        """An inference up to the `turn`-th execution of a line of the program's text. Raises RuntimeFault when there is none."""
        positions = [position for position, index in enumerate(self._order) if self.steps[index].line.instruction.line == line]
        if not 1 <= turn <= len(positions):
            times = f"{len(positions)} time{'s' * (len(positions) != 1)}"
            raise RuntimeFault(f"line {line} is executed {times}, not {turn}", hint="give the line of an instruction, as `npucc disasm` numbers them")
        order = self._order[: positions[turn - 1] + 1]
        memories = self._memories_after(inputs, order)
        step = self.steps[order[-1]]
        tiles = decode(step.line.instruction).tiles
        operands = {name: self.memories[tile.space].view(tile, address_at(tile, step.iterations)).copy() for name, tile in tiles.items()}
        return Stop(step.line.instruction, len(order), int(self.timeline.ends[order[-1]]), operands, memories)

    def memories_after(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The bytes of every memory after an inference, uint8, by space."""
        return self._memories_after(inputs, self._order)

    def _memories_after(self, inputs: Mapping[str, Any], order: list[int]) -> dict[str, Array]:
        """`run` may leave out bytes that nothing reads; here every instruction stores its result."""
        self._write_inputs(inputs)
        for closure in self._bind(order, known_order=False):
            closure()
        return {space: memory.content() for space, memory in self.memories.items()}

    def run_many(self, samples: Iterable[Mapping[str, Any]], *, workers: int = 1, dump: Dump = None) -> Iterator[Result]:
        """One Result per sample, in order; with `workers` above 1 in as many processes (a script then needs its `if __name__ == "__main__"`).

        Each process computes in one thread. Raises RuntimeFault.
        """
        if workers <= 1:
            return (self.run(sample, dump=dump) for sample in samples)
        if callable(dump):
            raise RuntimeFault("several processes can't call one function for each tensor", hint="give dump the tensors' names, or use workers=1")
        found = run_in_processes(self.program, self.constants, samples, workers=workers, dump=dump, host=self.host.engine, engine=self.engine)
        return (Result(outputs, raw, tensors, self.report) for outputs, raw, tensors in found)

    @cached_property
    def timeline(self) -> Timeline:
        """When each instruction runs."""
        return simulate(self.program, self.constants)

    def _report_of_run(self) -> Report:
        """What the run before cost: on a target that skips zero inputs more than `report` knows."""
        if self._meter is None:
            return self.report
        return make_report(self.program, self.ran, seen=True)

    @property
    def ran(self) -> Timeline:
        """When each instruction ran in the last run."""
        return self.timeline if self._meter is None else simulate(self.program, self.constants, self._meter.seen)

    @cached_property
    def report(self) -> Report:
        """Cycles, bytes and energy of one inference; they do not depend on the inputs (on a target that skips zero inputs: at most)."""
        return make_report(self.program, self.timeline)

    def _check_sizes(self) -> None:
        program = self.program
        low, high = program.constants_address, program.constants_address + program.constants_bytes
        if len(self.constants) != program.constants_bytes:
            raise RuntimeFault(f"the constants have {len(self.constants)} bytes", hint=f"the program says {program.constants_bytes}")
        if low < 0 or high > program.dram_bytes:
            raise RuntimeFault(f"the constants lie at {low} to {high}", hint=f"the program uses {program.dram_bytes} bytes of dram")
        if program.dram_bytes > program.target.dram_bytes:
            raise RuntimeFault(f"the program uses {program.dram_bytes} bytes of dram", hint=f"its target has {program.target.dram_bytes}")

    def _load_constants(self) -> None:
        dram = self.memories["dram"]
        place = dram.write if self._constants_change else dram.fix
        place(self.program.constants_address, self.constants)

    @cached_property
    def _dirty(self) -> dict[str, list[tuple[int, int]]]:
        """The bytes that a run may change, by memory."""
        ranges = written_ranges(self.steps)
        ranges["dram"] = ranges.get("dram", []) + [extent(record.tile, record.tile.address) for record in self.program.inputs]
        return ranges

    @cached_property
    def _constants_change(self) -> bool:
        """Whether the program or its inputs write over its constants."""
        low, high = self.program.constants_address, self.program.constants_address + self.program.constants_bytes
        return any(first < high and low < last for first, last in self._dirty["dram"])

    def _view(self, record: TensorRecord) -> Array:
        return self.memories[record.tile.space].view(record.tile, record.tile.address)

    def _tensors_by_layer(self) -> dict[int, list[TensorRecord]]:
        """Named tensors by the number of the layer that completes them; -1 for those that hold before the first."""
        numbers, last = {"": -1}, -1
        for number, layer in enumerate(self.program.layers):
            last = number if layer.body else last  # a layer without instructions is complete with the one before it
            numbers[layer.name] = last
        found: dict[int, list[TensorRecord]] = {}
        for record in self.program.tensors:
            if record.layer not in numbers:
                raise RuntimeFault(f"tensor {record.name!r} belongs to layer {record.layer!r}, which does not exist")
            found.setdefault(numbers[record.layer], []).append(record)
        return found

    def _bind(self, order: list[int], *, known_order: bool) -> list[Callable[[], None]]:
        binder = Binder(self.program, self.memories, self._memo, known_order=known_order, host=self.host, kernels=self._kernels, meter=self._meter)
        closures = [binder.bind(number, self.steps[index], index) for number, index in enumerate(order)]
        binder.finish()
        if known_order:
            for number in binder.unread((*self.program.tensors, *self.program.outputs)):
                closures[number] = _nothing
        return closures

    def _write_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Bring the memories to the state before a run: zero, with constants and inputs."""
        boundary.check_names(inputs, self.program.inputs)
        stored = [boundary.to_stored(record, inputs[record.name], view.dtype) for record, view in self._inputs]
        for space, ranges in self._dirty.items():
            self.memories[space].clear(ranges)
        if self._constants_change:
            self._load_constants()
        for (_, view), values in zip(self._inputs, stored, strict=True):
            np.copyto(view, values)

    def _run_layers(self, keep: Callable[[TensorRecord, Array], None]) -> None:
        """Run in program order, handing each named tensor over when the last instruction of its layer is done."""
        left = [0] * len(self.program.layers)
        for step in self.steps:
            left[step.layer] += 1
        for record, view in self._named.get(-1, ()):
            keep(record, view)
        for index, closure in zip(self._order, self._closures, strict=True):
            closure()
            layer = self.steps[index].layer
            left[layer] -= 1
            if left[layer] == 0:
                self._hand_over(layer, keep)

    def _hand_over(self, layer: int, keep: Callable[[TensorRecord, Array], None]) -> None:
        for record, view in self._named.get(layer, ()):
            keep(record, view)

    def _collector(self, dump: Dump, tensors: dict[str, Array]) -> Callable[[TensorRecord, Array], None]:
        """What to do with a named tensor once it is complete. Raises RuntimeFault for unknown names."""
        if callable(dump):
            return dump
        known = {record.name for record in self.program.tensors}
        wanted = set(known if dump is True else dump or ())
        if unknown := sorted(wanted - known):
            raise RuntimeFault(f"the program has no tensor {', '.join(map(repr, unknown))}", hint=f"it names: {', '.join(sorted(known)) or 'none'}")

        def keep(record: TensorRecord, stored: Array) -> None:
            if record.name in wanted:
                tensors[record.name] = stored.copy()

        return keep
