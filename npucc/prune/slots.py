"""Which channels stand or fall together.

The one big idea: every index of every dimension of every tensor is a slot, and each operator says which slots of its inputs and results are
the same thing. Slots so tied carry one label; removing a label removes all its slots, and the graph fits together again by itself, whatever
lies between: residual sums, concatenations, depthwise convolutions, gates, slices, flattening into a matrix product. Label 0 is what can't
go: dimensions of inputs and outputs, pixels, whatever an operator mixes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import ops
from npucc.graph import Graph, Node

Array = np.ndarray[Any, np.dtype[Any]]
Axis = tuple[str, int]  # a tensor and one of its dimensions

FIXED = 0


@dataclass(frozen=True, slots=True)
class Slots:
    """`labels`: per dimension of each tensor, the label of each index. Equal labels must be removed together; 0 stays."""

    labels: Mapping[Axis, Array]
    count: int

    def of(self, tensor: str, rank: int) -> Array:
        """Which labels the tensor has: bool[count]."""
        present = np.zeros(self.count, bool)
        for axis in range(rank):
            present[self.labels[tensor, axis]] = True
        present[FIXED] = False
        return present

    def families(self) -> tuple[Array, ...]:
        """Labels that lie in exactly the same dimensions equally often, so that any of them may go: arrays of at least two labels, ascending."""
        places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, labels in enumerate(self.labels.values()):
            for label, times in zip(*(part.tolist() for part in np.unique(labels[labels != FIXED], return_counts=True)), strict=True):
                places[label].append((index, times))
        families: defaultdict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for label, where in sorted(places.items()):
            families[tuple(where)].append(label)
        return tuple(np.array(members) for members in families.values() if len(members) > 1)


def find_slots(graph: Graph) -> Slots:
    """Tie the slots of a graph, operator by operator."""
    builder = _Builder(graph)
    for name in (*graph.inputs, *graph.outputs):
        builder.fix(name)
    for node in graph:
        RELATIONS.get(node.op, _fix_all)(builder, node)
    return builder.finish()


class _Builder:
    """Collects which slots are one; `finish` merges them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ids: dict[Axis, Array] = {}
        self.fixed: set[Axis] = set()
        self.ties: list[tuple[Array, Array]] = []
        total = 1
        for name, tensor in graph.tensors.items():
            for axis, size in enumerate(tensor.shape):
                self.ids[name, axis] = np.arange(total, total + size)
                total += size
                if size <= 1:
                    self.fix(name, axis)
        self.total = total

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.graph.tensors[tensor].shape

    def fix(self, tensor: str, *axes: int) -> None:
        """These dimensions (all, if none is named) keep their size."""
        for axis in axes or range(len(self.shape(tensor))):
            self.fixed.add((tensor, axis))
            self.ties.append((self.ids[tensor, axis], np.array([FIXED])))

    def tie(self, first: Axis, second: Axis) -> None:
        """Two dimensions are index for index the same."""
        self.tie_slots(first, self.ids[first], second, self.ids[second])

    def tie_slots(self, first: Axis, first_ids: Array, second: Axis, second_ids: Array) -> None:
        self.ties.append((first_ids, second_ids))
        if first in self.fixed:
            self.fixed.add(second)

    def finish(self) -> Slots:
        """Labels: the smallest slot number among those tied, counted from 0."""
        label = np.arange(self.total)
        pairs = [np.broadcast_arrays(a, b) for a, b in self.ties]
        changed = True
        while changed:
            before = label.copy()
            for a, b in (*pairs, *reversed(pairs)):
                np.minimum.at(label, a, label[b])
                np.minimum.at(label, b, label[a])
            changed = bool((label != before).any())
        _, dense = np.unique(label, return_inverse=True)
        return Slots({axis: dense[ids] for axis, ids in self.ids.items()}, int(dense.max()) + 1)


def _fix_all(builder: _Builder, node: Node) -> None:
    for name in (*node.inputs, *node.outputs):
        if name:
            builder.fix(name)


def _same(builder: _Builder, node: Node) -> None:
    for axis in range(len(builder.shape(node.inputs[0]))):
        builder.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _broadcast(builder: _Builder, node: Node) -> None:
    _broadcast_to(builder, node.inputs, node.outputs[0])


def _broadcast_to(builder: _Builder, inputs: Sequence[str], result: str, *, skip: int = 0) -> None:
    """Align dimensions from the right as numpy does; the last `skip` are somebody else's business."""
    shape = builder.shape(result)
    for name in inputs:
        own = builder.shape(name)
        for back in range(skip + 1, len(own) + 1):
            if own[-back] == shape[-back]:
                builder.tie((name, len(own) - back), (result, len(shape) - back))


def _conv(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Conv)
    (x, weights), result = node.inputs[:2], node.outputs[0]
    builder.tie((x, 0), (result, 0))
    for name, axes in ((x, (2, 3)), (weights, (2, 3)), (result, (2, 3))):
        builder.fix(name, *axes)
    builder.tie((weights, 0), (result, 1))
    if node.attributes.groups == 1:
        builder.tie((x, 1), (weights, 1))
    else:
        _grouped(builder, node.attributes.groups, x, weights, result)
    if len(node.inputs) > 2 and node.inputs[2]:
        builder.tie((node.inputs[2], 0), (result, 1))


def _grouped(builder: _Builder, groups: int, x: str, weights: str, result: str) -> None:
    """Depthwise: a group goes as a whole. Wider groups: every group loses the same positions."""
    sources, results = builder.ids[x, 1].reshape(groups, -1), builder.ids[result, 1].reshape(groups, -1)
    if sources.shape[1] == 1:
        builder.tie_slots((x, 1), np.repeat(sources[:, 0], results.shape[1]), (result, 1), results.ravel())
        return
    builder.tie_slots((x, 1), sources.ravel(), (weights, 1), np.tile(builder.ids[weights, 1], groups))
    builder.tie_slots((result, 1), results.ravel(), (result, 1), np.tile(results[0], groups))


def _conv_transpose(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.ConvTranspose)
    if node.attributes.groups != 1:
        _fix_all(builder, node)
        return
    (x, weights), result = node.inputs[:2], node.outputs[0]
    builder.tie((x, 0), (result, 0))
    for name, axes in ((x, (2, 3)), (weights, (2, 3)), (result, (2, 3))):
        builder.fix(name, *axes)
    builder.tie((x, 1), (weights, 0))
    builder.tie((weights, 1), (result, 1))
    if len(node.inputs) > 2 and node.inputs[2]:
        builder.tie((node.inputs[2], 0), (result, 1))


def _matmul(builder: _Builder, node: Node) -> None:
    (a, b), result = node.inputs[:2], node.outputs[0]
    rank_a, rank_b, rank = len(builder.shape(a)), len(builder.shape(b)), len(builder.shape(result))
    builder.tie((a, rank_a - 1), (b, rank_b - 2))
    builder.tie((a, rank_a - 2), (result, rank - 2))
    builder.tie((b, rank_b - 1), (result, rank - 1))
    _broadcast_to(builder, (a, b), result, skip=2)
    if len(node.inputs) > 2 and node.inputs[2]:
        builder.tie((node.inputs[2], 0), (result, rank - 1))


def _spatial(builder: _Builder, node: Node) -> None:
    """Pools and resizing: the last two dimensions are mixed."""
    rank = len(builder.shape(node.inputs[0]))
    for name in (node.inputs[0], node.outputs[0]):
        builder.fix(name, rank - 2, rank - 1)
    for axis in range(rank - 2):
        builder.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _reduce(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Reduce)
    _mixing(builder, node, node.attributes.axes)


def _mixing(builder: _Builder, node: Node, axes: Sequence[int]) -> None:
    """These dimensions are mixed; the others pass through."""
    for axis in range(len(builder.shape(node.inputs[0]))):
        if axis in axes:
            builder.fix(node.inputs[0], axis)
            builder.fix(node.outputs[0], axis)
        else:
            builder.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _softmax(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Softmax)
    _mixing(builder, node, (node.attributes.axis % len(builder.shape(node.inputs[0])),))


def _layer_norm(builder: _Builder, node: Node) -> None:
    _mixing(builder, node, (len(builder.shape(node.inputs[0])) - 1,))
    for name in node.inputs[1:]:
        if name:
            builder.fix(name)


def _concat(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Concat)
    result, joined, start = node.outputs[0], node.attributes.axis, 0
    for name in node.inputs:
        for axis in range(len(builder.shape(name))):
            if axis != joined:
                builder.tie((name, axis), (result, axis))
        size = builder.shape(name)[joined]
        builder.tie_slots((name, joined), builder.ids[name, joined], (result, joined), builder.ids[result, joined][start : start + size])
        start += size


def _slice(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Slice)
    x, result, a = node.inputs[0], node.outputs[0], node.attributes
    for axis, size in enumerate(builder.shape(x)):
        if a.steps[axis] != 1 and a.sizes[axis] > 1:
            builder.fix(x, axis)
            builder.fix(result, axis)
        else:
            part = builder.ids[x, axis][a.starts[axis] : min(a.starts[axis] + a.sizes[axis], size)]
            builder.tie_slots((x, axis), part, (result, axis), builder.ids[result, axis])


def _transpose(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Transpose)
    for axis, source in enumerate(node.attributes.permutation):
        builder.tie((node.inputs[0], source), (node.outputs[0], axis))


def _expand(builder: _Builder, node: Node) -> None:
    _broadcast_to(builder, node.inputs, node.outputs[0])
    own, shape = builder.shape(node.inputs[0]), builder.shape(node.outputs[0])
    for axis, size in enumerate(shape):
        back = len(shape) - axis
        if back > len(own) or own[-back] != size:
            builder.fix(node.outputs[0], axis)


def _pad(builder: _Builder, node: Node) -> None:
    assert isinstance(node.attributes, ops.Pad)
    x, result, a = node.inputs[0], node.outputs[0], node.attributes
    for axis, size in enumerate(builder.shape(x)):
        before, after = a.before[axis], a.after[axis]
        if a.mode != "constant" and before + after:
            builder.fix(x, axis)
            builder.fix(result, axis)
            continue
        ids = builder.ids[result, axis]
        builder.tie_slots((x, axis), builder.ids[x, axis], (result, axis), ids[before : before + size])
        builder.ties.append((np.concatenate([ids[:before], ids[before + size :]]), np.array([FIXED])))


def _reshape(builder: _Builder, node: Node) -> None:
    """Where dimensions merge or one is split, one of the factors goes on as the channels: heads when splitting, what may go when merging."""
    x, result = node.inputs[0], node.outputs[0]
    for sources, results in _blocks(builder.shape(x), builder.shape(result)):
        if len(sources) == 1 and len(results) == 1:
            builder.tie((x, sources[0]), (result, results[0]))
        elif len(results) == 1:
            free = [axis for axis in sources if (x, axis) not in builder.fixed]
            _carry(builder, (result, results[0]), [(x, axis) for axis in sources], (x, free[0]) if free else None)
        elif len(sources) == 1:
            whole = (x, sources[0])
            _carry(builder, whole, [(result, axis) for axis in results], None if whole in builder.fixed else (result, results[0]))
        else:
            builder.fix(x, *sources)
            builder.fix(result, *results)


def _carry(builder: _Builder, whole: Axis, factors: Sequence[Axis], carrier: Axis | None) -> None:
    """`whole` is the product of `factors`; its slots belong to those of the carrier, the other factors stay."""
    for axis in factors:
        if axis != carrier:
            builder.fix(*axis)
    if carrier is None:
        builder.fix(*whole)
        return
    inner = math.prod(len(builder.ids[axis]) for axis in factors[factors.index(carrier) + 1 :])
    ids = builder.ids[carrier]
    builder.tie_slots(carrier, ids[np.arange(len(builder.ids[whole])) // inner % len(ids)], whole, builder.ids[whole])


def _blocks(first: Sequence[int], second: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions (those of size 1 left out) with equal products in both shapes."""
    left, right = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (first, second))
    blocks = []
    while left and right:
        sources, results = [left.pop(0)], [right.pop(0)]
        while (have := math.prod(first[i] for i in sources)) != (want := math.prod(second[i] for i in results)):
            if have < want:
                sources.append(left.pop(0))
            else:
                results.append(right.pop(0))
        blocks.append((sources, results))
    return blocks


#: operator → how its slots are tied; one that is not here keeps all its dimensions
RELATIONS: dict[str, Callable[[_Builder, Node], None]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "matmul": _matmul,
    **dict.fromkeys(("max_pool", "average_pool", "interpolate", "resize"), _spatial),
    **dict.fromkeys(("reduce_mean", "reduce_sum", "reduce_max", "reduce_min"), _reduce),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "concat": _concat,
    "slice": _slice,
    "transpose": _transpose,
    "reshape": _reshape,
    "expand": _expand,
    "pad": _pad,
    "table": _same,
    **{record.name: _broadcast for record in ops.TABLE if record.elementwise and record.name != "table"},
}
