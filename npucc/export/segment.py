"""A host segment, written out: the ONNX nodes it holds, under names of the model around it.

The one big idea: nothing is interpreted. Names are replaced, in nested graphs too, and nodes of an older opset are converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import onnx
import onnx.version_converter
from onnx import AttributeProto, GraphProto, NodeProto

from npucc.errors import CompileError
from npucc.export.model import Model
from npucc.graph import Graph, Node
from npucc.segments import attributes_of, first_line, host_nodes, input_types, output_types, parse

Typed = tuple[str, str]  # a value's name and element type


def newest_opset(graph: Graph) -> int:
    """The newest opset that a host segment of the graph is written in; 0 without segments."""
    return max((_opset(parse(attributes_of(node).model)) for node in host_nodes(graph)), default=0)


def emit_segment(model: Model, node: Node, values: Sequence[Typed], results: Sequence[Typed]) -> None:
    """Write the segment's nodes: they read `values` and make `results`, cast where the segment's own types differ."""
    proto = _converted(attributes_of(node).model, model.opset)
    names: dict[str, str] = {}
    for port, (value, dtype), wanted in zip(proto.graph.input, values, input_types(node), strict=True):
        names[port.name] = value if dtype == wanted else model.cast(value, wanted)
    later: list[tuple[str, Typed]] = []
    for port, (into, wanted), dtype in zip(proto.graph.output, results, output_types(node), strict=True):
        names[port.name] = into if dtype == wanted else model.fresh(f"{into}/{dtype}")
        later += [] if dtype == wanted else [(names[port.name], (into, wanted))]
    for domain in proto.opset_import:
        model.domains.setdefault("" if domain.domain == "ai.onnx" else domain.domain, domain.version)
    graph = _renamed_graph(model, proto.graph, names, node.name, keep_ports=True)
    model.constants += graph.initializer
    model.nodes += graph.node
    for value, (into, wanted) in later:
        model.cast(value, wanted, into=into)


def _renamed_graph(model: Model, graph: GraphProto, outer: Mapping[str, str], stem: str, *, keep_ports: bool = False) -> GraphProto:
    """The graph with fresh names for what it makes itself, and those of `outer` for the rest."""
    own = [value.name for value in graph.initializer] + [name for node in graph.node for name in node.output]
    own += [] if keep_ports else [value.name for value in graph.input]
    names = {**outer, **{name: model.fresh(f"{stem}/{name}") for name in own if name and not (keep_ports and name in outer)}}
    renamed = GraphProto()
    renamed.CopyFrom(graph)
    for value in (*renamed.initializer, *renamed.input, *renamed.output):
        value.name = names.get(value.name, value.name)
    for node in renamed.node:
        _rename(model, node, names, stem)
    del renamed.value_info[:]
    return renamed


def _rename(model: Model, node: NodeProto, names: Mapping[str, str], stem: str) -> None:
    node.name = model.fresh(node.name or f"{stem}:{node.op_type}")
    for side in (node.input, node.output):
        side[:] = [names.get(name, name) for name in side]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            attribute.g.CopyFrom(_renamed_graph(model, attribute.g, names, node.name))
        elif attribute.type == AttributeProto.GRAPHS:
            graphs = [_renamed_graph(model, graph, names, node.name) for graph in attribute.graphs]
            del attribute.graphs[:]
            attribute.graphs.extend(graphs)


@lru_cache(maxsize=64)
def _converted(content: bytes, opset: int) -> onnx.ModelProto:
    """The segment in this opset. Raises CompileError when onnx can't convert it."""
    proto = parse(content)
    if _opset(proto) in (0, opset) or all(_is_the_same(node, _opset(proto), opset) for node in proto.graph.node):
        return proto
    try:
        return onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # noqa: BLE001  onnx raises several kinds, none of them documented
        nodes = ", ".join(dict.fromkeys(node.op_type for node in proto.graph.node))
        raise CompileError(
            f"a host segment ({nodes}) can't be converted from opset {_opset(proto)} to {opset}: {first_line(error)}",
            hint="convert the model with onnx.version_converter, or export it again with a newer opset",
        ) from None


def _opset(proto: onnx.ModelProto) -> int:
    return next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), 0)


def _is_the_same(node: NodeProto, old: int, new: int) -> bool:
    """Whether both opsets mean the same operator, in nested graphs too."""
    inner = [each for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) for each in graph.node]
    if node.domain in ("", "ai.onnx"):
        try:
            versions = {onnx.defs.get_schema(node.op_type, opset, "").since_version for opset in (old, new)}
        except onnx.defs.SchemaError:
            return False
        if len(versions) > 1:
            return False
    return all(_is_the_same(each, old, new) for each in inner)
