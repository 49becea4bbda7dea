"""The three memories of the machine, and the only door to them: bounds-checked strided views.

The one big idea: a tile of the instruction set *is* a numpy strided view of a flat byte array, so that decoding an
operand once gives the array that every execution reads or writes. No view is made before its extent and alignment are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isa.program import DTYPES, SPACES, Tile
from runtime.errors import RuntimeFault

Array = NDArray[Any]
NUMPY: dict[str, np.dtype[Any]] = {
    "s8": np.dtype(np.int8), "u8": np.dtype(np.uint8), "s16": np.dtype(np.int16),
    "s32": np.dtype(np.int32), "s64": np.dtype(np.int64), "f32": np.dtype(np.float32),
    "u16": np.dtype(np.uint16), "u32": np.dtype(np.uint32), "u64": np.dtype(np.uint64), "f16": np.dtype(np.float16), "f64": np.dtype(np.float64),
}  # fmt: skip
NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in NUMPY.items()}
LARGEST_MEMORY = 1 << 36  # bytes; a larger one is a damaged program, not a chip
LARGEST_TILE = 1 << 28  # elements, counting broadcast ones
CACHE_LINE = 64


class Memory:
    """One flat byte memory, zeroed. Raises RuntimeFault when the size is impossible."""

    def __init__(self, space: str, size: int):
        if not 0 <= size <= LARGEST_MEMORY:
            raise RuntimeFault(f"the {space} memory has {size} bytes", hint=f"it can have 0 to {LARGEST_MEMORY}")
        try:
            self.bytes: NDArray[np.uint8] = aligned(size, np.zeros)
        except MemoryError as error:
            raise RuntimeFault(f"this computer can't hold a {space} memory of {size} bytes", hint="use a smaller model or target") from error
        self.space, self.size = space, size
        self._fixed: tuple[int, NDArray[np.uint8]] | None = None  # address and content of bytes that are read where they are

    def write(self, address: int, content: bytes | memoryview) -> None:
        """Copy `content` to `address`."""
        self.bytes[address : address + len(content)] = np.frombuffer(content, np.uint8)

    def fix(self, address: int, content: bytes) -> None:
        """Let `content`, which nothing will ever write over, lie at `address`: without a copy, as long as no view reaches beyond it."""
        self._fixed = (address, np.frombuffer(content, np.uint8))

    def view(self, tile: Tile, address: int, *, line: int = 0) -> Array:
        """The tile at `address` as an array that shares this memory; packed weights as their bytes.

        Raises RuntimeFault when it leaves the memory or is not aligned.
        """
        elements, tile = tile.elements, tile.storage
        dtype, width = NUMPY[tile.dtype], DTYPES[tile.dtype]
        if len(tile.shape) != len(tile.strides) or any(size < 1 for size in tile.shape) or elements > LARGEST_TILE:
            raise RuntimeFault(f"a tile of shape {list(tile.shape)} with strides {list(tile.strides)} can't be read or written", line=line)
        if width > 1 and any(step % width for step in (address, *tile.strides)):
            raise RuntimeFault(
                f"{SPACES[tile.space]}{address:#x}:{tile.dtype}{{{','.join(map(str, tile.strides))}}} is not aligned",
                line=line, hint=f"address and strides of {tile.dtype} must be multiples of {width}",
            )  # fmt: skip
        low, high = extent(tile, address)
        if low < 0 or high > self.size:
            raise RuntimeFault(
                f"the tile {SPACES[tile.space]}{address:#x}:{tile.dtype}{list(tile.shape)} touches bytes {low} to {high}",
                line=line, hint=f"{tile.space} has {self.size} bytes",
            )  # fmt: skip
        buffer, origin = self._backing(low, high)
        view: Array = np.ndarray(tile.shape, dtype, buffer=buffer.data, offset=address - origin, strides=tile.strides)
        return view

    def content(self) -> NDArray[np.uint8]:
        """All bytes, as a copy."""
        content: NDArray[np.uint8] = self.bytes.copy()
        if self._fixed is not None:
            first, fixed = self._fixed
            content[first : first + len(fixed)] = fixed
        return content

    def _backing(self, low: int, high: int) -> tuple[NDArray[np.uint8], int]:
        """The array that holds the bytes [low, high), and the address of its first one."""
        if self._fixed is None:
            return self.bytes, 0
        first, content = self._fixed
        if first <= low and high <= first + len(content):
            return content, first
        if low < first + len(content) and first < high:  # a view of both: from now on there are two copies of the same bytes
            self.write(first, content.data)
        return self.bytes, 0

    def clear(self, intervals: Iterable[tuple[int, int]]) -> None:
        """Zero the given [low, high) byte ranges."""
        for low, high in intervals:
            self.bytes[low:high] = 0


def aligned(size: int, make: Callable[..., Array] = np.empty) -> Array:
    """So many bytes from `make`, the first of them at the start of a cache line."""
    backing = make(size + CACHE_LINE, np.uint8)
    start = -backing.ctypes.data % CACHE_LINE
    return backing[start : start + size]


def extent(tile: Tile, address: int) -> tuple[int, int]:
    """Lowest byte touched and one past the highest, with the tile at `address`."""
    low, high = tile.extent()
    return low - tile.address + address, high - tile.address + address


def merge(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of byte ranges as sorted, disjoint ranges."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged
