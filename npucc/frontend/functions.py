"""ONNX operators that ONNX itself defines by others: a node becomes the nodes of its function body.

The one big idea: onnx's own inliner is asked, on a model of the one node, so that versions, attributes and forms that depend on the input's
types are its business. Only the names are made unique here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
import onnx.inliner
from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto, ValueInfoProto, helper

from npucc.frontend.prepare import widen_floats

DOMAINS = ("", "ai.onnx", "ai.onnx.preview")
#: operators whose function body comes down to the NPU; others of this kind are worth a try, too
EXPANDED = {
    "Attention": "as ONNX defines it", "CausalConvWithState": "as ONNX defines it; constant weights", "CenterCropPad": "as ONNX defines it",
    "NegativeLogLikelihoodLoss": "as ONNX defines it; constant targets", "SoftmaxCrossEntropyLoss": "as ONNX defines it; constant labels",
    "SwiGLU": "as ONNX defines it",
}  # fmt: skip


def body_of(proto: NodeProto, inputs: Mapping[str, TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]) -> list[NodeProto]:
    """The nodes that ONNX says the node stands for, its inputs and outputs under their own names; [] where ONNX says nothing."""
    if proto.domain not in DOMAINS:
        return []
    try:
        nodes = _by_schema(proto, inputs, opsets) if "" in proto.input else _by_inliner(proto, inputs, opsets)
    except Exception:  # noqa: BLE001  onnx raises what its C++ code throws
        return []
    if [node.op_type for node in nodes] == [proto.op_type]:
        return []
    kept, prefix = {*inputs, *proto.output, ""}, f"{proto.name}/"
    for number, node in enumerate(nodes):
        widen_floats(node)
        node.name = f"{number}:{node.op_type}"
        rename(node, lambda name: name if name in kept else prefix + name, prefix)
    return nodes


def _by_inliner(proto: NodeProto, inputs: Mapping[str, TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]) -> list[NodeProto]:
    values = [ValueInfoProto(name=name, type=kind) for name, kind in inputs.items()]
    outputs = [ValueInfoProto(name=name) for name in proto.output if name]
    model = helper.make_model(helper.make_graph([proto], "function", values, outputs), opset_imports=opsets)
    return list(
        onnx.inliner.inline_selected_functions(model, [(proto.domain, proto.op_type)], exclude=False, inline_schema_functions=True).graph.node
    )


def _by_schema(proto: NodeProto, inputs: Mapping[str, TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]) -> list[NodeProto]:
    """Without the inliner, which knows no inputs left out in the middle: bodies that depend on the input's types, and so have no attributes."""
    version = next(entry.version for entry in opsets if entry.domain.removeprefix("ai.onnx") == proto.domain.removeprefix("ai.onnx"))
    schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
    types = [inputs.get(name, TypeProto()).SerializeToString() for name in proto.input]
    content = schema.get_context_dependent_function(proto.SerializeToString(), types)  # type: ignore[attr-defined]  # missing in its stub
    function = FunctionProto.FromString(content)
    given = {**dict.fromkeys(function.input, ""), **dict(zip(function.input, proto.input, strict=False))}
    given |= {formal: name for formal, name in zip(function.output, proto.output, strict=False) if name}
    for node in function.node:
        for names in (node.input, node.output):
            actual = [given.get(name, name) for name in names]
            del names[:]
            names.extend(actual)
    return list(function.node)


def rename(node: NodeProto, called: Callable[[str], str], prefix: str) -> None:
    """Call the tensors that a node and its subgraphs name as `called` says, and put the prefix before the names of nodes."""
    node.name = prefix + (node.name or node.op_type)
    for names in (node.input, node.output):
        renamed = [called(name) for name in names]
        del names[:]
        names.extend(renamed)
    for attribute in node.attribute:
        graphs = (attribute.g,) if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            for value in (*graph.input, *graph.output, *graph.initializer):
                value.name = called(value.name)
            for inner in graph.node:
                rename(inner, called, prefix)
