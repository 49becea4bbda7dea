"""What one inference costs, as numbers that add up.

The one big idea: every total is the sum over layers, and every layer's cycles are the sum of five parts; nothing is estimated twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isa.program import QUEUES, Instruction, Loop, Program
from runtime.costs import Work
from runtime.energy import SOURCES, energy
from runtime.timing import LayerTime, Timeline


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer: `cycles` = ideal + underuse + fill + dma_stall + sync_stall. `nodes` are the ONNX nodes it serves."""

    name: str
    op: str
    nodes: tuple[str, ...]
    cycles: int
    ideal: int
    underuse: int
    fill: int
    dma_stall: int
    sync_stall: int
    macs: int
    dram_bytes: int
    energy_pj: float
    skipped_macs: int = 0
    matrix_cycles: int = 0
    saved_cycles: int = 0


@dataclass(frozen=True, slots=True)
class Counter:
    """One kind of instruction: how often it ran on its engine, and for how many cycles the engine was at work for it."""

    instruction: str
    engine: str
    count: int
    cycles: int


@dataclass(frozen=True, slots=True)
class Report:
    """One inference. `utilization` is ideal multiply-accumulate cycles over cycles; `energy` is in picojoules by component.

    `macs` are done, `skipped_macs` are those that an array without skipping would do besides; `array_utilization` is `macs` over what the
    array could do while it works (`matrix_cycles`), `array_utilization_unskipped` the same without skipping: the share of useful work there.
    `at_most`: the target skips zeros of the inputs, and none were seen, so cycles, MACs and energy are upper bounds.
    """

    cycles: int
    macs: int
    utilization: float
    dram_read_bytes: int
    dram_write_bytes: int
    spm_peak_bytes: int
    energy_pj: float
    energy: dict[str, float]
    energy_sources: dict[str, str]
    layers: tuple[LayerReport, ...]
    counters: tuple[Counter, ...]
    skipped_macs: int = 0
    matrix_cycles: int = 0
    array_utilization: float = 0.0
    array_utilization_unskipped: float = 0.0
    at_most: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return asdict(self)


def make_report(program: Program, timeline: Timeline, *, seen: bool = False) -> Report:
    """Gather what the timeline counted; `seen`: it knows the inputs of a run."""
    total = sum((layer.work for layer in timeline.layers), Work())
    components = energy(total, program.target)
    possible = timeline.total_cycles * program.target.macs_per_cycle
    layers = tuple(_layer_report(program, number, time) for number, time in enumerate(timeline.layers))
    busy, saved = sum(layer.matrix for layer in timeline.layers), sum(layer.saved for layer in timeline.layers)
    peak = program.target.macs_per_cycle
    return Report(
        cycles=timeline.total_cycles, macs=total.macs, utilization=total.macs / possible if possible else 0.0,
        dram_read_bytes=total.dram_read_bytes, dram_write_bytes=total.dram_write_bytes, spm_peak_bytes=spm_peak(program),
        energy_pj=sum(components.values()), energy=components, energy_sources=dict(SOURCES), layers=layers,
        counters=count_instructions(timeline), skipped_macs=total.skipped_macs, matrix_cycles=busy,
        array_utilization=total.macs / (busy * peak) if busy else 0.0,
        array_utilization_unskipped=total.macs / ((busy + saved) * peak) if busy else 0.0,
        at_most=program.target.skips_inputs and not seen,
    )  # fmt: skip


def count_instructions(timeline: Timeline) -> tuple[Counter, ...]:
    """One row per kind, in the order of the queues, the longest first."""
    engines = {step.line.instruction.name: step.line.queue for step in timeline.steps}
    kinds = {name: number for number, name in enumerate(engines)}
    kind_of = np.array([kinds[step.line.instruction.name] for step in timeline.steps], np.int64)
    counts = np.bincount(kind_of, minlength=len(kinds)).tolist()
    cycles = np.zeros(len(kinds), np.int64)
    np.add.at(cycles, kind_of, timeline.ends - timeline.begins)
    rows = [Counter(name, engine, counts[kinds[name]], int(cycles[kinds[name]])) for name, engine in engines.items()]
    return tuple(sorted(rows, key=lambda row: (QUEUES.index(row.engine), -row.cycles, row.instruction)))


def _layer_report(program: Program, number: int, time: LayerTime) -> LayerReport:
    layer = program.layers[number]
    return LayerReport(
        name=layer.name, op=layer.op, nodes=layer.nodes, cycles=time.cycles, ideal=time.ideal, underuse=time.underuse, fill=time.fill,
        dma_stall=time.dma_stall, sync_stall=time.sync_stall, macs=time.work.macs, dram_bytes=time.work.dram_bytes,
        energy_pj=sum(energy(time.work, program.target).values()), skipped_macs=time.work.skipped_macs, matrix_cycles=time.matrix,
        saved_cycles=time.saved,
    )  # fmt: skip


def spm_peak(program: Program) -> int:
    """One past the highest scratchpad byte that any instruction touches."""
    return max((_highest(layer.body, ()) for layer in program.layers), default=0)


def _highest(body: tuple[Instruction | Loop, ...], counts: tuple[int, ...]) -> int:
    peak = 0
    for item in body:
        if isinstance(item, Loop):
            peak = max(peak, _highest(item.body, (*counts, item.count)))
            continue
        for tile in item.tiles:
            if tile.space == "spm":
                reach = sum(max(0, step * (count - 1)) for step, count in zip(tile.steps, counts, strict=False))
                peak = max(peak, tile.extent()[1] + reach)
    return peak
