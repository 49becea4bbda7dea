"""Labels out, smaller graph in.

The one big idea: the labels say which indices of every dimension stay; constants are cut along them, shapes are counted, and the few
attributes that repeat a size follow. Nothing here knows why a channel goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npucc import ops
from npucc.graph import Editor, Graph, Node
from npucc.ops import Attributes
from npucc.prune.slots import FIXED, Slots

Array = np.ndarray[Any, np.dtype[Any]]


def shrink(graph: Graph, slots: Slots, removed: Array, *, values: Mapping[str, Array] | None = None) -> Graph:
    """The graph without the labels where bool[`removed`] is set. `values`: other data for some constants, in their old shape."""
    assert not removed[FIXED], "label 0 stays"
    cutter = _Cutter(graph, slots, removed)
    editor = Editor(graph)
    for name, tensor in graph.tensors.items():
        data = tensor.data if values is None else values.get(name, tensor.data)
        shape = tuple(int(cutter.kept(name, axis).sum()) for axis in range(len(tensor.shape)))
        if data is not None and (shape != tensor.shape or data is not tensor.data):
            data = np.ascontiguousarray(data[np.ix_(*(cutter.kept(name, axis) for axis in range(len(tensor.shape))))])
        editor.tensors[name] = replace(tensor, shape=shape, data=data)
    for node in graph:
        adapt = ADAPT.get(node.op)
        if adapt is not None:
            editor.add_node(replace(node, attributes=adapt(cutter, node)))
    return editor.freeze()


def kept_size(slots: Slots, removed: Array, tensor: str, axis: int) -> int:
    """How long a dimension will be."""
    return int((~removed[slots.labels[tensor, axis]]).sum())


class _Cutter:
    """What stays, by dimension."""

    def __init__(self, graph: Graph, slots: Slots, removed: Array) -> None:
        self.graph, self.slots, self.removed = graph, slots, removed

    def kept(self, tensor: str, axis: int) -> Array:
        return np.asarray(~self.removed[self.slots.labels[tensor, axis]])

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(int(self.kept(tensor, axis).sum()) for axis in range(len(self.graph.tensors[tensor].shape)))


def _conv(cutter: _Cutter, node: Node) -> Attributes:
    assert isinstance(node.attributes, ops.Conv)
    depth = cutter.graph.tensors[node.inputs[1]].shape[1]
    depthwise = node.attributes.groups > 1 and depth == 1
    return replace(node.attributes, groups=int(cutter.kept(node.inputs[0], 1).sum())) if depthwise else node.attributes


def _shaped(cutter: _Cutter, node: Node) -> Attributes:
    assert isinstance(node.attributes, ops.Reshape | ops.Expand)
    return replace(node.attributes, shape=cutter.shape(node.outputs[0]))


def _slice(cutter: _Cutter, node: Node) -> Attributes:
    assert isinstance(node.attributes, ops.Slice)
    starts = tuple(int(cutter.kept(node.inputs[0], axis)[:start].sum()) for axis, start in enumerate(node.attributes.starts))
    return replace(node.attributes, starts=starts, sizes=cutter.shape(node.outputs[0]))


#: operator → its attributes after the cut
ADAPT: dict[str, Callable[[_Cutter, Node], Attributes]] = {"conv": _conv, "reshape": _shaped, "expand": _shaped, "slice": _slice}
