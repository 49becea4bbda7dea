"""Which tensors share one scale.

The one big idea: where data only moves, the stored integers move, so both ends share a scale (union-find). A Concat joins its inputs
too, except one that others read as well and whose range is much narrower: that one keeps its own scale and is rescaled before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from npucc.graph import Editor, Graph, Node
from npucc.ops import OPS, Table
from npucc.quantize.ranges import Range
from npucc.quantize.repeats import Repeats

NARROWER = 4.0  # times, and an input of a Concat that others read too keeps its own scale: two bits are more than the rescaling costs


@dataclass(slots=True)
class Groups:
    """Disjoint sets of tensors; `root` names a tensor's set. `sets`: the members of each, by root; `repeats`: tensors that are in one set
    because they are the same at different steps."""

    parents: dict[str, str] = field(default_factory=dict)
    sets: dict[str, list[str]] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=dict)

    def root(self, tensor: str) -> str:
        if tensor not in self.parents:
            self.parents[tensor], self.sets[tensor] = tensor, [tensor]
        while (parent := self.parents[tensor]) != tensor:
            self.parents[tensor] = tensor = self.parents[parent]
        return tensor

    def join(self, first: str, second: str) -> None:
        """The first's root becomes the root of both."""
        kept, gone = self.root(first), self.root(second)
        if kept != gone:
            self.parents[gone] = kept
            self.sets[kept] += self.sets.pop(gone)

    def members(self, tensor: str) -> list[str]:
        return list(self.sets[self.root(tensor)])


def moved_inputs(node: Node) -> tuple[str, ...]:
    """The inputs of a node that moves data whose values the result holds."""
    return tuple(name for index, name in enumerate(node.inputs) if index not in OPS[node.op].indices)


def share_scales(graph: Graph, ranges: Mapping[str, Range], repeats: Repeats | None = None) -> tuple[Graph, Groups, tuple[str, ...]]:
    """(graph with rescaling nodes, groups, names of the tensors that are rescaled). `ranges`: observed, of the measured tensors."""
    groups = Groups(repeats=repeats or {})
    for name in graph.tensors:
        groups.root(name)
    for name, names in groups.repeats.items():
        groups.join(names[0], name)
    for node in graph:
        if OPS[node.op].moves_data and len(moved_inputs(node)) == 1:
            groups.join(node.inputs[0], node.outputs[0])
    editor, rescaled = Editor(graph), []
    for node in graph:
        if OPS[node.op].moves_data and len(moved_inputs(node)) > 1:
            rescaled += _join_inputs(graph, editor, node, groups, ranges)
    return editor.freeze(), groups, tuple(rescaled)


def _join_inputs(graph: Graph, editor: Editor, node: Node, groups: Groups, ranges: Mapping[str, Range]) -> list[str]:
    """Join what a Concat joins, and rescale the rest; returns the latter. Given scales are the same already."""
    if graph.tensors[node.outputs[0]].given:
        for name in node.inputs:
            groups.join(node.outputs[0], name)
        return []
    covered = {name: group_range(groups, ranges, name) for name in node.inputs}
    whole = Range()
    for each in covered.values():
        whole = whole.joined(each)
    apart = [name for name, each in covered.items() if whole.width > NARROWER * each.width > 0 and _read_elsewhere(graph, groups, name, node)]
    counts = {name for name in covered if _is_whole(graph, groups, name)}
    apart += [name for name in covered if name in counts and name not in apart and counts != set(covered)]
    for name in apart:
        _rescale(editor, groups, node.name, name)
    for name in editor.nodes[node.name].inputs:
        groups.join(node.outputs[0], name)
    return apart


def _is_whole(graph: Graph, groups: Groups, name: str) -> bool:
    """Whether the tensor's group holds integers, whose steps are 1: reals would lose theirs."""
    return any(np.dtype(graph.tensors[member].dtype).kind in "iu" for member in groups.members(name) if member in graph.tensors)


def _rescale(editor: Editor, groups: Groups, reader: str, name: str) -> None:
    """reader(name) → reader(table "x"(name)): the same values on another scale."""
    copy, node = editor.fresh(f"{name}/rescaled"), editor.nodes[reader]
    editor.add_tensor(replace(editor.tensors[name], name=copy, dtype=editor.tensors[node.outputs[0]].dtype, data=None, source=""))
    editor.add_node(Node(editor.fresh(f"{copy}:table"), "table", (name,), (copy,), Table("x"), node.sources), at=reader)
    editor.add_node(replace(node, inputs=tuple(copy if each == name else each for each in node.inputs)))
    groups.root(copy)


def _read_elsewhere(graph: Graph, groups: Groups, name: str, reader: Node) -> bool:
    """Whether something besides moves within the group and `reader` reads the tensor's group."""
    if graph.tensors[name].is_constant:
        return False
    root = groups.root(name)
    for member in groups.members(name):
        if member in graph.outputs:
            return True
        for user in graph.users(member):
            moves_within = OPS[user.op].moves_data and groups.root(user.outputs[0]) == root and member in moved_inputs(user)
            if user.name != reader.name and not moves_within:
                return True
    return False


def group_range(groups: Groups, ranges: Mapping[str, Range], name: str) -> Range:
    """What the measured tensors of a group cover together."""
    whole = Range()
    for member in groups.members(name):
        whole = whole.joined(ranges.get(member, Range()))
    return whole
