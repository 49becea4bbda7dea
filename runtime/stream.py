"""A program as the sequence of instructions that the machine executes, and the orders in which its queues may execute them.

The one big idea: queues are in order, and events order instructions of different queues; every order that respects both must
give the same bytes. The program's own line order is one of them; a random one finds programs whose events are missing.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from isa.program import QUEUES, Instruction, Layer, Loop, Program, unroll
from isa.spec import SPEC
from runtime.errors import RuntimeFault

LARGEST_STREAM = 1 << 21  # dynamic instructions; more is a damaged program
DEEPEST_LOOP = 8
#: (signalling queue, waiting queue, number)
EventKey = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Line:
    """A static instruction with its queue and the events it waits for and gives."""

    instruction: Instruction
    queue: str
    waits: tuple[EventKey, ...]
    signals: tuple[EventKey, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One dynamic instruction: its line, the iterations of its loops (outermost first), and the number of its layer."""

    line: Line
    iterations: tuple[int, ...]
    layer: int


def unrolled(program: Program) -> list[Step]:
    """Every dynamic instruction in line order. Raises RuntimeFault when there are absurdly many, or an instruction is unknown."""
    total = sum(dynamic_count(layer.body) for layer in program.layers)
    if total > LARGEST_STREAM:
        raise RuntimeFault(f"the program executes {total} instructions", hint=f"at most {LARGEST_STREAM} are run; check its loop counts")
    lines: dict[int, Line] = {}
    return list(_steps(program.layers, lines))


def dynamic_count(body: tuple[Instruction | Loop, ...], depth: int = 0) -> int:
    """How many instructions a body executes. Raises RuntimeFault for empty or too deep loops."""
    if depth > DEEPEST_LOOP:
        raise RuntimeFault(f"loops are nested deeper than {DEEPEST_LOOP}", line=body[0].line if body else 0)
    count = 0
    for item in body:
        if isinstance(item, Loop):
            if item.count < 1 or not item.body:
                raise RuntimeFault(f"a loop of {item.count} times {len(item.body)} lines", line=item.line, hint="both must be at least 1")
            count += item.count * dynamic_count(item.body, depth + 1)
        else:
            count += 1
    return count


def _steps(layers: tuple[Layer, ...], lines: dict[int, Line]) -> Iterator[Step]:
    for number, layer in enumerate(layers):
        for instruction, iterations in unroll(layer.body):
            line = lines.get(id(instruction))
            if line is None:
                line = lines[id(instruction)] = make_line(instruction)
            yield Step(line, iterations, number)


def make_line(instruction: Instruction) -> Line:
    """Resolve an instruction's queue and events. Raises RuntimeFault for unknown names."""
    spec = SPEC.get(instruction.name)
    if spec is None:
        raise RuntimeFault(f"unknown instruction {instruction.name!r}", line=instruction.line, hint=f"known: {', '.join(SPEC)}")
    for event in (*instruction.waits, *instruction.signals):
        if event.queue not in QUEUES:
            raise RuntimeFault(f"{instruction.name}: no queue {event.queue!r}", line=instruction.line, hint=f"queues: {', '.join(QUEUES)}")
    waits = tuple((event.queue, spec.queue, event.id) for event in instruction.waits)
    signals = tuple((spec.queue, event.queue, event.id) for event in instruction.signals)
    return Line(instruction, spec.queue, waits, signals)


def _names(events: tuple[EventKey, ...]) -> str:
    return ", ".join(f"{source}.{number}" for source, _, number in events)


class _Queues:
    """The state of all queues while an order is made: what is left in each, and the events given and not yet consumed."""

    def __init__(self, steps: list[Step]):
        self.steps = steps
        self.waiting: dict[str, deque[int]] = {queue: deque() for queue in QUEUES}
        self.given: Counter[EventKey] = Counter()
        self.order: list[int] = []

    def ready(self, queue: str) -> bool:
        """Whether the queue's next instruction may execute."""
        if not self.waiting[queue]:
            return False
        waits = self.steps[self.waiting[queue][0]].line.waits
        return all(self.given[event] >= waits.count(event) for event in waits)

    def execute(self, queue: str) -> None:
        """Take the queue's next instruction, which is ready."""
        index = self.waiting[queue].popleft()
        line = self.steps[index].line
        self.given.subtract(line.waits)
        self.given.update(line.signals)
        self.order.append(index)

    def require_empty(self) -> None:
        """Raise RuntimeFault when instructions are left that can never execute."""
        stuck = [(queue, self.steps[waiting[0]].line) for queue, waiting in self.waiting.items() if waiting]
        if stuck:
            told = [f"{queue} at line {line.instruction.line} ({line.instruction.name}) waits for {_names(line.waits)}" for queue, line in stuck]
            hint = "every wait needs a signal that can be given before it"
            raise RuntimeFault(f"deadlock: {'; '.join(told)}", line=stuck[0][1].instruction.line, hint=hint)


def program_order(steps: list[Step]) -> list[int]:
    """Line order, except that an instruction whose events are not yet given waits in its queue until they are. Raises RuntimeFault on deadlock."""
    queues = _Queues(steps)
    for index, step in enumerate(steps):
        queue = step.line.queue
        queues.waiting[queue].append(index)
        if len(queues.waiting[queue]) > 1 or not queues.ready(queue):
            continue
        queues.execute(queue)
        if any(queues.waiting.values()):
            _drain(queues)
    _drain(queues)
    queues.require_empty()
    return queues.order


def _drain(queues: _Queues) -> None:
    """Execute what became ready, queue by queue, until nothing is."""
    progress = True
    while progress:
        progress = False
        for queue in QUEUES:
            while queues.ready(queue):
                queues.execute(queue)
                progress = True


def random_order(steps: list[Step], seed: int) -> list[int]:
    """One of the orders that the queues and events allow. Raises RuntimeFault on deadlock."""
    queues = _Queues(steps)
    for index, step in enumerate(steps):
        queues.waiting[step.line.queue].append(index)
    choose: Callable[[list[str]], str] = random.Random(seed).choice
    while ready := [queue for queue in QUEUES if queues.ready(queue)]:
        queues.execute(choose(ready))
    queues.require_empty()
    return queues.order
