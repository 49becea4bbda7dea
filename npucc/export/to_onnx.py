"""The way out to ONNX, for a float graph and for an integer graph.

The one big idea: both models hold the graph's tensors as float tensors under the graph's names, so that any of them can be asked for
and compared.
"""

from __future__ import annotations

import onnx

from npucc.export.model import OPSET, OPSET_INT16, Array, Model
from npucc.export.operators import FLOAT, clip, emit, rounded
from npucc.export.quantized import emit_quantized
from npucc.export.segment import emit_segment, newest_opset
from npucc.graph import Graph, Node
from npucc.ops import OPS, Binary


def to_onnx(graph: Graph, *, unsigned: bool | None = None, exact: bool = True, apart: dict[str, Array] | None = None) -> onnx.ModelProto:
    """The graph as a checked ONNX model with the graph's input and output names and types.

    An integer graph (one with scales) becomes QDQ, and onnxruntime agrees with it to the bit given `session.x64quantprecision=1`.
    Where its kernels would compute in float (softmax, layer normalization, tables, whatever stores 16 bits) the operator is spelled out
    in integer operators; `exact=False` leaves such operators as ONNX has them, easier to read and to deploy, a step off here and there.
    `unsigned=False` writes int8 activations, for tools that want them; onnxruntime is then exact with `session.qdqisint8allowed=1`
    instead, but for ties in sums and products, where its kernels of signed and unsigned bytes differ. Left open, it is what the graph's own
    sums are: signed for a model that was imported with int8 activations, else unsigned. ONNX rounds as targets with requantize=fp32.rne do;
    the q31 modes of other targets may differ from it by a step of the result.
    `apart`: see `npucc.export.model.Model`; only for a float graph.
    """
    if unsigned is None:
        unsigned = not any(isinstance(node.attributes, Binary) and node.attributes.offset == 0 for node in graph)
    quants = [tensor.quant for tensor in graph.tensors.values() if tensor.quant is not None]
    opset = OPSET_INT16 if any(quant.dtype == "s16" for quant in quants) else OPSET
    model = Model(max(opset, newest_opset(graph)), taken=graph.tensors, apart=None if quants else apart)
    if quants:
        emit_quantized(graph, model, unsigned=unsigned, exact=exact)
    else:
        _emit_float(graph, model)
    return model.finish(graph)


def _emit_float(graph: Graph, model: Model) -> None:
    for tensor in graph.tensors.values():
        if tensor.data is not None:
            model.constant(tensor.data, tensor.dtype, name=tensor.name)
    for node in graph:
        _emit_float_node(graph, model, node)


def _emit_float_node(graph: Graph, model: Model, node: Node) -> None:
    """The node, its clamp and the rounding that an already quantized model gives it, into the result's own name."""

    def dtype_of(name: str) -> str:
        return graph.tensors[name].dtype

    if OPS[node.op].host:
        emit_segment(model, node, [(name, dtype_of(name)) for name in node.inputs], [(name, dtype_of(name)) for name in node.outputs])
        return
    result, clamp = node.outputs[0], getattr(node.attributes, "clamp", None)
    given = graph.tensors[result].given if not OPS[node.op].moves_data and graph.tensors[result].dtype == FLOAT else None
    quant = given.quant if given else None
    exact = result if quant is None else model.fresh(f"{result}/unrounded")
    raw = exact if clamp is None else model.fresh(f"{result}/unclamped")
    emit(model, graph, node, node.inputs, raw, dtype_of)
    if clamp is not None:
        clip(model, raw, clamp, into=exact)
    if quant is not None:
        rounded(model, exact, quant, into=result)
