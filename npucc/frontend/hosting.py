"""ONNX nodes that go to the host, and how they are gathered into segments.

The one big idea: nodes are placed one by one while the model is walked, each with onnxruntime's word for its result types; afterwards
those that no NPU node separates become one segment. Levels along the graph (host, NPU, host …) give as few segments as there can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from npucc.errors import ImportModelError
from npucc.frontend.constants import SMALL, Constants
from npucc.frontend.prepare import FLOATS, numpy_name, reads
from npucc.graph import Editor, Graph, Node, Tensor
from npucc.ops import Host
from npucc.segments import RAW, first_line

BETWEEN = "it lies between host nodes that exchange a tensor without a fixed shape"
OPEN = "object"  # element type of a tensor that exists within a segment only
#: results that are no tensors, or hold none: never folded into constants
NO_TENSORS = re.compile(r"(?<!Reverse)Sequence|Optional|String|Regex|LabelEncoder|Tokenizer")
IR_VERSION = 8  # of a segment, at least
_TYPE = re.compile(r"(tensor|seq|optional)\((.*)\)$")
_ELEMENTS = {
    "float": TensorProto.FLOAT, "double": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "bool": TensorProto.BOOL, "string": TensorProto.STRING,
    **{f"{sign}int{bits}": getattr(TensorProto, f"{sign}int{bits}".upper()) for sign in ("", "u") for bits in (4, 8, 16, 32, 64)},
}  # fmt: skip


class MustBeHosted(Exception):  # noqa: N818  not an error: the import starts again
    """Nodes that were placed on the NPU, but must not be: by name, with the reason."""

    def __init__(self, nodes: Mapping[str, str]):
        self.nodes = dict(nodes)
        super().__init__(str(self.nodes))


@dataclass(slots=True)
class Hosting:
    """The nodes placed on the host so far. `open`: tensors without a fixed shape, or that are none, which can't leave a segment.

    `declared`: types that the model states. They are believed where onnxruntime can't infer a shape; the machine checks it in each run.
    """

    opsets: Sequence[onnx.OperatorSetIdProto]
    constants: Constants
    file: str
    ir_version: int = IR_VERSION
    declared: Mapping[str, TypeProto] = field(default_factory=dict)
    nodes: dict[str, NodeProto] = field(default_factory=dict)  # graph node → ONNX node
    open: dict[str, TypeProto] = field(default_factory=dict)

    def place(self, proto: NodeProto, reason: str, editor: Editor, tensors: Mapping[str, str], types: Mapping[str, int]) -> dict[str, TypeProto]:
        """Put a node into the graph as a host node; its results' types. Raises ImportModelError when onnxruntime can't run it either."""
        inputs = list(dict.fromkeys(name for name in reads(proto) if name not in self.constants))
        known = {name: self.open[name] if name in self.open else _tensor_type(types[name], editor.tensors[tensors[name]].shape) for name in inputs}
        results = self._result_types(proto, known, reason)
        for name, kind in results.items():
            shape = _static(kind)
            if shape is None and name in self.declared and _may_be(kind, self.declared[name]):
                shape = _static(self.declared[name])
            if shape is None:
                self.open[name] = kind
            editor.add_tensor(Tensor(name, shape or (), numpy_name(kind.tensor_type.elem_type) if shape is not None else OPEN, source=name))
        name = proto.name if proto.name not in editor.nodes else editor.fresh(proto.name)
        attributes = Host(b"", ((proto.name, title(proto), reason),))
        sources = tuple(name if name in self.open else tensors[name] for name in inputs)
        editor.add_node(Node(name, "host", sources, tuple(results), attributes, (proto.name,)))
        self.nodes[name] = proto
        return results

    def _result_types(self, proto: NodeProto, inputs: Mapping[str, TypeProto], reason: str) -> dict[str, TypeProto]:
        """What onnxruntime infers from the node alone."""
        outputs = [name for name in proto.output if name]
        model = self.model([proto], inputs, [ValueInfoProto(name=name) for name in outputs], probe=True)
        try:
            session = _quiet_session(model)
        except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
            raise ImportModelError(
                f"operator {title(proto)} has no place on the NPU ({reason}), and onnxruntime does not run it either: {first_line(error)}",
                file=self.file, node=proto.name, hint="replace the node by standard operators, or cut the model before it",
            ) from None  # fmt: skip
        ranked = _ranked_outputs(model)  # onnxruntime gives the shape [] to a scalar and to a tensor of unknown rank
        return {value.name: _parse_type(value.type, value.shape if value.shape or value.name in ranked else None) for value in session.get_outputs()}

    def runs(
        self, nodes: Sequence[NodeProto], results: Sequence[str], editor: Editor, tensors: Mapping[str, str], types: Mapping[str, int]
    ) -> bool:
        """Whether onnxruntime runs these nodes, on zeros of the shapes that they read."""
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in reads(node) if name not in made and name not in self.constants)
        if any(name in self.open for name in read):
            return True
        sizes = {name: editor.tensors[tensors[name]].shape for name in read}
        known = {name: _tensor_type(types[name], sizes[name]) for name in read}
        model = self.model(nodes, known, [ValueInfoProto(name=name) for name in results if name in made])
        feeds = {name: np.zeros(sizes[name], helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)) for name, kind in known.items()}
        try:
            _quiet_session(model).run(None, feeds)
        except Exception:  # noqa: BLE001  onnxruntime raises many kinds
            return False
        return True

    def model(
        self, nodes: Sequence[NodeProto], inputs: Mapping[str, TypeProto], outputs: Iterable[ValueInfoProto], *, probe: bool = False
    ) -> onnx.ModelProto:
        """A model of some nodes with the constants they need; to `probe` types, large constants are left out as inputs."""
        graph = onnx.GraphProto(name="segment", node=nodes, output=outputs)
        graph.input.extend(ValueInfoProto(name=name, type=kind) for name, kind in inputs.items())
        made = {name for node in nodes for name in node.output}
        for name in dict.fromkeys(name for node in nodes for name in reads(node)):
            if name in made or name in inputs or name not in self.constants:
                continue
            value = self.constants.value(name)
            if probe and value.size > SMALL:
                graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape))
            else:
                graph.initializer.append(numpy_helper.from_array(value, name))
        return onnx.ModelProto(ir_version=max(self.ir_version, IR_VERSION), graph=graph, opset_import=self.opsets)

    # ---- segments

    def gather(self, graph: Graph, tensors: Mapping[str, str], types: Mapping[str, int]) -> Graph:
        """The graph with its host nodes gathered into segments. Raises MustBeHosted, and ImportModelError for an open output."""
        for name in graph.outputs:
            if name in self.open:
                raise ImportModelError(
                    f"output {name!r} has no fixed shape, or is no tensor", file=self.file,
                    hint="remove it from the model's outputs, or compile with quant none and a sample",
                )  # fmt: skip
        groups = self._groups(graph)
        editor = Editor(graph)
        of_graph: dict[str, list[str]] = {}
        for onnx_name, name in tensors.items():
            of_graph.setdefault(name, []).append(onnx_name)
        for members in groups:
            self._merge(graph, editor, members, of_graph, types)
        return editor.freeze()

    def _groups(self, graph: Graph) -> list[list[str]]:
        """Host nodes of one level make a segment; nodes that exchange an open tensor have the same level."""
        bundles = nx.utils.UnionFind(graph.nodes)
        for node in graph:
            for name in node.inputs:
                if name in self.open and node.name in self.nodes:
                    bundles.union(node.name, graph.producers[name])
        quotient = self._quotient(graph, bundles)
        levels: dict[str, int] = {}
        for name in nx.topological_sort(quotient):
            own = name in self.nodes
            before = [levels[other] + ((other in self.nodes) != own) for other in quotient.predecessors(name)]
            levels[name] = max(before, default=0 if own else -1)  # the host's are even, the NPU's odd
        groups: dict[int, list[str]] = {}
        for node in graph:
            if node.name in self.nodes:
                groups.setdefault(levels[bundles[node.name]], []).append(node.name)
        return [groups[level] for level in sorted(groups)]

    def _quotient(self, graph: Graph, bundles: nx.utils.UnionFind) -> nx.DiGraph:
        """The graph of the bundles, without cycles: host bundles on a cycle are joined. NPU nodes on one must go to the host, too."""
        while True:
            quotient = nx.DiGraph()
            quotient.add_nodes_from(bundles[name] for name in graph.nodes)
            quotient.add_edges_from((bundles[a], bundles[b]) for a, b in graph.topology.edges if bundles[a] != bundles[b])
            cycles = [component for component in nx.strongly_connected_components(quotient) if len(component) > 1]
            between = [graph.nodes[name] for component in cycles for name in component if name not in self.nodes]
            if between:
                raise MustBeHosted({source: BETWEEN for node in between for source in node.sources})
            if not cycles:
                return quotient
            for component in cycles:
                bundles.union(*component)

    def _merge(self, graph: Graph, editor: Editor, members: list[str], of_graph: Mapping[str, list[str]], types: Mapping[str, int]) -> None:
        """Put one host node in the place of the members."""
        inside = set(members)
        made = {name: graph.producers[name] for member in members for name in graph.nodes[member].outputs}
        nodes = [self.nodes[name] for name in members]
        here = {name for node in nodes for name in node.output}
        outer = {name: owner for owner, names in of_graph.items() for name in names}
        read = [name for name in dict.fromkeys(name for node in nodes for name in reads(node)) if name not in here and name not in self.constants]
        inputs = {name: _tensor_type(types[name], graph.tensors[outer[name]].shape) for name in read}
        left = [name for name in made if name in graph.outputs or any(user.name not in inside for user in graph.users(name))]
        results = [next(name for name in of_graph[left_name] if name in here) for left_name in left]
        infos = [_value_info(name, types[name], graph.tensors[tensor].shape) for name, tensor in zip(results, left, strict=True)]
        model = self.model(nodes, inputs, infos)
        attributes = Host(model.SerializeToString(deterministic=True), tuple(entry for name in members for entry in _entries(graph.nodes[name])))
        sources = tuple(source for name in members for source in graph.nodes[name].sources)
        first = members[-1]
        for name in members[:-1]:
            editor.remove_node(name)
        editor.add_node(Node(first, "host", tuple(outer[name] for name in read), tuple(left), attributes, sources))
        for name in made:
            if name not in left:
                editor.tensors.pop(name, None)


def _ranked_outputs(model: onnx.ModelProto) -> set[str]:
    """The outputs of which onnx can infer a shape."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # noqa: BLE001  onnx raises several kinds, none of them documented
        return set()
    return {value.name for value in inferred.graph.output if value.type.tensor_type.HasField("shape")}


def title(proto: NodeProto) -> str:
    """`TopK`, or `com.microsoft.Foo`."""
    return f"{proto.domain}.{proto.op_type}" if proto.domain not in ("", "ai.onnx") else proto.op_type


def _entries(node: Node) -> tuple[tuple[str, str, str], ...]:
    assert isinstance(node.attributes, Host)
    return tuple(node.attributes.nodes)


def _quiet_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _tensor_type(dtype: int, shape: Sequence[int]) -> TypeProto:
    """Everything is computed in float32, so that is what floats are within a segment."""
    return helper.make_tensor_type_proto(TensorProto.FLOAT if dtype in FLOATS else dtype, shape)


def _value_info(name: str, dtype: int, shape: Sequence[int]) -> ValueInfoProto:
    return ValueInfoProto(name=name, type=_tensor_type(dtype, shape))


def _parse_type(text: str, shape: Sequence[int | str | None] | None) -> TypeProto:
    """onnxruntime's `seq(tensor(float))` as a TypeProto; what it can't be becomes a string tensor without shape, which stays open."""
    match = _TYPE.match(text)
    if match and match[1] == "seq":
        return helper.make_sequence_type_proto(_parse_type(match[2], None))
    if match and match[1] == "optional":
        return helper.make_optional_type_proto(_parse_type(match[2], None))
    element = _ELEMENTS.get(match[2] if match else "", TensorProto.STRING)
    sizes = None if shape is None else [size if isinstance(size, int) and size >= 0 else None for size in shape]
    return helper.make_tensor_type_proto(element, sizes)


def _may_be(kind: TypeProto, stated: TypeProto) -> bool:
    """Whether a tensor of a type that is known in part can have the stated one."""
    known, other = kind.tensor_type, stated.tensor_type
    if not kind.HasField("tensor_type") or known.elem_type != other.elem_type:
        return False
    sizes = [[dim.dim_value for dim in each.shape.dim] for each in (known, other)]
    return not known.HasField("shape") or (len(sizes[0]) == len(sizes[1]) and all(a in (0, b) for a, b in zip(*sizes, strict=True)))


def _static(kind: TypeProto) -> tuple[int, ...] | None:
    """The shape of a tensor that the machine can hold; None for any other type."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.tensor_type.shape.dim]
    known = kind.tensor_type.elem_type in {helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in RAW}
    return tuple(sizes) if known and all(sizes) else None
