"""One emitter per graph operator: its float meaning in ONNX operators.

The one big idea: an emitter knows nothing of quantization. It reads float values and writes one float value; where a form was
chosen because onnxruntime runs it in integers exactly, the comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import scalar
from npucc.arithmetic import RANGES
from npucc.export.model import Model
from npucc.graph import Graph, Node, Quant, Tensor, as_quant
from npucc.ops import OPS

FLOAT = "float32"
BEFORE_THE_START = -(2**31)  # as the end of a Slice that runs backwards through element 0


@dataclass(frozen=True, slots=True)
class Call:
    """A node to emit: `inputs` are the values it reads (an optional one left out: ""), `into` the name of its result."""

    model: Model
    graph: Graph
    node: Node
    inputs: tuple[str, ...]
    into: str

    @property
    def attributes(self) -> Any:
        return self.node.attributes

    def source(self, index: int = 0) -> Tensor:
        return self.graph.tensors[self.node.inputs[index]]

    @property
    def result(self) -> Tensor:
        return self.graph.tensors[self.node.outputs[0]]

    def emit(self, kind: str, inputs: tuple[str, ...] | None = None, **attributes: Any) -> None:
        """One ONNX operator that makes the result."""
        self.model.op(kind, self.inputs if inputs is None else inputs, into=self.into, **attributes)


def emit(model: Model, graph: Graph, node: Node, inputs: tuple[str, ...], into: str, type_of: Callable[[str], str]) -> None:
    """The node without its clamp: casts what it can't compute with to float32, and the result to what `type_of` says of it."""
    moves, wanted = OPS[node.op].moves_data, type_of(node.outputs[0])
    types = [type_of(name) if name else "" for name in node.inputs]
    if moves:
        moved = {dtype for index, dtype in enumerate(types) if index not in OPS[node.op].indices}
        natural = types[0] if len(moved) == 1 else wanted
        arguments = tuple(_as_moved(model, node, index, value, types[index], natural) for index, value in enumerate(inputs))
    else:
        natural = RESULT_TYPES.get(node.op, FLOAT)
        arguments = tuple(_as_float(model, node, index, value, types[index]) for index, value in enumerate(inputs))
    if natural == wanted:
        EMITTERS[node.op](Call(model, graph, node, arguments, into))
        return
    raw = model.fresh(f"{into}/{natural}")
    EMITTERS[node.op](Call(model, graph, node, arguments, raw))
    model.cast(raw, wanted, into=into)


def clip(model: Model, value: str, clamp: tuple[float, float], *, into: str) -> None:
    """min(max(value, low), high); an infinite limit is none."""
    low, high = (model.constant(limit, FLOAT) if math.isfinite(limit) else "" for limit in clamp)
    if clamp == (0.0, math.inf):
        model.op("Relu", [value], into=into)
    else:
        model.op("Clip", [value, low, high], into=into)


def rounded(model: Model, value: str, quant: Quant, *, into: str) -> None:
    """A real as the quantization holds it, in float operators: any opset has them."""
    low, high = (limit - quant.zero for limit in RANGES[quant.dtype])
    steps = model.op("Round", [model.op("Div", [value, model.constant(quant.scale, FLOAT)])])
    held = model.op("Clip", [steps, model.constant(low, FLOAT), model.constant(high, FLOAT)])
    model.op("Mul", [held, model.constant(quant.scale, FLOAT)], into=into)


def _as_float(model: Model, node: Node, index: int, value: str, dtype: str) -> str:
    """The value as float32; the condition of a `where` as bool."""
    wanted = "bool" if (node.op, index) == ("where", 0) else FLOAT
    return value if not value or dtype == wanted else model.cast(value, wanted)


def _as_moved(model: Model, node: Node, index: int, value: str, dtype: str, wanted: str) -> str:
    """The value in the type that all parts of the result have; positions as they are."""
    return value if index in OPS[node.op].indices or dtype == wanted else model.cast(value, wanted)


def _conv(call: Call) -> None:
    a = call.attributes
    call.emit("Conv", strides=a.strides, pads=a.pads, dilations=a.dilations, group=a.groups, kernel_shape=call.source(1).shape[2:])


def _conv_transpose(call: Call) -> None:
    a = call.attributes
    call.emit(
        "ConvTranspose", strides=a.strides, pads=a.pads, dilations=a.dilations, group=a.groups,
        kernel_shape=call.source(1).shape[2:], output_padding=a.output_padding,
    )  # fmt: skip


def _matmul(call: Call) -> None:
    """Gemm or MatMul + Add: the forms that onnxruntime fuses into an integer product with an integer bias."""
    if len(call.inputs) < 3 or not call.inputs[2]:
        call.emit("MatMul", call.inputs[:2])
    elif len(call.source(0).shape) == 2 and len(call.source(1).shape) == 2:
        call.emit("Gemm")
    else:
        product = call.model.op("MatMul", call.inputs[:2])
        call.emit("Add", (product, call.inputs[2]))


def _named(kind: str) -> Callable[[Call], None]:
    """The ONNX operator of that name, without attributes."""

    def emit_it(call: Call) -> None:
        call.emit(kind)

    return emit_it


def _compare(call: Call) -> None:
    kinds = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
    if call.attributes.kind == "ne":
        equal = call.model.op("Equal", call.inputs)
        call.emit("Not", (equal,))
    else:
        call.emit(kinds[call.attributes.kind])


def _table(call: Call) -> None:
    """The expression. A mere clip or change of scale ends in a sum of one term: between two pairs onnxruntime would else merge the pairs."""
    expression, model = call.attributes.expression, call.model
    merges = expression == "x" or scalar.is_clip(expression) is not None
    into = model.fresh(f"{call.into}/table") if merges else call.into
    model.nodes += scalar.emit(expression, call.inputs[0], lambda stem: model.fresh(f"{call.into}/{stem}"), model.opset, output=into)
    if merges:
        call.emit("Sum", (into,))


def _shape(model: Model, shape: tuple[int, ...]) -> str:
    return model.constant(shape, "int64")


def _max_pool(call: Call) -> None:
    a = call.attributes
    call.emit("MaxPool", kernel_shape=a.kernel, strides=a.strides, pads=a.pads, dilations=a.dilations)


def _average_pool(call: Call) -> None:
    a = call.attributes
    call.emit("AveragePool", kernel_shape=a.kernel, strides=a.strides, pads=a.pads, count_include_pad=int(a.count_include_pad))


def _reduce(kind: str) -> Callable[[Call], None]:
    def emit_it(call: Call) -> None:
        call.model.reduce(kind, call.inputs[0], call.attributes.axes, into=call.into)

    return emit_it


def _reduce_mean(call: Call) -> None:
    """Over an image: GlobalAveragePool, which onnxruntime runs in integers."""
    if len(call.source().shape) == 4 and call.attributes.axes == (2, 3):
        call.emit("GlobalAveragePool")
    else:
        _reduce("ReduceMean")(call)


def _layer_norm(call: Call) -> None:
    gamma, beta = (*call.inputs, "", "")[1:3]
    if not call.attributes.centered:
        _root_mean_square_norm(call, gamma, beta)
        return
    scale = gamma or call.model.constant(np.ones(call.source().shape[-1]), FLOAT)
    call.emit("LayerNormalization", (call.inputs[0], scale, beta), axis=-1, epsilon=call.attributes.epsilon)


def _root_mean_square_norm(call: Call, gamma: str, beta: str) -> None:
    """Written out: ONNX has an operator for it only since version 23."""
    model, x = call.model, call.inputs[0]
    mean = model.reduce("ReduceMean", model.op("Mul", (x, x)), [len(call.source().shape) - 1])
    root = model.op("Sqrt", (model.op("Add", (mean, model.constant(np.array(call.attributes.epsilon), FLOAT))),))
    factors = [(kind, value) for kind, value in (("Mul", gamma), ("Add", beta)) if value]
    value = model.op("Div", (x, root), into="" if factors else call.into)
    for index, (kind, operand) in enumerate(factors):
        value = model.op(kind, (value, operand), into=call.into if index == len(factors) - 1 else "")


def _interpolate(call: Call) -> None:
    _sized(call, mode="linear")


def _resize(call: Call) -> None:
    _sized(call, mode="nearest", nearest_mode=call.attributes.nearest_mode)


def _sized(call: Call, **attributes: str) -> None:
    """Resize by scales where they give the recorded size, as they decide the positions; by size otherwise."""
    a, shape = call.attributes, call.source().shape
    scales = np.array((*[1.0] * (len(shape) - 2), *a.scales), np.float32)
    by_scales = all(
        math.floor(np.float32(n) * s) == math.floor(n * float(s)) == m  # shape inference and the operator may round differently
        for n, s, m in zip(shape[-2:], scales[-2:], a.size, strict=True)
    )
    how: tuple[str, ...] = ("", call.model.constant(scales, FLOAT)) if by_scales else ("", "", _shape(call.model, call.result.shape))
    call.emit("Resize", (call.inputs[0], *how), coordinate_transformation_mode=a.coordinates, **attributes)


def _slice(call: Call) -> None:
    a, model = call.attributes, call.model
    ends = [_end(start, size, step) for start, size, step in zip(a.starts, a.sizes, a.steps, strict=True)]
    lists = (a.starts, ends, range(len(ends)), a.steps)
    call.emit("Slice", (call.inputs[0], *(model.constant(list(values), "int64") for values in lists)))


def _gather(call: Call) -> None:
    """The indices arrive as floats (or as the integers of a graph input) and are whole numbers."""
    table, indices = call.inputs
    call.emit("Gather", (table, call.model.cast(indices, "int64")), axis=call.attributes.axis)


def _end(start: int, size: int, step: int) -> int:
    """The `ends` entry for `size` elements from `start`: one past the last, which backwards may lie before element 0."""
    end = start + (size - 1) * step + (1 if step > 0 else -1)
    return end if end >= 0 else BEFORE_THE_START


def _pad(call: Call) -> None:
    a = call.attributes
    if a.mode == "wrap":
        _pad_by_wrapping(call)
        return
    fill = (call.model.constant(a.value, call.source().dtype),) if a.mode == "constant" else ()
    call.emit("Pad", (call.inputs[0], call.model.constant((*a.before, *a.after), "int64"), *fill), mode=a.mode)


def _pad_by_wrapping(call: Call) -> None:
    """ONNX has mode `wrap` from opset 19 on only: the end of the tensor, the tensor, its start, dimension by dimension."""
    model, value, a = call.model, call.inputs[0], call.attributes
    for axis, (size, before, after) in enumerate(zip(call.source().shape, a.before, a.after, strict=True)):
        parts = [value]
        if before:
            parts.insert(0, _part(model, value, size - before, size, axis))
        if after:
            parts.append(_part(model, value, 0, after, axis))
        value = model.op("Concat", parts, axis=axis) if len(parts) > 1 else value
    call.emit("Identity", (value,))


def _part(model: Model, value: str, start: int, end: int, axis: int) -> str:
    return model.op("Slice", [value, *(model.constant([number], "int64") for number in (start, end, axis))])


RESULT_TYPES = {"compare": "bool"}
EMITTERS: dict[str, Callable[[Call], None]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "matmul": _matmul,
    **{name: _named(name.capitalize()) for name in ("add", "sub", "mul", "div", "max", "min")},
    "compare": _compare,
    "where": _named("Where"),
    "table": _table,
    "quantize": lambda call: rounded(call.model, call.inputs[0], as_quant(call.attributes), into=call.into),
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "reduce_mean": _reduce_mean,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "softmax": lambda call: call.emit("Softmax", axis=call.attributes.axis),
    "layer_norm": _layer_norm,
    "interpolate": _interpolate,
    "resize": _resize,
    "concat": lambda call: call.emit("Concat", axis=call.attributes.axis),
    "slice": _slice,
    "gather": _gather,
    "transpose": lambda call: call.emit("Transpose", perm=call.attributes.permutation),
    "reshape": lambda call: call.emit("Reshape", (call.inputs[0], _shape(call.model, call.attributes.shape))),
    "expand": lambda call: call.emit("Expand", (call.inputs[0], _shape(call.model, call.attributes.shape))),
    "pad": _pad,
}
