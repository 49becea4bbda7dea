"""Packed weights to s8 values and back (`isa.packing` says how they lie).

The one big idea: `pack` and `unpack` of each format stand side by side, and whatever `pack` writes `unpack` reads as the same values.
`unpack` trusts nothing: a bitmap that does not count the values, or places that do not rise, are a fault, never other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from isa.packing import Packing, index_bits, matrix_shape
from isa.program import Tile
from isa.target import Target
from runtime.errors import RuntimeFault
from runtime.memory import Array


class DamageError(Exception):
    """Packed bytes that stand for no weights; what is wrong with them."""


def unpack(tile: Tile, stored: Array, *, line: int = 0) -> Array:
    """The s8 values of a packed tile from its bytes (u8, as many as the tile takes). Raises RuntimeFault where they stand for none."""
    assert tile.packing is not None
    depth, outputs = matrix_shape(tile.shape)
    parts = np.split(stored, np.cumsum(tile.packing.sections(tile.shape))[:-1])
    try:
        matrix = UNPACK[tile.packing.format](tile.packing.numbers, parts, depth, outputs)
    except DamageError as damage:
        told = f"the weights packed as {{{tile.packing.text()}}} are damaged: {damage}"
        raise RuntimeFault(told, line=line, hint="compile the model again, or pack the weights as isa/ISA.md tells") from None
    return matrix.reshape(tile.shape)


def pack(values: Array, packing: Packing) -> Array:
    """The bytes (u8) of s8 values [..., N], which the format must be able to hold."""
    matrix = values.reshape(matrix_shape(values.shape))
    assert holds(matrix, packing), f"{packing.text()} can't hold these weights"
    stored = PACK[packing.format](packing.numbers, matrix)
    assert stored.size == packing.bytes(values.shape), f"{packing.text()} counts other values"
    return stored


# ── nm ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pack_nm(numbers: tuple[int, ...], matrix: Array) -> Array:
    keep, of = numbers
    groups = _neighbours(matrix, of)
    order = np.argsort(groups == 0, axis=1, kind="stable")[:, :keep]  # the non-zeros first, then the lowest places that are free
    places = np.sort(order, axis=1)
    values = np.take_along_axis(groups, places, axis=1)
    return np.concatenate([values.view(np.uint8).reshape(-1), _to_bits(places.reshape(-1), index_bits(of))])


def _neighbours(matrix: Array, of: int) -> Array:
    """[K, N] as [⌈K/of⌉, of, N], filled up with zeros."""
    depth, outputs = matrix.shape
    groups = np.zeros((-(-depth // of) * of, outputs), matrix.dtype)
    groups[:depth] = matrix
    return groups.reshape(-1, of, outputs)


def _unpack_nm(numbers: tuple[int, ...], parts: list[Array], depth: int, outputs: int) -> Array:
    keep, of = numbers
    values = parts[0].view(np.int8).reshape(-1, keep, outputs)
    places = _from_bits(parts[1], index_bits(of), values.size).reshape(values.shape)
    if (places >= of).any():
        raise DamageError(f"place {int(places.max())} among {of} neighbours")
    if (np.diff(places, axis=1) <= 0).any():
        raise DamageError("the places of some neighbours do not rise")
    groups = np.zeros((len(values), of, outputs), np.int8)
    np.put_along_axis(groups, places, values, axis=1)
    matrix = groups.reshape(-1, outputs)
    if matrix[depth:].any():
        raise DamageError(f"a value that is not 0 past the last of {depth} rows")
    return matrix[:depth]


# ── block ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def block_map(matrix: Array, rows: int, columns: int) -> Array:
    """bool[⌈K/rows⌉, ⌈N/columns⌉]: the blocks that are not all zero."""
    used = np.logical_or.reduceat(matrix != 0, np.arange(0, matrix.shape[0], rows), axis=0)
    return np.asarray(np.logical_or.reduceat(used, np.arange(0, matrix.shape[1], columns), axis=1))


def _pack_block(numbers: tuple[int, ...], matrix: Array) -> Array:
    rows, columns, _ = numbers
    used = block_map(matrix, rows, columns)
    blocks = [matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].reshape(-1) for i, j in np.argwhere(used).tolist()]
    values = np.concatenate([np.zeros(0, np.int8), *blocks])
    return np.concatenate([np.packbits(used, bitorder="little"), values.view(np.uint8)])


def _unpack_block(numbers: tuple[int, ...], parts: list[Array], depth: int, outputs: int) -> Array:
    rows, columns, count = numbers
    down, across = -(-depth // rows), -(-outputs // columns)
    used = _flags(parts[0], down * across).reshape(down, across)
    heights = np.minimum(rows, depth - rows * np.arange(down))
    widths = np.minimum(columns, outputs - columns * np.arange(across))
    if (found := int((np.outer(heights, widths) * used).sum())) != count:
        raise DamageError(f"the bitmap tells of {found} values, {count} are stored")
    matrix, values, first = np.zeros((depth, outputs), np.int8), parts[1].view(np.int8), 0
    for i, j in np.argwhere(used).tolist():
        block = matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        block[...] = values[first : first + block.size].reshape(block.shape)
        first += block.size
    return matrix


# ── mask ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pack_mask(numbers: tuple[int, ...], matrix: Array) -> Array:  # noqa: ARG001  the shape of every `pack`
    used = matrix != 0
    return np.concatenate([np.packbits(used, bitorder="little"), matrix[used].view(np.uint8)])


def _unpack_mask(numbers: tuple[int, ...], parts: list[Array], depth: int, outputs: int) -> Array:
    used = _flags(parts[0], depth * outputs)
    if (found := int(used.sum())) != numbers[0]:
        raise DamageError(f"the bitmap tells of {found} values, {numbers[0]} are stored")
    matrix = np.zeros(depth * outputs, np.int8)
    matrix[used] = parts[1].view(np.int8)
    return matrix.reshape(depth, outputs)


# ── s4 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_four_bits(matrix: Array, group: int) -> tuple[Array, Array] | None:
    """(4 bits per weight, int8 [K, N]; factors u8 [⌈K/group⌉, N]), if there are such: the factors are the greatest common divisors."""
    if not group:
        return (matrix, np.zeros(0, np.uint8)) if matrix.min() >= -8 and matrix.max() <= 7 else None
    if len(matrix) > group and _in_four_bits(matrix[:group], group) is None:  # soon told, as of most weights that need 8 bits
        return None
    groups = _neighbours(matrix.astype(np.int16), group)
    factors = np.maximum(np.gcd.reduce(groups, axis=1), 1)
    small = (groups // factors[:, None]).reshape(-1, matrix.shape[1])[: len(matrix)]
    return (small.astype(np.int8), factors.astype(np.uint8)) if small.min() >= -8 and small.max() <= 7 else None


def _pack_s4(numbers: tuple[int, ...], matrix: Array) -> Array:
    found = _in_four_bits(matrix, numbers[0])
    assert found is not None
    small, factors = found
    nibbles = np.zeros(-(-small.size // 2) * 2, np.uint8)
    nibbles[: small.size] = small.view(np.uint8).reshape(-1) & 15
    return np.concatenate([nibbles[::2] | nibbles[1::2] << 4, factors.reshape(-1)])


def _unpack_s4(numbers: tuple[int, ...], parts: list[Array], depth: int, outputs: int) -> Array:
    (group,) = numbers
    nibbles = np.stack([parts[0] & 15, parts[0] >> 4], axis=1).reshape(-1)[: depth * outputs].astype(np.int16)
    values = (nibbles - 16 * (nibbles > 7)).reshape(depth, outputs)
    if group:
        values = values * np.repeat(parts[1].reshape(-1, outputs).astype(np.int16), min(group, depth), axis=0)[:depth]
        if values.min() < -128 or values.max() > 127:
            raise DamageError(f"a weight is {int(values.flat[np.abs(values).argmax()])}, which is no s8")
    return values.astype(np.int8)


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _to_bits(numbers: Array, width: int) -> Array:
    """Unsigned numbers of `width` bits each, lowest bit first, one after the other."""
    return np.packbits((numbers[:, None] >> np.arange(width)) & 1, bitorder="little")


def _from_bits(stored: Array, width: int, count: int) -> Array:
    return np.asarray(_flags(stored, count * width).reshape(count, width) @ (1 << np.arange(width)))


def _flags(stored: Array, count: int) -> Array:
    """The first `count` bits; those that fill up the last byte must be 0."""
    bits = np.unpackbits(stored, bitorder="little").astype(bool)
    if bits[count:].any():
        raise DamageError("bits past the end are not 0")
    return bits[:count]


Numbers = tuple[int, ...]
PACK: dict[str, Callable[[Numbers, Array], Array]] = {"nm": _pack_nm, "block": _pack_block, "mask": _pack_mask, "s4": _pack_s4}
UNPACK: dict[str, Callable[[Numbers, list[Array], int, int], Array]] = {
    "nm": _unpack_nm, "block": _unpack_block, "mask": _unpack_mask, "s4": _unpack_s4,
}  # fmt: skip


def array_block(target: Target) -> tuple[int, int]:
    """(rows, columns): the weights that the target's array holds or reads at once, as part of a matrix K × N."""
    if target.family == "mac":
        return target.depth, target.cols
    return (1 if target.dataflow == "os" else target.rows), (1 if target.dataflow == "is" else target.cols)


def candidates(matrix: Array, formats: tuple[str, ...], block: tuple[int, int]) -> list[Packing]:
    """The packings of these formats that may hold a matrix K × N; `block`: the largest blocks to try."""
    found = []
    for word in formats:
        name, *numbers = word.split(":")
        if name == "nm":
            found.append(Packing(name, (int(numbers[0]), int(numbers[1]))))
        elif name == "mask":
            found.append(Packing(name, (int(np.count_nonzero(matrix)),)))
        elif name == "s4":
            found += [Packing(name, (group,)) for group in (0, 128, 64, 32)]
        else:
            found += [_blocks(matrix, rows, block[1]) for rows in (block[0], block[0] // 2, block[0] // 4) if rows]
    return found


def _blocks(matrix: Array, rows: int, columns: int) -> Packing:
    used = block_map(matrix, rows, columns)
    heights = np.minimum(rows, matrix.shape[0] - rows * np.arange(used.shape[0]))
    widths = np.minimum(columns, matrix.shape[1] - columns * np.arange(used.shape[1]))
    return Packing("block", (rows, columns, int((np.outer(heights, widths) * used).sum())))


def packings(values: Array, formats: tuple[str, ...], block: tuple[int, int]) -> Iterator[Packing]:
    """The packings that hold s8 values [..., N] in fewer bytes than they take themselves, the smallest first."""
    matrix = values.reshape(matrix_shape(values.shape))
    options = [(packing.bytes(values.shape), order, packing) for order, packing in enumerate(candidates(matrix, formats, block))]
    for size, _, packing in sorted(options, key=lambda option: option[:2]):
        if size < values.size and holds(matrix, packing):
            yield packing


def holds(matrix: Array, packing: Packing) -> bool:
    """Whether the format can hold the matrix; a bitmap can hold any."""
    if packing.format == "nm":
        keep, of = packing.numbers
        return int(_neighbours(matrix != 0, of).sum(axis=1, dtype=np.uint8).max(initial=0)) <= keep
    return packing.format != "s4" or _in_four_bits(matrix, packing.numbers[0]) is not None
