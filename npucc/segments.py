"""Host segments: parts of an ONNX model that onnxruntime runs next to the NPU.

The one big idea: a segment is a whole ONNX model, as bytes in the attributes of a `host` node. Its inputs and outputs are the node's,
in order, and everything else about it (element types, sessions) is derived from those bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from npucc.graph import Graph, Node, Quant, Tensor
from npucc.ops import OPS, Host
from npucc.outline import outline
from runtime.errors import RuntimeFault

Array = np.ndarray[Any, np.dtype[Any]]

MEMBER = "host/{}.onnx"  # of a package
THREADS = 2
#: numpy's element type → how a tensor that no integer instruction touches is stored: as it is
RAW = {
    "float32": "f32", "float16": "f16", "float64": "f64", "bool": "u8", "int8": "s8", "uint8": "u8", "int16": "s16", "uint16": "u16",
    "int32": "s32", "uint32": "u32", "int64": "s64", "uint64": "u64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostNode:
    """One ONNX node on the host: its operator, the segment it is in, and why it is there."""

    name: str
    operator: str
    segment: int
    reason: str


def host_nodes(graph: Graph) -> tuple[Node, ...]:
    """The segments of a graph, in order: the position is the segment's number."""
    return tuple(node for node in graph if OPS[node.op].host)


def attributes_of(node: Node) -> Host:
    """The segment of a host node."""
    assert isinstance(node.attributes, Host)
    return node.attributes


def with_models(graph: Graph, models: Sequence[bytes]) -> Graph:
    """The graph with these models in its segments, in order. Raises ValueError when their number differs."""
    given = {node.name: replace(attributes_of(node), model=model) for node, model in zip(host_nodes(graph), models, strict=True)}
    nodes = {name: replace(node, attributes=given[name]) if name in given else node for name, node in graph.nodes.items()}
    return replace(graph, nodes=nodes)


@lru_cache(maxsize=256)
def parse(model: bytes) -> onnx.ModelProto:
    """The ONNX model of a segment. Raises RuntimeFault when the bytes are none."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model)
    except (DecodeError, RecursionError):
        raise RuntimeFault("a host segment holds no ONNX model", hint="the package is damaged; compile the model again") from None
    return proto


@lru_cache(maxsize=256)
def outline_of(model: bytes) -> onnx.ModelProto:
    """The same without the data of large stored tensors. Raises RuntimeFault when the bytes are no ONNX model."""
    try:
        return outline(model)
    except (DecodeError, RecursionError):
        raise RuntimeFault("a host segment holds no ONNX model", hint="the package is damaged; compile the model again") from None


def types_of(values: Sequence[onnx.ValueInfoProto]) -> tuple[str, ...]:
    """numpy's names of the element types of a segment's inputs or outputs."""
    return tuple(str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)) for value in values)


def input_types(node: Node) -> tuple[str, ...]:
    """The element types that the segment wants."""
    return types_of(outline_of(attributes_of(node).model).graph.input)


def output_types(node: Node) -> tuple[str, ...]:
    """The element types that the segment returns."""
    return types_of(outline_of(attributes_of(node).model).graph.output)


def raw_quant(dtype: str) -> Quant | None:
    """Storing values of a numpy type as they are; None for a type that the machine can't hold."""
    return Quant(RAW[dtype], np.asarray(1.0, np.float32), 0) if dtype in RAW else None


def is_raw(quant: Quant) -> bool:
    """Whether stored values stand for themselves and float32 arithmetic on them might lose something."""
    return quant.dtype in ("f32", "f16", "f64", "u16", "u32", "s64", "u64") or (quant.dtype == "s32" and quant.key == _WHOLE)


_WHOLE = Quant("s32", np.asarray(1.0, np.float32), 0).key


def untouched(graph: Graph) -> frozenset[str]:
    """Tensors that only the host makes (or the caller gives) and only the host (or the caller) reads: they keep their type, unquantized."""
    if not host_nodes(graph):
        return frozenset()
    return frozenset(name for name, tensor in graph.tensors.items() if not tensor.is_constant and _is_untouched(graph, tensor))


def _is_untouched(graph: Graph, tensor: Tensor) -> bool:
    producer, users = graph.producer(tensor.name), graph.users(tensor.name)
    made_outside = OPS[producer.op].host if producer else bool(users)
    return made_outside and tensor.dtype in RAW and all(OPS[user.op].host for user in users)


@lru_cache(maxsize=64)
def session(model: bytes) -> onnxruntime.InferenceSession:
    """The segment in onnxruntime on the CPU. Raises RuntimeFault when onnxruntime refuses it."""
    return open_session(model)


def open_session(model: bytes, *, folder: str = "") -> onnxruntime.InferenceSession:
    """A session that nobody keeps. `folder`: where the model's external data is; it is mapped, and used once, so nothing is rearranged for speed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    if folder:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
        raise RuntimeFault(f"onnxruntime refuses a host segment: {first_line(error)}", hint="the model or package is damaged") from None


def run(model: bytes, inputs: Sequence[Array]) -> list[Array]:
    """The segment's outputs for its inputs, both in order. Raises RuntimeFault."""
    return run_in(session(model), inputs)


def run_in(engine: onnxruntime.InferenceSession, inputs: Sequence[Array]) -> list[Array]:
    """The outputs for inputs, both in order. Raises RuntimeFault."""
    names = [value.name for value in engine.get_inputs()]
    if len(names) != len(inputs):
        raise RuntimeFault(f"a host segment takes {len(names)} inputs, but is given {len(inputs)}", hint="compile the model again")
    try:
        results = engine.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
    except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
        raise RuntimeFault(f"onnxruntime fails in a host segment: {first_line(error)}", hint="run the ONNX model on the same inputs") from None
    for value, result in zip(engine.get_outputs(), results, strict=True):
        if not isinstance(result, np.ndarray):
            raise RuntimeFault(f"output {value.name!r} of a host segment is a {type(result).__name__}", hint="only tensors leave a segment")
    return list(results)


@dataclass(frozen=True)
class Engine:
    """What `runtime.Machine` takes as its host: the segments by number."""

    models: tuple[bytes, ...]

    def __call__(self, segment: int, inputs: Sequence[Array]) -> list[Array]:
        """Run one. Raises RuntimeFault for a number that the package does not hold."""
        if segment >= len(self.models):
            raise RuntimeFault(
                f"the program runs host segment {segment}, but the package has {len(self.models)}", hint="it is damaged; compile the model again"
            )
        return run(self.models[segment], inputs)


def first_line(error: Exception) -> str:
    """What an exception of onnxruntime says, without its trace."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.rpartition("[ONNXRuntimeError] : ")[2]
