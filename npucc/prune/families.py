"""Channels that lie in the same dimensions, and in which order they go.

The one big idea: the order comes from the layers that read a family: what can the remaining channels say in place of the removed one?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc.graph import Graph
from npucc.ops import OPS
from npucc.prune.options import PruneOptions
from npucc.prune.slots import Slots
from npucc.prune.solve import eliminate
from npucc.sites import Site

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """Channels that lie in the same dimensions. `name`: the first layer that makes them; `makers`, `readers`: names of matrix nodes."""

    name: str
    labels: Array
    makers: tuple[str, ...]
    readers: tuple[str, ...]


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
