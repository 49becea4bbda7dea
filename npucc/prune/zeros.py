"""Channels that are zero, or that nobody listens to: removed without any change of the output.

The one big idea: follow exact zeros forward, label by label. A label may go if every sum over it (convolution, matrix product) meets
a zero on one side: the values are all zero there, or the weights are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npucc import ops, scalar
from npucc.graph import Graph, Node
from npucc.ops import OPS
from npucc.prune.shrink import shrink
from npucc.prune.slots import FIXED, Slots
from npucc.prune.ties import find_slots

Array = np.ndarray[Any, np.dtype[Any]]

_ALL = frozenset({"add", "sub", "max", "min", "concat", "where"})  # zero where every operand is
_PASSES = frozenset({"average_pool", "interpolate", "reduce_mean", "reduce_sum"})  # zero where the operand is, besides what moves data


def remove_zero_channels(graph: Graph) -> tuple[Graph, int]:
    """The graph without them, and how many labels went. At least one index of every dimension stays."""
    removed_in_all = 0
    while True:  # what is cut off may have been the only listener of something else
        slots = find_slots(graph)
        removed = removable(graph, slots)
        if not removed.any():
            return graph, removed_in_all
        removed_in_all += int(removed.sum())
        graph = shrink(graph, slots, removed)


def removable(graph: Graph, slots: Slots) -> Array:
    """bool[labels]: those that can go without changing any output."""
    zeros = _zero_labels(graph, slots)
    free = np.ones(slots.count, bool)
    free[FIXED] = False
    for node in graph:
        if OPS[node.op].matrix:
            _refuse_needed(graph, slots, node, zeros, free)
    for labels in slots.labels.values():
        if len(labels) and free[labels].all():
            free[labels[0]] = False
    return free


def _refuse_needed(graph: Graph, slots: Slots, node: Node, zeros: dict[str, Array], free: Array) -> None:
    """Clear the labels over which this node sums something that is not zero."""
    a, b = node.inputs[:2]
    first, second = _summed_axes(graph, node)
    if first is None:
        return
    here, silent = slots.labels[a, first], _silent(graph, slots, zeros, b, second)
    if node.op != "matmul":  # a grouped convolution's weights are seen by several inputs each
        silent = np.resize(silent, len(here))
    needed = ~zeros[a][here] & ~silent
    free[here[needed]] = False


def _silent(graph: Graph, slots: Slots, zeros: dict[str, Array], name: str, axis: int) -> Array:
    """bool per index of a dimension: whether all values there are zero; of another dimension with the same label they need not be."""
    data = graph.tensors[name].data
    if data is None:
        return np.asarray(zeros[name][slots.labels[name, axis]])
    return np.asarray(~(data != 0).any(axis=tuple(i for i in range(data.ndim) if i != axis)))


def _summed_axes(graph: Graph, node: Node) -> tuple[int | None, int]:
    """The dimension of the first operand that the node sums over, and that of the weights; None for a depthwise convolution."""
    if node.op == "matmul":
        return len(graph.tensors[node.inputs[0]].shape) - 1, len(graph.tensors[node.inputs[1]].shape) - 2
    if node.op == "conv_transpose":
        return 1, 0
    return (None, 1) if getattr(node.attributes, "groups", 1) > 1 and graph.tensors[node.inputs[1]].shape[1] == 1 else (1, 1)


def _zero_labels(graph: Graph, slots: Slots) -> dict[str, Array]:
    """Per tensor: bool[labels], whether all its values at that label are exactly zero."""
    zeros: dict[str, Array] = {name: np.zeros(slots.count, bool) for name in graph.tensors}
    for name, tensor in graph.tensors.items():
        if tensor.data is not None:
            zeros[name] = _constant_zeros(tensor.data, slots, name)
    for node in graph:
        if len(node.outputs) > 1:
            continue
        result = node.outputs[0]
        found = _node_zeros(graph, slots, node, zeros)
        zeros[result] = found & slots.of(result, len(graph.tensors[result].shape))
    return zeros


def _constant_zeros(data: Array, slots: Slots, name: str) -> Array:
    """A label is zero if all its slices are."""
    seen, nonzero = np.zeros(slots.count, bool), np.zeros(slots.count, bool)
    for axis in range(data.ndim):
        others = tuple(i for i in range(data.ndim) if i != axis)
        labels = slots.labels[name, axis]
        seen[labels] = True
        nonzero[labels[(data != 0).any(axis=others)]] = True
    return seen & ~nonzero


def _node_zeros(graph: Graph, slots: Slots, node: Node, zeros: dict[str, Array]) -> Array:
    nothing = np.zeros(slots.count, bool)
    if not _keeps_zero(node):
        return nothing
    if OPS[node.op].matrix:
        return _matrix_zeros(graph, slots, node, zeros)
    if node.op == "mul":
        return zeros[node.inputs[0]] | zeros[node.inputs[1]]
    if node.op in _ALL:
        operands = node.inputs[1:] if node.op == "where" else node.inputs
        result = np.ones(slots.count, bool)
        for name in operands:
            absent = ~slots.of(name, len(graph.tensors[name].shape))
            result &= zeros[name] | (absent if node.op == "concat" else False)
        return result
    if OPS[node.op].moves_data or node.op in _PASSES or node.op == "table":
        return zeros[node.inputs[0]]
    return nothing


def _keeps_zero(node: Node) -> bool:
    """Whether zeros in give zeros out, as far as clamp, padding and function go."""
    clamp = getattr(node.attributes, "clamp", None)
    if clamp is not None and not clamp[0] <= 0 <= clamp[1]:
        return False
    if isinstance(node.attributes, ops.Pad):
        return node.attributes.mode != "constant" or node.attributes.value == 0
    if isinstance(node.attributes, ops.Table):
        with np.errstate(all="ignore"):
            return bool(scalar.evaluate(node.attributes.expression, np.zeros(1, np.float32))[0] == 0)
    return True


def _matrix_zeros(graph: Graph, slots: Slots, node: Node, zeros: dict[str, Array]) -> Array:
    """Result channels whose weights are zero wherever the input is not, and whose bias is zero."""
    result = np.zeros(slots.count, bool)
    weights = graph.tensors[node.inputs[1]].data
    if weights is None or (node.op == "matmul" and weights.ndim != 2):
        return result
    axis, _ = _summed_axes(graph, node)
    used = weights != 0
    silent = zeros[node.inputs[0]]
    if node.op == "matmul" and axis is not None:
        used = used & ~silent[slots.labels[node.inputs[0], axis]][:, None]
        channels = ~used.any(axis=0)
    elif node.op == "conv_transpose":
        used = used & ~silent[slots.labels[node.inputs[0], 1]][:, None, None, None]
        channels = ~used.any(axis=(0, 2, 3))
    else:
        groups = getattr(node.attributes, "groups", 1)
        inputs = np.repeat(~silent[slots.labels[node.inputs[0], 1]].reshape(groups, -1), len(weights) // groups, axis=0)
        channels = ~(used & inputs[:, :, None, None]).any(axis=(1, 2, 3))
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = graph.tensors[node.inputs[2]].data
        channels &= (bias == 0) if bias is not None else False
    labels = slots.labels[node.outputs[0], len(graph.tensors[node.outputs[0]].shape) - 1 if node.op == "matmul" else 1]
    result[labels] = True
    result[labels[~channels]] = False
    return result
