"""Which tile sizes a matrix layer takes: of all that fit, those that the cost model finds quickest.

The one big idea: the engines' work is known before the buffers are, and no tile sizes take fewer cycles than that. So of thousands of
candidates only a few have their buffers laid out and their transfers counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from isa.target import Target
from npucc.lowering.buffers import Buffer, first_and_last, fits, share_out, transfer_cycles

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class Work:
    """How many tiles of results there are, and the cycles of one."""

    tiles: int
    matrix: float
    vector: float

    @property
    def least(self) -> float:
        """Cycles of the layer were everything there at once."""
        return self.tiles * max(self.matrix, self.vector) + self.vector


@dataclass(frozen=True, slots=True)
class Choice(Generic[Plan]):
    """Tile sizes, and how many slots each kind of tile gets."""

    plan: Plan
    buffers: Mapping[str, Buffer]
    slots: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Search(Generic[Plan]):
    """What the layer says of a plan, and the room there is."""

    target: Target
    free: int  # bytes of scratchpad
    work: Callable[[Plan], Work]
    buffers: Callable[[Plan], Mapping[str, Buffer]]

    def quickest(self, plans: Iterable[Plan]) -> Choice[Plan] | None:
        """The first of the quickest plans whose buffers fit; None where none does."""
        best, found = math.inf, None
        for plan in plans:
            work = self.work(plan)
            if work.least >= best:
                continue
            buffers = self.buffers(plan)
            if not fits(buffers.values(), self.target, self.free):
                continue
            slots = share_out(buffers, self.target, self.free)
            if (cycles := self._cycles(work, buffers, slots)) < best:
                best, found = cycles, Choice(plan, buffers, slots)
        return found

    def _cycles(self, work: Work, buffers: Mapping[str, Buffer], slots: Mapping[str, int]) -> float:
        """The busiest engine's, plus what the first tile waits for and the last one leaves behind."""
        transfers = transfer_cycles(buffers, slots, work.matrix + work.vector, self.target)
        return max(work.least, transfers + work.vector) + first_and_last(buffers, self.target)
