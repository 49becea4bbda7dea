"""Layer after layer: let it answer in the pruned network what it answered in the dense one.

The one big idea: a layer is fitted on the inputs that it now gets, those of the pruned and already mended layers before it, to the answers of
the dense layer. So each layer also takes back what is left of the errors before it; in front of a residual sum also those of the other side,
which else would stay to the end. Half of the samples propose, the other half judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph, Node
from npucc.prune.moments import Moments, Pair, Stream, pair_moments, with_constants
from npucc.prune.patterns import Pattern
from npucc.prune.solve import refit, thin_out
from npucc.sites import MOST_COLUMNS, find_sites

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[str, int, int], None]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
JUDGED = 48  # outputs of a layer by which its ridge is chosen


@dataclass(frozen=True, slots=True)
class Repaired:
    """The relative error of a layer's answers before and after; None where the layer has too many inputs to be fitted."""

    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """`kept`: per layer, bool[outputs in the dense graph] of those that are left; `patterns`: of the layers that get one; how to fit."""

    kept: Mapping[str, Array]
    patterns: Mapping[str, Pattern]
    criterion: str
    repair: bool
    rows: int


def repair(
    now: Graph, dense: Graph, plan: Plan, feeds: Sequence[Mapping[str, Array]], *, plain: Graph, progress: Progress | None = None
) -> tuple[Graph, dict[str, Repaired]]:
    """Go through the layers of `now` in order. `plain`: `now` with the dense network's weights, only cut, for the error before.

    Layers whose inputs are still exact, and which get no pattern, stay as they are.
    """
    rows: dict[str, Repaired] = {}
    streams = (Stream(now, feeds), Stream(dense, feeds))
    pairs = _pairs(now, dense, plan)
    for index, (name, pair) in enumerate(pairs.items()):
        if progress:
            progress("repair", index, len(pairs))
        site, pattern = pair.now[0], plan.patterns.get(name)
        if pattern is None and not plan.repair:
            continue
        start = site.matrix(now)
        if site.depth > MOST_COLUMNS:
            if pattern is not None:
                now = with_constants(now, site, start * _mask(start, _choose(start, pattern, site.summing_order, None)))
                rows[name] = Repaired(None, None)
            continue
        halves = pair_moments(now, dense, streams, pair, rows=-(-plan.rows // len(feeds)))
        both = halves[0] + halves[1]
        if pattern is None and both.error(start) < 1e-10:
            continue
        matrix, mask = fit(halves, start, pattern, site.summing_order, plan)
        rows[name] = Repaired(both.error(site.matrix(plain) * mask), both.error(matrix))
        now = with_constants(now, site, matrix)
    return now, rows


def _pairs(now: Graph, dense: Graph, plan: Plan) -> dict[str, Pair]:
    """The layers in order, those with the same weights together, by the name of the first."""
    here, there = find_sites(now), find_sites(dense)
    together: dict[str, list[str]] = {}
    for name, site in here.items():
        together.setdefault(site.weights, []).append(name)
    pairs = {}
    for first, *more in together.values():
        joined = (joined_to(now, here[first].node), joined_to(dense, there[first].node))
        sites, whole = (tuple(each[name] for name in (first, *more)) for each in (here, there))
        pairs[first] = Pair(sites, whole, plan.kept[first], ("", "") if more or not all(joined) else joined)
    return pairs


def joined_to(graph: Graph, node: Node) -> str:
    """The tensor of the same shape, known before the layer, that the only reader of a layer's answers adds to them; "" if there is none."""
    result = node.outputs[0]
    users = graph.users(result)
    if len(users) != 1 or users[0].op != "add" or result in graph.outputs or getattr(node.attributes, "clamp", None) is not None:
        return ""
    other = next((name for name in users[0].inputs if name != result), result)
    same = other != result and graph.tensors[other].shape == graph.tensors[result].shape
    if not same or graph.tensors[other].is_constant:
        return ""
    producer = graph.producer(other)
    known = producer is None or next(each for each in graph if each.name in (producer.name, node.name)).name == producer.name
    return other if known else ""


def _mask(start: Array, chosen: Array) -> Array:
    """What may be other than zero: no weight that is zero already."""
    mask = chosen & (start != 0)
    mask[:, -1] = True
    return np.asarray(mask)


def fit(halves: Sequence[Moments], start: Array, pattern: Pattern | None, order: Array, plan: Plan) -> tuple[Array, Array]:
    """(new matrix, bool of what of it may be other than zero). `order`: the columns as the array sums them."""
    there = _mask(start, np.ones(start.shape, bool))
    if pattern is None:
        return best_fit(halves, start, there), there
    both = halves[0] + halves[1]
    if plan.criterion != "second_order":
        scales = np.diag(both.gram[0]) if plan.criterion == "activation" else None
        mask = _mask(start, _choose(start, pattern, order, scales))
        return (best_fit(halves, start, mask) if plan.repair else start * mask), mask
    whole = best_fit(halves, start, there) if plan.repair else start
    rows = np.append(order, len(order))
    kept, found = (np.empty(start.shape[1:], each) for each in (bool, float))
    kept[rows], found[rows] = thin_out(both.gram[0][np.ix_(rows, rows)], whole[0, rows], pattern, there[0, rows])
    mask = _mask(start, kept[None])
    return (best_fit(halves, whole, mask, first=found[None]) if plan.repair else start * mask), mask


def masked(graph: Graph, patterns: Mapping[str, Pattern]) -> Graph:
    """The graph with the least weights of these layers zeroed, and nothing mended."""
    for name, site in find_sites(graph).items():
        if name in patterns:
            start = site.matrix(graph)
            graph = with_constants(graph, site, start * _mask(start, _choose(start, patterns[name], site.summing_order, None)))
    return graph


def _choose(start: Array, pattern: Pattern, order: Array, scales: Array | None) -> Array:
    """bool like the matrix [1, K + 1, N]: by magnitude, times the root of the inputs' energy where `scales` has it."""
    costs = start[0] ** 2 if scales is None else start[0] ** 2 * scales[:, None]
    kept = np.ones(start.shape, bool)
    kept[0, order] = pattern.choose(costs[order])
    return kept


def best_fit(halves: Sequence[Moments], start: Array, mask: Array, *, first: Array | None = None) -> Array:
    """Least squares with the ridge by which each half foresees the other best; `start` cut to the mask where no ridge does better."""
    outputs = np.unique(np.linspace(0, start.shape[-1] - 1, JUDGED).astype(int))
    parts = [half.only(outputs) for half in halves]
    begin = None if first is None else first[..., outputs]

    def foresight(ridge: float) -> float:
        crossed = ((parts[0], parts[1]), (parts[1], parts[0]))
        fits = (refit(fit.gram, fit.cross, start[..., outputs], mask=mask[..., outputs], ridge=ridge, first=begin) for fit, _ in crossed)
        return sum(judge.error(fitted) for fitted, (_, judge) in zip(fits, crossed, strict=True))

    best, least = None, sum(part.error((start * mask)[..., outputs]) for part in parts)
    for ridge in RIDGES:
        error = foresight(ridge)
        if error < least:
            best, least = ridge, error
        elif best is not None:
            break
    if best is None:
        return np.asarray(start * mask)
    both = halves[0] + halves[1]
    return refit(both.gram, both.cross, start, mask=mask, ridge=best, first=first)
