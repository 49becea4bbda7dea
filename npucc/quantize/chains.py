"""Chains: where the channels of tensors can be scaled without the network noticing.

The one big idea: follow a channel dimension from the operators that make it (convolution, matrix product, layer normalization, a product with ones:
their constants take any scale) through those that pass scales on (ReLU, pooling, residual addition, …) to those that read it (their weights take it
back).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npucc import ops, scalar
from npucc.graph import Graph, Node, Tensor

Place = tuple[str, int]  # a tensor and its channel dimension

SUMS = frozenset({"add", "sub", "max", "min"})


@dataclass(frozen=True, slots=True)
class Chain:
    """Tensors whose channels may be scaled together: `makers` write them, `readers` are the matrix operators that read them."""

    places: tuple[Place, ...]
    makers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.places)


def find_chains(graph: Graph) -> tuple[Chain, ...]:
    """Every set of places that scales can be put into and taken out of again, in the order of their makers."""
    chains, taken = [], set()
    for node in graph:
        start = _made(graph, node)
        if start is not None and start not in taken:
            chain = _follow(graph, start)
            if chain is not None:
                taken |= set(chain.places)
                chains.append(chain)
    return tuple(chains)


def _made(graph: Graph, node: Node) -> Place | None:
    """The place whose channels the node's constants can scale."""
    constants = [graph.tensors[name] for name in node.inputs[1:] if name]
    if not constants or not all(map(_is_free, constants)) or graph.tensors[node.inputs[0]].is_constant:
        return None
    last = len(graph.tensors[node.outputs[0]].shape) - 1
    if node.op == "conv":
        return node.outputs[0], 1
    makes = (node.op == "layer_norm" and node.inputs[1] != "") or (node.op == "matmul" and len(constants[0].shape) == 2)
    return (node.outputs[0], last) if makes or _is_tap(graph, node) else None


def _is_tap(graph: Graph, node: Node) -> bool:
    """Whether the node multiplies with ones, one for each channel: other whole numbers are as exact."""
    factors = graph.tensors[node.inputs[1]].data if node.op == "mul" else None
    return factors is not None and factors.shape == graph.tensors[node.outputs[0]].shape[-1:] and bool((factors == 1).all())


def _is_free(tensor: Tensor) -> bool:
    """Whether it is a constant whose integers are not given."""
    return tensor.is_constant and tensor.given is None


def reads_channels(graph: Graph, node: Node, place: Place) -> bool:
    """Whether the node is a matrix operator whose weights can take the scales back."""
    if node.op not in ("conv", "matmul") or place[0] != node.inputs[0] or place[0] in node.inputs[1:]:
        return False
    weights, last = graph.tensors[node.inputs[1]], len(graph.tensors[place[0]].shape) - 1
    return _is_free(weights) and (place[1] == 1 if node.op == "conv" else place[1] == last and len(weights.shape) == 2)


def _follow(graph: Graph, start: Place) -> Chain | None:
    """The chain that the place belongs to; None if a scale would be seen somewhere."""
    places: dict[Place, None] = {}
    makers: dict[str, None] = {}
    readers: dict[str, None] = {}
    waiting = [start]
    while waiting:
        place = waiting.pop()
        if place in places:
            continue
        places[place] = None
        name = place[0]
        producer = graph.producer(name)
        tensor = graph.tensors[name]
        if producer is None or name in graph.outputs or tensor.dtype != "float32" or tensor.given is not None:
            return None
        for node in (producer, *graph.users(name)):
            low, high = getattr(node.attributes, "clamp", None) or (-np.inf, np.inf)
            passes = low in (0, -np.inf) and high == np.inf  # a ReLU6 would clip a scaled channel elsewhere
            if name in node.outputs and _made(graph, node) == place and passes:
                makers[node.name] = None
            elif name in node.inputs and reads_channels(graph, node, place):
                readers[node.name] = None
            elif (others := _tied(graph, node, place)) is not None and passes:
                waiting += others
            else:
                return None
    if not makers or not readers or len({name for name, _ in places}) != len(places):
        return None
    return Chain(tuple(places), tuple(makers), tuple(readers))


def _tied(graph: Graph, node: Node, place: Place) -> list[Place] | None:
    """The places that carry the same scales because of the node; None if it does not pass scales on."""
    axis, result = place[1], node.outputs[0]
    shape = graph.tensors[place[0]].shape
    if node.op in ("max_pool", "average_pool", "interpolate", "resize") and axis < len(shape) - 2:
        return [(node.inputs[0], axis), (result, axis)]
    if isinstance(node.attributes, ops.Reduce) and axis not in node.attributes.axes:
        return [(node.inputs[0], axis), (result, axis)]
    if isinstance(node.attributes, ops.Pad) and not node.attributes.value and not (node.attributes.before[axis] or node.attributes.after[axis]):
        return [(node.inputs[0], axis), (result, axis)]
    if isinstance(node.attributes, ops.Table) and _is_homogeneous(node.attributes.expression):
        return [(node.inputs[0], axis), (result, axis)]
    if node.op in SUMS and all(graph.tensors[name].shape == shape and not graph.tensors[name].is_constant for name in node.inputs):
        return [(name, axis) for name in (*node.inputs, result)]
    return _moved(graph, node, place)


def _moved(graph: Graph, node: Node, place: Place) -> list[Place] | None:
    """Through a transposition, or a reshape that keeps the dimension and what lies before it."""
    source, result = node.inputs[0], node.outputs[0]
    if isinstance(node.attributes, ops.Transpose):
        permutation = node.attributes.permutation
        axis = place[1] if place[0] == source else permutation[place[1]]
        return [(source, axis), (result, permutation.index(axis))]
    if isinstance(node.attributes, ops.Reshape):
        before, after = graph.tensors[source].shape, graph.tensors[result].shape
        own, other = (before, after) if place[0] == source else (after, before)
        sizes = [int(np.prod(own[: place[1]])), own[place[1]]]
        for axis in range(len(other)):
            if [int(np.prod(other[:axis])), other[axis]] == sizes and own[place[1]] > 1:
                return [(source, place[1] if place[0] == source else axis), (result, axis if place[0] == source else place[1])]
    return None


def _is_homogeneous(expression: scalar.Expression) -> bool:
    """Whether f(2^k·x) = 2^k·f(x), as for ReLU and its leaky kin."""
    points = np.array([-3.7, -1.3, -0.2, 0.0, 0.1, 0.9, 5.3], np.float32)
    values = [np.broadcast_to(scalar.evaluate(expression, np.ldexp(points, power)), points.shape) for power in (0, -9, 9)]
    return bool(np.isfinite(values[0]).all()) and all(np.array_equal(values[0], np.ldexp(values[i], -power)) for i, power in ((1, -9), (2, 9)))
