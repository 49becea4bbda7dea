"""ONNX operators that ONNX itself defines by others: a node becomes the nodes of its function body.

The one big idea: onnx's own inliner is asked, on a model of the one node, so that versions, attributes and forms that depend on the input's
types are its business. Only the names are made unique here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.inliner
from onnx import AttributeProto, NodeProto, TypeProto, ValueInfoProto, helper

from npucc.frontend.prepare import widen_floats

DOMAINS = ("", "ai.onnx", "ai.onnx.preview")
#: operators whose function body comes down to the NPU; others of this kind are worth a try, too
EXPANDED = {
    "Attention": "its function body", "CausalConvWithState": "constant weights",
    "NegativeLogLikelihoodLoss": "constant targets",
    "SoftmaxCrossEntropyLoss": "constant labels", "SwiGLU": "its function body",
}  # fmt: skip


def body_of(proto: NodeProto, inputs: Mapping[str, TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]) -> list[NodeProto]:
    """The nodes that ONNX says the node stands for, its inputs and outputs under their own names; [] where ONNX says nothing."""
    if proto.domain not in DOMAINS:
        return []
    values = [ValueInfoProto(name=name, type=kind) for name, kind in inputs.items()]
    outputs = [ValueInfoProto(name=name) for name in proto.output if name]
    graph = helper.make_graph([proto], "function", values, outputs)
    try:
        inlined = onnx.inliner.inline_selected_functions(
            helper.make_model(graph, opset_imports=opsets), [(proto.domain, proto.op_type)], exclude=False, inline_schema_functions=True
        )
    except Exception:  # noqa: BLE001  the inliner raises what its C++ code throws
        return []
    nodes = list(inlined.graph.node)
    if [node.op_type for node in nodes] == [proto.op_type]:
        return []
    kept = {*inputs, *proto.output, ""}
    for number, node in enumerate(nodes):
        widen_floats(node)
        node.name = f"{number}:{node.op_type}"
        _rename(node, kept, f"{proto.name}/")
    return nodes


def _rename(node: NodeProto, kept: set[str], prefix: str) -> None:
    """Put the prefix before every name but the kept ones, in subgraphs too."""
    node.name = prefix + (node.name or node.op_type)
    for names in (node.input, node.output):
        renamed = [name if name in kept else prefix + name for name in names]
        del names[:]
        names.extend(renamed)
    for attribute in node.attribute:
        graphs = (attribute.g,) if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            for value in (*graph.input, *graph.output, *graph.initializer):
                value.name = value.name if value.name in kept else prefix + value.name
            for inner in graph.node:
                _rename(inner, kept, prefix)
