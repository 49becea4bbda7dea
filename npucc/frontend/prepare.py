"""A loaded model made uniform: functions inlined, nodes sorted and named, shapes bound, dead nodes gone, every float type float32.

The one big idea: after this, an importer sees plain standard nodes with unique names in executable order, and inputs with complete shapes.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from npucc.errors import ImportModelError
from npucc.frontend.plain import restore_plain_forms

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
NUMBERS = frozenset(
    {*FLOATS, TensorProto.BOOL, *(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64))}
)  # the element types that inputs and outputs may have
MICROSOFT = "com.microsoft"
STRAYS = frozenset({"SimplifiedLayerNormalization"})  # onnxruntime's own, which it keeps in the default domain, where ONNX does not know them
LARGEST_CHECKED = 1 << 20  # bytes of a stored tensor that the checker looks into; it copies the model several times


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input with its complete shape; `dtype` is its ONNX element type."""

    name: str
    shape: tuple[int, ...]
    dtype: int


def prepare(model: ModelProto, file: str) -> list[NodeProto]:
    """The nodes that the outputs depend on, in executable order, uniquely named and with float32 in place of other float types.

    Changes `model`. Raises ImportModelError for a cycle, a tensor that two nodes make, or a model that the ONNX checker refuses.
    """
    restore_plain_forms(model, file)
    if model.functions:
        model.CopyFrom(onnx.inliner.inline_local_functions(model))
    for node in model.graph.node:
        widen_floats(node)
        if node.op_type in STRAYS and node.domain in ("", "ai.onnx"):
            node.domain = MICROSOFT
    if MICROSOFT not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    nodes = _sorted_alive(model.graph, file)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _name_uniquely(model.graph.node)
    model.ir_version = max(model.ir_version, 4)  # since 4 a stored tensor need be no input; onnxruntime never wanted that
    _check(model, file)
    return list(model.graph.node)


def reads(node: NodeProto) -> list[str]:
    """The tensors a node depends on, those its subgraphs capture from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g,) if attribute.type == AttributeProto.GRAPH else attribute.graphs:
            names += captured(graph)
    return names


def captured(graph: GraphProto) -> list[str]:
    """The tensors that a subgraph reads from outside."""
    local = {value.name for value in (*graph.input, *graph.initializer)} | {name for node in graph.node for name in node.output}
    wanted = [name for node in graph.node for name in reads(node)] + [value.name for value in graph.output]
    return [name for name in wanted if name not in local]


def _sorted_alive(graph: GraphProto, file: str) -> list[NodeProto]:
    """The needed nodes in topological order (the file's order where it is free)."""
    producers: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in producers:
                raise ImportModelError(
                    f"tensor {name!r} is made by two nodes",
                    file=file,
                    node=_title(node),
                    hint="an ONNX graph makes each tensor once; export the model again",
                )
            producers[name] = index
    topology = nx.DiGraph()
    waiting = [producers[value.name] for value in graph.output if value.name in producers]
    while waiting:
        index = waiting.pop()
        if index in topology and "visited" in topology.nodes[index]:
            continue
        topology.add_node(index, visited=True)
        for name in reads(graph.node[index]):
            if name in producers:
                topology.add_edge(producers[name], index)
                waiting.append(producers[name])
    try:
        return [graph.node[index] for index in nx.lexicographical_topological_sort(topology)]
    except nx.NetworkXUnfeasible:
        cycle = " → ".join(_title(graph.node[edge[0]]) for edge in nx.find_cycle(topology))
        raise ImportModelError(f"the graph has a cycle: {cycle}", file=file, hint="an ONNX graph must be acyclic; export the model again") from None


def _title(node: NodeProto) -> str:
    return node.name or next(filter(None, node.output), "") or node.op_type


def _name_uniquely(nodes: Iterable[NodeProto]) -> None:
    """Unnamed nodes are called after their first output; a name that is taken gets a number."""
    used: set[str] = set()
    for node in nodes:
        title = name = _title(node)
        number = 1
        while name in used:
            number += 1
            name = f"{title}.{number}"
        used.add(name)
        node.name = name


def widen_floats(node: NodeProto) -> None:
    """float16, bfloat16 and double become float32 in the node's attributes: everything is computed in float32."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in FLOATS[1:]:
            wide = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
        elif attribute.type == AttributeProto.INT and attribute.name in ("to", "dtype") and attribute.i in FLOATS[1:]:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                widen_floats(inner)


def _check(model: ModelProto, file: str) -> None:
    """What the ONNX checker says of the model (missing inputs, unknown operators, wrong attributes), as our error."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()  # the checker wants one, even where the model may leave it open
    try:
        onnx.checker.check_model(_without_large_tensors(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        if "for GroupNormalization is deprecated" in str(error):  # from opset 18 to 20; onnxruntime runs it
            return
        message = " ".join(str(error).split("\n==>")[0].split())
        named = re.search(r"Bad node spec for node\. Name: (.*?) OpType:", str(error))
        raise ImportModelError(
            f"the ONNX checker refuses the model: {message}",
            file=file,
            node=named[1] if named else "",
            hint="export the model again, or convert it with onnx.version_converter",
        ) from None


def _without_large_tensors(model: ModelProto) -> ModelProto:
    """The model to check, with inputs in the place of large or external stored tensors; the model itself where it has none."""
    large = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() > LARGEST_CHECKED]
    if not large:
        return model
    known = {value.name for value in model.graph.input}
    inputs = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large if tensor.name not in known]
    names = {tensor.name for tensor in large}
    graph = GraphProto(
        name=model.graph.name, node=model.graph.node, input=[*model.graph.input, *inputs], output=model.graph.output,
        initializer=[tensor for tensor in model.graph.initializer if tensor.name not in names], sparse_initializer=model.graph.sparse_initializer,
    )  # fmt: skip
    return ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)


def bind_inputs(graph: GraphProto, shapes: Mapping[str, tuple[int, ...]], file: str) -> list[Input]:
    """The true inputs (those without an initializer) with complete shapes, taken from the model and from `shapes`.

    A named dimension that `shapes` gives in one input holds in the others too. Raises ImportModelError for what stays unknown.
    """
    stored = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    values = [value for value in graph.input if value.name not in stored]
    for name in shapes:
        _known_input(name, [value.name for value in values], file)
    symbols: dict[str, int] = {}
    for value in values:
        if value.name in shapes:
            _collect_symbols(value, tuple(shapes[value.name]), symbols, file)
    bound = {value.name: _sizes(value, shapes.get(value.name), symbols, file) for value in values}
    if any(sizes is None or not all(isinstance(size, int) for size in sizes) for sizes in bound.values()):
        raise _unbound(bound, file)
    return [Input(value.name, tuple(bound[value.name]), value.type.tensor_type.elem_type) for value in values]  # type: ignore[arg-type]


def _known_input(name: str, known: list[str], file: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise ImportModelError(
            f"a shape is given for {name!r}, but the model's inputs are {', '.join(map(repr, known))}",
            file=file,
            hint=f"did you mean {close[0]!r}?" if close else "name one of the inputs",
        )


def _declared(value: ValueInfoProto, file: str) -> list[int | str] | None:
    """Per dimension its size, or its symbol ("" if it has none); None if the model does not say."""
    if not value.type.HasField("tensor_type"):
        raise ImportModelError(f"input {value.name!r} is not a tensor", file=file, hint="only dense tensors can be inputs")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param for dim in tensor.shape.dim]


def _collect_symbols(value: ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int], file: str) -> None:
    declared = _declared(value, file)
    fits = all(isinstance(size, int) and size > 0 for size in shape)
    if declared is not None:
        fits = (
            fits and len(shape) == len(declared) and all(isinstance(known, str) or known == size for known, size in zip(declared, shape, strict=True))
        )
    if not fits:
        expected = "any rank" if declared is None else f"[{', '.join(str(size) or '?' for size in declared)}]"
        raise ImportModelError(
            f"shape {tuple(shape)} does not fit input {value.name!r}, declared as {expected}",
            file=file,
            hint="give a positive size for every dimension",
        )
    for known, size in zip(declared or (), shape, strict=False):
        if isinstance(known, str) and known and symbols.setdefault(known, size) != size:
            raise ImportModelError(
                f"dimension {known!r} is {symbols[known]} in one input and {size} in {value.name!r}",
                file=file,
                hint="a named dimension has the same size everywhere",
            )


def _sizes(value: ValueInfoProto, shape: tuple[int, ...] | None, symbols: Mapping[str, int], file: str) -> list[int | str] | None:
    """Per dimension its size, or its symbol where that is still open; None where not even the rank is known."""
    declared = _declared(value, file)
    return list(shape) if shape is not None else declared and [symbols.get(size, size) if isinstance(size, str) else size for size in declared]


def _unbound(bound: Mapping[str, list[int | str] | None], file: str) -> ImportModelError:
    """What to give for all inputs with open dimensions, ready to be pasted."""
    told: list[str] = []
    examples: list[tuple[str, tuple[int, ...]]] = []
    for name, sizes in bound.items():
        if sizes is None:
            told.append(f"input {name!r} has no shape")
            examples.append((name, (1, 3, 224, 224)))
        elif not all(isinstance(size, int) for size in sizes):
            told.append(f"input {name!r} has the dynamic shape [{', '.join(str(size) or '?' for size in sizes)}]")
            examples.append((name, tuple(size if isinstance(size, int) else 1 for size in sizes)))
    options = " ".join(f"--shape {shlex.quote(name + '=' + ','.join(map(str, sizes)))}" for name, sizes in examples)
    return ImportModelError("; ".join(told), file=file, hint=f"bind it: {options} (in Python: shapes={dict(examples)})")


def element_type(value: ValueInfoProto) -> int:
    """The ONNX element type of a tensor value."""
    return value.type.tensor_type.elem_type


def type_name(dtype: int) -> str:
    """ "FLOAT" for TensorProto.FLOAT; the number itself if ONNX has no such type."""
    return str(TensorProto.DataType.Name(dtype)) if dtype in TensorProto.DataType.values() else str(dtype)


def numpy_name(dtype: int) -> str:
    """ "float32" for TensorProto.FLOAT, and so on. numpy has no bfloat16: such values are handed over as float32."""
    return "float32" if dtype == TensorProto.BFLOAT16 else str(helper.tensor_dtype_to_np_dtype(dtype))
