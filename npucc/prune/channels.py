"""How many channels each family loses: how much that costs the outputs, and the cheapest way to the budget.

The one big idea: the amounts come from the network's outputs (measured with each family pruned alone), and are bought with the cycles they save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph
from npucc.prune.families import Family, Order, Statistics, order_family
from npucc.prune.options import PruneOptions
from npucc.prune.price import Price, PriceList
from npucc.prune.shrink import shrink
from npucc.prune.slots import FIXED
from npucc.prune.solve import damped

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Callable[[Graph], float]
Progress = Callable[[str, int, int], None]

STEPS = 16  # amounts considered per family, at most
ASIDE = 0.25  # what a saving counts that was not asked for: cycles where the budget is multiply-accumulates, and the other way round
EVEN = 4  # where no amount saves cycles by itself: shares to go on by
MEASURED = 6  # of them, the error of the others lies between
DEEPEST = 0.25  # of a family's channels always stay


@dataclass(frozen=True, slots=True)
class Curve:
    """A family's labels in the order they go, the counts to consider, and the outputs' error at each, the family pruned alone."""

    family: Family
    order: Array
    counts: tuple[int, ...]  # removed, ascending
    errors: tuple[float, ...]
    is_told: bool = False  # the only count is what the user wants

    def labels(self, level: int) -> Array:
        """The labels gone at a level; level 0 removes none."""
        return self.order[: self.counts[level - 1]] if level else self.order[:0]

    def error(self, level: int) -> float:
        return self.errors[level - 1] if level else 0.0


def mend(statistics: Statistics, removed: Array) -> dict[str, Array]:
    """New constants, in their old shapes, for every layer that loses inputs: what is left says as well as it can what was there."""
    values: dict[str, Array] = {}
    for name, site in statistics.sites.items():
        gone = np.append(removed[statistics.depth_labels(site)], False)
        if not gone.any():
            continue
        gram, matrix = damped(statistics.grams[name]), site.matrix(statistics.graph)
        kept = np.flatnonzero(~gone)
        fitted = np.zeros_like(matrix)
        fitted[:, kept] = np.linalg.solve(gram[:, kept[:, None], kept], gram[:, kept] @ matrix)
        weights, bias = site.constants(statistics.graph, fitted)
        values |= {site.weights: weights, site.bias: bias}
    return values


def draw_curves(
    statistics: Statistics,
    families: Sequence[Family],
    prices: PriceList,
    options: PruneOptions,
    measure: Measure,
    *,
    progress: Progress | None = None,
) -> tuple[Curve, ...]:
    """Prune each family alone by growing amounts (mended, if repair is on) and measure the outputs."""
    curves = []
    for index, family in enumerate(families):
        if progress:
            progress("sensitivity", index, len(families))
        share = next((share for name in family.makers if (share := options.channels_of(statistics.graph.nodes[name])) is not None), None)
        counts = _counts(family, prices) if share is None else (int(np.clip(round(share * len(family.labels)), 1, len(family.labels) - 1)),)
        measured = sorted({counts[round(place)] for place in np.linspace(0, len(counts) - 1, MEASURED)}) if counts else []
        order = order_family(statistics, family, options.criterion, at=measured)
        errors = np.maximum.accumulate([_alone(statistics, order, count, options, measure) for count in measured])
        curves.append(Curve(family, order.labels, counts, tuple(np.interp(counts, [0, *measured], [0.0, *errors]).tolist()), share is not None))
    return tuple(curves)


def _counts(family: Family, prices: PriceList) -> tuple[int, ...]:
    """Removed channels to consider, at most STEPS: those at which the target's cycles fall, so that what is kept fills the array."""
    channels = len(family.labels)
    nodes, removed = prices.touched(family.labels), np.zeros(prices.slots.count, bool)
    least, falling = prices.part(nodes, removed).cycles, []
    most = channels - max(1, round(channels * DEEPEST))
    for count in range(1, most + 1):
        removed[family.labels[count - 1]] = True
        cycles = prices.part(nodes, removed).cycles
        if cycles < least:
            least = cycles
            falling.append(count)
    if not falling:
        falling = list(range(max(1, channels // EVEN), most + 1, max(1, channels // EVEN)))
    if not falling:
        return ()
    return tuple(falling[index] for index in sorted({round(place) for place in np.linspace(0, len(falling) - 1, STEPS)}))


def _alone(statistics: Statistics, order: Order, count: int, options: PruneOptions, measure: Measure) -> float:
    removed = np.zeros(statistics.slots.count, bool)
    removed[order.labels[:count]] = True
    if options.repair and count in order.mended:
        return measure(shrink(statistics.graph, statistics.slots, removed, values=order.mended[count]))
    return measure(cut(statistics, removed, repair=options.repair))


def cut(statistics: Statistics, removed: Array, *, repair: bool) -> Graph:
    """The smaller graph; with `repair`, each layer that lost inputs mended by the dense network's statistics."""
    return shrink(statistics.graph, statistics.slots, removed, values=mend(statistics, removed) if repair else None)


def choose(curves: Sequence[Curve], prices: PriceList, enough: Callable[[Price], bool], *, by_cycles: bool = False) -> Array:
    """bool[labels]: remove, step by step, where the outputs' error grows least for what it saves, until it is `enough` or nothing is left.

    A step may skip levels that save nothing by themselves (a half-used array column). `by_cycles`: what counts is cycles, and multiply-accumulates
    a little; else the other way round.
    """
    of_macs, of_cycles = (ASIDE, 1.0) if by_cycles else (1.0, ASIDE)
    removed = np.zeros(prices.slots.count, bool)
    levels = [0] * len(curves)
    touched = [prices.touched(curve.family.labels) for curve in curves]
    whole = prices.of(removed)
    for index, curve in enumerate(curves):
        if curve.is_told:
            levels[index] = 1
            removed = _with(removed, curve.labels(1))
    now = prices.of(removed)
    while not enough(now):
        best: tuple[float, int, int] | None = None
        for index, curve in enumerate(curves):
            before = prices.part(touched[index], removed)
            for level in range(levels[index] + 1, len(curve.counts) + 1):
                after = prices.part(touched[index], _with(removed, curve.labels(level)))
                saved = of_macs * (before.macs - after.macs) / whole.macs + of_cycles * (before.cycles - after.cycles) / whole.cycles
                grown = curve.error(level) - curve.error(levels[index])
                if saved > 0 and (best is None or grown / saved < best[0]):
                    best = (grown / saved, index, level)
        if best is None:
            break
        _, index, last = best
        for level in range(levels[index] + 1, last + 1):  # no further than needed
            levels[index] = level
            now = prices.of(_with(removed, curves[index].labels(level)))
            if enough(now):
                break
        removed = _with(removed, curves[index].labels(levels[index]))
    assert not removed[FIXED]
    return removed


def _with(removed: Array, labels: Array) -> Array:
    result: Array = removed.copy()
    result[labels] = True
    return result
