"""What the lowerings write with: tiles of memory, loads, stores and instructions, in plain sequential order.

The one big idea: a lowering thinks in windows of tensors; the emitter turns a window into a tile in the scratchpad (by a load,
or for nothing where the tensor already lives there) and hands out the buffers in which tiles take turns (ping and pong).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from isa.program import DTYPES, Instruction, Tile, Value, dense_strides
from isa.spec import SPEC
from isa.target import Target
from npucc.errors import CompileError
from npucc.graph import Graph
from npucc.lowering.placement import Placement
from npucc.lowering.views import View, merge_dimensions
from npucc.lowering.weights import packed
from runtime.skipping import kept_packing

SLOT_ALIGNMENT = 8
MOST_DMA_DIMENSIONS = 5


class ConstantPool:
    """The bytes of constants.bin, each distinct array once."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._offsets: dict[bytes, int] = {}
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        """Byte offset of the array's row-major bytes, 64-aligned."""
        data = np.ascontiguousarray(array).tobytes()
        if data not in self._offsets:
            padding = -self.size % 64
            self._chunks += [bytes(padding), data]
            self.size += padding
            self._offsets[data] = self.size
            self.size += len(data)
        return self._offsets[data]

    def bytes(self) -> bytes:
        return b"".join(self._chunks)


class Ring:
    """Equal slots of one memory. The slot that was not used for longest is given out next; what was loaded into a slot stays until then."""

    def __init__(self, addresses: Iterable[int]) -> None:
        self._loaded: dict[int, tuple[object, Tile] | None] = dict.fromkeys(addresses)  # least recently used first

    def next(self) -> int:
        """The address of a slot, whose content is lost."""
        address = next(iter(self._loaded))
        self._use(address, None)
        return address

    def find(self, key: object) -> Tile | None:
        """The tile that was kept under this key, if its slot was not given out since."""
        for address, loaded in self._loaded.items():
            if loaded is not None and loaded[0] == key:
                self._use(address, loaded)
                return loaded[1]
        return None

    def keep(self, key: object, tile: Tile) -> Tile:
        """Note what the slot given out last now holds."""
        self._use(next(reversed(self._loaded)), (key, tile))
        return tile

    def _use(self, address: int, loaded: tuple[object, Tile] | None) -> None:
        del self._loaded[address]
        self._loaded[address] = loaded


@dataclass(slots=True)
class Emitter:
    """Collects one layer's instructions. Scratchpad outside `reserved` (resident tensors) is free for the layer's tiles."""

    graph: Graph
    target: Target
    placement: Placement
    constants: ConstantPool
    constants_address: int
    reserved: int = 0  # bytes at the bottom of the scratchpad held by resident tensors
    from_top: bool = False  # every other layer takes its tiles from the other end, so that its loads need not wait
    instructions: list[Instruction] = field(default_factory=list)
    spm_peak: int = 0  # most bytes of scratchpad that the layer's tiles held at once
    _spm_used: int = 0
    _acc_used: int = 0

    @property
    def spm_free(self) -> int:
        """Bytes of scratchpad that the layer may still take."""
        return self.top - self.reserved - self._spm_used

    @property
    def top(self) -> int:
        """One past the last usable byte of the scratchpad."""
        unit = max(SLOT_ALIGNMENT, self.target.alignment)
        return self.target.spm_bytes // unit * unit

    def ring(self, size: int, slots: int) -> Ring:
        """`slots` scratchpad slots of `size` bytes. Raises CompileError when they do not fit."""
        size = aligned(size, self.target)
        return Ring([self._take(size) for _ in range(slots)])

    def _take(self, size: int) -> int:
        if size > self.spm_free:
            raise CompileError(
                f"a tile of {size} bytes does not fit in the {self.spm_free} bytes left of {self.target.spm_bytes} bytes of scratchpad",
                hint=f"raise spm_bytes of target {self.target.name!r}",
            )
        low = self.top - self._spm_used - size if self.from_top else self.reserved + self._spm_used
        self._spm_used += size
        self.spm_peak = max(self.spm_peak, self._spm_used)
        return low

    def acc_ring(self, size: int) -> Ring:
        """Two accumulator slots if two fit, else one."""
        size = -(-size // 64) * 64 if 2 * (-(-size // 64) * 64) <= self.target.acc_bytes else size
        return Ring((0, size) if 2 * size <= self.target.acc_bytes else (0,))

    def issue(self, name: str, *tiles: Tile, **attributes: Value) -> None:
        """Append an instruction; attributes equal to the table's default are left out, and the one stride of a single element is its size."""
        tiles = tuple(replace(tile, strides=(DTYPES[tile.dtype],)) if tile.shape == (1,) else tile for tile in tiles)
        defaults = {attribute.name: attribute.default for attribute in SPEC[name].attributes}
        kept = tuple((key, value) for key, value in attributes.items() if value != defaults[key])
        self.instructions.append(Instruction(name, tiles, kept))

    def tile(self, view: View) -> Tile:
        """The view as an operand, where its buffer lies."""
        space, address = self.placement.addresses[view.buffer] if view.buffer != CONSTANTS else ("dram", self.constants_address)
        return Tile(space, address + view.offset, view.dtype, view.shape, view.strides)

    def constant(self, array: np.ndarray, dtype: str) -> View:
        """A constant in DRAM, row-major."""
        view = View.dense(CONSTANTS, array.shape, dtype)
        return replace(view, offset=self.constants.add(array))

    def weights(self, array: np.ndarray, pixels: int = 0) -> Tile:
        """Weights (s8) in DRAM, packed where that costs less (`pixels`: see `packed`)."""
        found = packed(array, self.target, pixels)
        if found is None:
            return self.tile(self.constant(array, "s8"))
        packing, stored = found
        return replace(Tile.dense("dram", self.tile(self.constant(stored, "u8")).address, "s8", array.shape), packing=packing)

    def load_weights(self, key: object, source: Tile, ring: Ring, *, in_array: bool = False) -> Tile:
        """A scratchpad tile of weights, dense, or packed where the array takes and skips them; one that the ring still holds is not loaded again."""
        held = ring.find(key)
        if held is not None:
            return held
        tile = Tile.dense("spm", ring.next(), "s8", source.shape)
        if source.packing is None:
            self._transfer("ld", tile, source)
        else:
            tile = replace(tile, packing=source.packing) if in_array and kept_packing(source.packing, self.target) else tile
            self.issue("ld", tile, source)
        return ring.keep(key, tile)

    def load(self, view: View, ring: Ring) -> Tile:
        """The window as a dense scratchpad tile in the view's dimension order; broadcast dimensions are loaded once."""
        source = self.tile(view)
        if source.space == "spm":
            return source
        shape = tuple(1 if stride == 0 else size for size, stride in zip(view.shape, view.strides, strict=True))
        tile = Tile.dense("spm", ring.next(), view.dtype, shape)
        self._transfer("ld", tile, replace(source, shape=shape))
        strides = tuple(0 if stride == 0 else own for stride, own in zip(view.strides, tile.strides, strict=True))
        return Tile("spm", tile.address, view.dtype, view.shape, strides)

    def load_once(self, view: View, ring: Ring) -> Tile:
        """As load, but a window that the ring still holds is not loaded again."""
        if self.tile(view).space == "spm":
            return self.tile(view)
        return ring.find(view) or ring.keep(view, self.load(view, ring))

    def mark(self) -> int:
        """A point to `reset` to: buffers taken after it are given back."""
        return self._spm_used

    def reset(self, mark: int) -> None:
        self._spm_used = mark

    def store(self, view: View, tile: Tile) -> None:
        """Write a scratchpad tile to the window; nothing where the tile was computed in place."""
        target = self.tile(view)
        if target.space == "dram":
            self._transfer("st", target, tile)
        elif (target.address, target.strides) != (tile.address, tile.strides):
            self._copy(target, tile)

    def result_tile(self, view: View, ring: Ring | None) -> Tile:
        """Where to compute the window: in place if its tensor lives in the scratchpad, else a slot of the ring."""
        target = self.tile(view)
        if target.space == "spm" or ring is None:
            return target
        return Tile.dense("spm", ring.next(), view.dtype, view.shape)

    def _transfer(self, name: str, result: Tile, source: Tile) -> None:
        shape, (left, right) = keep_dimensions(result.shape, result.strides, source.strides)
        if len(shape) > MOST_DMA_DIMENSIONS:
            shape, (left, right) = merge_dimensions(result.shape, result.strides, source.strides)
        if len(shape) > MOST_DMA_DIMENSIONS:
            for index in range(shape[0]):
                self._transfer(name, *(_part(tile, shape, own, index) for tile, own in ((result, left), (source, right))))
            return
        self.issue(name, replace(result, shape=shape, strides=left), replace(source, shape=shape, strides=right))

    def _copy(self, result: Tile, source: Tile) -> None:
        self.vector("cvt", result, source)

    def vector(self, name: str, *tiles: Tile, **attributes: Value) -> None:
        """An elementwise instruction, its dimensions merged as far as all tiles allow."""
        shape, strides = merge_dimensions(tiles[0].shape, *(tile.strides for tile in tiles))
        self.issue(name, *(replace(tile, shape=shape, strides=own) for tile, own in zip(tiles, strides, strict=True)), **attributes)


def _part(tile: Tile, shape: tuple[int, ...], strides: tuple[int, ...], index: int) -> Tile:
    """The tile under another shape, at one index of its first dimension."""
    return replace(tile, address=tile.address + index * strides[0], shape=shape[1:], strides=strides[1:])


CONSTANTS = "\0constants"  # no tensor has this name


def aligned(size: int, target: Target) -> int:
    """Bytes that a slot of this size takes."""
    unit = max(SLOT_ALIGNMENT, target.alignment)
    return -(-size // unit) * unit


def keep_dimensions(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Drop size-1 dimensions (all but one)."""
    if not shape:
        return (1,), tuple((1,) for _ in strides)
    kept = [d for d, size in enumerate(shape) if size != 1] or [len(shape) - 1]
    return tuple(shape[d] for d in kept), tuple(tuple(own[d] for d in kept) for own in strides)


def spm_tile(address: int, dtype: str, shape: Sequence[int]) -> Tile:
    """A dense tile in the scratchpad."""
    return Tile("spm", address, dtype, tuple(shape), dense_strides(tuple(shape), dtype))


def windows(total: int, tile: int) -> list[tuple[int, int]]:
    """(start, size) of consecutive tiles of a dimension."""
    return [(start, min(tile, total - start)) for start in range(0, total, tile)]


def parameter_rows(bias: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """int32 [2 or 3, outputs]: the biases, then the rows of `arithmetic.Factor`, so that one load brings all."""
    return np.concatenate([bias.astype(np.int32)[None], factors])


def factor_tiles(parameters: Tile, mode: str) -> tuple[Tile, ...]:
    """The operands of requant in a parameter block: float32 factors; or multipliers and shifts."""
    rows, count = parameters.shape
    dtype = "f32" if mode == "fp32.rne" else "s32"
    return tuple(Tile("spm", parameters.address + 4 * count * row, dtype, (count,), (4,)) for row in range(1, rows))
