"""Candidate tile sizes of one dimension."""

from __future__ import annotations


def halvings(size: int) -> list[int]:
    """size, size/2, size/4 … 1, rounded up."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def tile_sizes(size: int) -> list[int]:
    """The distinct values of ⌈size / n⌉, largest first: tile sizes that waste nothing on a ragged end."""
    return sorted({-(-size // n) for n in range(1, size + 1)}, reverse=True)


def output_sizes(size: int, columns: int) -> list[int]:
    """Output channels per tile, largest first: all, multiples of the array's columns, or what is left by halving those."""
    multiples = {min(size, -(-count // columns) * columns) for count in tile_sizes(size)}
    return sorted({size, *multiples, *halvings(min(size, columns))}, reverse=True)
