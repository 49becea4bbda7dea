"""What a layer sees, as a few matrices summed over samples: enough to solve for the best weights, whatever remains of them.

The one big idea: with X the inputs that a layer gets and Y what it should answer, XᵀX, XᵀY and YᵀY's trace hold all that least squares needs.
They are sums over samples, so samples stream and are forgotten. X may come from the pruned network and Y from the dense one: then the
weights also take back what went wrong before them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc.graph import Editor, Graph, make_graph
from npucc.quantize.calibrate import tensor_runner
from npucc.sites import Site

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Iterable[Mapping[str, Array]]

IN_MEMORY = 1 << 26  # bytes of a Gram matrix; larger ones go to a file
IN_STREAM = 1 << 29  # bytes of all samples between two layers


@dataclass(frozen=True, slots=True)
class Moments:
    """`gram` XᵀX [groups, depth + 1, depth + 1], `cross` XᵀY [groups, depth + 1, outputs], `squares` the sums of Y² [groups, outputs]."""

    gram: Array
    cross: Array
    squares: Array

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.squares + other.squares)

    def only(self, outputs: Array) -> Moments:
        """Those of some outputs of each group."""
        return Moments(self.gram, self.cross[..., outputs], self.squares[..., outputs])

    def error(self, matrix: Array) -> float:
        """Energy of Y − X·matrix over that of Y less its mean per output."""
        energy = float(self.squares.sum())
        left = float((matrix * (self.gram @ matrix - 2 * self.cross)).sum()) + energy
        means = float((self.cross[:, -1] ** 2).sum()) / max(float(self.gram[0, -1, -1]), 1.0)
        return max(left, 0.0) / max(energy - means, 1e-9 * energy, 1e-30)


def cut_graph(graph: Graph, wanted: Sequence[str]) -> Graph:
    """The part of the graph that computes the wanted tensors."""
    inputs = set(graph.inputs)
    computed = [name for name in wanted if name not in inputs]
    return make_graph(graph.name, graph, graph.tensors, graph.inputs, dict.fromkeys(computed)) if computed else graph


def input_moments(graph: Graph, sites: Mapping[str, Site], feeds: Feeds, *, rows: int) -> dict[str, Array]:
    """Per site: its Gram matrix XᵀX in the graph as it is, all in one pass; sites that share their weights share the sum."""
    wanted = sorted({site.input for site in sites.values()})
    run = tensor_runner(cut_graph(graph, wanted), wanted)
    by_weights = {site.weights: _room((site.groups, site.depth + 1, site.depth + 1)) for site in sites.values()}
    for seed, feed in enumerate(feeds):
        values = run(feed)
        for site in sites.values():
            columns = site.columns(values[site.input], rows, seed)
            by_weights[site.weights] += columns.transpose(0, 2, 1) @ columns
    return {name: by_weights[site.weights] for name, site in sites.items()}


def _room(shape: tuple[int, ...]) -> Array:
    """Zeros; a large matrix lies in a file that is gone with it, so that many of them need no more memory than there is."""
    if math.prod(shape) * 8 < IN_MEMORY:
        return np.zeros(shape)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float64, "w+", shape=shape)


class Stream:
    """The values in a graph, layer after layer, on all samples.

    It keeps what the samples are at some place in the graph and goes on from there, so that going through all layers costs little more than one
    inference. Where what lies between two layers does not fit, it goes on from further ahead.
    """

    def __init__(self, graph: Graph, feeds: Iterable[Mapping[str, Array]]) -> None:
        self.feeds = [dict(feed) for feed in feeds]
        self.names: tuple[str, ...] = graph.inputs
        self.done: set[str] = set()

    def read(self, graph: Graph, node: str, wanted: Sequence[str]) -> Iterator[dict[str, Array]]:
        """The wanted tensors per sample, in the `graph`, whose nodes before `node` will not change any more."""
        order = list(graph.nodes)
        before = order[: order.index(node)]
        kept = self._crossing(graph, before)
        size = sum(math.prod(graph.tensors[name].shape) * np.dtype(graph.tensors[name].dtype).itemsize for name in kept)
        if size * len(self.feeds) <= IN_STREAM:
            run = self._runner(graph, kept)
            for index, feed in enumerate(self.feeds):
                self.feeds[index] = run(feed)
            self.names, self.done = kept, set(before)
        return map(self._runner(graph, wanted), self.feeds)

    def _crossing(self, graph: Graph, before: Sequence[str]) -> tuple[str, ...]:
        """What nodes after those read of what is there by then."""
        done = set(before)
        made = {*self.names, *(name for key in before for name in graph.nodes[key].outputs)}
        return tuple(dict.fromkeys(name for node in graph if node.name not in done for name in node.inputs if name in made))

    def _runner(self, graph: Graph, wanted: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        computed = [name for name in wanted if name not in self.names]
        if not computed:
            return lambda feed: {name: feed[name] for name in wanted}
        nodes = (node for node in graph if node.name not in self.done)
        return tensor_runner(make_graph(graph.name, nodes, graph.tensors, self.names, computed), wanted)


@dataclass(frozen=True, slots=True)
class Pair:
    """One layer (or several with the same weights) in the graph as it is `now` and in the `dense` one; `kept`: bool of the dense outputs.

    `joined`: the tensors that a residual connection adds to its answers, in the two graphs; "" without.
    """

    now: tuple[Site, ...]
    dense: tuple[Site, ...]
    kept: Array
    joined: tuple[str, str]


def pair_moments(now: Graph, dense: Graph, streams: tuple[Stream, Stream], pair: Pair, *, rows: int) -> tuple[Moments, Moments]:
    """Moments with X from the graph `now` and Y from the `dense` one, more by what the other side of a residual sum lacks.

    Those of the even samples and those of the odd ones, so that one half can judge what the other proposes.
    """
    matrix = pair.dense[0].matrix(dense).astype(np.float32)
    sees = [
        stream.read(graph, sites[0].node.name, [*(site.input for site in sites), *([joined] if joined else [])])
        for stream, graph, sites, joined in zip(streams, (now, dense), (pair.now, pair.dense), pair.joined, strict=True)
    ]
    sums = (_Sums(pair.now[0]), _Sums(pair.now[0]))
    for seed, (here, there) in enumerate(zip(*sees, strict=True)):
        for site, whole in zip(pair.now, pair.dense, strict=True):
            answers = whole.columns(there[whole.input], rows, seed) @ matrix
            if pair.joined[1]:
                answers = answers + whole.answers(there[pair.joined[1]], rows, seed)
            answers = _only(answers, pair.kept, site.groups)
            if pair.joined[0]:
                answers = answers - site.answers(here[pair.joined[0]], rows, seed)
            sums[seed % 2].add(site.columns(here[site.input], rows, seed), answers)
    return sums[0].finish(), sums[1].finish()


def dense_moments(dense: Graph, site: Site, stream: Stream, *, rows: int) -> tuple[Moments, Moments]:
    """Moments of a layer of the dense graph and its own answers; those of the even samples and those of the odd ones."""
    matrix, sums = site.matrix(dense), (_Sums(site), _Sums(site))
    for seed, values in enumerate(stream.read(dense, site.node.name, [site.input])):
        x = site.columns(values[site.input], rows, seed)
        sums[seed % 2].gram += x.transpose(0, 2, 1) @ x
    return tuple(Moments(each.gram, cross := each.gram @ matrix, (matrix * cross).sum(axis=1)) for each in sums)  # type: ignore[return-value]


class _Sums:
    """Moments in the making."""

    def __init__(self, site: Site) -> None:
        self.gram = np.zeros((site.groups, site.depth + 1, site.depth + 1))
        self.cross = np.zeros((site.groups, site.depth + 1, site.outputs))
        self.squares = np.zeros((site.groups, site.outputs))

    def add(self, x: Array, y: Array) -> None:
        self.gram += x.transpose(0, 2, 1) @ x
        self.cross += x.transpose(0, 2, 1) @ y
        self.squares += (y.astype(np.float64) ** 2).sum(axis=1)

    def finish(self) -> Moments:
        return Moments(self.gram, self.cross, self.squares)


def _only(answers: Array, kept: Array, groups: int) -> Array:
    """[groups, rows, outputs]: those of the dense layer at the outputs that stay."""
    if kept.all():
        return np.asarray(answers)
    rows = answers.shape[1]
    flat = answers.transpose(0, 2, 1).reshape(-1, rows)[kept]
    return np.asarray(flat.reshape(groups, -1, rows).transpose(0, 2, 1))


def with_constants(graph: Graph, site: Site, matrix: Array) -> Graph:
    """The graph with other weights and bias at a site, and at those that share them."""
    editor = Editor(graph)
    for name, data in zip((site.weights, site.bias), site.constants(graph, matrix), strict=True):
        editor.tensors[name] = replace(editor.tensors[name], data=data)
    return editor.freeze()
