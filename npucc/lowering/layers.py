"""Nodes into layers: a layer is computed tile by tile without going back to DRAM in between.

The one big idea: fusing never changes a value. Each node keeps its own integers in and out; the layer only decides that a
tile stays in the scratchpad while one elementwise node after another works on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from npucc.graph import Graph, Node
from npucc.lowering.placement import free_moves
from npucc.lowering.views import View
from npucc.ops import OPS

#: operators whose lowering hands each finished tile to the elementwise nodes that follow
ACCEPTS_EPILOGUE = frozenset({"conv", "conv_transpose", "matmul"})


@dataclass(frozen=True, slots=True)
class Group:
    """An anchor and the elementwise nodes that follow it in the same tile; the last node's result leaves the tile."""

    nodes: tuple[Node, ...]

    @property
    def anchor(self) -> Node:
        return self.nodes[0]

    @property
    def result(self) -> str:
        return self.nodes[-1].outputs[0]

    @property
    def results(self) -> tuple[str, ...]:
        """Everything that leaves the layer."""
        return self.nodes[-1].outputs

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source for node in self.nodes for source in node.sources))


def group_nodes(graph: Graph, views: Mapping[str, View], *, fuse: bool = True) -> list[Group]:
    """Layers in an order in which each comes after what it reads; nodes that only pass on a view are left out."""
    groups: dict[int, list[Node]] = {}
    tail_of: dict[str, int] = {}  # tensor → group whose last node makes it
    last: dict[int, int] = {}
    for position, node in enumerate(graph):
        if free_moves(graph, node, views):
            continue
        home = _group_to_join(graph, node, tail_of, groups, last) if fuse else None
        if home is None:
            home = position
            groups[home] = []
        if groups[home]:
            del tail_of[groups[home][-1].outputs[0]]
        groups[home].append(node)
        last[home] = position
        tail_of[node.outputs[0]] = home
    return [Group(tuple(groups[key])) for key in sorted(groups, key=last.__getitem__)]


def _group_to_join(graph: Graph, node: Node, tail_of: Mapping[str, int], groups: Mapping[int, list[Node]], last: Mapping[int, int]) -> int | None:
    """The latest group whose result only this elementwise node reads, in the same shape."""
    if not OPS[node.op].elementwise:
        return None
    shape = graph.tensors[node.outputs[0]].shape
    candidates = []
    for name in dict.fromkeys(node.inputs):
        home = tail_of.get(name)
        if home is None or name in graph.outputs or len(graph.users(name)) != 1:
            continue
        anchor = groups[home][0]
        if graph.tensors[name].shape == shape and (anchor.op in ACCEPTS_EPILOGUE or OPS[anchor.op].elementwise):
            candidates.append(home)
    return max(candidates, key=last.__getitem__, default=None)
