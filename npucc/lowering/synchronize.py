"""Put the events in: from a program in which each line comes after what it needs, to one whose queues may run side by side.

The one big idea: the lowering writes plain sequential code. Here every pair of accesses to the same bytes from two queues,
one of them a write, becomes a happens-before edge, and an edge that earlier edges imply is left out. The edges between two
queues are made in the order of the signalling instructions, so one counting event per pair of queues is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isa.program import QUEUES, SPACES, Event, Instruction
from isa.spec import SPEC

_QUEUE_INDEX = {queue: index for index, queue in enumerate(QUEUES)}
_PAGE_BITS = 16  # the tiles of a layer lie in a few pages, those of other layers mostly in others


@dataclass(slots=True)
class _Access:
    """One tile of one instruction: bytes [low, high) read or written by the `position`-th instruction of a queue."""

    low: int
    high: int
    queue: int
    position: int
    writes: bool


class _Memory:
    """The accesses of one memory that may still matter, found by page."""

    def __init__(self) -> None:
        self.pages: dict[int, list[_Access]] = {}

    def overlapping(self, low: int, high: int) -> list[_Access]:
        found: dict[int, _Access] = {}
        for page in range(low >> _PAGE_BITS, ((high - 1) >> _PAGE_BITS) + 1):
            for access in self.pages.get(page, ()):
                if access.low < high and low < access.high:
                    found[id(access)] = access
        return list(found.values())

    def add(self, access: _Access, over: Sequence[int]) -> None:
        """Record an access; forget those it covers and those that every queue knows to be over (up to `over[queue]`)."""
        for page in range(access.low >> _PAGE_BITS, ((access.high - 1) >> _PAGE_BITS) + 1):
            kept = [old for old in self.pages.get(page, ()) if old.position > over[old.queue] and not _covered(old, access)]
            kept.append(access)
            self.pages[page] = kept


def _covered(old: _Access, new: _Access) -> bool:
    """Whatever would have to wait for `old` waits for `new`, which comes after it."""
    if old.low < new.low or old.high > new.high:
        return False
    return new.writes or (old.queue == new.queue and not old.writes)


def _known_by_all(known: Sequence[Sequence[int]], used: Sequence[int]) -> list[int]:
    """Per queue: the last position whose completion every other queue in use has seen."""
    return [min((known[reader][queue] for reader in used if reader != queue), default=-1) for queue in range(len(QUEUES))]


def synchronize(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same instructions in the same order, with `waits` and `signals` that make every interleaving give the same bytes."""
    memories = {space: _Memory() for space in SPACES}
    over = [-1] * len(QUEUES)
    used = sorted({_QUEUE_INDEX[SPEC[instruction.name].queue] for instruction in instructions})
    known = [[-1] * len(QUEUES) for _ in QUEUES]  # known[q][p]: position in p whose completion q has seen
    issued: list[list[tuple[int, ...]]] = [[] for _ in QUEUES]  # what each instruction's queue knew when it was issued
    places: list[list[int]] = [[] for _ in QUEUES]  # index in `instructions` of each queue's n-th instruction
    waits: list[list[Event]] = [[] for _ in instructions]
    signals: list[list[Event]] = [[] for _ in instructions]
    for index, instruction in enumerate(instructions):
        queue = _QUEUE_INDEX[SPEC[instruction.name].queue]
        accesses = _accesses(instruction, queue, len(issued[queue]))
        for other, position in _dependencies(memories, accesses, queue, known[queue]):
            if known[queue][other] >= position:
                continue  # implied by an edge just added
            waits[index].append(Event(QUEUES[other]))
            signals[places[other][position]].append(Event(QUEUES[queue]))
            known[queue] = [max(pair) for pair in zip(known[queue], issued[other][position], strict=True)]
            known[queue][other] = position
        issued[queue].append(tuple(known[queue]))
        places[queue].append(index)
        if waits[index]:
            over = _known_by_all(known, used)
        for space, access in accesses:
            memories[space].add(access, over)
    return [
        replace(old, waits=tuple(w), signals=tuple(sorted(s, key=lambda e: e.queue))) for old, w, s in zip(instructions, waits, signals, strict=True)
    ]


def _accesses(instruction: Instruction, queue: int, position: int) -> list[tuple[str, _Access]]:
    found = []
    for tile, operand in zip(instruction.tiles, SPEC[instruction.name].operands, strict=False):
        low, high = tile.extent()
        found.append((tile.space, _Access(low, high, queue, position, operand.role != "read")))
    return found


def _dependencies(memories: dict[str, _Memory], accesses: list[tuple[str, _Access]], queue: int, known: Sequence[int]) -> list[tuple[int, int]]:
    """The last instruction of each other queue that must be complete, as (queue, position), most recent knowledge first."""
    needed: dict[int, int] = {}
    for space, access in accesses:
        for old in memories[space].overlapping(access.low, access.high):
            if old.queue != queue and (old.writes or access.writes) and known[old.queue] < old.position:
                needed[old.queue] = max(needed.get(old.queue, -1), old.position)
    return sorted(needed.items(), key=lambda item: -item[0])
