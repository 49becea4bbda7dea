"""What may happen at the same time: events, deadlock, races between queues, and reads of memory that nobody wrote.

The one big idea: each event has one signalling and one waiting queue, so whether a program can get stuck does not depend on timing; if the
text order satisfies every wait, every order that the hardware may choose does. Walking the text once with a vector clock per queue then
tells which earlier accesses are complete for certain: those whose number lies below the clock. Any other access that shares a byte, one
of the two writing, is a race.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from isa.finding import Finding, finding
from isa.geometry import Footprint, footprint, overlaps
from isa.program import QUEUES, Instruction, Program, TensorRecord, Tile, address_at, unroll
from isa.shapes import attribute_values
from isa.spec import SPEC
from isa.text import format_instruction
from isa.tokens import print_address, print_place

MAXIMUM_FINDINGS = 100
MAXIMUM_NOTED = 1 << 22  # runs of strided tiles that are noted or looked up one by one, in all
MAXIMUM_ROWS = 1 << 14  # rows of one tile that are looked up when its bounding interval was not all written

Channel = tuple[str, str, int]  # from queue, to queue, number
Clock = tuple[int, ...]  # per queue: how many of its instructions are complete for certain


@dataclass(frozen=True, slots=True)
class Access:
    """One tile of one static instruction."""

    tile: Tile
    footprint: Footprint
    reads: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What one static instruction means for order: its queue, events and memory accesses."""

    instruction: Instruction
    queue: int
    waits: tuple[Channel, ...]
    signals: tuple[Channel, ...]
    accesses: tuple[Access, ...]


def step_of(instruction: Instruction) -> Step:
    """Look the instruction up in the table, once for all its iterations."""
    spec, values = SPEC[instruction.name], attribute_values(instruction)
    accesses = []
    for operand, tile in zip(spec.operands, instruction.tiles, strict=False):
        reads = operand.role == "read" or (operand.role == "update" and bool(values.get("accumulate", 0)))
        accesses.append(Access(tile, footprint(tile), reads, operand.role != "read"))
    return Step(
        instruction,
        QUEUES.index(spec.queue),
        tuple((event.queue, spec.queue, event.id) for event in instruction.waits),
        tuple((spec.queue, event.queue, event.id) for event in instruction.signals),
        tuple(accesses),
    )


def order_findings(program: Program) -> list[Finding]:
    """Stuck queues, unmatched events, races and reads of unwritten memory. Expects a program whose single instructions are legal."""
    walk = _Walk(program)
    for step, iterations in dynamic_steps(program):
        if len(walk.findings) >= MAXIMUM_FINDINGS:
            return walk.findings
        if not walk.advance(step, iterations):
            return [*walk.findings, *stuck_findings(program, step)]
    return [*walk.findings, *_leftover_findings(walk), *_output_findings(program, walk)]


def dynamic_steps(program: Program) -> Iterator[tuple[Step, tuple[int, ...]]]:
    """Every dynamic instruction in text order."""
    steps: dict[int, Step] = {}
    for layer in program.layers:
        for instruction, iterations in unroll(layer.body):
            step = steps.get(id(instruction))
            if step is None:
                step = steps[id(instruction)] = step_of(instruction)
            yield step, iterations


class _Walk:
    """The state of the one walk in text order."""

    def __init__(self, program: Program):
        self.findings: list[Finding] = []
        self.clocks = [[0] * len(QUEUES) for _ in QUEUES]
        self.signals: dict[Channel, deque[Clock]] = {}
        self.signallers: dict[Channel, Instruction] = {}
        self.reported: set[tuple[int, ...]] = set()
        self.looked_up: set[tuple[str, int, int]] = set()  # strided tiles whose runs were all found written, or reported
        self.written: set[tuple[str, int, int]] = set()  # strided tiles whose runs were all noted
        self.runs = 0  # noted or looked up, all together
        self.memories = {space: _Memory() for space in ("dram", "spm", "acc")}
        dram = self.memories["dram"].written
        dram.add(program.constants_address, program.constants_address + program.constants_bytes)
        for record in program.inputs:
            _add_bytes(self.memories[record.tile.space].written, footprint(record.tile), *record.tile.extent())

    def advance(self, step: Step, iterations: tuple[int, ...]) -> bool:
        """Execute one instruction; False when one of its waits has no signal yet."""
        clock = self.clocks[step.queue]
        for channel in step.waits:
            given = self.signals.get(channel)
            if not given:
                return False
            clock[:] = map(max, clock, given.popleft())
        number = clock[step.queue]
        for access in step.accesses:
            tile, mark = access.tile, access.footprint
            address = address_at(tile, iterations) if tile.steps else tile.address
            low, high = address + mark.low, address + mark.high
            memory = self.memories[tile.space]
            if access.reads and not memory.written.covers(low, high):
                self.require_written(step, access, low, memory.written)
            for queue, kind, log in memory.logs:
                if queue != step.queue and (access.writes or kind) and log.last >= clock[queue] and log.latest(low, high) >= clock[queue]:
                    self.require_order(step, access, address, log, clock[queue], kind)
        self.record(step, iterations, number)
        clock[step.queue] = number + 1
        if step.signals:
            snapshot = tuple(clock)
            for channel in step.signals:
                self.signals.setdefault(channel, deque()).append(snapshot)
                self.signallers[channel] = step.instruction
        return True

    def record(self, step: Step, iterations: tuple[int, ...], number: int) -> None:
        for access in step.accesses:
            address = address_at(access.tile, iterations) if access.tile.steps else access.tile.address
            low, high = address + access.footprint.low, address + access.footprint.high
            memory = self.memories[access.tile.space]
            if access.writes and not memory.written.covers(low, high):
                self.note_written(access, low, high)
            memory.log(step.queue, access.writes).add(low, high, number, address, access.footprint, step.instruction)

    def may_list(self, mark: Footprint) -> bool:
        """Whether the runs of one more tile may be gone through one by one."""
        self.runs += mark.runs
        return self.runs <= MAXIMUM_NOTED

    def note_written(self, access: Access, low: int, high: int) -> None:
        """Run by run, each place once; of endless runs the gaps count as written too."""
        written, mark = self.memories[access.tile.space].written, access.footprint
        place = (access.tile.space, low, id(mark))
        if place in self.written:
            return
        self.written.add(place)
        if self.may_list(mark):
            _add_bytes(written, mark, low, high)
        else:
            written.add(low, high)

    def require_written(self, step: Step, access: Access, low: int, written: Coverage) -> None:
        """Report a read of bytes that no earlier instruction wrote. Strided tiles are looked up run by run."""
        place = (access.tile.space, low, id(access.footprint))
        key = (0, id(step.instruction), id(access))
        if place in self.looked_up or key in self.reported:
            return
        self.looked_up.add(place)
        if not self.may_list(access.footprint):
            return
        runs = ((start, start + access.footprint.run) for start in _run_addresses(access.footprint, low))
        missing = next((written.first_missing(*run) for run in runs if not written.covers(*run)), None)
        if missing is None:
            return
        self.reported.add(key)
        what = f"{print_place(access.tile)}, but nothing has written the bytes from {print_address(missing)} of {access.tile.space}"
        self.findings.append(
            finding(
                step.instruction,
                f"{step.instruction.name} reads {what}",
                "write them first (ld, fill, or an instruction before this one), or correct the address or the strides",
            )
        )

    def require_order(self, step: Step, access: Access, address: int, log: Log, threshold: int, wrote: bool) -> None:
        """Report the first access in `log` that is not complete for certain and shares a byte with this one."""
        for other, mark, number, instruction in log.since(threshold):
            if number < threshold or not overlaps(access.footprint, address, mark, other):
                continue
            key = (1, id(step.instruction), id(instruction))
            if key not in self.reported:
                self.reported.add(key)
                self.findings.append(_race(step.instruction, access, instruction, wrote))
            return


def _run_addresses(mark: Footprint, low: int) -> Iterator[int]:
    """Where the runs of a tile begin, at most MAXIMUM_ROWS of them."""
    if mark.runs > MAXIMUM_ROWS:
        return
    starts = [low]
    for size, stride in mark.dims:
        starts = [start + index * stride for start in starts for index in range(size)]
    yield from starts


def _add_bytes(written: Coverage, mark: Footprint, low: int, high: int) -> None:
    """Add a tile's bytes. The gaps between its runs are not among them (of a tile with very many runs they are taken to be)."""
    if mark.runs == 1 or mark.runs > MAXIMUM_ROWS:
        written.add(low, high)
        return
    for start in _run_addresses(mark, low):
        written.add(start, start + mark.run)


def _race(instruction: Instruction, access: Access, other: Instruction, wrote: bool) -> Finding:
    mine, theirs = SPEC[instruction.name].queue, SPEC[other.name].queue
    place = f"line {other.line}" if other.line else f"`{format_instruction(other)}`"
    return finding(
        instruction,
        f"{instruction.name} {'writes' if access.writes else 'reads'} {print_place(access.tile)} while {other.name} ({place}) "
        f"may still be {'writing' if wrote else 'reading'} it: no event orders the {mine} queue after the {theirs} queue here",
        f"let {other.name}, or a later {theirs} instruction, have signal={mine}.0, and this one, or an earlier {mine} instruction, wait={theirs}.0",
    )


# ── what was accessed ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Coverage:
    """A set of addresses as disjoint intervals."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def covers(self, low: int, high: int) -> bool:
        index = bisect_right(self.starts, low) - 1
        return (index >= 0 and self.ends[index] >= high) or low >= high

    def first_missing(self, low: int, high: int) -> int:
        """The lowest address in [low, high) that is not in the set; `high` if there is none."""
        index = bisect_right(self.starts, low) - 1
        return min(max(low, self.ends[index]), high) if index >= 0 else low

    def add(self, low: int, high: int) -> None:
        if self.covers(low, high):
            return
        first, last = bisect_left(self.ends, low), bisect_right(self.starts, high)
        if first < last:
            low, high = min(low, self.starts[first]), max(high, self.ends[last - 1])
        self.starts[first:last], self.ends[first:last] = [low], [high]


class Log:
    """The accesses of one kind of one queue to one memory.

    `starts`/`stamps` give for every address the number of the last access whose bounding interval holds it: a quick "no".
    `history` has the last access of each distinct tile, in order, for the exact answer.
    """

    __slots__ = ("history", "last", "stamps", "starts")

    def __init__(self) -> None:
        self.starts, self.stamps, self.last = [-(1 << 63)], [-1], -1
        self.history: dict[tuple[int, int], tuple[int, Footprint, int, Instruction]] = {}

    def latest(self, low: int, high: int) -> int:
        """The highest number of an access whose bounding interval meets [low, high)."""
        return max(self.stamps[bisect_right(self.starts, low) - 1 : bisect_left(self.starts, high)])

    def since(self, threshold: int) -> Iterator[tuple[int, Footprint, int, Instruction]]:
        """(address, footprint, number, instruction) of accesses from `threshold` on, latest first."""
        for entry in reversed(self.history.values()):
            if entry[2] < threshold:
                return
            yield entry

    def add(self, low: int, high: int, number: int, address: int, mark: Footprint, instruction: Instruction) -> None:
        key = (address, id(mark))
        self.history.pop(key, None)
        self.history[key] = (address, mark, number, instruction)
        self.last = number
        first, after = bisect_left(self.starts, low), bisect_left(self.starts, high)
        tail = self.stamps[after - 1]
        if after < len(self.starts) and self.starts[after] == high:
            self.starts[first:after], self.stamps[first:after] = [low], [number]
        else:
            self.starts[first:after], self.stamps[first:after] = [low, high], [number, tail]


class _Memory:
    """The written addresses of one memory, and a log per queue and kind of access."""

    __slots__ = ("index", "logs", "written")

    def __init__(self) -> None:
        self.written = Coverage()
        self.logs: list[tuple[int, bool, Log]] = []  # queue, whether writes, log
        self.index: dict[tuple[int, bool], Log] = {}

    def log(self, queue: int, writes: bool) -> Log:
        log = self.index.get((queue, writes))
        if log is None:
            log = self.index[queue, writes] = Log()
            self.logs.append((queue, writes, log))
        return log


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def stuck_findings(program: Program, blocked: Step) -> list[Finding]:
    """Why the text order fails at `blocked`: the queues run as far as they can, and those that stop are reported."""
    pending: list[deque[Step]] = [deque() for _ in QUEUES]
    for step, _ in dynamic_steps(program):
        pending[step.queue].append(step)
    given: Counter[Channel] = Counter()
    moved = True
    while moved:
        moved = False
        for queue in pending:
            while queue and all(given[channel] >= needed for channel, needed in Counter(queue[0].waits).items()):
                step, moved = queue.popleft(), True
                given.subtract(step.waits)
                given.update(step.signals)
    if any(pending):
        stuck = [_stuck(queue[0], pending, given) for queue in pending if queue]
        return [remark for _, remark in sorted(stuck, key=lambda pair: pair[0])]
    return [
        finding(
            blocked.instruction,
            f"{blocked.instruction.name} waits for {_event(blocked.waits[0])}, which is given only further down: this text order cannot be executed",
            "move the instruction below those that it waits for",
        )
    ]


def _stuck(step: Step, pending: list[deque[Step]], given: Counter[Channel]) -> tuple[bool, Finding]:
    """The finding, and whether it only follows from another one."""
    needed = Counter(step.waits)
    channel = next(channel for channel in step.waits if given[channel] < needed[channel])
    blocker = next((later for later in pending[QUEUES.index(channel[0])] if channel in later.signals), None)
    if blocker is None:
        message, hint = (
            "which is never given again",
            f"give it: signal={channel[1]}.{channel[2]} on an instruction of the {channel[0]} queue; or remove this wait",
        )
    else:
        place = f"on line {blocker.instruction.line}" if blocker.instruction.line else f"by `{format_instruction(blocker.instruction)}`"
        message, hint = (
            f"which is given {place}, behind another stuck instruction",
            "the queues wait for one another in a circle: break it, or add a signal before it",
        )
    message = f"the {QUEUES[step.queue]} queue is stuck: {step.instruction.name} waits for {_event(channel)}, {message}"
    return blocker is not None, finding(step.instruction, message, hint)


def _event(channel: Channel) -> str:
    return f"event {channel[0]}.{channel[2]}"


def _leftover_findings(walk: _Walk) -> Iterator[Finding]:
    for channel, given in walk.signals.items():
        if given:
            times = "once" if len(given) == 1 else f"{len(given)} times"
            yield finding(
                walk.signallers[channel],
                f"signal={channel[1]}.{channel[2]} of the {channel[0]} queue is given {times} more than the {channel[1]} queue waits for it",
                f"add wait={channel[0]}.{channel[2]} to an instruction of the {channel[1]} queue, or remove the signal",
            )


def _output_findings(program: Program, walk: _Walk) -> Iterator[Finding]:
    for record in program.outputs:
        if not _is_written(record, walk.memories[record.tile.space].written):
            yield Finding(
                0, 0, f"output {record.name!r} is not written whole by any instruction", "store it: st @…, or correct the address of .output"
            )


def _is_written(record: TensorRecord, written: Coverage) -> bool:
    low, high = record.tile.extent()
    mark = footprint(record.tile)
    return written.covers(low, high) or all(written.covers(start, start + mark.run) for start in _run_addresses(mark, low))
