"""Loops out of straight-line code: the fewest lines that unroll to the same instructions.

The one big idea: tiles of a layer repeat, and their addresses advance by constants. Wherever a run of lines is repeated
with constant address steps, it becomes `loop n … end`. Applied again to the result, it finds nested loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isa.program import Instruction, Loop

Item = Instruction | Loop
_LONGEST_BODY = 96
_DEEPEST_NEST = 4


@dataclass(frozen=True, slots=True)
class _Line:
    """An item, what must be equal for it to repeat (as a small integer), and what may advance."""

    item: Item
    key: int
    addresses: tuple[int, ...]


def roll(instructions: Sequence[Item]) -> tuple[Item, ...]:
    """Before: A(0) A(64) A(128) A(192). After: loop 4 { A(0+64*i) }."""
    items = tuple(instructions)
    return min((_roll_repeatedly(items, shortest) for shortest in (True, False)), key=lines_of)


def lines_of(items: Sequence[Item]) -> int:
    """Lines of text."""
    return sum(2 + lines_of(item.body) if isinstance(item, Loop) else 1 for item in items)


def _roll_repeatedly(items: tuple[Item, ...], shortest: bool) -> tuple[Item, ...]:
    """Inner loops first (`shortest` period that saves lines), or the loop that saves most; then loops around them."""
    for _ in range(_DEEPEST_NEST):
        rolled = _roll_once(items, shortest)
        if len(rolled) == len(items):
            break
        items = rolled
    return items


def _roll_once(items: tuple[Item, ...], shortest: bool) -> tuple[Item, ...]:
    keys: dict[object, int] = {}
    lines = [_Line(item, keys.setdefault(_shape(item), len(keys)), tuple(_addresses(item))) for item in items]
    result: list[Item] = []
    position = 0
    while position < len(lines):
        period, count = _best_repeat(lines, position, shortest)
        if count < 2:
            result.append(lines[position].item)
            position += 1
            continue
        body = [_advance(lines[position + n], lines[position + period + n]) for n in range(period)]
        result.append(Loop(count, tuple(body)))
        position += period * count
    return tuple(result)


def _best_repeat(lines: Sequence[_Line], start: int, shortest: bool) -> tuple[int, int]:
    """(period, count) that saves most lines from `start`, or the shortest that saves any; count 1 if none does."""
    best, saved = (1, 1), 0
    longest = min(_LONGEST_BODY, (len(lines) - start) // 2)
    for period in range(1, longest + 1):
        if lines[start].key != lines[start + period].key:
            continue
        count = _repeats(lines, start, period)
        gain = (count - 1) * period - 2
        if gain > saved:
            best, saved = (period, count), gain
            if shortest:
                break
    return best


def _repeats(lines: Sequence[_Line], start: int, period: int) -> int:
    """How often the lines from `start` repeat with this period and constant address steps."""
    steps: list[tuple[int, ...]] = []
    for n in range(period):
        first, second = lines[start + n], lines[start + period + n]
        if first.key != second.key:
            return 1
        steps.append(tuple(b - a for a, b in zip(first.addresses, second.addresses, strict=True)))
    count = 2
    while start + (count + 1) * period <= len(lines):
        before, after = start + (count - 1) * period, start + count * period
        for n in range(period):
            old, new = lines[before + n], lines[after + n]
            if old.key != new.key or any(b - a != step for a, b, step in zip(old.addresses, new.addresses, steps[n], strict=True)):
                return count
        count += 1
    return count


def _shape(item: Item) -> object:
    """Everything of an item but its addresses."""
    if isinstance(item, Loop):
        return ("loop", item.count, tuple(_shape(inner) for inner in item.body))
    tiles = tuple((tile.space, tile.dtype, tile.shape, tile.strides, tile.steps, tile.packing) for tile in item.tiles)
    return (item.name, tiles, item.attributes, item.waits, item.signals)


def _addresses(item: Item) -> list[int]:
    if isinstance(item, Loop):
        return [address for inner in item.body for address in _addresses(inner)]
    return [tile.address for tile in item.tiles]


def _advance(first: _Line, second: _Line) -> Item:
    """The first item with a step for the new outermost loop."""
    steps = [b - a for a, b in zip(first.addresses, second.addresses, strict=True)]
    return _with_steps(first.item, steps)


def _with_steps(item: Item, steps: list[int]) -> Item:
    """Consumes as many `steps` as the item has addresses."""
    if isinstance(item, Loop):
        return replace(item, body=tuple(_with_steps(inner, steps) for inner in item.body))
    tiles = []
    for tile in item.tiles:
        step = steps.pop(0)
        tiles.append(replace(tile, steps=(step, *tile.steps) if step or tile.steps else ()))
    return replace(item, tiles=tuple(tiles))
