"""Overlap of strided tiles against sets of bytes, spelled out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from isa import Tile
from isa.geometry import footprint, overlaps, writes_twice
from isa.program import DTYPES

strides = st.integers(-12, 12)
dimensions = st.lists(st.tuples(st.integers(1, 4), strides), max_size=3)
small_tiles = st.builds(
    lambda address, dtype, dims: Tile("spm", address, dtype, tuple(size for size, _ in dims), tuple(stride for _, stride in dims)),
    st.integers(0, 40), st.sampled_from(["s8", "s16", "s32"]), dimensions,
)  # fmt: skip


def element_addresses(tile: Tile) -> list[int]:
    addresses = [tile.address]
    for size, stride in zip(tile.shape, tile.strides, strict=True):
        addresses = [address + index * stride for address in addresses for index in range(size)]
    return addresses


def touched(tile: Tile) -> set[int]:
    return {address + byte for address in element_addresses(tile) for byte in range(DTYPES[tile.dtype])}


@settings(max_examples=500)
@given(small_tiles)
def test_footprint_is_the_byte_set(tile: Tile) -> None:
    mark, spelled = footprint(tile), touched(tile)
    runs = [tile.address + mark.low]
    for size, stride in mark.dims:
        runs = [start + index * stride for start in runs for index in range(size)]
    assert {start + byte for start in runs for byte in range(mark.run)} == spelled
    assert (tile.address + mark.low, tile.address + mark.high) == (min(spelled), max(spelled) + 1) == tile.extent()


@settings(max_examples=1000)
@given(small_tiles, small_tiles)
def test_overlap_is_a_shared_byte(first: Tile, second: Tile) -> None:
    expected = bool(touched(first) & touched(second))
    assert overlaps(footprint(first), first.address, footprint(second), second.address) == expected
    assert overlaps(footprint(second), second.address, footprint(first), first.address) == expected


@settings(max_examples=500)
@given(small_tiles)
def test_writing_twice_is_a_repeated_byte(tile: Tile) -> None:
    size = DTYPES[tile.dtype]
    assert writes_twice(tile.shape, tile.strides, size) == (len(touched(tile)) < tile.elements * size)


def test_interleaved_channels_do_not_overlap() -> None:
    """Two halves of the channels of a large tensor: told apart without spelling out 12 million runs."""
    left = Tile("dram", 0, "s8", (3500, 3500, 32), (3500 * 64, 64, 1))
    right = Tile("dram", 32, "s8", (3500, 3500, 32), (3500 * 64, 64, 1))
    wide = Tile("dram", 31, "s8", (3500, 3500, 2), (3500 * 64, 64, 1))
    assert not overlaps(footprint(left), 0, footprint(right), 32)
    assert overlaps(footprint(left), 0, footprint(wide), 31)
