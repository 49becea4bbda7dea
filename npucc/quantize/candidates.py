"""Which groups of activations could have 16 bits.

The one big idea: 16 bits are refused only where a sum could leave 32 bits, where the host or the model decides, or where a table is indexed.
"""

from __future__ import annotations

import numpy as np

from npucc.graph import Graph, Node
from npucc.ops import OPS
from npucc.quantize.calibrate import measured
from npucc.quantize.constants import LARGEST_STEP as BYTE_STEP
from npucc.quantize.constants import LARGEST_SUM
from npucc.quantize.scales import Scales

LARGEST_STEP = 2**15  # of an s16 activation from its zero point
WEIGHT_BITS = 0.5  # that a reader may lose where its sums would leave 32 bits otherwise


def byte_groups(graph: Graph, scales: Scales) -> dict[str, tuple[str, ...]]:
    """Per group of real numbers in 8 bits, by its root: its activations."""
    groups: dict[str, list[str]] = {}
    for name, tensor in graph.tensors.items():
        if not tensor.is_constant and tensor.dtype != "bool":
            groups.setdefault(scales.groups.root(name), []).append(name)
    roots = {scales.groups.root(name) for name in measured(graph)}
    stored = {root: names for root, names in groups.items() if root in roots and root in scales.quants and scales.quants[root].dtype == "s8"}
    return {root: tuple(names) for root, names in stored.items() if all(graph.tensors[name].dtype == "float32" for name in names)}


def candidates(graph: Graph, integer: Graph, scales: Scales) -> dict[str, tuple[str, ...]]:
    """The groups that 16 bits may go to. Left out is what would cost its readers too many weight bits, and what the model has fixed itself."""
    refused = {scales.groups.root(name) for node in graph for name in _refused_operands(graph, integer, node)}
    refused |= {scales.groups.root(name) for name, tensor in graph.tensors.items() if tensor.given is not None}
    return {root: names for root, names in byte_groups(graph, scales).items() if root not in refused}


def _refused_operands(graph: Graph, integer: Graph, node: Node) -> tuple[str, ...]:
    """Activations that must stay in 8 bits because of this node: right operands of products of activations, those whose sums would be
    too large, and what the host reads or makes."""
    record = OPS[node.op]
    if record.host or record.indices:
        return tuple(name for name in (*node.inputs, *node.outputs) if name)
    if not record.matrix:
        return ()
    weights = integer.tensors[integer.nodes[node.name].inputs[1]]
    if weights.data is None or graph.tensors[node.inputs[1]].data is None:
        return node.inputs[1:2] if left_may_be_wide(graph, node) else node.inputs[:2]
    axis = weights.quant.axis if weights.quant else None
    magnitude = np.abs(weights.data.astype(np.int64))
    others = tuple(i for i in range(magnitude.ndim) if i != axis) if axis is not None else tuple(range(1, magnitude.ndim))
    return node.inputs[:1] if float(magnitude.sum(axis=others).max(initial=0)) * LARGEST_STEP > LARGEST_SUM * 2**WEIGHT_BITS else ()


def left_may_be_wide(graph: Graph, node: Node) -> bool:
    """Whether a product of two activations stays within 32 bits: few products are summed, or probabilities weigh them."""
    left = graph.tensors[node.inputs[0]]
    producer = graph.producer(node.inputs[0])
    probabilities = producer is not None and producer.op == "softmax" and producer.attributes.axis % len(left.shape) == len(left.shape) - 1  # type: ignore[attr-defined]
    return probabilities or left.shape[-1] * LARGEST_STEP * BYTE_STEP < LARGEST_SUM
