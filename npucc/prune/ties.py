"""Which slots are the same thing, operator by operator.

The one big idea: each operator only knows how its own dimensions hang together; what lies between two layers follows. An operator that is not in
the table at the end keeps all its dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from npucc import ops
from npucc.graph import Graph, Node
from npucc.prune.slots import FIXED, Axis, Slots, Ties


def find_slots(graph: Graph) -> Slots:
    """Tie the slots of a graph, operator by operator."""
    ties = Ties(graph)
    for name in (*graph.inputs, *graph.outputs):
        ties.fix(name)
    for node in graph:
        RELATIONS.get(node.op, _fix_all)(ties, node)
    return ties.finish()


def _fix_all(ties: Ties, node: Node) -> None:
    for name in (*node.inputs, *node.outputs):
        if name:
            ties.fix(name)


def _same(ties: Ties, node: Node) -> None:
    for axis in range(len(ties.shape(node.inputs[0]))):
        ties.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _broadcast(ties: Ties, node: Node) -> None:
    _broadcast_to(ties, node.inputs, node.outputs[0])


def _broadcast_to(ties: Ties, inputs: Sequence[str], result: str, *, skip: int = 0) -> None:
    """Align dimensions from the right as numpy does; the last `skip` are somebody else's business."""
    shape = ties.shape(result)
    for name in inputs:
        own = ties.shape(name)
        for back in range(skip + 1, len(own) + 1):
            if own[-back] == shape[-back]:
                ties.tie((name, len(own) - back), (result, len(shape) - back))


def _conv(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Conv)
    (x, weights), result = node.inputs[:2], node.outputs[0]
    ties.tie((x, 0), (result, 0))
    for name, axes in ((x, (2, 3)), (weights, (2, 3)), (result, (2, 3))):
        ties.fix(name, *axes)
    ties.tie((weights, 0), (result, 1))
    if node.attributes.groups == 1:
        ties.tie((x, 1), (weights, 1))
    else:
        _grouped(ties, node.attributes.groups, x, weights, result)
    if len(node.inputs) > 2 and node.inputs[2]:
        ties.tie((node.inputs[2], 0), (result, 1))


def _grouped(ties: Ties, groups: int, x: str, weights: str, result: str) -> None:
    """Depthwise: a group goes as a whole. Wider groups: every group loses the same positions."""
    sources, results = ties.ids[x, 1].reshape(groups, -1), ties.ids[result, 1].reshape(groups, -1)
    if sources.shape[1] == 1:
        ties.tie_slots((x, 1), np.repeat(sources[:, 0], results.shape[1]), (result, 1), results.ravel())
        return
    ties.tie_slots((x, 1), sources.ravel(), (weights, 1), np.tile(ties.ids[weights, 1], groups))
    ties.tie_slots((result, 1), results.ravel(), (result, 1), np.tile(results[0], groups))


def _conv_transpose(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.ConvTranspose)
    if node.attributes.groups != 1:
        _fix_all(ties, node)
        return
    (x, weights), result = node.inputs[:2], node.outputs[0]
    ties.tie((x, 0), (result, 0))
    for name, axes in ((x, (2, 3)), (weights, (2, 3)), (result, (2, 3))):
        ties.fix(name, *axes)
    ties.tie((x, 1), (weights, 0))
    ties.tie((weights, 1), (result, 1))
    if len(node.inputs) > 2 and node.inputs[2]:
        ties.tie((node.inputs[2], 0), (result, 1))


def _matmul(ties: Ties, node: Node) -> None:
    (a, b), result = node.inputs[:2], node.outputs[0]
    rank_a, rank_b, rank = len(ties.shape(a)), len(ties.shape(b)), len(ties.shape(result))
    ties.tie((a, rank_a - 1), (b, rank_b - 2))
    ties.tie((a, rank_a - 2), (result, rank - 2))
    ties.tie((b, rank_b - 1), (result, rank - 1))
    _broadcast_to(ties, (a, b), result, skip=2)
    if len(node.inputs) > 2 and node.inputs[2]:
        ties.tie((node.inputs[2], 0), (result, rank - 1))


def _spatial(ties: Ties, node: Node) -> None:
    """Pools and resizing: the last two dimensions are mixed."""
    rank = len(ties.shape(node.inputs[0]))
    for name in (node.inputs[0], node.outputs[0]):
        ties.fix(name, rank - 2, rank - 1)
    for axis in range(rank - 2):
        ties.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _reduce(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Reduce)
    _mixing(ties, node, node.attributes.axes)


def _mixing(ties: Ties, node: Node, axes: Sequence[int]) -> None:
    """These dimensions are mixed; the others pass through."""
    for axis in range(len(ties.shape(node.inputs[0]))):
        if axis in axes:
            ties.fix(node.inputs[0], axis)
            ties.fix(node.outputs[0], axis)
        else:
            ties.tie((node.inputs[0], axis), (node.outputs[0], axis))


def _softmax(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Softmax)
    _mixing(ties, node, (node.attributes.axis % len(ties.shape(node.inputs[0])),))


def _layer_norm(ties: Ties, node: Node) -> None:
    _mixing(ties, node, (len(ties.shape(node.inputs[0])) - 1,))
    for name in node.inputs[1:]:
        if name:
            ties.fix(name)


def _concat(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Concat)
    result, joined, start = node.outputs[0], node.attributes.axis, 0
    for name in node.inputs:
        for axis in range(len(ties.shape(name))):
            if axis != joined:
                ties.tie((name, axis), (result, axis))
        size = ties.shape(name)[joined]
        ties.tie_slots((name, joined), ties.ids[name, joined], (result, joined), ties.ids[result, joined][start : start + size])
        start += size


def _slice(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Slice)
    x, result, a = node.inputs[0], node.outputs[0], node.attributes
    for axis, size in enumerate(ties.shape(x)):
        if a.steps[axis] != 1 and a.sizes[axis] > 1:
            ties.fix(x, axis)
            ties.fix(result, axis)
        else:
            part = ties.ids[x, axis][a.starts[axis] : min(a.starts[axis] + a.sizes[axis], size)]
            ties.tie_slots((x, axis), part, (result, axis), ties.ids[result, axis])


def _transpose(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Transpose)
    for axis, source in enumerate(node.attributes.permutation):
        ties.tie((node.inputs[0], source), (node.outputs[0], axis))


def _expand(ties: Ties, node: Node) -> None:
    _broadcast_to(ties, node.inputs, node.outputs[0])
    own, shape = ties.shape(node.inputs[0]), ties.shape(node.outputs[0])
    for axis, size in enumerate(shape):
        back = len(shape) - axis
        if back > len(own) or own[-back] != size:
            ties.fix(node.outputs[0], axis)


def _pad(ties: Ties, node: Node) -> None:
    assert isinstance(node.attributes, ops.Pad)
    x, result, a = node.inputs[0], node.outputs[0], node.attributes
    for axis, size in enumerate(ties.shape(x)):
        before, after = a.before[axis], a.after[axis]
        if a.mode != "constant" and before + after:
            ties.fix(x, axis)
            ties.fix(result, axis)
            continue
        ids = ties.ids[result, axis]
        ties.tie_slots((x, axis), ties.ids[x, axis], (result, axis), ids[before : before + size])
        ties.pairs.append((np.concatenate([ids[:before], ids[before + size :]]), np.array([FIXED])))


def _reshape(ties: Ties, node: Node) -> None:
    """Where dimensions merge or one is split, one of the factors goes on as the channels: heads when splitting, what may go when merging."""
    x, result = node.inputs[0], node.outputs[0]
    for sources, results in _blocks(ties.shape(x), ties.shape(result)):
        if len(sources) == 1 and len(results) == 1:
            ties.tie((x, sources[0]), (result, results[0]))
        elif len(results) == 1:
            free = [axis for axis in sources if (x, axis) not in ties.fixed]
            _carry(ties, (result, results[0]), [(x, axis) for axis in sources], (x, free[0]) if free else None)
        elif len(sources) == 1:
            whole = (x, sources[0])
            _carry(ties, whole, [(result, axis) for axis in results], None if whole in ties.fixed else (result, results[0]))
        else:
            ties.fix(x, *sources)
            ties.fix(result, *results)


def _carry(ties: Ties, whole: Axis, factors: Sequence[Axis], carrier: Axis | None) -> None:
    """`whole` is the product of `factors`; its slots belong to those of the carrier, the other factors stay."""
    for axis in factors:
        if axis != carrier:
            ties.fix(*axis)
    if carrier is None:
        ties.fix(*whole)
        return
    inner = math.prod(len(ties.ids[axis]) for axis in factors[factors.index(carrier) + 1 :])
    ids = ties.ids[carrier]
    ties.tie_slots(carrier, ids[np.arange(len(ties.ids[whole])) // inner % len(ids)], whole, ties.ids[whole])


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
RELATIONS: dict[str, Callable[[Ties, Node], None]] = {
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
