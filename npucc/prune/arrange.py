"""Channels change places, so that a pattern among neighbours loses less.

The one big idea: which channels are neighbours is free. Labels of one family (`slots.py`) may change places in all their dimensions at once, and
the network computes the same. They do, two at a time, where the layers that read them would lose less energy to their patterns.
(Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npucc.graph import Editor, Graph
from npucc.prune.patterns import NeighbourPattern
from npucc.prune.slots import Slots
from npucc.prune.ties import find_slots
from npucc.quantize.calibrate import tensor_runner
from npucc.sites import Site, find_sites

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 16
COLUMNS = 256  # weights per channel and layer that are looked at
FEW_NEIGHBOURS = 8  # that are compared one by one
ROUNDS = 1000
WORTH = 0.98  # of the energy lost at most, or the family stays as it is


def arrange(graph: Graph, patterns: Mapping[str, NeighbourPattern], feeds: Sequence[Mapping[str, Array]]) -> Graph:
    """The same network with its channels in a better order. `patterns`: by layer."""
    slots, sites = find_slots(graph), find_sites(graph)
    energies = _energies(graph, {name: sites[name] for name in patterns}, feeds[:SAMPLES])
    source = np.arange(slots.count)
    held = _held(graph, slots, [site for name, site in sites.items() if name not in patterns])
    for labels in slots.families():
        if held[labels].any():
            continue
        for pattern in dict.fromkeys(patterns.values()):
            readers = [name for name, each in patterns.items() if each == pattern and _neighbours(slots, sites[name], labels, pattern)]
            if readers:
                carried = [energies[name][np.searchsorted(_labels(slots, sites[name]), labels)] for name in readers]
                source[labels] = labels[_best_order(np.concatenate(carried, axis=1), pattern)]
                break  # layers with another pattern take what comes
    return graph if (source == np.arange(slots.count)).all() else reordered(graph, slots, source)


def _held(graph: Graph, slots: Slots, sites: Sequence[Site]) -> Array:
    """bool per label: what layers without a pattern read or make that have zeros, whose places may be a pattern of their own."""
    held = np.zeros(slots.count, bool)
    for site in sites:
        data = graph.tensors[site.weights].data
        if site.groups == 1 and data is not None and not data.all():
            held |= slots.of(site.weights, data.ndim)
    return held


def reordered(graph: Graph, slots: Slots, source: Array) -> Graph:
    """The graph in which each label stands where `source[label]` of its family did."""
    editor = Editor(graph)
    for name, tensor in graph.tensors.items():
        indices = [_indices(slots.labels[name, axis], source) for axis in range(len(tensor.shape))]
        if all((np.diff(each) == 1).all() for each in indices):
            continue
        if tensor.data is None:
            editor.tensors[name] = replace(tensor, source="")  # it equals no tensor of the model any more
        else:
            editor.tensors[name] = replace(tensor, data=np.ascontiguousarray(tensor.data[np.ix_(*indices)]))
    return editor.freeze()


def _indices(labels: Array, source: Array) -> Array:
    """Per index of a dimension the one whose values it gets: the k-th index of a label those of the k-th of its source."""
    result = np.empty(len(labels), int)
    result[np.argsort(source[labels], kind="stable")] = np.argsort(labels, kind="stable")
    return result


def _labels(slots: Slots, site: Site) -> Array:
    """Those of a layer's input channels."""
    return slots.labels[site.weights, 0 if site.node.op == "matmul" else 1]


def _neighbours(slots: Slots, site: Site, labels: Array, pattern: NeighbourPattern) -> bool:
    """Whether the layer sees the family's labels, `pattern.of` after `pattern.of`, as neighbours of the pattern."""
    places = np.flatnonzero(np.isin(_labels(slots, site), labels))
    whole = len(labels) // pattern.of * pattern.of
    if len(places) != len(labels) or not whole or (_labels(slots, site)[places] != labels).any():
        return False
    groups = places[:whole].reshape(-1, pattern.of) // pattern.of
    return bool((groups == groups[:, :1]).all())


def _energies(graph: Graph, sites: Mapping[str, Site], feeds: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Per layer [input channels, weights]: the share of the energy of the answers that each weight carries, of at most COLUMNS per channel."""
    run = tensor_runner(graph, sorted({site.input for site in sites.values()}))
    loud = {site.input: np.zeros(()) for site in sites.values()}
    for feed in feeds:
        values = run(feed)
        for site in sites.values():
            value, axis = values[site.input], 1 if site.node.op == "conv" else -1
            moved = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
            loud[site.input] = loud[site.input] + np.square(moved).mean(axis=1, dtype=np.float64)
    found = {}
    for name, site in sites.items():
        energy = site.matrix(graph)[0, :-1].reshape(site.depth // site.taps, -1) ** 2 * loud[site.input][:, None]
        energy /= max(float(energy.sum()), 1e-30)
        found[name] = energy[:, np.unique(np.linspace(0, energy.shape[1] - 1, COLUMNS).astype(int))]
    return found


def _best_order(energy: Array, pattern: NeighbourPattern) -> Array:
    """int[channels]: which channel takes each place, by `energy` [channels, weights]. Pairs of groups swap a channel as long as that pays."""
    order = np.arange(len(energy))
    count = len(order) // pattern.of
    groups = order[: count * pattern.of].reshape(count, pattern.of)
    lost = _lost(energy[groups], pattern)
    before, random = lost.sum(), np.random.default_rng(0)
    for _ in range(ROUNDS if count > 1 else 0):
        first, second = random.permutation(count)[: count // 2 * 2].reshape(2, -1)
        pairs, here, there = np.arange(len(first)), *random.integers(pattern.of, size=(2, len(first)))
        mine, theirs = groups[first], groups[second]
        mine[pairs, here], theirs[pairs, there] = groups[second, there], groups[first, here]
        after = _lost(energy[mine], pattern), _lost(energy[theirs], pattern)
        better = after[0] + after[1] < lost[first] + lost[second]
        groups[first[better]], groups[second[better]] = mine[better], theirs[better]
        lost[first[better]], lost[second[better]] = after[0][better], after[1][better]
    return order if lost.sum() < WORTH * before else np.arange(len(energy))


def _lost(energy: Array, pattern: NeighbourPattern) -> Array:
    """[groups]: what of [groups, neighbours, weights] is not among the largest. The least of few neighbours bubble up sooner than they are sorted."""
    if pattern.of > FEW_NEIGHBOURS:
        return np.asarray(np.sort(energy, axis=1)[:, : pattern.of - pattern.keep].sum(axis=(1, 2)))
    rows = [energy[:, index] for index in range(pattern.of)]
    least = np.zeros(energy[:, 0].shape)
    for place in range(pattern.of - pattern.keep):
        for index in range(pattern.of - 1, place, -1):
            upper, lower = rows[index - 1], rows[index]
            rows[index - 1], rows[index] = np.minimum(upper, lower), np.maximum(upper, lower)
        least += rows[place]
    return np.asarray(least.sum(axis=1))
