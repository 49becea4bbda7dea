"""What a layer sees, as a few matrices summed over samples: enough to solve for the best weights, whatever remains of them.

The one big idea: with X the inputs that a layer gets and Y what it should answer, XᵀX, XᵀY and YᵀY's trace hold all that least squares needs.
They are sums over samples, so samples stream and are forgotten. X may come from the pruned network and Y from the dense one: then the
weights also take back what went wrong before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc.graph import Editor, Graph, make_graph
from npucc.quantize.calibrate import tensor_runner
from npucc.sites import Site

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Iterable[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Moments:
    """`gram` XᵀX [groups, depth + 1, depth + 1], `cross` XᵀY [groups, depth + 1, outputs], `squares` the sum of Y²."""

    gram: Array
    cross: Array
    squares: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.squares + other.squares)

    def error(self, matrix: Array) -> float:
        """Energy of Y − X·matrix over that of Y less its mean per output."""
        left = float((matrix * (self.gram @ matrix - 2 * self.cross)).sum()) + self.squares
        means = float((self.cross[:, -1] ** 2).sum()) / max(float(self.gram[0, -1, -1]), 1.0)
        return max(left, 0.0) / max(self.squares - means, 1e-9 * self.squares, 1e-30)


def cut_graph(graph: Graph, wanted: Sequence[str]) -> Graph:
    """The part of the graph that computes the wanted tensors."""
    inputs = set(graph.inputs)
    computed = [name for name in wanted if name not in inputs]
    return make_graph(graph.name, graph, graph.tensors, graph.inputs, dict.fromkeys(computed)) if computed else graph


def input_moments(graph: Graph, sites: Mapping[str, Site], feeds: Feeds, *, rows: int) -> dict[str, Array]:
    """Per site: its Gram matrix XᵀX in the graph as it is, all in one pass."""
    wanted = sorted({site.input for site in sites.values()})
    run = tensor_runner(cut_graph(graph, wanted), wanted)
    grams = {name: np.zeros((site.groups, site.depth + 1, site.depth + 1)) for name, site in sites.items()}
    for seed, feed in enumerate(feeds):
        values = run(feed)
        for name, site in sites.items():
            columns = site.columns(values[site.input], rows, seed)
            grams[name] += columns.transpose(0, 2, 1) @ columns
    return grams


def site_moments(now: Graph, site: Site, dense: Graph, whole: Site, kept: Array, feeds: Feeds, *, rows: int) -> tuple[Moments, Moments]:
    """Moments with X from the graph `now` and Y from the site `whole` of the `dense` graph, at the outputs where bool[all outputs] is kept.

    Those of the even samples and those of the odd ones, so that one half can judge what the other proposes.
    """
    matrix = whole.matrix(dense)
    see_now, see_dense = (tensor_runner(cut_graph(graph, [at.input]), [at.input]) for graph, at in ((now, site), (dense, whole)))
    sums = (_Sums(site), _Sums(site))
    for seed, feed in enumerate(feeds):
        x = site.columns(see_now(feed)[site.input], rows, seed)
        y = _answers(whole.columns(see_dense(feed)[whole.input], rows, seed), matrix, kept, site.groups)
        sums[seed % 2].add(x, y)
    return sums[0].finish(), sums[1].finish()


class _Sums:
    """Moments in the making."""

    def __init__(self, site: Site) -> None:
        self.gram = np.zeros((site.groups, site.depth + 1, site.depth + 1))
        self.cross = np.zeros((site.groups, site.depth + 1, site.outputs))
        self.squares = 0.0

    def add(self, x: Array, y: Array) -> None:
        self.gram += x.transpose(0, 2, 1) @ x
        self.cross += x.transpose(0, 2, 1) @ y
        self.squares += float((y.astype(np.float64) ** 2).sum())

    def finish(self) -> Moments:
        return Moments(self.gram, self.cross, self.squares)


def _answers(columns: Array, matrix: Array, kept: Array, groups: int) -> Array:
    """[groups, rows, outputs]: what the dense layer answers, at the outputs that stay."""
    answers = columns @ matrix.astype(np.float32)
    if kept.all():
        return np.asarray(answers)
    rows = answers.shape[1]
    flat = answers.transpose(0, 2, 1).reshape(-1, rows)[kept]
    return np.asarray(flat.reshape(groups, -1, rows).transpose(0, 2, 1))


def with_constants(graph: Graph, site: Site, matrix: Array) -> Graph:
    """The graph with other weights and bias at a site (constants of their own, if others read the old ones)."""
    editor = Editor(graph)
    weights, bias = site.constants(graph, matrix)
    node = editor.nodes[site.node.name]
    names = []
    for old, data, stem in ((site.weights, weights, "weights"), (site.bias, bias, "bias")):
        if old and editor.is_read_once(old) and graph.tensors[old].shape == data.shape:
            editor.tensors[old] = replace(editor.tensors[old], data=data)
            names.append(old)
        else:
            names.append(editor.constant(f"{node.name}/{stem}", data))
    editor.add_node(replace(node, inputs=(node.inputs[0], *names)))
    return editor.freeze()
