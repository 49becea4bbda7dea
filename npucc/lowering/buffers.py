"""The buffers of a layer: how many slots each gets, what moving their tiles takes, and constants that travel together.

The one big idea: a transfer takes at least a DRAM latency, however short it is, for its queue asks for the next one only when it
begins to stream. So constants that are needed together are one transfer, small tiles share one, and what has room is loaded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isa.target import Target
from npucc.lowering import cost
from npucc.lowering.elementwise import Box, Chain
from npucc.lowering.emitter import aligned


@dataclass(frozen=True, slots=True)
class Buffer:
    """The tiles of one kind that a layer needs one after the other."""

    bytes: int  # of the largest tile
    contents: int  # different tiles
    transfers: int  # of tiles, with few slots: more than `contents` where a tile is needed again after others
    cycles: float = 0.0  # of one transfer on the DRAM channel; 0 where nothing is transferred
    queue: str = "ld"
    requests: int = 1  # that one transfer takes

    @property
    def fewest(self) -> int:
        """Slots that it can't do with less of: two, so that one is filled while the other is worked on."""
        return min(2, self.contents)

    def moved(self, slots: int) -> int:
        """Transfers with this many slots."""
        return 0 if not self.cycles else self.contents if slots >= self.contents else self.transfers

    def held(self, target: Target) -> float:
        """Cycles that one transfer holds its queue."""
        return max(self.cycles, self.requests * target.dram_latency) if self.cycles else 0.0


def operand_buffer(chain: Chain, box: Box, tiles: int, run: int, target: Target) -> Buffer:
    """The operands from outside of a chain that works on tiles of at most that box; `run`: contiguous bytes of them in DRAM."""
    loaded = [size for size in chain.operand_bytes(box) if size]
    size = chain.bytes_per_slot(box) + 64 * len(chain.operands())
    tiles = max(tiles, 2) if len(chain.widths) > 1 else tiles  # a node works from one spare slot into another
    return Buffer(size, tiles, tiles, sum(cost.dma_cycles(target, each, run) for each in loaded), requests=len(loaded))


def fits(buffers: Iterable[Buffer], target: Target, free: int) -> bool:
    """Whether each can have its fewest slots in this many bytes."""
    return sum(aligned(buffer.bytes, target) * buffer.fewest for buffer in buffers) <= free


ENOUGH = 3  # slots: one worked on, one asked for, one streaming


def share_out(buffers: Mapping[str, Buffer], target: Target, free: int) -> dict[str, int]:
    """Slots of each buffer, in the order given as far as `free` bytes reach: for all tiles where some would else be loaded again."""
    slots = {name: buffer.fewest for name, buffer in buffers.items()}
    spare = free - sum(aligned(buffer.bytes, target) * buffer.fewest for buffer in buffers.values())
    for name, buffer in buffers.items():
        room = slots[name] + spare // max(aligned(buffer.bytes, target), 1)
        again = buffer.transfers > buffer.contents and buffer.contents <= room
        wanted = buffer.contents if again else min(buffer.contents, ENOUGH if buffer.cycles else buffer.fewest, room)
        spare -= (wanted - slots[name]) * aligned(buffer.bytes, target)
        slots[name] = wanted
    return slots


def transfer_cycles(buffers: Mapping[str, Buffer], slots: Mapping[str, int], work: float, target: Target) -> float:
    """Cycles that the layer's transfers take at least: of the channel, of each queue, and of slots that are
    filled, worked on for `work` cycles, and only then filled again."""
    moved = {name: buffer.moved(slots[name]) for name, buffer in buffers.items()}
    busy = {"ld": 0.0, "st": 0.0}
    slowest = 0.0
    for name, buffer in buffers.items():
        busy[buffer.queue] += moved[name] * buffer.held(target)
        if slots[name] < min(buffer.contents, ENOUGH):
            slowest = max(slowest, moved[name] / slots[name] * (target.dram_latency + buffer.cycles + work))
    return max(sum(moved[name] * buffer.cycles for name, buffer in buffers.items()), *busy.values(), slowest)


def first_and_last(buffers: Mapping[str, Buffer], target: Target) -> float:
    """Cycles before all of the first tile is there, and after the last one is computed."""
    return sum(buffer.held(target) if buffer.queue == "ld" else buffer.cycles for buffer in buffers.values()) + 2 * target.dram_latency


@dataclass(frozen=True, slots=True)
class Block:
    """The constants of one tile of results side by side: int32 parameters, then int8 weights."""

    parameters: int  # bytes
    weights: int  # bytes
    target: Target

    @property
    def offset(self) -> int:
        """Of the weights."""
        return aligned(self.parameters, self.target)

    @property
    def bytes(self) -> int:
        return self.offset + aligned(self.weights, self.target)

    def together(self, count: int) -> int:
        """How many of `count` such blocks are one transfer: until it streams as long as a request takes."""
        return min(count, max(1, math.ceil(self.target.dram_latency * self.target.dram_bytes_per_cycle / self.bytes)))


def pack_blocks(parts: Sequence[tuple[np.ndarray, np.ndarray]], target: Target) -> np.ndarray:
    """The bytes of one transfer: (parameters, weights) of one tile after the other."""
    found = bytearray()
    for part in (array for pair in parts for array in pair):
        data = np.ascontiguousarray(part).tobytes()
        found += data + bytes(aligned(len(data), target) - len(data))
    return np.frombuffer(bytes(found), np.int8)
