"""The graph: what every stage takes and returns.

The one big idea: a Graph is a value. Nodes and tensors are frozen records; networkx holds the topology (who feeds whom)
and answers every question about it. A stage makes an `Editor` from a graph, changes it, and freezes a new, verified graph.

Shapes are ONNX shapes (N, C, H, W …); where and in which order the bytes lie is the backend's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import networkx as nx
import numpy as np

from npucc.errors import GraphError
from npucc.ops import MANY, OPS, Attributes, Quantize


@dataclass(frozen=True, slots=True)
class Quant:
    """How integers stand for reals: real = scale · (stored − zero).

    `scale` is float32; a per-channel weight has one scale per entry of dimension `axis` (and zero 0).
    """

    dtype: str  # s8, s16, s32, u8 (bool)
    scale: np.ndarray  # float32, shape () or (channels,)
    zero: int = 0
    axis: int | None = None

    @property
    def key(self) -> tuple[str, bytes, int, int | None]:
        """Equal keys: equal meaning of the stored integers."""
        return (self.dtype, self.scale.tobytes(), self.zero, self.axis)


def as_quant(steps: Quantize) -> Quant:
    """The quantization of a tensor on these steps."""
    return Quant(steps.dtype, np.asarray(steps.scale, np.float32), steps.zero)


@dataclass(frozen=True, slots=True)
class Given:
    """The quantization that an already quantized model brings along, and the integers of a constant: real = scale · (stored − zero).

    `scale` broadcasts against the constant; `dtype` is s8, s16 or s32, to which unsigned integers and their zero points are shifted.
    """

    dtype: str
    scale: np.ndarray  # float32, shape () or the constant's rank
    zero: int = 0
    stored: np.ndarray | None = None

    @property
    def quant(self) -> Quant | None:
        """The same for a whole tensor; None where one scale does not do."""
        return Quant(self.dtype, self.scale.reshape(()), self.zero) if self.scale.size == 1 else None

    def transposed(self, permutation: Sequence[int]) -> Given:
        """Of the transposed constant."""
        assert self.stored is not None
        scale = self.scale.transpose(permutation) if self.scale.ndim else self.scale
        return replace(self, scale=scale, stored=self.stored.transpose(permutation))

    def reshaped(self, shape: Sequence[int]) -> Given | None:
        """Of the constant in another shape; None where its scales do not lie along one dimension of that."""
        assert self.stored is not None
        if self.scale.size == 1:
            return replace(self, scale=self.scale.reshape(()), stored=self.stored.reshape(shape))
        if [size for size in shape if size != 1] != [size for size in self.stored.shape if size != 1]:
            return None
        kept = iter([size for size, whole in zip(self.scale.shape, self.stored.shape, strict=True) if whole != 1])
        return replace(self, scale=self.scale.reshape([next(kept) if size != 1 else 1 for size in shape]), stored=self.stored.reshape(shape))

    def scaled(self, factor: np.ndarray) -> Given | None:
        """Of the constant times positive factors, which broadcast against it; None for others."""
        return replace(self, scale=(self.scale * factor).astype(np.float32)) if np.all(factor > 0) else None


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of each channel (dimension 1), as the model has them from its training; float64."""

    mean: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named value between nodes. `data` makes it a constant: float before quantization, integers after.

    `dtype` is the numpy name of the float model's element type. `source` is the name of the ONNX tensor it equals.
    `wide` asks the quantizer for 16 bits (recurrent state, say); an integer graph has it in `quant`. `given` fixes what the quantizer
    would choose: the model has chosen already. `moments`: what a normalization that reads it knows of its values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    data: np.ndarray | None = None
    quant: Quant | None = None
    source: str = ""
    wide: bool = False
    given: Given | None = None
    moments: Moments | None = None

    @property
    def is_constant(self) -> bool:
        return self.data is not None


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `op` names a record of `npucc.ops.OPS`; `sources` are the ONNX nodes that it does the work of."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in a fixed topological order, tensors by name, and the networkx DiGraph over node names (edge data: tensors)."""

    name: str
    nodes: Mapping[str, Node]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    topology: nx.DiGraph = field(compare=False, repr=False)
    producers: Mapping[str, str] = field(compare=False, repr=False)
    consumers: Mapping[str, tuple[str, ...]] = field(compare=False, repr=False)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def producer(self, tensor: str) -> Node | None:
        """The node that computes the tensor; None for inputs and constants."""
        name = self.producers.get(tensor)
        return self.nodes[name] if name is not None else None

    def users(self, tensor: str) -> tuple[Node, ...]:
        """The nodes that read the tensor, in order."""
        return tuple(self.nodes[name] for name in self.consumers.get(tensor, ()))

    def quant(self, tensor: str) -> Quant:
        quant = self.tensors[tensor].quant
        assert quant is not None, f"{tensor} is not quantized"
        return quant

    def text(self) -> str:
        """One line per node: `out: s8[1,64,7,7]*0.05-3 = conv(x, w, b) strides=2,2  ; Conv_3`."""
        lines = [f"graph {self.name!r}"]
        lines += [f"  input  {self._tensor_text(name)}" for name in self.inputs]
        for node in self:
            results = ", ".join(self._tensor_text(name) for name in node.outputs)
            arguments = ", ".join(self._argument_text(name) for name in node.inputs)
            lines.append(f"  {results} = {node.op}({arguments}){node.attributes.text()}  ; {' '.join(node.sources)}")
        lines += [f"  output {self._tensor_text(name)}" for name in self.outputs]
        return "\n".join(lines) + "\n"

    def _tensor_text(self, name: str) -> str:
        tensor = self.tensors[name]
        shape = ",".join(map(str, tensor.shape))
        if tensor.quant is None:
            given = f" given as {tensor.given.dtype}*{tensor.given.scale}{-tensor.given.zero:+d}" if tensor.given else ""
            return f"{name}: {tensor.dtype}[{shape}]{given}"
        scale = "per-channel" if tensor.quant.axis is not None else str(tensor.quant.scale)
        return f"{name}: {tensor.quant.dtype}[{shape}]*{scale}{-tensor.quant.zero:+d}"

    def _argument_text(self, name: str) -> str:
        if not name:
            return "-"
        tensor = self.tensors[name]
        if tensor.data is not None and tensor.data.size == 1 and tensor.quant is None:
            return f"{tensor.data.reshape(-1)[0]}"
        return name


class Editor:
    """A graph under change. Make it from a Graph, call its methods, then `freeze()`.

    It keeps an index of who makes and who reads each tensor, so that every change costs only what it touches.
    """

    def __init__(self, graph: Graph | None = None, *, name: str = "") -> None:
        self.name = graph.name if graph else name
        self.tensors: dict[str, Tensor] = dict(graph.tensors) if graph else {}
        self.inputs: list[str] = list(graph.inputs) if graph else []
        self.outputs: list[str] = list(graph.outputs) if graph else []
        self._nodes: dict[str, Node] = {}
        self._places: dict[str, int] = {}
        self._producers: dict[str, str] = {}
        self._readers: dict[str, dict[str, None]] = {}
        self._next_place = 0
        self._fresh = 0
        for node in graph or ():
            self.add_node(node)

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by name, to read; change them with `add_node` and `remove_node`."""
        return MappingProxyType(self._nodes)

    def producer(self, tensor: str) -> Node | None:
        """The node that computes the tensor; None for inputs and constants."""
        name = self._producers.get(tensor)
        return self._nodes[name] if name is not None else None

    def readers(self, tensor: str) -> tuple[Node, ...]:
        """The nodes that read the tensor."""
        return tuple(self._nodes[name] for name in self._readers.get(tensor, ()))

    def is_read_once(self, tensor: str) -> bool:
        """Whether one node alone reads the tensor, and it is no graph output."""
        return len(self._readers.get(tensor, ())) == 1 and tensor not in self.outputs

    def fresh(self, stem: str) -> str:
        """A name used by no tensor and no node yet."""
        name = stem
        while name in self.tensors or name in self._nodes:
            self._fresh += 1
            name = f"{stem}.{self._fresh}"
        return name

    def add_tensor(self, tensor: Tensor) -> str:
        self.tensors[tensor.name] = tensor
        return tensor.name

    def constant(self, stem: str, data: np.ndarray, given: Given | None = None) -> str:
        name = self.fresh(stem)
        return self.add_tensor(Tensor(name, tuple(data.shape), str(data.dtype), data, given=given))

    def add_node(self, node: Node, *, at: str = "") -> None:
        """Add the node, or put it in the place of the one with its name. `at`: the node whose place in the order a new one shares."""
        place = self._places.get(node.name, self._places.get(at))
        if node.name in self._nodes:
            self.remove_node(node.name)
        if place is None:
            place = self._next_place
            self._next_place += 1
        self._nodes[node.name] = node
        self._places[node.name] = place
        for tensor in node.inputs:
            self._readers.setdefault(tensor, {})[node.name] = None
        for tensor in node.outputs:
            self._producers[tensor] = node.name

    def remove_node(self, name: str) -> None:
        node = self._nodes.pop(name)
        for tensor in dict.fromkeys(node.inputs):
            del self._readers[tensor][name]
        for tensor in node.outputs:
            if self._producers.get(tensor) == name:
                del self._producers[tensor]

    def replace_input(self, old: str, new: str) -> None:
        """Every reader of tensor `old` reads `new` instead (graph outputs keep their name)."""
        for node in self.readers(old):
            self.add_node(replace(node, inputs=tuple(new if name == old else name for name in node.inputs)))

    def freeze(self) -> Graph:
        """Drop what nothing reads, order the nodes, verify. Raises GraphError."""
        ordered = sorted(self._nodes.values(), key=lambda node: self._places[node.name])
        return make_graph(self.name, ordered, self.tensors, self.inputs, self.outputs)


def make_graph(name: str, nodes: Iterable[Node], tensors: Mapping[str, Tensor], inputs: Iterable[str], outputs: Iterable[str]) -> Graph:
    """A verified Graph with its nodes in topological order and dead nodes and tensors gone. Raises GraphError."""
    by_name = {node.name: node for node in nodes}
    producers = {output: node.name for node in by_name.values() for output in node.outputs}
    topology: nx.DiGraph = nx.DiGraph()
    topology.add_nodes_from(by_name)
    for node in by_name.values():
        for tensor in node.inputs:
            if tensor in producers:
                topology.add_edge(producers[tensor], node.name)
    outputs = tuple(outputs)
    _drop_dead(topology, producers, outputs)
    try:
        rank = {key: index for index, key in enumerate(by_name)}
        order = list(nx.lexicographical_topological_sort(topology, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = " → ".join(edge[0] for edge in nx.find_cycle(topology))
        raise GraphError(f"the graph has a cycle: {cycle}", hint="an ONNX graph must be acyclic; re-export the model") from None
    ordered = {key: by_name[key] for key in order}
    consumers: dict[str, list[str]] = {}
    for node in ordered.values():
        for tensor in dict.fromkeys(node.inputs):
            if tensor:
                consumers.setdefault(tensor, []).append(node.name)
    used = {*inputs, *outputs, *consumers, *(out for node in ordered.values() for out in node.outputs)}
    graph = Graph(
        name, ordered, {key: value for key, value in tensors.items() if key in used}, tuple(inputs), outputs, topology,
        {out: node.name for node in ordered.values() for out in node.outputs}, {key: tuple(value) for key, value in consumers.items()},
    )  # fmt: skip
    verify(graph)
    return graph


def _drop_dead(topology: nx.DiGraph, producers: Mapping[str, str], outputs: tuple[str, ...]) -> None:
    """Remove the nodes that no output depends on."""
    alive: set[str] = set()
    waiting = [producers[output] for output in outputs if output in producers]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting.extend(topology.predecessors(node))
    topology.remove_nodes_from([key for key in topology if key not in alive])


def verify(graph: Graph) -> None:
    """Every tensor known and made once, every operator known with its arity and attributes. Raises GraphError."""
    made: set[str] = {*graph.inputs, *(name for name, tensor in graph.tensors.items() if tensor.is_constant)}
    for node in graph:
        record = OPS.get(node.op)
        if record is None:
            raise GraphError(f"node {node.name!r} has unknown operator {node.op!r}")
        if not isinstance(node.attributes, record.attributes):
            raise GraphError(f"node {node.name!r} ({node.op}) has {type(node.attributes).__name__}, expected {record.attributes.__name__}")
        low, high = record.arity
        if not low <= len(node.inputs) <= high:
            raise GraphError(f"node {node.name!r} ({node.op}) has {len(node.inputs)} inputs, expected {low} to {high}")
        for index, name in enumerate(node.inputs):
            if not name and (index < low or high == MANY):
                raise GraphError(f"node {node.name!r} ({node.op}) lacks its input {index}")
            if name and name not in made:
                raise GraphError(f"node {node.name!r} ({node.op}) reads {name!r}, which nothing before it makes")
        for name in node.outputs:
            if name in made:
                raise GraphError(f"node {node.name!r} ({node.op}) writes {name!r}, which is made already")
            if name not in graph.tensors:
                raise GraphError(f"node {node.name!r} ({node.op}) writes {name!r}, which has no shape")
            made.add(name)
    for name in graph.outputs:
        if name not in made:
            raise GraphError(f"graph output {name!r} is made by no node")
    _verify_shapes(graph)


def _verify_shapes(graph: Graph) -> None:
    """Compare each output's recorded shape with what the operator's record derives from its inputs."""
    for node in graph:
        shapes: list[Any] = [graph.tensors[name].shape if name else None for name in node.inputs]
        derived = OPS[node.op].shape(node.attributes, shapes)
        if derived is not None and tuple(derived) != graph.tensors[node.outputs[0]].shape:
            recorded = graph.tensors[node.outputs[0]].shape
            raise GraphError(f"node {node.name!r} ({node.op}) yields {tuple(derived)}, but {node.outputs[0]!r} is recorded as {recorded}")
