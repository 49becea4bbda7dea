"""When each instruction runs, and what each cycle of the run was spent on.

The one big idea: the same instructions that compute the values run here on timed queues. A queue is in order; an instruction
starts when its queue is free and every event it waits for was given; events are given when the signalling instruction ends.

DRAM is one channel, shared by `ld` and `st`. A queue may issue the request of its next transfer as soon as the one before
starts to stream. A transfer issued at t starts to stream at max(t + latency, channel free), in the order of issue (at equal
times `ld` before `st`), and occupies the channel for its burst cycles. So latency costs only when the channel had run dry.

Every cycle of the run belongs to one layer and one of five parts. In a cycle in which
    the matrix engine works     its layer: ideal (products / peak), fill (array filling and draining), or underuse (the rest)
    only the vector engine does its layer: underuse (the array idles meanwhile); so it is while only the host works
    only the DRAM channel does  the layer of the transfer that streams: dma_stall
    nothing does                sync_stall of the layer that works next: everyone waits for an answer (a request's latency after an event)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isa.program import QUEUES, Program, address_at
from isa.spec import SPEC
from isa.target import Target
from isa.tokens import print_tile
from runtime.costs import Cost, Product, Work, cost, product_of
from runtime.decode import decode
from runtime.errors import RuntimeFault
from runtime.skipping import Loaded
from runtime.stream import EventKey, Step, program_order, unrolled

Integers = NDArray[np.int64]
PARTS = ("ideal", "underuse", "fill", "dma_stall", "sync_stall")


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer's share of the run, in cycles: the five parts sum to it."""

    ideal: int
    underuse: int
    fill: int
    dma_stall: int
    sync_stall: int
    work: Work
    matrix: int = 0  # cycles in which the matrix engine works
    saved: int = 0  # how many more they would be without skipping

    @property
    def cycles(self) -> int:
        return self.ideal + self.underuse + self.fill + self.dma_stall + self.sync_stall


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and end cycle of every dynamic instruction, in line order, and the layers' shares of the run.

    A transfer starts with its request; `begins` tells when it begins to stream (for the other engines it equals `starts`).
    """

    program: Program
    steps: list[Step]
    starts: Integers
    begins: Integers
    ends: Integers
    total_cycles: int
    layers: tuple[LayerTime, ...]

    def chrome_trace(self) -> dict[str, Any]:
        """The run in Chrome's trace format (one cycle is shown as one microsecond): open it in Perfetto or chrome://tracing."""
        tracks = [queue for queue in QUEUES if any(step.line.queue == queue for step in self.steps)]
        names = [{"ph": "M", "pid": 0, "tid": track, "name": "thread_name", "args": {"name": queue}} for track, queue in enumerate(tracks)]
        number = {queue: track for track, queue in enumerate(tracks)}
        events = [
            {
                "ph": "X", "pid": 0, "tid": number[step.line.queue], "name": step.line.instruction.name, "cat": self.program.layers[step.layer].name,
                "ts": start, "dur": end - start,
                "args": {"layer": self.program.layers[step.layer].name, "line": step.line.instruction.line, "tiles": _tiles(step)},
            }
            for step, start, end in zip(self.steps, self.starts.tolist(), self.ends.tolist(), strict=True)
        ]  # fmt: skip
        return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"target": self.program.target.name, "unit": "1 us = 1 cycle"}}


def _tiles(step: Step) -> str:
    """The operands of one execution, as the text writes them."""
    tiles = step.line.instruction.tiles
    return ", ".join(print_tile(replace(tile, address=address_at(tile, step.iterations), steps=())) for tile in tiles)


def simulate(program: Program, constants: bytes = b"", seen: Mapping[int, Cost] | None = None) -> Timeline:
    """Run the program on timed queues. Raises RuntimeFault on deadlock and on operands that do not fit the table.

    Only a target that skips zeros looks at values: of weights among the `constants`, and of a run's inputs, the costs `seen` by step.
    Without them each instruction takes the most that it can.
    """
    steps = unrolled(program)
    by_line: dict[int, Cost] = {}
    costs = []
    for step in steps:
        known = by_line.get(id(step.line))
        if known is None:
            known = by_line[id(step.line)] = cost(step.line.instruction, program.target)
        costs.append(known)
    if program.target.skip != "none":
        _skip(program, constants, steps, costs)
    for number, known in (seen or {}).items():
        costs[number] = known
    clock = _Clock(steps, costs, program.target)
    clock.run()
    layers = _attribute(program, steps, costs, clock.begins, clock.ends)
    return Timeline(program, steps, clock.starts, clock.begins, clock.ends, int(clock.ends.max(initial=0)), layers)


def _skip(program: Program, constants: bytes, steps: list[Step], costs: list[Cost]) -> None:
    """Replace the costs of matrix instructions by what skipping leaves of them."""
    loaded = Loaded(constants, program.constants_address)
    products: dict[int, Product] = {}
    for number, step in enumerate(steps):
        if step.line.queue == "mm":
            if id(step.line) not in products:
                decoded = decode(step.line.instruction)
                products[id(step.line)] = product_of(step.line.instruction.name, decoded.tiles, decoded.attributes)
            if products[id(step.line)].packing is not None:
                costs[number] = loaded.cost(step, products[id(step.line)], program.target)
        loaded.follow(step)


class _Clock:
    """The queues in time. Repeatedly the instruction that can start first is started; later events can't make an earlier one possible."""

    def __init__(self, steps: list[Step], costs: list[Cost], target: Target):
        self.steps, self.costs, self.latency = steps, costs, target.dram_latency
        self.queues: list[list[int]] = [[] for _ in QUEUES]
        numbers: dict[EventKey, int] = {}
        self.waits: dict[int, tuple[int, ...]] = {}
        self.signals: dict[int, tuple[int, ...]] = {}
        queue_number = {queue: number for number, queue in enumerate(QUEUES)}
        for index, step in enumerate(steps):
            line = step.line
            self.queues[queue_number[line.queue]].append(index)
            if id(line) not in self.waits:
                self.waits[id(line)] = tuple(numbers.setdefault(event, len(numbers)) for event in line.waits)
                self.signals[id(line)] = tuple(numbers.setdefault(event, len(numbers)) for event in line.signals)
        self.given: list[list[int]] = [[] for _ in numbers]  # times at which each event was given
        self.taken = [0] * len(numbers)  # how many of them were waited for
        self.heads = [0] * len(QUEUES)
        self.free = [0] * len(QUEUES)  # when the queue may start (a DMA: issue) its next instruction
        self.last_end = [0] * len(QUEUES)
        self.channel_free = 0
        self.starts, self.begins, self.ends = (np.zeros(len(steps), np.int64) for _ in range(3))

    def run(self) -> None:
        """Find start and end of every step. Raises RuntimeFault on deadlock."""
        possible: list[int | None] = [self._possible(queue) for queue in range(len(QUEUES))]
        for _ in self.steps:
            queue, when = -1, -1
            for number, time in enumerate(possible):
                if time is not None and (when < 0 or time < when):
                    queue, when = number, time
            if queue < 0:
                program_order(self.steps)  # tells which instructions wait for each other
                raise RuntimeFault("deadlock: no queue can go on", hint="every wait needs a signal that can be given before it")
            given = self._start(queue, when)
            possible[queue] = self._possible(queue)
            if given:
                possible = [self._possible(number) if time is None else time for number, time in enumerate(possible)]

    def _possible(self, queue: int) -> int | None:
        """When the queue's next instruction can start; None while that is unknown, or there is none."""
        if self.heads[queue] >= len(self.queues[queue]):
            return None
        line = self.steps[self.queues[queue][self.heads[queue]]].line
        when = self.free[queue]
        waits = self.waits[id(line)]
        for position, event in enumerate(waits):
            number = self.taken[event] + waits[:position].count(event)
            if number >= len(self.given[event]):
                return None
            when = max(when, self.given[event][number])
        return when

    def _start(self, queue: int, when: int) -> bool:
        """Start the queue's next instruction at `when`; whether it gives any event."""
        index = self.queues[queue][self.heads[queue]]
        self.heads[queue] += 1
        line, cycles = self.steps[index].line, self.costs[index].cycles
        if QUEUES[queue] in ("ld", "st") or SPEC[line.instruction.name].timing == "transfer":
            begin = max(when + self.latency, self.channel_free)
            start, end = max(when, self.last_end[queue]), begin + cycles
            self.free[queue], self.channel_free = end if QUEUES[queue] == "host" else begin, end
        else:
            start, begin, end = when, when, when + cycles
            self.free[queue] = end
        self.last_end[queue] = end
        self.starts[index], self.begins[index], self.ends[index] = start, begin, end
        for event in self.waits[id(line)]:
            self.taken[event] += 1
        signals = self.signals[id(line)]
        for event in signals:
            self.given[event].append(end)
        return bool(signals)


def _attribute(program: Program, steps: list[Step], costs: list[Cost], begins: Integers, ends: Integers) -> tuple[LayerTime, ...]:
    """Each layer's parts, by the rule at the top of this file."""
    count, peak = len(program.layers), program.target.macs_per_cycle
    matrix, fill, saved, work = [0] * count, [0] * count, [0] * count, [Work()] * count
    executed: dict[tuple[int, int], tuple[Cost, int]] = {}
    for step, each in zip(steps, costs, strict=True):
        if step.line.queue == "mm":
            matrix[step.layer] += each.cycles
            fill[step.layer] += each.fill
            saved[step.layer] += each.saved
        key = (step.layer, id(each))
        executed[key] = (each, executed[key][1] + 1 if key in executed else 1)
    for (layer, _), (each, times) in executed.items():
        work[layer] = work[layer] + each.work.times(times)
    vector, stall, idle = _idle_array(steps, begins, ends, count)
    layers = []
    for layer in range(count):
        ideal = work[layer].macs // peak
        underuse = matrix[layer] - fill[layer] - ideal + int(vector[layer])
        layers.append(LayerTime(ideal, underuse, fill[layer], int(stall[layer]), int(idle[layer]), work[layer], matrix[layer], saved[layer]))
    return tuple(layers)


def _idle_array(steps: list[Step], begins: Integers, ends: Integers, layers: int) -> tuple[Integers, Integers, Integers]:
    """Cycles in which the matrix engine does not work, per layer: (vector engine works, only the DRAM channel does, nothing does)."""
    shares: tuple[Integers, Integers, Integers] = (np.zeros(layers, np.int64), np.zeros(layers, np.int64), np.zeros(layers, np.int64))
    if not steps:
        return shares
    queue_of, layer_of = np.array([QUEUES.index(step.line.queue) for step in steps]), np.array([step.layer for step in steps])
    times = np.unique(np.concatenate(([0], begins, ends)))
    cuts, lengths = times[:-1], np.diff(times)
    left = np.ones(len(cuts), bool)  # segments not yet given to anyone
    for queue, share in (("mm", None), ("vec", shares[0]), ("host", shares[0]), ("ld", shares[1]), ("st", shares[1])):
        own = np.flatnonzero(queue_of == QUEUES.index(queue))
        if not len(own):
            continue
        latest = np.searchsorted(begins[own], cuts, side="right") - 1
        busy = left & (latest >= 0) & (ends[own][latest] > cuts)
        left &= ~busy
        if share is not None:
            np.add.at(share, layer_of[own][latest[busy]], lengths[busy])
    in_time = np.lexsort((np.arange(len(begins)), begins))
    following = in_time[np.searchsorted(begins[in_time], cuts[left], side="left")]
    np.add.at(shares[2], layer_of[following], lengths[left])
    return shares
