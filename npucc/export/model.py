"""An ONNX model under construction.

The one big idea: an emitter only ever says which operation reads which values; names, initializers and versions are settled here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from npucc.graph import Graph, Tensor

Array = np.ndarray[Any, np.dtype[Any]]

LARGE = 1 << 16  # bytes of a constant that may be kept apart
OPSET = 17
OPSET_INT16 = 21  # the first whose QuantizeLinear writes int16
IR_VERSION, IR_VERSION_INT16 = 8, 10  # of models up to the opset before OPSET_INT16, and from there on
#: metadata of the node that ends a spelled out operator: what else could stand there, an ONNX graph in base64, read by npucc.frontend.plain
PLAIN_FORM = "npucc.plain_form"
REDUCE_AXES_INPUT = 18  # from this opset on ReduceMean, ReduceMax and ReduceMin take their axes as an input


class Model:
    """Values are tensor names. `taken` holds every name in use, of tensors and nodes alike.

    `apart`: where large constants go instead of into the model, by name; for whoever hands them to onnxruntime as they are in memory."""

    def __init__(self, opset: int, *, taken: Iterable[str] = (), apart: dict[str, Array] | None = None) -> None:
        self.apart = apart
        self.opset = opset
        self.taken = set(taken)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.domains: dict[str, int] = {"": opset}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # of the model that this one is beside

    def beside(self) -> Model:
        """A model for other nodes in the place of some of this one: it reads this one's values, and takes no name that this one has."""
        other = Model(self.opset)
        other.taken, other._known = self.taken, self._shared
        return other

    def op(self, kind: str, inputs: Sequence[str], *, into: str = "", **attributes: Any) -> str:
        """Append a node whose one result is named `into` (or freshly); returns that name. An input left out is the empty string."""
        arguments = list(inputs)
        while arguments and not arguments[-1]:
            arguments.pop()
        result = into or self.fresh(f"{arguments[0] if arguments else ''}/{kind}")
        self.nodes.append(helper.make_node(kind, arguments, [result], name=self.fresh(f"{result}:{kind}"), **attributes))
        return result

    def reduce(self, kind: str, value: str, axes: Sequence[int], *, into: str = "") -> str:
        """A Reduce… operator over axes, which are kept as 1."""
        if kind == "ReduceSum" or self.opset >= REDUCE_AXES_INPUT:
            return self.op(kind, [value, self.constant(list(axes), "int64")], into=into, keepdims=1)
        return self.op(kind, [value], into=into, axes=list(axes), keepdims=1)

    def cast(self, value: str, dtype: str, *, into: str = "") -> str:
        """The value as another element type (a numpy name)."""
        return self.op("Cast", [value], into=into, to=element_type(dtype))

    def constant(self, value: Any, dtype: str, *, name: str = "") -> str:
        """An initializer. Equal ones without a name of their own are shared."""
        if name and self.apart is not None and isinstance(value, np.ndarray) and value.nbytes >= LARGE:
            self.apart[name] = np.ascontiguousarray(value, dtype=dtype)
            self.constants.append(_elsewhere(name, self.apart[name]))
            return name
        array = np.array(value, dtype=dtype, order="C")
        key = (dtype, array.shape, array.tobytes())
        if key in self._known:
            return self._known[key]
        if not name and key in self._shared:
            return self._shared[key]
        chosen = name or self.fresh("constant")
        self.constants.append(numpy_helper.from_array(array, chosen))
        if not name:
            self._shared[key] = chosen
        return chosen

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        name, count = stem, 0
        while name in self.taken:
            count += 1
            name = f"{stem}.{count}"
        self.taken.add(name)
        return name

    def finish(self, graph: Graph) -> onnx.ModelProto:
        """The whole model, checked."""
        inputs = [_value_info(graph.tensors[name]) for name in graph.inputs]
        outputs = [_value_info(graph.tensors[name]) for name in graph.outputs]
        body = helper.make_graph(self.nodes, graph.name or "graph", inputs, outputs, self.constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid(*each) for each in self.domains.items()], producer_name="npucc")
        model.ir_version = IR_VERSION if self.opset < OPSET_INT16 else IR_VERSION_INT16
        if not self.apart:
            onnx.checker.check_model(model)
        return model


def _elsewhere(name: str, value: Array) -> onnx.TensorProto:
    """An initializer without data."""
    tensor = onnx.TensorProto(name=name, dims=value.shape, data_type=element_type(str(value.dtype)), data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="memory")
    return tensor


def element_type(dtype: str) -> int:
    """The ONNX number of a numpy element type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, element_type(tensor.dtype), tensor.shape)
