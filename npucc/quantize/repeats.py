"""Tensors that a network computes over and over: the steps of a recurrence.

The one big idea: a step is known by the weights it reads. Tensors that are computed in the same way, as far as one looks back or until a product
with weights is met, and have the same shape, are one tensor at different steps. They are stored on one scale, counted in one histogram and measured
as one, so that quantizing a long sequence takes no longer than a short one, and every step reads the same tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from npucc.graph import Graph, Node
from npucc.ops import OPS, Slice

LOOK_BACK = 6  # operators, from a result
Repeats = Mapping[str, tuple[str, ...]]  # of a tensor: it and its repetitions, in order
FEWEST = 16  # steps: what is repeated less often (layers that share weights, say) has a range each time


def repeated(graph: Graph) -> Repeats:
    """The computed real tensors that are repeated."""
    kinds = _kinds(graph)
    classes: dict[int, list[str]] = {}
    for name, kind in kinds.items():
        tensor = graph.tensors[name]
        if tensor.dtype == "float32" and tensor.given is None and name not in graph.outputs:
            classes.setdefault(kind, []).append(name)
    several = [tuple(names) for names in classes.values() if len(names) >= FEWEST]
    return {name: names for names in several for name in names}


def _kinds(graph: Graph) -> dict[str, int]:
    """Per computed tensor a number that is equal for those computed in the same way: refined step by step, by what the node reads."""
    numbers: dict[object, int] = {}
    kinds: dict[str, int] = {}
    for _ in range(LOOK_BACK):
        known, counts = kinds, Counter(kinds.values())
        kinds = {}
        for node in graph:
            weights = _weights(graph, node)
            reads: tuple[object, ...] = weights or tuple(_operand(graph, known, name) for name in node.inputs)
            attributes = node.attributes
            if isinstance(attributes, Slice) and counts[known.get(node.inputs[0], 0)] <= 1:
                attributes = replace(attributes, starts=())  # of what is there once, each step picks its own part
            for index, name in enumerate(node.outputs):
                kind = (node.op, attributes, graph.tensors[name].shape, reads, index)
                kinds[name] = numbers.setdefault(kind, len(numbers) + 1)
    return kinds


def _weights(graph: Graph, node: Node) -> tuple[str, ...]:
    """The constants that the node multiplies with; they tell where one looks no further back."""
    names = node.inputs[1:]
    return names if OPS[node.op].matrix and all(not name or graph.tensors[name].is_constant for name in names) else ()


def _operand(graph: Graph, kinds: Mapping[str, int], name: str) -> object:
    """What equals for equal operands. Which steps a condition holds for has no scale."""
    tensor = graph.tensors.get(name)
    if tensor is not None and tensor.dtype == "bool":
        return tensor.shape
    if tensor is not None and tensor.data is not None and tensor.data.size == 1:
        return float(tensor.data.reshape(())), tensor.shape
    return kinds.get(name, 0) if graph.producer(name) else name
