"""Which channels go: an order within each family, how much each costs the outputs, and the cheapest way to the budget.

The one big idea: the order comes from the layers that read a family (what can the remaining channels say in place of the removed one?),
the amounts come from the network's outputs (measured with each family pruned alone), and both are bought with the cycles they save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph
from npucc.ops import OPS
from npucc.prune.options import PruneOptions
from npucc.prune.price import Price, PriceList
from npucc.prune.shrink import shrink
from npucc.prune.slots import FIXED, Slots
from npucc.prune.solve import damped, eliminate
from npucc.sites import Site

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Callable[[Graph], float]
Progress = Callable[[str, int, int], None]

STEPS = 16  # amounts considered per family, at most
ASIDE = 0.25  # what a saving counts that was not asked for: cycles where the budget is multiply-accumulates, and the other way round
EVEN = 4  # where no amount saves cycles by itself: shares to go on by
MEASURED = 6  # of them, the error of the others lies between
DEEPEST = 0.25  # of a family's channels always stay


@dataclass(frozen=True, slots=True)
class Family:
    """Channels that lie in the same dimensions. `name`: the first layer that makes them; `makers`, `readers`: names of matrix nodes."""

    name: str
    labels: Array
    makers: tuple[str, ...]
    readers: tuple[str, ...]


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


@dataclass(frozen=True, slots=True)
class Statistics:
    """The graph with its labels, matrix operators and their Gram matrices."""

    graph: Graph
    slots: Slots
    sites: Mapping[str, Site]
    grams: Mapping[str, Array]

    def depth_labels(self, site: Site) -> Array:
        """int[depth]: the label of each column."""
        axis = len(self.graph.tensors[site.input].shape) - 1 if site.node.op == "matmul" else 1
        if site.node.op == "matmul":
            return self.slots.labels[site.input, axis]
        return np.repeat(self.slots.labels[site.weights, 1], site.taps)


def find_families(graph: Graph, slots: Slots, options: PruneOptions) -> tuple[Family, ...]:
    """Families that constant weights make and read, none of which is to be left alone."""
    found = []
    for labels in slots.families():
        makers, readers, skipped = [], [], False
        for node in graph:
            if not OPS[node.op].matrix:
                continue
            made = np.isin(slots.labels[node.outputs[0], len(graph.tensors[node.outputs[0]].shape) - 1 if node.op == "matmul" else 1], labels).any()
            read = any(np.isin(slots.labels[node.inputs[1], axis], labels).any() for axis in _summed(graph, node.inputs[1], node.op))
            if (made or read) and graph.tensors[node.inputs[1]].is_constant:
                makers += [node.name] if made else []
                readers += [node.name] if read else []
                skipped = skipped or options.skips(node)
        if makers and readers and not skipped:
            found.append(Family(makers[0], labels, tuple(makers), tuple(readers)))
    return tuple(found)


def _summed(graph: Graph, weights: str, op: str) -> tuple[int, ...]:
    """The dimension of the weights that is summed over."""
    if op == "matmul":
        return (len(graph.tensors[weights].shape) - 2,)
    return (0,) if op == "conv_transpose" else (1,)


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


@dataclass(frozen=True, slots=True)
class Order:
    """A family's labels, the least needed first; the last one stays. `mended[count]`: constants of the readers when so many are gone."""

    labels: Array
    mended: Mapping[int, Mapping[str, Array]]


def order_family(statistics: Statistics, family: Family, criterion: str, *, at: Sequence[int] = ()) -> Order:
    """The order by a criterion; by the second order what is left is mended at the counts `at` on the way."""
    sites = [statistics.sites[name] for name in family.readers if name in statistics.sites]
    sites = list({site.weights: site for site in sites}.values())
    if criterion != "second_order" or not sites:
        scores = _scores(statistics, family, sites if criterion == "activation" else [])
        return Order(family.labels[np.argsort(scores, kind="stable")[:-1]], {})
    per_site = [_second_order_parts(statistics, site, family) for site in sites]
    grams, matrices, columns, weights = (list(column) for column in zip(*(part for parts in per_site for part in parts), strict=True))
    done = eliminate(grams, matrices, columns, weights, at=at)
    return Order(family.labels[done.order], {count: _constants(statistics, sites, found) for count, found in done.mended.items()})


def _constants(statistics: Statistics, sites: Sequence[Site], matrices: Sequence[Array]) -> dict[str, Array]:
    """Weights and biases by name, of one matrix per group of each site."""
    values: dict[str, Array] = {}
    start = 0
    for site in sites:
        values |= zip((site.weights, site.bias), site.constants(statistics.graph, np.stack(matrices[start : start + site.groups])), strict=True)
        start += site.groups
    return values


def _second_order_parts(statistics: Statistics, site: Site, family: Family) -> list[tuple[Array, Array, Array, float]]:
    """Per group of a site: Gram matrix, weights, columns of each unit, and one over the energy of its answers."""
    labels, matrix, grams = statistics.depth_labels(site), site.matrix(statistics.graph), statistics.grams[site.node.name]
    columns = np.stack([np.flatnonzero(labels == label) for label in family.labels])
    energy = max(float(np.einsum("gko,gkl,glo->", matrix, grams, matrix)), 1e-30)
    return [(gram, part, columns, 1 / energy) for gram, part in zip(grams, matrix, strict=True)]


def _scores(statistics: Statistics, family: Family, sites: Sequence[Site]) -> Array:
    """Per label: with `sites` what its values weigh in the layers that read it, without the size of all weights that make or read it."""
    scores = np.zeros(len(family.labels))
    for site in sites:
        labels, matrix, grams = statistics.depth_labels(site), site.matrix(statistics.graph), statistics.grams[site.node.name]
        weights = (np.sqrt(np.einsum("gkk->gk", grams))[:, :, None] * np.abs(matrix)).sum(axis=(0, 2))[:-1]
        scores += _summed_by_label(labels, weights, family.labels) / max(float(weights.sum()), 1e-30)
    if not sites:
        for name in dict.fromkeys((*family.makers, *family.readers)):
            scores += _magnitudes(statistics, name, family.labels)
    return scores


def _magnitudes(statistics: Statistics, node: str, family: Array) -> Array:
    """Per label: its share of the absolute values of a node's weights."""
    weights = statistics.graph.nodes[node].inputs[1]
    data = statistics.graph.tensors[weights].data
    assert data is not None
    scores = np.zeros(len(family))
    for axis in range(data.ndim):
        sums = np.abs(data).sum(axis=tuple(i for i in range(data.ndim) if i != axis), dtype=np.float64)
        scores += _summed_by_label(statistics.slots.labels[weights, axis], sums, family) / max(float(sums.sum()), 1e-30)
    return scores


def _summed_by_label(labels: Array, values: Array, family: Array) -> Array:
    place = np.searchsorted(family, labels)
    place = np.where(place < len(family), place, 0)
    mine = family[place] == labels
    return np.asarray(np.bincount(place[mine], values[mine], len(family)))


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
