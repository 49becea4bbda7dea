"""How weights lie in memory when their zeros, or half of their bits, are left out.

The one big idea: a packed tile is the same tile of s8 values, only stored otherwise. It is seen as a matrix K × N, N being its last
dimension and K all others in row-major order (the order in which the matrix engine sums), and the numbers in its braces tell how many
bytes it takes, so that a line can be checked without looking at the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Sections = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a matrix K × N of s8. `sections`: bytes of its parts, in the order in which they follow each other, from the
    numbers, K and N. `lowest`: of each number."""

    numbers: tuple[str, ...]
    lowest: tuple[int, ...]
    layout: str
    sections: Callable[[tuple[int, ...], int, int], Sections]


def _up(amount: int, unit: int) -> int:
    return -(-amount // unit)


def index_bits(neighbours: int) -> int:
    """Bits of the place of a value among its neighbours."""
    return (neighbours - 1).bit_length()


def _nm(numbers: tuple[int, ...], depth: int, outputs: int) -> Sections:
    keep, neighbours = numbers
    count = _up(depth, neighbours) * keep * outputs
    return count, _up(count * index_bits(neighbours), 8)


def _block(numbers: tuple[int, ...], depth: int, outputs: int) -> Sections:
    rows, columns, values = numbers
    return _up(_up(depth, rows) * _up(outputs, columns), 8), values


def _mask(numbers: tuple[int, ...], depth: int, outputs: int) -> Sections:
    return _up(depth * outputs, 8), numbers[0]


def _s4(numbers: tuple[int, ...], depth: int, outputs: int) -> Sections:
    return _up(depth * outputs, 2), _up(depth, numbers[0]) * outputs if numbers[0] else 0


FORMATS: dict[str, Format] = {
    "nm": Format(
        ("keep", "of"), (1, 2),
        "of each `of` neighbours along K, `keep` values (s8) [⌈K/of⌉, keep, N], then their places among the neighbours, "
        "⌈log2 of⌉ bits each in the same order, rising; places past the last row hold the value 0",
        _nm,
    ),
    "block": Format(
        ("rows", "columns", "values"), (1, 1, 0),
        "a bit per block of rows × columns, row-major, then the blocks whose bit is 1 one after the other, each row-major "
        "(those at the edges are smaller); `values` bytes in all",
        _block,
    ),
    "mask": Format(("values",), (0,), "a bit per weight, row-major, then the `values` weights whose bit is 1", _mask),
    "s4": Format(
        ("group",), (0,),
        "4 bits per weight (−8 to 7), row-major; with a group, then factors (u8) [⌈K/group⌉, N]: a weight is its 4 bits times the factor of "
        "its `group` neighbours along K, and must be an s8",
        _s4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packing:
    """A format with its numbers: `nm,2,4`, `block,32,32,18432`, `mask,18432`, `s4,64`."""

    format: str
    numbers: tuple[int, ...]

    def text(self) -> str:
        return ",".join((self.format, *map(str, self.numbers)))

    def sections(self, shape: Shape) -> Sections:
        """Bytes of each part of a tile of that shape."""
        return FORMATS[self.format].sections(self.numbers, *matrix_shape(shape))

    def bytes(self, shape: Shape) -> int:
        """Bytes that a tile of that shape takes."""
        return sum(self.sections(shape))

    @property
    def kind(self) -> str:
        """As a target lists it: the format; for `nm` with its pattern."""
        return f"nm:{self.numbers[0]}:{self.numbers[1]}" if self.format == "nm" else self.format

    @property
    def drops_zeros(self) -> bool:
        """Whether zeros are left out, so that an array could skip them."""
        return self.format != "s4"


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(K, N)."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def packing_remarks(packing: Packing, shape: Shape, dtype: str) -> Iterator[tuple[str, str]]:
    """What is wrong with a packed tile, as (message, hint)."""
    known = FORMATS.get(packing.format)
    if known is None:
        yield f"unknown weight format {packing.format!r}", f"known: {', '.join(FORMATS)}"
        return
    wanted = f"{{{','.join((packing.format, *known.numbers))}}}"
    if len(packing.numbers) != len(known.numbers) or any(n < low for n, low in zip(packing.numbers, known.lowest, strict=True)):
        limits = ", ".join(f"{name} ≥ {low}" for name, low in zip(known.numbers, known.lowest, strict=True))
        yield f"the packing is {{{packing.text()}}}", f"write {wanted} with {limits}"
        return
    if dtype != "s8" or len(shape) < 2:
        yield f"a packed tile of {dtype} with {len(shape)} dimensions", "only s8 weights of two dimensions or more are packed"
        return
    depth, outputs = matrix_shape(shape)
    if packing.format == "nm" and not packing.numbers[0] < packing.numbers[1] <= 256:
        yield f"the packing is {{{packing.text()}}}", "keep is below of, and of is at most 256"
    if packing.format in ("mask", "block") and packing.numbers[-1] > depth * outputs:
        yield f"the packing holds {packing.numbers[-1]} values, the tile has {depth * outputs} elements", "give the number of stored values"
