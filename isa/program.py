"""The value that a program is: frozen records, one per line of the text.

The one big idea: an operand is a *tile*, a strided view of one memory. Everything about it (memory, address,
element type, shape, byte strides, step per enclosing loop) stands in the operand, so that a line can be read alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from isa.packing import Packing
from isa.target import Target

#: bytes per element of each element type; those of the second line are known to the host alone, no engine computes with them
DTYPES: dict[str, int] = {
    "s8": 1, "u8": 1, "s16": 2, "s32": 4, "s64": 8, "f32": 4,
    "u16": 2, "u32": 4, "u64": 8, "f16": 2, "f64": 8,
}  # fmt: skip
#: memory name → the character that marks it in the text
SPACES: dict[str, str] = {"dram": "@", "spm": "%", "acc": "$"}
#: the in-order queues, one per engine
QUEUES: tuple[str, ...] = ("ld", "mm", "vec", "st", "host")
#: names of the loop variables, outermost first
LOOP_VARIABLES = "ijklmnop"

Value = int | float | str | tuple[int, ...] | tuple[float, ...]


def dense_strides(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Byte strides of a row-major array."""
    strides, step = [], DTYPES[dtype]
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Tile:
    """A strided view of one memory: `%0x100+0x40*i:s8[16,58,64]{3712,64,1}`.

    `address` and `strides` are in bytes (a stride of 0 broadcasts; negative ones walk backwards);
    `steps[d]` is added to the address per iteration of the d-th enclosing loop, outermost first (no trailing zeros).
    A tile of packed weights, `%0x100:s8[3,3,64,64]{nm,2,4}`, has a `packing` in place of strides (those are then the unpacked tile's).
    """

    space: str
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...] = ()
    packing: Packing | None = None

    @staticmethod
    def dense(space: str, address: int, dtype: str, shape: tuple[int, ...]) -> Tile:
        return Tile(space, address, dtype, shape, dense_strides(shape, dtype))

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes of payload: elements × element size."""
        return self.elements * DTYPES[self.dtype]

    @property
    def is_dense(self) -> bool:
        return self.strides == dense_strides(self.shape, self.dtype) and self.packing is None

    @property
    def storage(self) -> Tile:
        """The tile as the memories see it: the packed bytes, or the tile itself."""
        if self.packing is None:
            return self
        return Tile(self.space, self.address, "u8", (self.packing.bytes(self.shape),), (1,), self.steps)

    def extent(self) -> tuple[int, int]:
        """Lowest address touched and one past the highest, at iteration 0 of every loop."""
        if self.packing is not None:
            return self.address, self.address + self.packing.bytes(self.shape)
        low = high = self.address
        for size, stride in zip(self.shape, self.strides, strict=True):
            reach = (size - 1) * stride
            low, high = (low + reach, high) if reach < 0 else (low, high + reach)
        return low, high + DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Event:
    """One counting semaphore between two queues. In `signal=` the other queue is the waiter, in `wait=` the signaller.

    The k-th wait on an event passes when its k-th signal was given, that is, when the signalling instruction is complete.
    """

    queue: str
    id: int = 0


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. `tiles` in the order of the table (the result first); `attributes` as {name: value}, by name, defaults left out."""

    name: str
    tiles: tuple[Tile, ...]
    attributes: tuple[tuple[str, Value], ...] = ()
    waits: tuple[Event, ...] = ()
    signals: tuple[Event, ...] = ()
    line: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """One spelling: attributes in the order of their names."""
        if len(self.attributes) > 1:
            object.__setattr__(self, "attributes", tuple(sorted(self.attributes, key=lambda pair: pair[0])))


@dataclass(frozen=True, slots=True)
class Loop:
    """`loop COUNT … end`: the body COUNT times, each tile advanced by its step of this depth."""

    count: int
    body: tuple[Instruction | Loop, ...]
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Layer:
    """A run of instructions that serve the same ONNX nodes: the unit of every report."""

    name: str
    op: str
    nodes: tuple[str, ...]
    macs: int
    body: tuple[Instruction | Loop, ...]
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in DRAM or scratchpad that has a name outside: `.input`, `.output` or `.tensor`.

    `tile` is the tensor in its logical (ONNX) dimension order; its strides give the physical layout.
    real value = scale · (stored − zero). `layer` names the layer after which a `.tensor` holds its value ("" for inputs).
    """

    name: str
    tile: Tile
    scale: float
    zero: int
    layer: str = ""
    dtype: str = "float32"  # element type on the outside


@dataclass(frozen=True, slots=True)
class Program:
    target: Target
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    tensors: tuple[TensorRecord, ...]
    constants_address: int
    constants_bytes: int
    dram_bytes: int
    layers: tuple[Layer, ...]
    source: str = ""  # what was compiled, for the reader


def unroll(body: tuple[Instruction | Loop, ...], offsets: tuple[int, ...] = ()) -> Iterator[tuple[Instruction, tuple[int, ...]]]:
    """Every dynamic instruction of a body in text order, with the iteration numbers of its loops, outermost first."""
    for item in body:
        if isinstance(item, Loop):
            for iteration in range(item.count):
                yield from unroll(item.body, (*offsets, iteration))
        else:
            yield item, offsets


def address_at(tile: Tile, iterations: tuple[int, ...]) -> int:
    """The tile's byte address at the given loop iterations."""
    return tile.address + sum(step * n for step, n in zip(tile.steps, iterations, strict=False))
