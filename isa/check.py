"""The static checker: whether a program is legal for its target, in every order that the hardware may choose.

The one big idea: every rule looks at values, never at time. First each line alone (its record in the table, memory bounds over all loop
iterations, shapes), then all lines together (`isa.order`: events, deadlock, races, unwritten memory). A program without findings gives the
same bytes in every legal interleaving.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, product

from isa.errors import CheckError
from isa.finding import Finding, finding
from isa.geometry import footprint, overlaps, writes_twice
from isa.order import order_findings
from isa.program import DTYPES, LOOP_VARIABLES, QUEUES, SPACES, Event, Instruction, Loop, Program, TensorRecord, Tile, address_at
from isa.reader import MAXIMUM_DYNAMIC
from isa.shapes import Remark, attribute_values, may_replace, shape_remarks
from isa.signature import operand_count_fault, operand_fault, packing_fault
from isa.spec import SPEC, Operand
from isa.tokens import MAXIMUM_EVENT, did_you_mean, print_address, print_place, print_tile

MAXIMUM_ITERATIONS = 4096
SHOWN = 5  # findings that a CheckError spells out


def check(program: Program, *, file: str = "") -> None:
    """Raise CheckError with the first findings, if there are any."""
    found = findings(program)
    if not found:
        return
    first, *others = found
    more = "".join(f"\n  also: {other}" for other in others[: SHOWN - 1])
    if len(found) > SHOWN:
        more += f"\n  … and {len(found) - SHOWN} more"
    raise CheckError(first.message, file=file, line=first.line, column=first.column, hint=first.hint + more)


def findings(program: Program) -> list[Finding]:
    """Everything that is wrong: lines alone first; only when those are right, their order and memory use."""
    found = [*_program_findings(program), *_line_findings(program)]
    return found or order_findings(program)


# ── the program as a whole ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _program_findings(program: Program) -> Iterator[Finding]:
    if program.dram_bytes > program.target.dram_bytes:
        yield Finding(
            0, 0, f"the program uses {program.dram_bytes} bytes of DRAM, target {program.target.name!r} has {program.target.dram_bytes}",
            "use a target with more DRAM, or a smaller model",
        )  # fmt: skip
    if program.constants_address < 0 or program.constants_address + program.constants_bytes > program.dram_bytes:
        yield Finding(0, 0, "the constants do not lie within the DRAM that .memory states", "enlarge dram= or move constants=")
    layers = {layer.name for layer in program.layers}
    for directive, records in ((".input", program.inputs), (".output", program.outputs), (".tensor", program.tensors)):
        for record in records:
            for message, hint in _record_remarks(program, directive, record, layers):
                yield Finding(0, 0, f"{directive} {record.name!r} {message}", hint)
    if _dynamic_count(tuple(item for layer in program.layers for item in layer.body)) > MAXIMUM_DYNAMIC:
        yield Finding(0, 0, f"the program executes more than {MAXIMUM_DYNAMIC} instructions", "use larger tiles or fewer iterations")


def _record_remarks(program: Program, directive: str, record: TensorRecord, layers: set[str]) -> Iterator[Remark]:
    tile = record.tile
    if tile.space == "acc" or tile.steps:
        yield f"lies at {print_place(tile)}", "give a plain address in dram or spm"
        return
    yield from _bounds_remarks(program, tile, (), "")
    if not 0 < record.scale < math.inf:
        yield f"has the scale {record.scale!r}", "give a number above 0"
    if directive == ".input" and _touches_constants(program, tile, ()):
        yield "overlaps the constants", "give it another address"
    if record.layer and record.layer not in layers:
        yield (
            f"names layer {record.layer!r}, which does not exist",
            did_you_mean(record.layer, sorted(layers)) if layers else "the program has no layers",
        )


def _dynamic_count(body: tuple[Instruction | Loop, ...]) -> int:
    return sum(item.count * _dynamic_count(item.body) if isinstance(item, Loop) else 1 for item in body)


# ── each line alone ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _line_findings(program: Program) -> Iterator[Finding]:
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for layer in program.layers:
        for instruction, counts in _static(layer.body, ()):
            if isinstance(instruction, Loop):
                yield Finding(
                    instruction.line,
                    0,
                    f"a loop of {instruction.count} iterations over {len(instruction.body)} lines at depth {len(counts)}",
                    "loops count from 1, hold at least one line and nest at most 8 deep",
                )
            elif (id(instruction), counts) not in seen:
                seen.add((id(instruction), counts))
                for message, hint in _instruction_remarks(program, instruction, counts):
                    yield finding(instruction, message, hint)


def _static(body: tuple[Instruction | Loop, ...], counts: tuple[int, ...]) -> Iterator[tuple[Instruction | Loop, tuple[int, ...]]]:
    """Each instruction once with the counts of its loops, outermost first; and each impossible loop."""
    for item in body:
        if not isinstance(item, Loop) or item.count < 1 or not item.body or len(counts) >= len(LOOP_VARIABLES):
            yield item, counts
        else:
            yield from _static(item.body, (*counts, item.count))


def _instruction_remarks(program: Program, instruction: Instruction, counts: tuple[int, ...]) -> Iterator[Remark]:
    """Signature, then tiles, then shapes: each stage assumes that the one before found nothing."""
    for stage in (_signature_remarks, _tile_remarks):
        remarks = list(stage(program, instruction, counts))
        yield from remarks
        if remarks:
            return
    yield from shape_remarks(instruction)
    yield from _mode_remarks(program, instruction)
    yield from _in_place_remarks(instruction, counts)


def _mode_remarks(program: Program, instruction: Instruction) -> Iterator[Remark]:
    """The vector engine rounds in one way; the DMA and matrix engines know some weight formats."""
    if instruction.name == "requant":
        mode, known = attribute_values(instruction)["mode"], program.target.requantize
        if mode != known:
            yield f"mode={mode}, but the target has {known}", f"write mode={known}, or choose a target with requantize={mode}"
    formats = program.target.formats
    for tile in instruction.tiles:
        if tile.packing is not None and tile.packing.kind not in formats:
            known = ", ".join(formats) or "no packed weights"
            yield f"weights are packed as {tile.packing.kind}, but the target knows {known}", "unpack them, or name the format in its weight_formats"
            return


def _signature_remarks(program: Program, instruction: Instruction, counts: tuple[int, ...]) -> Iterator[Remark]:  # noqa: ARG001
    spec = SPEC.get(instruction.name)
    if spec is None:
        yield f"unknown instruction {instruction.name!r}", did_you_mean(instruction.name, SPEC)
        return
    fault = operand_count_fault(spec, len(instruction.tiles))
    if fault:
        yield fault
        return
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        fault = operand_fault(spec.name, operand, tile.space, tile.dtype) or packing_fault(spec.name, operand, tile)
        if fault:
            yield fault
        if len(tile.strides) != len(tile.shape) or any(size < 1 for size in tile.shape) or len(tile.steps) > len(counts):
            yield (
                f"operand {operand.name} of {spec.name} is {print_tile(tile)}",
                "sizes start at 1, with one stride each and at most one step per enclosing loop",
            )
    for event in (*instruction.waits, *instruction.signals):
        yield from _event_remarks(spec.queue, event)


def _event_remarks(queue: str, event: Event) -> Iterator[Remark]:
    name = f"{event.queue}.{event.id}"
    if event.queue not in QUEUES or not 0 <= event.id <= MAXIMUM_EVENT:
        yield f"unknown event {name}", f"queues are {', '.join(QUEUES)}; numbers go from 0 to {MAXIMUM_EVENT}"
    elif event.queue == queue:
        yield f"event {name} connects the {queue} queue with itself", "a queue works in order: remove the event"


def _tile_remarks(program: Program, instruction: Instruction, counts: tuple[int, ...]) -> Iterator[Remark]:
    for operand, tile in zip(SPEC[instruction.name].operands, instruction.tiles, strict=False):
        name = f"operand {operand.name}, {print_place(tile)}, "
        yield from _bounds_remarks(program, tile, counts, name)
        if operand.role != "read":
            yield from _write_remarks(program, operand, tile, counts)


def _bounds_remarks(program: Program, tile: Tile, counts: tuple[int, ...], name: str) -> Iterator[Remark]:
    """Inside its memory in every iteration, and aligned."""
    size = {"dram": program.dram_bytes, "spm": program.target.spm_bytes, "acc": program.target.acc_bytes}[tile.space]
    low, high = _reach(tile, counts)
    if low < 0 or high > size:
        yield (
            f"{name}reaches from {print_address(low)} to {print_address(high)}, outside the {size} bytes of {tile.space}",
            _bounds_hint(tile, counts),
        )
    alignment, width = program.target.alignment, DTYPES[tile.dtype]
    if any(number % width for number in (tile.address, *tile.steps, *tile.strides)):
        yield f"{name}is not aligned", f"{tile.dtype} wants addresses, steps and strides that are multiples of {width}"
    elif any(number % alignment for number in (tile.address, *tile.steps)):
        yield f"{name}is not aligned", f"target {program.target.name!r} wants addresses and steps that are multiples of {alignment}"


def _bounds_hint(tile: Tile, counts: tuple[int, ...]) -> str:
    loops = " (over all loop iterations)" if counts and tile.steps else ""
    where = ".memory dram=" if tile.space == "dram" else f"{tile.space}_bytes of the target"
    return f"the limit{loops} is {where}: use a smaller tile or a lower address {SPACES[tile.space]}"


def _reach(tile: Tile, counts: tuple[int, ...]) -> tuple[int, int]:
    """Lowest address and one past the highest over all loop iterations."""
    low, high = tile.extent()
    for step, count in zip(tile.steps, counts, strict=False):
        low, high = low + min(0, step * (count - 1)), high + max(0, step * (count - 1))
    return low, high


def _write_remarks(program: Program, operand: Operand, tile: Tile, counts: tuple[int, ...]) -> Iterator[Remark]:
    if tile.packing is None and writes_twice(tile.shape, tile.strides, DTYPES[tile.dtype]):
        yield f"operand {operand.name}, {print_tile(tile)}, writes some bytes twice", "a result needs strides that keep its elements apart"
    if _touches_constants(program, tile, counts):
        constants = f"{print_address(program.constants_address)} to {print_address(program.constants_address + program.constants_bytes)}"
        yield f"operand {operand.name}, {print_place(tile)}, writes into the constants", f"they lie in DRAM from {constants} and are read only"


def _touches_constants(program: Program, tile: Tile, counts: tuple[int, ...]) -> bool:
    low, high = _reach(tile, counts)
    return tile.space == "dram" and low < program.constants_address + program.constants_bytes and program.constants_address < high


def _in_place_remarks(instruction: Instruction, counts: tuple[int, ...]) -> Iterator[Remark]:
    """A result may replace an operand element by element; any other overlap would depend on the order within the instruction."""
    spec = SPEC[instruction.name]
    if not instruction.tiles:
        return
    result = instruction.tiles[0]
    for operand, tile in zip(spec.operands[1:], instruction.tiles[1:], strict=False):
        if tile.space != result.space or not _overlap_somewhere(result, tile, counts):
            continue
        same = tile.address == result.address and tile.steps == result.steps and tile.strides == result.strides and tile.shape == result.shape
        if not (same and DTYPES[tile.dtype] == DTYPES[result.dtype] and may_replace(spec, operand)):
            yield (
                f"the result {print_place(result)} overlaps operand {operand.name}, {print_place(tile)}",
                "give the result bytes of its own; only elementwise instructions may write exactly where they read",
            )


def _overlap_somewhere(result: Tile, tile: Tile, counts: tuple[int, ...]) -> bool:
    """Whether the two overlap in any iteration; with equal steps the first one tells, with others up to 4,096 are looked at."""
    iterations = product(*(range(count) for count in counts)) if result.steps != tile.steps else iter([()])
    return any(
        overlaps(footprint(result), address_at(result, each), footprint(tile), address_at(tile, each))
        for each in islice(iterations, MAXIMUM_ITERATIONS)
    )
