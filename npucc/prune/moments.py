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

from npucc.graph import Graph, make_graph
from npucc.prune.sites import Site
from npucc.quantize.calibrate import tensor_runner

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Iterable[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Moments:
    """`gram` XᵀX [groups, depth + 1, depth + 1], `cross` XᵀY [groups, depth + 1, outputs], `energy` of Y less its mean, `power` of Y per output."""

    gram: Array
    cross: Array
    energy: float

    def error(self, matrix: Array) -> float:
        """Energy of Y − X·matrix over that of Y (without its mean)."""
        squared = float(np.einsum("gko,gko->", matrix, self.gram @ matrix - 2 * self.cross)) + self._whole
        return max(squared, 0.0) / max(self.energy, 1e-30)

    @property
    def _whole(self) -> float:
        return self.energy + float((self.cross[:, -1] ** 2).sum()) / max(float(self.gram[0, -1, -1]), 1.0)


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


def site_moments(now: Graph, site: Site, dense: Graph, whole: Site, kept: Array, feeds: Feeds, *, rows: int, target: Array | None = None) -> Moments:
    """Moments with X from the graph `now` and Y from the site `whole` of the `dense` graph, at the outputs where bool[groups, outputs] is kept.

    `kept` must leave as many outputs in each group as `site` has. `target`: the dense weights as a matrix, if already at hand.
    """
    matrix = whole.matrix(dense) if target is None else target
    see_now, see_dense = (tensor_runner(cut_graph(graph, [at.input]), [at.input]) for graph, at in ((now, site), (dense, whole)))
    gram = np.zeros((site.groups, site.depth + 1, site.depth + 1))
    cross = np.zeros((site.groups, site.depth + 1, site.outputs))
    total = np.zeros((site.groups, site.outputs))
    squares, count = 0.0, 0
    for seed, feed in enumerate(feeds):
        x = site.columns(see_now(feed)[site.input], rows, seed)
        wanted = whole.columns(see_dense(feed)[whole.input], rows, seed)
        y = _answers(wanted, matrix, kept, site.groups)
        gram += x.transpose(0, 2, 1) @ x
        cross += x.transpose(0, 2, 1) @ y
        total += y.sum(axis=1)
        squares += float((y.astype(np.float64) ** 2).sum())
        count += x.shape[1]
    return Moments(gram, cross, squares - float((total**2).sum()) / max(count, 1))


def _answers(columns: Array, matrix: Array, kept: Array, groups: int) -> Array:
    """[groups, rows, outputs]: what the dense layer answers, at the outputs that stay."""
    answers = columns @ matrix.astype(np.float32)
    if len(answers) == groups and kept.all():
        return np.asarray(answers)
    rows = answers.shape[1]
    flat = answers.transpose(0, 2, 1).reshape(-1, rows)[kept.reshape(-1)]
    return np.asarray(flat.reshape(groups, -1, rows).transpose(0, 2, 1))


def with_constants(graph: Graph, site: Site, matrix: Array) -> Graph:
    """The graph with other weights and bias at a site (constants of their own, if others read the old ones)."""
    from npucc.graph import Editor

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
