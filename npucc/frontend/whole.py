"""The whole model as one host segment: float mode, for whatever onnxruntime runs.

The one big idea: nothing is imported or changed. Only the model's inputs and outputs are looked at: they need a shape and a type that the
machine can hold. Sizes that onnxruntime leaves open are those of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from npucc.errors import ImportModelError, NotHeldError
from npucc.feeds import Port, synthetic_feeds
from npucc.frontend.hosting import title
from npucc.frontend.load import load_model, whole_bytes
from npucc.frontend.prepare import bind_inputs, numpy_name, type_name
from npucc.graph import Editor, Graph, Node, Tensor
from npucc.ops import Host
from npucc.segments import RAW, open_session, raw_quant, run, run_in
from runtime.errors import RuntimeFault

BACKEND = "there can be no package; npucc.backend runs such a model on the host directly"
REASON = "float mode (quant none) runs the whole model on the host"
Array = np.ndarray[Any, np.dtype[Any]]


def import_whole(
    model: str | Path | ModelProto, *, shapes: Mapping[str, tuple[int, ...]] | None = None, sample: Mapping[str, Any] | None = None
) -> Graph:
    """A graph of one host node, its tensors stored as they are. `sample`: a feed that settles the sizes of outputs. Raises ImportModelError."""
    proto, file = load_model(model, any_opset=True)
    _refuse_other_types(proto.graph, file)
    inputs = bind_inputs(proto.graph, shapes or {}, file)
    tensors = [_tensor(value.name, value.shape, value.dtype, "input", file) for value in inputs]
    del proto.graph.input[:]
    proto.graph.input.extend(helper.make_tensor_value_info(value.name, value.dtype, value.shape) for value in inputs)
    proto.ir_version = max(proto.ir_version, 4)  # before that, stored tensors had to be inputs too
    feed = sample if sample is not None else _made_up(tensors)
    try:
        results = _results(proto, file, [np.asarray(feed[tensor.name], tensor.dtype) for tensor in tensors])
    except RuntimeFault as error:
        raise ImportModelError(error.message, file=file, hint="onnxruntime must be able to run a model that is compiled with quant none") from None
    editor = Editor(name=proto.graph.name)
    for tensor in tensors:
        editor.add_tensor(tensor)
        editor.inputs.append(tensor.name)
    for value, result in zip(proto.graph.output, results, strict=True):
        if value.name in editor.tensors:
            raise ImportModelError(f"output {value.name!r} is also an input, or stands twice", file=file, hint="remove it from the model's outputs")
        kind = int(helper.np_dtype_to_tensor_dtype(result.dtype)) if result.dtype != object else onnx.TensorProto.STRING
        editor.add_tensor(_tensor(value.name, result.shape, kind, "output", file))
        editor.outputs.append(value.name)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, result.shape))
    nodes = tuple((node.name or title(node), title(node), REASON) for node in proto.graph.node)
    attributes = Host(whole_bytes(proto, file), nodes)
    sources = tuple(dict.fromkeys(name for name, _, _ in nodes))
    editor.add_node(Node(_free_name(proto.graph), "host", tuple(editor.inputs), tuple(editor.outputs), attributes, sources))
    return editor.freeze()


def _results(proto: ModelProto, file: str, inputs: list[Array]) -> list[Array]:
    """The outputs for one feed. Stored tensors that lie outside the model are mapped, not read. Raises RuntimeFault."""
    outside = [tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if not outside:
        return run(proto.SerializeToString(deterministic=True), inputs)
    folder, mapped = Path(file).parent.resolve(), ModelProto()
    mapped.CopyFrom(proto)
    for tensor in mapped.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(Path(entry.value).relative_to(folder))
    return run_in(open_session(mapped.SerializeToString(), folder=str(folder)), inputs)


def _refuse_other_types(graph: GraphProto, file: str) -> None:
    for what, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            kind = value.type.WhichOneof("value") or "tensor_type"
            if kind != "tensor_type":
                raise NotHeldError(f"{what} {value.name!r} is a {kind.removesuffix('_type')}, not a tensor", file=file, hint=BACKEND)
            if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
                hint = "cast it to FLOAT in the model, as onnxruntime hands none out"
                raise NotHeldError(f"{what} {value.name!r} has element type BFLOAT16", file=file, hint=hint)


def _tensor(name: str, shape: tuple[int, ...], dtype: int, what: str, file: str) -> Tensor:
    known = type_name(dtype)
    if dtype not in onnx.TensorProto.DataType.values() or dtype == onnx.TensorProto.STRING or (numpy := numpy_name(dtype)) not in RAW:
        raise NotHeldError(f"{what} {name!r} has element type {known}", file=file, hint=f"the machine holds {', '.join(RAW)}; {BACKEND}")
    if 0 in shape:
        raise NotHeldError(f"{what} {name!r} has shape {list(shape)}, which holds nothing", file=file, hint=BACKEND)
    return Tensor(name, tuple(shape), numpy, quant=raw_quant(numpy), source=name)


def _made_up(tensors: list[Tensor]) -> Mapping[str, Array]:
    """A feed to find the outputs' sizes with; where they depend on data, a real one should be given."""
    (feed,) = synthetic_feeds([Port(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors], count=1)
    return feed


def _free_name(graph: GraphProto) -> str:
    taken = {value.name for value in (*graph.input, *graph.output)}
    name = "model"
    while name in taken:
        name += "_"
    return name
