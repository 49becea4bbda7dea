"""Which buffer each tensor lies in, in which layout, and where the buffers lie in memory.

The one big idea: data movement is decided here, before any instruction exists. Walking the graph backward, the inputs of a
concat are given their place inside its result; walking forward, whatever a view can express becomes a view of its input.
What remains is computed or copied into a buffer of its own, channels last for images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from npucc.graph import Graph, Node
from npucc.lowering.views import View
from npucc.ops import OPS

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that live from the first layer that writes them to the last that reads them (layer indices, both included)."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Placement:
    views: Mapping[str, View]  # tensor name → view
    addresses: Mapping[str, tuple[str, int]]  # buffer name → (memory, byte address)


def _view_of_concat(graph: Graph, node: Node, result: View) -> list[View]:
    """The windows of a concat's result that its inputs fill."""
    views, start = [], 0
    axis = node.attributes.axis  # type: ignore[attr-defined]
    for name in node.inputs:
        shape = graph.tensors[name].shape
        starts = [start if d == axis else 0 for d in range(len(shape))]
        views.append(result.window(starts, shape))
        start += shape[axis]
    return views


#: operator → (view of the result, given the view of the input); None: it takes a copy
FORWARD: dict[str, Callable[[Node, View], View | None]] = {
    "reshape": lambda node, view: view.reshape(node.attributes.shape),  # type: ignore[attr-defined]
    "transpose": lambda node, view: view.permute(node.attributes.permutation),  # type: ignore[attr-defined]
    "slice": lambda node, view: view.window(node.attributes.starts, node.attributes.sizes, node.attributes.steps),  # type: ignore[attr-defined]
    "expand": lambda node, view: view.broadcast(node.attributes.shape),  # type: ignore[attr-defined]
}
#: operator → (view of the input, given the view of the result)
BACKWARD: dict[str, Callable[[Node, View, tuple[int, ...]], View | None]] = {
    "reshape": lambda _, view, shape: view.reshape(shape),
    "transpose": lambda node, view, shape: view.permute([node.attributes.permutation.index(d) for d in range(len(shape))]),  # type: ignore[attr-defined]
}


def assign_views(graph: Graph) -> dict[str, View]:
    """A view for every tensor that is not a constant."""
    views: dict[str, View] = {}
    for node in reversed(list(graph)):
        _assign_backward(graph, node, views)
    for name in graph.inputs:
        tensor = graph.tensors[name]
        views.setdefault(name, View.dense(name, tensor.shape, graph.quant(name).dtype, _image_order(len(tensor.shape))))
    for node in graph:
        for output in node.outputs:
            if output not in views:
                views[output] = _forward_view(graph, node, output, views)
    return views


def _assign_backward(graph: Graph, node: Node, views: dict[str, View]) -> None:
    """Give a node's inputs their place inside its result, where its result has (or, for a concat, now gets) one."""
    result = node.outputs[0]
    if node.op == "concat":
        if result not in views:
            views[result] = _own_buffer(graph, node, result, views)
        for name, view in zip(node.inputs, _view_of_concat(graph, node, views[result]), strict=True):
            _claim(graph, name, view, views)
    elif node.op in BACKWARD and result in views:
        source = BACKWARD[node.op](node, views[result], graph.tensors[node.inputs[0]].shape)
        if source is not None:
            _claim(graph, node.inputs[0], source, views)


def _claim(graph: Graph, name: str, view: View, views: dict[str, View]) -> None:
    """Place a computed tensor, unless it has a place already, its producer only passes on a view, or it could not be written there."""
    producer = graph.producer(name)
    if name in views or producer is None or (producer.op in FORWARD and producer.op not in BACKWARD):
        return
    if producer.op in BACKWARD and BACKWARD[producer.op](producer, view, graph.tensors[producer.inputs[0]].shape) is None:
        return
    views[name] = view


def _forward_view(graph: Graph, node: Node, output: str, views: Mapping[str, View]) -> View:
    if node.op in FORWARD and node.inputs[0] in views:
        view = FORWARD[node.op](node, views[node.inputs[0]])
        if view is not None:
            return view
    return _own_buffer(graph, node, output, views)


def _own_buffer(graph: Graph, node: Node, output: str, views: Mapping[str, View]) -> View:
    """A dense buffer: images channels last, anything else in the order of the input it resembles."""
    tensor = graph.tensors[output]
    order: tuple[int, ...] | None = _image_order(len(tensor.shape))
    if order is None or OPS[node.op].elementwise:
        for name in node.inputs:
            if name in views and graph.tensors[name].shape == tensor.shape:
                order = views[name].order()
                break
    return View.dense(output, tensor.shape, graph.quant(output).dtype, order)


def _image_order(rank: int) -> tuple[int, ...] | None:
    return (0, 2, 3, 1) if rank == 4 else None


def free_moves(graph: Graph, node: Node, views: Mapping[str, View]) -> bool:
    """True if the node's result needs no instruction: it is a view, or its inputs were computed in place."""
    if node.op == "concat":
        windows = _view_of_concat(graph, node, views[node.outputs[0]])
        return all(views.get(name) == window for name, window in zip(node.inputs, windows, strict=True))
    if node.op not in FORWARD or node.inputs[0] not in views:
        return False
    source, result = views[node.inputs[0]], views[node.outputs[0]]
    return same_elements(FORWARD[node.op](node, source), result)


def same_elements(left: View | None, right: View) -> bool:
    """Equal but for the strides of size-1 dimensions."""
    if left is None or (left.buffer, left.offset, left.shape) != (right.buffer, right.offset, right.shape):
        return False
    return all(a == b or size == 1 for a, b, size in zip(left.strides, right.strides, left.shape, strict=True))


def concat_windows(graph: Graph, node: Node, views: Mapping[str, View]) -> list[View]:
    """The windows of a placed concat's result that its inputs fill."""
    return _view_of_concat(graph, node, views[node.outputs[0]])


STRETCH = 16  # layers; only buffers that live in a common stretch of layers are compared


def allocate(buffers: Iterable[Buffer], capacity: int | None = None) -> tuple[dict[str, int], int]:
    """First-fit addresses in the given order: no two buffers that live at once overlap. Returns the addresses and the bytes used.

    With a capacity, buffers that do not fit are left out.
    """
    placed: dict[int, dict[str, tuple[int, int, Buffer]]] = {}  # by stretch of layers: (low, high, buffer) of those that live in it
    addresses: dict[str, int] = {}
    used = 0
    for buffer in buffers:
        size = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        low = 0
        stretches = range(buffer.first // STRETCH, buffer.last // STRETCH + 1)
        nearby = {name: place for stretch in stretches for name, place in placed.get(stretch, {}).items()}
        for start, end, other in sorted(nearby.values(), key=itemgetter(0)):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if low + size <= start:
                break
            low = max(low, end)
        if capacity is not None and low + size > capacity:
            continue
        addresses[buffer.name] = low
        for stretch in stretches:
            placed.setdefault(stretch, {})[buffer.name] = (low, low + size, buffer)
        used = max(used, low + size)
    return addresses, used


def by_size(buffers: Iterable[Buffer]) -> list[Buffer]:
    """Largest first: the order in which first-fit wastes least."""
    return sorted(buffers, key=lambda b: (-b.bytes, b.first, b.name))


def by_benefit(buffers: Iterable[Buffer], accesses: Mapping[str, int]) -> list[Buffer]:
    """Those whose stay in the scratchpad saves most traffic per byte and layer first."""
    return sorted(buffers, key=lambda b: (-accesses[b.name] / (b.last - b.first + 1), b.bytes, b.first, b.name))
