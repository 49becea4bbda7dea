"""How much there is to compute, and how much of it on the host.

The one big idea: work is counted from shapes alone, as the model asks for it: multiply-accumulates, and elements that any other operator
computes or reduces. Moving bytes is no work. So the count is the same before and after fusion, and on the NPU as in a host segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from npucc import ops
from npucc.graph import Graph, Node
from npucc.ops import OPS
from npucc.segments import attributes_of, outline_of

Shape = tuple[int, ...]
#: ONNX operators whose second input is multiplied with windows or rows of the first
PRODUCTS = frozenset({"Conv", "ConvInteger", "ConvTranspose", "MatMul", "MatMulInteger", "Gemm"})
UNCOUNTED = frozenset({"Constant", "Shape", "Size", "Identity"})


@dataclass(frozen=True, slots=True)
class Operations:
    """Multiply-accumulates, and elements of all other computations."""

    macs: int = 0
    elements: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.macs + other.macs, self.elements + other.elements)


@dataclass(frozen=True, slots=True)
class Split:
    """The work on either side."""

    npu: Operations = Operations()
    host: Operations = Operations()

    @property
    def mac_share(self) -> float:
        """Of the host."""
        return self.host.macs / max(self.npu.macs + self.host.macs, 1)

    @property
    def element_share(self) -> float:
        """Of the host."""
        return self.host.elements / max(self.npu.elements + self.host.elements, 1)

    def as_dict(self) -> dict[str, Any]:
        return {"npu": asdict(self.npu), "host": asdict(self.host), "host_mac_share": self.mac_share, "host_element_share": self.element_share}


def count(graph: Graph) -> Split:
    """The work of a graph's nodes; a node in a host segment whose shapes are not known beforehand counts with what is known."""
    npu, host = Operations(), Operations()
    for node in graph:
        if OPS[node.op].host:
            host += _of_segment(outline_of(attributes_of(node).model))
        else:
            npu += of_node(graph, node)
    return Split(npu, host)


def of_node(graph: Graph, node: Node) -> Operations:
    """The work of a node on the NPU."""
    if OPS[node.op].matrix:
        return Operations(macs=node_macs(graph, node))
    if OPS[node.op].moves_data and not isinstance(node.attributes, ops.Pool | ops.Reduce):
        return Operations()
    names = [name for name in (*node.inputs, *node.outputs) if name and not graph.tensors[name].is_constant]
    return Operations(elements=max(math.prod(graph.tensors[name].shape) for name in names))


def node_macs(graph: Graph, node: Node) -> int:
    """Multiply-accumulates that the float model's node asks for."""
    if not OPS[node.op].matrix:
        return 0
    result = graph.tensors[node.outputs[0]].shape
    weights = graph.tensors[node.inputs[1]].shape
    if isinstance(node.attributes, ops.Conv):
        return math.prod(result) * math.prod(weights[1:])
    if isinstance(node.attributes, ops.ConvTranspose):
        return math.prod(graph.tensors[node.inputs[0]].shape) * math.prod(weights[1:])
    return math.prod(result) * graph.tensors[node.inputs[0]].shape[-1]


def _of_segment(model: onnx.ModelProto) -> Operations:
    """The work of an ONNX model; the body of a loop counts as the elements that leave it."""
    from npucc.frontend import operators

    moving = {record.name for record in operators.GROUPS["layout"]} | UNCOUNTED
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = Operations()
    for node in graph.node:
        if node.op_type in PRODUCTS:
            total += Operations(macs=_product(node, shapes))
        elif node.op_type not in moving:
            total += Operations(elements=_largest(shapes, (*node.input, *node.output)))
    return total


def _product(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    first, second, result = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type.startswith("Conv"):
        return math.prod(result) * math.prod(second[1:])
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(result) * (first[-2 if turned else -1] if len(first) > turned else 1)


def _largest(shapes: Mapping[str, Shape], names: Iterable[str]) -> int:
    return max((math.prod(shapes[name]) for name in names if name in shapes), default=0)
