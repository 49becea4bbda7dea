"""Small ONNX models for the tests of import and passes, and the comparison of a graph with the model it came from, in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from npucc.export import to_onnx
from npucc.frontend import import_model
from npucc.graph import Graph
from npucc.passes import STAGES, Refusal

Shape = Sequence[int | str]
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """`node("Conv", "x w b", "y", pads=[1, 1, 1, 1])`; "-" is an input left out, and a name in `outputs` that starts with "/" names the node."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), **attributes)


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    constants: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
    dtypes: Mapping[str, str] | None = None,
) -> ModelProto:
    """A model whose outputs have no stated shape. Constants are float32 unless they are arrays of another type."""
    types = {name: TYPES[dtype] for name, dtype in (dtypes or {}).items()}
    values = [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), list(shape)) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in outputs]
    stored = [numpy_helper.from_array(as_array(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "test", values, results, stored)
    domains = sorted({node.domain for node in nodes} - {"", "my.company"})
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def as_array(value: Any) -> np.ndarray:
    """Arrays keep their type; lists of integers become int64, anything else float32."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    array = np.asarray(value)
    return array.astype(np.int64) if array.dtype.kind == "i" else array.astype(np.float32)


def reals(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def integers(values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(proto: ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs in onnxruntime, computed as written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    results: list[np.ndarray] = session.run(None, {name: value for name, value in feeds.items() if name in names})
    return results


def random_feeds(graph: Graph, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    feeds = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        values = random.normal(0, 2, tensor.shape)
        feeds[name] = (np.abs(values * 40) if tensor.dtype == "uint8" else values).astype(tensor.dtype)
    return feeds


def fused(graph: Graph) -> tuple[Graph, tuple[Refusal, ...]]:
    """The graph after all stages, and what they refused."""
    refusals: tuple[Refusal, ...] = ()
    for stage in STAGES:
        graph, refused = stage.run(graph)
        refusals += refused
    return graph, refusals


def assert_agrees(
    proto: ModelProto, *, shapes: Mapping[str, tuple[int, ...]] | None = None, tolerance: float = 1e-5, feeds: Mapping[str, np.ndarray] | None = None
) -> Graph:
    """The model, its import and its fused graph yield the same outputs. Returns the fused graph."""
    imported = import_model(proto, shapes=shapes)
    result, _ = fused(imported)
    feeds = feeds or random_feeds(imported)
    expected = run(proto, feeds)
    for graph in (imported, result):
        assert [value.name for value in proto.graph.output] == list(graph.outputs)
        for name, want, have in zip(graph.outputs, expected, run(to_onnx(graph), feeds), strict=True):
            assert have.shape == want.shape == graph.tensors[name].shape
            assert have.dtype == want.dtype
            scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0))) if want.dtype != bool else 1.0
            np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=0, atol=tolerance * scale, err_msg=name)
    return result


def ops_of(graph: Graph) -> list[str]:
    return [part.op for part in graph]


def save(proto: ModelProto, path: Any) -> str:
    onnx.save(proto, path)
    return str(path)
