"""From an integer graph to a program: each layer lowered in turn, then events, then loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from isa.program import Instruction, Layer, Program, TensorRecord, Tile
from isa.target import Target
from npucc import ops
from npucc.errors import CompileError
from npucc.graph import Graph, Node
from npucc.lowering.convolution import lower_conv, lower_conv_transpose
from npucc.lowering.elementwise import lower_elementwise
from npucc.lowering.emitter import ConstantPool, Emitter
from npucc.lowering.gathering import lower_gather
from npucc.lowering.hosting import host_buffers, lower_host
from npucc.lowering.layers import Group, group_nodes
from npucc.lowering.movement import lower_concat, lower_pad, lower_resize, lower_view
from npucc.lowering.placement import ALIGNMENT, Buffer, Placement, allocate, assign_views, by_benefit, by_size
from npucc.lowering.product import lower_matmul
from npucc.lowering.reduction import lower_reduce
from npucc.lowering.roll import roll
from npucc.lowering.rows import lower_layer_norm, lower_softmax
from npucc.lowering.synchronize import synchronize
from npucc.lowering.views import View
from npucc.lowering.window import lower_interpolate, lower_pool
from npucc.operations import node_macs
from runtime.timing import simulate

Progress = Callable[[str, int, int], None]
CONSTANTS_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program and the bytes of its constants."""

    program: Program
    constants: bytes


#: operator → how its layer is lowered
LOWERINGS: dict[str, Callable[[Emitter, Group], None]] = {
    "conv": lower_conv,
    "conv_transpose": lower_conv_transpose,
    "matmul": lower_matmul,
    "max_pool": lower_pool,
    "average_pool": lower_pool,
    "softmax": lower_softmax,
    "layer_norm": lower_layer_norm,
    "interpolate": lower_interpolate,
    "resize": lower_resize,
    "concat": lower_concat,
    "pad": lower_pad,
    "gather": lower_gather,
    "host": lower_host,
    **dict.fromkeys(("reduce_mean", "reduce_sum", "reduce_max", "reduce_min"), lower_reduce),
    **dict.fromkeys(("slice", "transpose", "reshape", "expand"), lower_view),
    **{record.name: lower_elementwise for record in ops.TABLE if record.elementwise},
}


#: shares of the scratchpad that may hold whole tensors: each is compiled, the fewest simulated cycles win
RESIDENT_SHARES = (0.5, 0.75, 0.92)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for every attempt: the graph, its layers, and the buffers that need a place."""

    graph: Graph
    target: Target
    views: Mapping[str, View]
    groups: Sequence[Group]
    buffers: Sequence[Buffer]
    accesses: Mapping[str, int]  # of each buffer
    progress: Progress | None


@dataclass(slots=True)
class _Attempt:
    """One placement of the buffers: its constants and, layer by layer, its instructions."""

    placement: Placement
    constants_address: int
    pool: ConstantPool = field(default_factory=ConstantPool)
    layers: list[Emitter] = field(default_factory=list)  # one per layer, with its instructions


def lower(graph: Graph, target: Target, *, progress: Progress | None = None, fuse: bool = True, shares: Sequence[float] = RESIDENT_SHARES) -> Lowered:
    """Compile an integer graph; the program with the fewest simulated cycles wins. Raises CompileError.

    `fuse=False` gives every node its own layer (same values, more traffic); `shares` of the scratchpad may hold whole tensors.
    """
    job = _job(graph, target, progress, fuse=fuse)
    placements = _placements(job, shares)
    attempts = (_finish(job, _lower_with(job, dict(residents))) for residents in placements)  # the best and the newest are held, not all
    alone = len(placements) == 1
    lowered = next(attempts) if alone else min(attempts, key=lambda attempt: simulate(attempt.program, attempt.constants).total_cycles)
    layers = tuple(replace(layer, body=roll(layer.body)) for layer in lowered.program.layers)
    return replace(lowered, program=replace(lowered.program, layers=layers))


def layer_cycles(graph: Graph, target: Target) -> list[tuple[tuple[Node, ...], int]]:
    """The nodes of each layer and the cycles that it takes, compiled with one placement only. Raises CompileError."""
    job = _job(graph, target)
    (residents,) = _placements(job, RESIDENT_SHARES[1:2])
    lowered = _finish(job, _lower_with(job, dict(residents)))
    times = simulate(lowered.program, lowered.constants).layers
    return [(group.nodes, time.cycles) for group, time in zip(job.groups, times, strict=True)]


def _job(graph: Graph, target: Target, progress: Progress | None = None, *, fuse: bool = True) -> _Job:
    views = assign_views(graph)
    groups = group_nodes(graph, views, fuse=fuse)
    buffers, accesses = lifetimes(graph, views, groups)
    return _Job(graph, target, views, groups, buffers, accesses, progress)


def _placements(job: _Job, shares: Sequence[float]) -> list[dict[str, int]]:
    """Tensors that stay in the scratchpad, with their addresses, for each share of it that they may take; every set once."""
    in_dram = {job.views[node.inputs[0]].buffer for node in job.graph if node.op == "gather" and node.inputs[0] in job.views}  # its instruction
    in_dram |= host_buffers(job.graph, job.views)
    last = len(job.groups)
    movable = by_benefit((b for b in job.buffers if b.first >= 0 and b.last < last and b.name not in in_dram), job.accesses)
    placements: list[dict[str, int]] = []
    for share in shares:
        residents, _ = allocate(movable, int(share * job.target.spm_bytes))
        if residents not in placements:
            placements.append(residents)
    return placements


def _lower_with(job: _Job, residents: dict[str, int]) -> _Attempt:
    """Compile with the given buffers at the given scratchpad addresses; those that leave a layer no room go back to DRAM."""
    while True:
        attempt = _place(job, residents)
        crowded = _lower_layers(job, attempt, residents)
        if not crowded:
            return attempt
        for buffer in crowded:
            residents.pop(buffer)


def _place(job: _Job, residents: Mapping[str, int]) -> _Attempt:
    addresses, dram_bytes = allocate(by_size(b for b in job.buffers if b.name not in residents))
    places = {name: ("dram", address) for name, address in addresses.items()} | {name: ("spm", address) for name, address in residents.items()}
    return _Attempt(Placement(job.views, places), -(-dram_bytes // CONSTANTS_ALIGNMENT) * CONSTANTS_ALIGNMENT)


def _lower_layers(job: _Job, attempt: _Attempt, residents: Mapping[str, int]) -> list[str]:
    """Lower each layer; stop at one that has no room and return the resident buffers that are in its way."""
    held_at: list[list[Buffer]] = [[] for _ in job.groups]
    for buffer in job.buffers:
        if buffer.name in residents:
            for index in range(buffer.first, buffer.last + 1):
                held_at[index].append(buffer)
    for index, (group, held) in enumerate(zip(job.groups, held_at, strict=True)):
        if job.progress is not None:
            job.progress("lower", index, len(job.groups))
        reserved = max((-(-(residents[b.name] + b.bytes) // ALIGNMENT) * ALIGNMENT for b in held), default=0)
        emitter = Emitter(job.graph, job.target, attempt.placement, attempt.pool, attempt.constants_address, reserved, from_top=index % 2 == 1)
        try:
            LOWERINGS[group.anchor.op](emitter, group)
        except CompileError as error:
            if held:
                return [buffer.name for buffer in held]
            raise CompileError(error.message, node=error.node or " + ".join(group.sources), hint=error.hint) from None
        attempt.layers.append(emitter)
    return []


def _close_ranks(layers: Sequence[Emitter]) -> list[list[Instruction]]:
    """Every layer's instructions, those that work at the top of the scratchpad moved down to just above their neighbours' tiles.

    Neighbours still share no byte where they did not before, and the program's highest address says what it needs.
    """
    needed = max((layer.reserved + layer.spm_peak for layer in layers), default=0)
    for left, right in pairwise(layers):
        needed = max(needed, max(left.reserved, right.reserved) + left.spm_peak + right.spm_peak)
    if not layers:
        return []
    unit = max(ALIGNMENT, layers[0].target.alignment)
    shift = max(layers[0].top - -(-needed // unit) * unit, 0)
    return [[_moved_down(line, layer, shift) for line in layer.instructions] if layer.from_top and shift else layer.instructions for layer in layers]


def _moved_down(instruction: Instruction, layer: Emitter, shift: int) -> Instruction:
    """The layer's own tiles lie at the top; resident tensors below them stay where they are."""
    lowest = layer.top - layer.spm_peak
    tiles = tuple(replace(t, address=t.address - shift) if t.space == "spm" and t.address >= lowest else t for t in instruction.tiles)
    return replace(instruction, tiles=tiles)


def _finish(job: _Job, attempt: _Attempt) -> Lowered:
    """Events and the program's header."""
    graph, target, placement = job.graph, job.target, attempt.placement
    constants = attempt.pool.bytes()
    total = attempt.constants_address + len(constants)
    if total > target.dram_bytes:
        raise CompileError(f"the network takes {total} bytes of DRAM, target {target.name!r} has {target.dram_bytes}", hint="raise dram_bytes")
    layers = _layers(graph, job.groups, _close_ranks(attempt.layers))
    inputs, outputs = (tuple(record(graph, placement, name) for name in names) for names in (graph.inputs, graph.outputs))
    tensors = _tensor_records(graph, placement, job.groups)
    return Lowered(Program(target, inputs, outputs, tensors, attempt.constants_address, len(constants), total, layers, graph.name), constants)


def lifetimes(graph: Graph, views: Mapping[str, View], groups: Sequence[Group]) -> tuple[list[Buffer], dict[str, int]]:
    """Every buffer with the layers between which it must keep its bytes (inputs from the start, outputs to the end), and how often it is accessed."""
    accesses: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def touch(tensor: str, layer: int) -> None:
        buffer = views[tensor].buffer
        first[buffer] = min(first.get(buffer, layer), layer)
        last[buffer] = max(last.get(buffer, layer), layer)
        accesses[buffer] = accesses.get(buffer, 0) + 1

    for name in graph.inputs:
        touch(name, -1)
    for index, group in enumerate(groups):
        for node in group.nodes:
            for tensor in node.inputs:
                if tensor in views:
                    touch(tensor, index)
        for tensor in group.results:
            touch(tensor, index)
    for name in graph.outputs:
        touch(name, len(groups))
    for name, view in views.items():
        if view.buffer == name:
            sizes[name] = max(view.bytes, 1)
    return [Buffer(name, sizes[name], first[name], last[name]) for name in first], accesses


def _layers(graph: Graph, groups: Sequence[Group], bodies: Sequence[Sequence[Instruction]]) -> tuple[Layer, ...]:
    """Events over the whole program; loops are left to `lower`."""
    flat = synchronize([instruction for body in bodies for instruction in body])
    layers, position = [], 0
    names: dict[str, int] = {}
    for group, body in zip(groups, bodies, strict=True):
        part = flat[position : position + len(body)]
        position += len(body)
        name = group.anchor.name
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        op = "+".join(node.op for node in group.nodes)
        layers.append(Layer(unique, op, group.sources, sum(node_macs(graph, node) for node in group.nodes), tuple(part)))
    return tuple(layers)


def record(graph: Graph, placement: Placement, name: str, layer: str = "") -> TensorRecord:
    """A tensor as the outside sees it: logical dimensions, strides for the layout, scale and zero point."""
    view, quant = placement.views[name], graph.quant(name)
    space, address = placement.addresses[view.buffer]
    tile = Tile(space, address + view.offset, view.dtype, view.shape, view.strides)
    return TensorRecord(name, tile, float(quant.scale), quant.zero, layer, graph.tensors[name].dtype)


def _tensor_records(graph: Graph, placement: Placement, groups: Sequence[Group]) -> tuple[TensorRecord, ...]:
    """Every layer's result, readable when the layer is complete."""
    return tuple(replace(record(graph, placement, name), layer=group.anchor.name) for group in groups for name in group.results)
