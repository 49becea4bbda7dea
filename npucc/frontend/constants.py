"""Constants of a model: stored ones, and those that nodes compute from constants alone.

The one big idea: a node with constant inputs is only noted down. When some importer asks for a value, all that is waiting runs in one
onnxruntime session. Result sizes are inferred before anything runs, so a few bytes of model can't ask for gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper, numpy_helper

from npucc.errors import ImportModelError
from npucc.frontend.load import external_array
from npucc.frontend.prepare import FLOATS
from npucc.graph import Given

LARGEST_CONSTANT = 1 << 27  # elements
SMALL = 1024  # elements; up to here a value is given to shape inference, which may need to see it
NOT_CONSTANT = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "If",
        "Loop",
        "Scan",
        "SequenceMap",
        "Optional",
    }
)
BOUNDED = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "TopK"})  # sizes depend on values, but are limited by the inputs' sizes


class Constants:
    """Known and computable constants by ONNX tensor name."""

    def __init__(self, model: ModelProto, file: str) -> None:
        self._file = file
        self._opsets = list(model.opset_import)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        self._values: dict[str, np.ndarray] = {}
        self._waiting: dict[str, NodeProto] = {}
        self.given: dict[str, Given] = {}  # of those that the model has quantized

    def __contains__(self, name: str) -> bool:
        return name in self._values or name in self._waiting or name in self._stored or name in self._sparse

    def store(self, tensors: Iterable[TensorProto]) -> None:
        """Further stored constants (a subgraph's initializers)."""
        self._stored.update({tensor.name: tensor for tensor in tensors})

    def set(self, name: str, value: np.ndarray, given: Given | None = None) -> None:
        self._values[name] = value
        if given is not None:
            self.given[name] = given

    def forget(self, names: Iterable[str]) -> None:
        """Take back what was set or deferred."""
        for name in names:
            self._values.pop(name, None)
            self._waiting.pop(name, None)
            self.given.pop(name, None)

    def defer(self, node: NodeProto) -> None:
        """Note a node whose inputs are all constant. A `Constant` node is read at once."""
        if node.op_type == "Constant":
            self._values[node.output[0]] = self._constant_node(node)
            return
        for name in filter(None, node.output):
            self._waiting[name] = node

    def value(self, name: str) -> np.ndarray:
        """The value, computed now if it is waiting. Float types come as float32. Raises ImportModelError."""
        if name in self._waiting:
            self._run_waiting()
        if name not in self._values:
            self._values[name] = self._read(name)
        return self._values[name]

    def _read(self, name: str) -> np.ndarray:
        if name in self._sparse:
            return self._dense(self._sparse[name])
        return self._array(self._stored[name])

    def _array(self, tensor: TensorProto) -> np.ndarray:
        try:
            value = external_array(tensor) if tensor.data_location == TensorProto.EXTERNAL else numpy_helper.to_array(tensor)
            return value.astype(np.float32, copy=False) if tensor.data_type in FLOATS else value
        except (ValueError, TypeError, KeyError) as error:
            raise ImportModelError(
                f"the data of tensor {tensor.name!r} do not fit its shape {tuple(tensor.dims)}: {error}",
                file=self._file,
                hint="the model is damaged; export it again",
            ) from None

    def _dense(self, sparse: SparseTensorProto) -> np.ndarray:
        shape = tuple(sparse.dims)
        self._limit(sparse.values.name, shape)
        values, indices = self._array(sparse.values), self._array(sparse.indices)
        dense = np.zeros(math.prod(shape), values.dtype)
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
        if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < dense.size:
            raise ImportModelError(
                f"sparse tensor {sparse.values.name!r} has an index outside its shape {shape}",
                file=self._file,
                hint="the model is damaged; export it again",
            )
        dense[flat] = values
        return dense.reshape(shape)

    def _limit(self, name: str, shape: Sequence[int], node: str = "") -> None:
        if math.prod(shape) > LARGEST_CONSTANT:
            raise ImportModelError(
                f"constant {name!r} would have shape {tuple(shape)}, more than {LARGEST_CONSTANT} elements",
                file=self._file,
                node=node,
                hint="check the shapes that the model computes",
            )

    def _constant_node(self, node: NodeProto) -> np.ndarray:
        (attribute,) = node.attribute
        if attribute.name == "value":
            return self._array(attribute.t)
        if attribute.name == "sparse_value":
            return self._dense(attribute.sparse_tensor)
        value = helper.get_attribute_value(attribute)
        return np.array(
            value, np.float32 if attribute.name.startswith("value_float") else np.int64 if attribute.name.startswith("value_int") else object
        )

    # ---- running what waits

    def _run_waiting(self) -> None:
        nodes = list({id(node): node for node in self._waiting.values()}.values())
        waiting = dict(self._waiting)
        self._waiting.clear()
        try:
            while nodes:
                count = self._inferable(nodes)
                self._run(nodes[:count])
                nodes = nodes[count:]
        except ImportModelError:
            self._waiting |= {name: node for name, node in waiting.items() if name not in self._values}
            raise

    def _inferable(self, nodes: list[NodeProto]) -> int:
        """How many of the nodes, from the first on, have results whose sizes are known without running them (at least 1)."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self._model(nodes, describe=True), data_prop=True)
        except Exception as error:  # noqa: BLE001  onnx raises several kinds, none of them documented
            raise ImportModelError(
                f"constant folding failed: {_first_line(error)}", file=self._file, node=nodes[0].name, hint="the model is damaged; export it again"
            ) from None
        shapes = {value.name: _static_shape(value) for value in (*inferred.graph.value_info, *inferred.graph.output)}
        for count, node in enumerate(nodes):
            for name in filter(None, node.output):
                shape = shapes.get(name)
                if shape is not None:
                    self._limit(name, shape, node.name)
                elif count:
                    return count
                elif node.op_type not in BOUNDED:
                    raise ImportModelError(
                        f"the result size of constant node {node.op_type} can't be inferred",
                        file=self._file,
                        node=node.name,
                        hint="replace it by its value in the model",
                    )
        return len(nodes)

    def _model(self, nodes: list[NodeProto], *, describe: bool = False) -> ModelProto:
        """A model of these nodes alone. Small inputs are initializers; large ones graph inputs, whose values are given when it runs."""
        graph = GraphProto(name="constants", node=nodes)
        made = {name for node in nodes for name in node.output if name}
        for name in self._needed(nodes):
            value = self.value(name)
            if value.size <= SMALL:
                graph.initializer.append(numpy_helper.from_array(value, name))
            else:
                graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape))
        if not describe:
            graph.output.extend(ValueInfoProto(name=name) for name in sorted(made))
        return ModelProto(ir_version=8, graph=graph, opset_import=self._opsets)

    def _needed(self, nodes: list[NodeProto]) -> list[str]:
        made = {name for node in nodes for name in node.output}
        return list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))

    def _run(self, nodes: list[NodeProto]) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        feeds = {name: self.value(name) for name in self._needed(nodes)}
        try:
            session = onnxruntime.InferenceSession(self._model(nodes).SerializeToString(), options, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            results = session.run(names, {name: value for name, value in feeds.items() if value.size > SMALL})
        except Exception as error:  # noqa: BLE001  onnxruntime raises many kinds
            raise ImportModelError(
                f"constant folding failed: {_first_line(error)}", file=self._file, node=nodes[0].name, hint="the model is damaged; export it again"
            ) from None
        for name, value in zip(names, results, strict=True):
            if not isinstance(value, np.ndarray):
                raise ImportModelError(
                    f"constant {name!r} is not a tensor", file=self._file, node=nodes[0].name, hint="sequences and maps are not supported"
                )
            self._values[name] = value


def _static_shape(value: ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
