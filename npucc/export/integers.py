"""Operators spelled out on stored integers, where onnxruntime would compute the float meaning in float.

The one big idea: integer convolutions, products and sums of ONNX are exact, and so is every single float32 operation of IEEE 754.
What a node stores is written with nothing else, step by step as `npucc.reference` has it: tables are gathered, 16-bit values go into
8-bit convolutions in two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npucc import arithmetic, scalar
from npucc.arithmetic import RANGES, clamp_bounds
from npucc.export.model import Model
from npucc.graph import Graph, Node, Quant, Tensor

FLOAT = "float32"
HALF = 256  # a 16-bit value is 256 · upper + lower, lower within a byte
FLOOR = 1 << 32  # makes a dividend positive, so that integer division rounds down


class Writer(Protocol):
    """What is needed of the writer of a model: what tensors store and stand for, and how a result is stored."""

    graph: Graph
    model: Model

    def stored(self, name: str) -> tuple[str, int]: ...

    def real_value(self, name: str) -> str: ...

    def form(self, quant: Quant) -> tuple[str, int]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One node to spell out; values are names in the model."""

    writer: Writer
    node: Node
    into: str  # the name of the stored result

    @property
    def model(self) -> Model:
        return self.writer.model

    @property
    def attributes(self) -> Any:
        return self.node.attributes

    @property
    def result(self) -> Tensor:
        return self.writer.graph.tensors[self.node.outputs[0]]

    @property
    def quant(self) -> Quant:
        return self.writer.graph.quant(self.node.outputs[0])

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def source(self, index: int = 0) -> Tensor:
        return self.writer.graph.tensors[self.node.inputs[index]]

    def scale_of(self, index: int = 0) -> Quant:
        return self.writer.graph.quant(self.node.inputs[index])

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.model.op(kind, inputs, **attributes)

    def number(self, value: Any, dtype: str = FLOAT) -> str:
        return self.model.constant(value, dtype)

    def less(self, value: str, amount: int, dtype: str) -> str:
        """value − amount."""
        return self.op("Sub", value, self.number(amount, dtype)) if amount else value

    def integers(self, index: int = 0, dtype: str = "int32", *, above: int = 0) -> str:
        """What is stored of an input, less `above`, as wider integers."""
        name, shift = self.writer.stored(self.node.inputs[index])
        return self.less(self.model.cast(name, dtype), above + shift, dtype)

    def steps(self, index: int = 0, dtype: str = "int32") -> str:
        """stored − zero point."""
        return self.integers(index, dtype, above=self.scale_of(index).zero)

    def requantized(self, total: str, factor: Any) -> None:
        """The result: clamp(rint(float32(total) · factor) + zero)."""
        self.rounded(self.op("Mul", self.model.cast(total, FLOAT), self.number(factor)))

    def quantized(self, real: str) -> None:
        """The result: clamp(rint(real / scale) + zero)."""
        self.rounded(self.op("Div", real, self.number(self.quant.scale)))

    def rounded(self, steps: str) -> None:
        """The result: clamp(rint(steps) + zero). Whole limits may come before the rounding."""
        quant, (dtype, shift) = self.quant, self.writer.form(self.quant)
        low, high = clamp_bounds(getattr(self.attributes, "clamp", None), quant)
        if (low, high) != RANGES[quant.dtype]:
            steps = self.op("Clip", steps, self.number(low - quant.zero), self.number(high - quant.zero))
        zero = self.number(quant.zero + shift, dtype)
        self.model.op("QuantizeLinear", (steps, self.number(1.0), zero), into=self.into)


def must_be_spelled_out(graph: Graph, node: Node) -> bool:
    """Whether onnxruntime's own kernels for the node's QDQ form would not give the stored integers for sure."""
    result = graph.tensors[node.outputs[0]]
    quant = result.quant
    if node.op not in FORMS or quant is None or not FORMS[node.op][0](graph, node):
        return False
    long = quant.dtype == "s32" and result.dtype == "float32"
    return quant.dtype in ("s8", "s16") or (long and node.op == "table" and not _direct(graph, node))


def spell_out(writer: Writer, node: Node, *, into: str) -> None:
    """Write the node so that `into` holds its stored result."""
    FORMS[node.op][1](Call(writer, node, into))


def _quants(graph: Graph, node: Node) -> list[Quant]:
    names = [name for name in (*node.inputs[:2], *node.outputs) if name]
    return [quant for name in names if (quant := graph.tensors[name].quant) is not None]


def _always(_: Graph, __: Node) -> bool:
    return True


def _is_wide(graph: Graph, node: Node) -> bool:
    return any(quant.dtype != "s8" for quant in _quants(graph, node))


def _direct(graph: Graph, node: Node) -> str:
    """The instruction that computes a function without a table, or ""."""
    return arithmetic.without_table(node.attributes.expression, graph.quant(node.inputs[0]))  # type: ignore[attr-defined]


def _is_looked_up(graph: Graph, node: Node) -> bool:
    """A function by table or a root, not what is exact in float: clips, copies and squares."""
    expression = node.attributes.expression  # type: ignore[attr-defined]
    if direct := _direct(graph, node):
        return direct == "sqrt"
    return graph.quant(node.inputs[0]).dtype in ("s8", "s16") and expression != "x" and scalar.is_clip(expression) is None


def _is_no_image_mean(graph: Graph, node: Node) -> bool:
    """onnxruntime pools whole images in integers."""
    rank, axes = len(graph.tensors[node.inputs[0]].shape), node.attributes.axes  # type: ignore[attr-defined]
    return _is_wide(graph, node) or rank != 4 or axes != (2, 3)


# ---- products ---------------------------------------------------------------------------------------------------------


def _halves(call: Call, index: int) -> list[tuple[int, str, str]]:
    """(weight, bytes, zero point) of what an input stores: one part for 8 bits, two for 16."""
    quant = call.scale_of(index)
    if quant.dtype == "s8":
        return [(1, call.model.cast(call.integers(index, above=-128), "uint8"), call.number(quant.zero + 128, "uint8"))]
    raised = call.integers(index, above=RANGES["s16"][0])
    upper = call.op("Div", raised, call.number(HALF, "int32"))
    lower = call.op("Sub", raised, call.op("Mul", upper, call.number(HALF, "int32")))
    zeros = divmod(quant.zero - RANGES["s16"][0], HALF)
    parts = zip((HALF, 1), (upper, lower), zeros, strict=True)
    return [(weight, call.model.cast(part, "uint8"), call.number(zero, "uint8")) for weight, part, zero in parts]


def _integer_convolution(call: Call, parts: list[tuple[int, str, str]], weights: np.ndarray, **attributes: Any) -> str:
    """Σ over the parts, int32 with wrap-around. Unsigned weights: kernels for signed ones may saturate between their steps."""
    raised = call.number(weights.astype(np.int64) + 128, "uint8")
    total = ""
    for weight, part, zero in parts:
        product = call.op("ConvInteger", part, raised, zero, call.number(128, "uint8"), kernel_shape=weights.shape[2:], **attributes)
        product = product if weight == 1 else call.op("Mul", product, call.number(weight, "int32"))
        total = call.op("Add", total, product) if total else product
    return total


def _with_bias(call: Call, total: str, *, spread: tuple[int, ...] = ()) -> str:
    if not call.has(2):
        return total
    bias = call.source(2).data
    assert bias is not None
    return call.op("Add", total, call.number(bias.reshape(-1, *spread) if bias.ndim else bias, "int32"))


def _factors(call: Call) -> np.ndarray:
    return arithmetic.multiplier(call.scale_of(0), call.scale_of(1), call.quant)


def _finish_image(call: Call, total: str) -> None:
    factors = _factors(call)
    call.requantized(_with_bias(call, total, spread=(1, 1)), factors.reshape(-1, 1, 1) if factors.ndim else factors)


def _conv(call: Call) -> None:
    a, weights = call.attributes, call.source(1).data
    assert weights is not None
    total = _integer_convolution(
        call, _halves(call, 0), weights, strides=a.strides, pads=a.pads, dilations=a.dilations, group=a.groups
    )  # fmt: skip
    _finish_image(call, total)


def _conv_transpose(call: Call) -> None:
    """A convolution with the turned kernel over the input with zero points between its values."""
    a, weights = call.attributes, call.source(1).data
    assert weights is not None
    channels, per_group, *kernel = weights.shape
    grouped = weights.reshape(a.groups, channels // a.groups, per_group, *kernel).swapaxes(1, 2)
    turned = grouped.reshape(a.groups * per_group, channels // a.groups, *kernel)[:, :, ::-1, ::-1]
    margins = [d * (k - 1) for d, k in zip(a.dilations, kernel, strict=True)]
    parts = [(weight, _spread_out(call, part, zero, margins), zero) for weight, part, zero in _halves(call, 0)]
    _finish_image(call, _integer_convolution(call, parts, turned, dilations=a.dilations, group=a.groups))


def _spread_out(call: Call, part: str, zero: str, margins: list[int]) -> str:
    """An image with stride − 1 zero points after each value, cut or padded to what the turned kernel slides over."""
    a, (batch, channels, height, width) = call.attributes, call.source(0).shape
    value, (down, right) = part, a.strides
    if (down, right) != (1, 1):
        value = call.op("Reshape", value, call.number([batch, channels, height, 1, width, 1], "int64"))
        value = _padded(call, value, zero, (0,) * 6, (0, 0, 0, down - 1, 0, right - 1))
        value = call.op("Reshape", value, call.number([batch, channels, height * down, width * right], "int64"))
    sizes = [size + margin for size, margin in zip(call.result.shape[2:], margins, strict=True)]
    before = [margin - pad for margin, pad in zip(margins, a.pads[:2], strict=True)]
    spans = zip(sizes, before, (height * down, width * right), strict=True)
    after = [size - first - span for size, first, span in spans]
    value = _padded(call, value, zero, (0, 0, *(max(n, 0) for n in before)), (0, 0, *(max(n, 0) for n in after)))
    starts = [max(-n, 0) for n in before]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    return call.op("Slice", value, call.number(starts, "int64"), call.number(ends, "int64"), call.number([2, 3], "int64"))


def _padded(call: Call, value: str, fill: str, before: Sequence[int], after: Sequence[int]) -> str:
    return call.op("Pad", value, call.number([*before, *after], "int64"), fill) if any((*before, *after)) else value


def _matmul(call: Call) -> None:
    """In float64, exact below 2^53."""
    product = call.op("MatMul", *(call.model.cast(call.steps(index), "float64") for index in (0, 1)))
    call.requantized(_with_bias(call, _wrapped(call, call.model.cast(product, "int64"))), _factors(call))


def _wrapped(call: Call, total: str) -> str:
    """int64 modulo 2^32 as int32. Not by a cast: one of a cast may become one cast, which saturates."""
    half, whole = 1 << 31, call.number(1 << 32, "int64")
    return call.model.cast(call.less(call.op("Mod", call.less(total, -half, "int64"), whole), half, "int64"), "int32")


# ---- tables and reductions --------------------------------------------------------------------------------------------


def _looked_up(call: Call, values: arithmetic.LookUp, position: str) -> str:
    """Entries at positions (int32, from the table's base), int32; between entries linear interpolation, rounded."""
    entries = call.number(values.entries, "int32")
    if not values.shift:
        return call.op("Gather", entries, position)
    step = call.number(1 << values.shift, "int32")
    index = call.op("Min", call.op("Div", position, step), call.number(len(values.entries) - 2, "int32"))
    low, rise = call.op("Gather", entries, index), call.op("Gather", call.number(np.diff(values.entries), "int64"), index)
    rest = call.op("Sub", position, call.op("Mul", index, step))
    part, half = call.op("Mul", rise, call.model.cast(rest, "int64")), 1 << (values.shift - 1)
    raised = call.less(part, -(FLOOR << values.shift) - half, "int64")
    quotient = call.op("Div", raised, call.number(1 << values.shift, "int64"))
    return call.op("Add", low, call.model.cast(call.less(quotient, FLOOR, "int64"), "int32"))


def _table(call: Call) -> None:
    if arithmetic.without_table(call.attributes.expression, call.scale_of()) == "sqrt":
        call.quantized(_square_root(call, call.op("Relu", call.writer.real_value(call.node.inputs[0]))))
        return
    values = arithmetic.table(call.attributes.expression, call.scale_of(), call.quant)
    position, (dtype, shift) = call.integers(above=values.base), call.writer.form(call.quant)
    if not values.shift:
        call.model.op("Gather", (call.number(values.entries + shift, dtype), position), into=call.into)
        return
    found = _looked_up(call, values, position)
    if values.missing:
        last = call.number(len(values.missing.entries) - 1, "int32")
        place = call.op("Max", call.less(position, values.missing.base - values.base, "int32"), call.number(0, "int32"))
        found = call.op("Add", found, call.op("Gather", call.number(values.missing.entries, "int32"), call.op("Min", place, last)))
    if values.fraction_bits:  # the zero point is in the entries
        steps = call.op("Round", call.op("Mul", call.model.cast(found, FLOAT), call.number(2.0**-values.fraction_bits)))
        call.model.op("QuantizeLinear", (steps, call.number(1.0), call.number(shift, dtype)), into=call.into)
    else:
        call.model.cast(call.less(found, -shift, "int32"), dtype, into=call.into)


def _softmax(call: Call) -> None:
    axis = call.attributes.axis % len(call.result.shape)
    values = arithmetic.softmax_exponentials(call.scale_of(), call.result.shape[axis])
    steps = call.integers()
    distance = call.less(call.op("Sub", steps, call.model.reduce("ReduceMax", steps, [axis])), values.base, "int32")
    exponential = _looked_up(call, values, distance)
    total = call.model.reduce("ReduceSum", exponential, [axis])
    probability = call.op("Div", call.model.cast(exponential, FLOAT), call.model.cast(total, FLOAT))
    call.rounded(call.op("Div", probability, call.number(arithmetic.softmax_steps(call.quant).scale)))


def _layer_norm(call: Call) -> None:
    """Mean and variance from exact sums, in units of the source's steps."""
    size, steps = call.source().shape[-1], call.steps(dtype="int64")
    last, part = [len(call.source().shape) - 1], call.number(np.float32(1) / np.float32(size))

    def mean_of(values: str) -> str:
        return call.op("Mul", call.model.cast(call.model.reduce("ReduceSum", values, last), FLOAT), part)

    variance, value = mean_of(call.op("Mul", steps, steps)), call.model.cast(steps, FLOAT)
    if call.attributes.centered:
        mean = mean_of(steps)
        variance, value = call.op("Relu", call.op("Sub", variance, call.op("Mul", mean, mean))), call.op("Sub", value, mean)
    epsilon = arithmetic.epsilon_in_steps(call.attributes.epsilon, call.scale_of().scale)
    value = call.op("Mul", value, _reciprocal(call, _square_root(call, call.op("Add", variance, call.number(epsilon)))))
    for index, kind in ((1, "Mul"), (2, "Add")):
        value = call.op(kind, value, _real(call, index)) if call.has(index) else value
    call.quantized(value)


def _square_root(call: Call, value: str) -> str:
    """Correctly rounded, as a float64 root is when it becomes float32; onnxruntime's own for float32 is an approximation."""
    return call.model.cast(call.op("Sqrt", call.model.cast(value, "float64")), FLOAT)


def _reciprocal(call: Call, value: str) -> str:
    """1 / value, by way of float64 too: of 1 / x · y onnxruntime makes y / x, which rounds once less."""
    return call.model.cast(call.op("Div", call.number(1.0, "float64"), call.model.cast(value, "float64")), FLOAT)


def _real(call: Call, index: int) -> str:
    """A constant as float32."""
    tensor = call.source(index)
    assert tensor.data is not None
    if tensor.quant is None:
        return call.number(tensor.data)
    return call.number((tensor.data.astype(np.int64) - tensor.quant.zero).astype(np.float32) * tensor.quant.scale)


def _reduce_mean(call: Call) -> None:
    _scaled_sum(call, int(np.prod([call.source().shape[axis] for axis in call.attributes.axes])))


def _scaled_sum(call: Call, count: int) -> None:
    total = call.model.reduce("ReduceSum", call.steps(dtype="int64"), call.attributes.axes)
    call.requantized(total, arithmetic.mean_multiplier(call.scale_of(), call.quant, count))


def _average_pool(call: Call) -> None:
    """A convolution of every channel with ones, over the number of values inside each window."""
    a, shape = call.attributes, call.source().shape
    ones = np.ones((1, 1, *a.kernel), np.int64)
    alone = call.number([shape[0] * shape[1], 1, *shape[2:]], "int64")
    parts = [(weight, call.op("Reshape", part, alone), zero) for weight, part, zero in _halves(call, 0)]
    total = _integer_convolution(call, parts, ones, strides=a.strides, pads=a.pads, dilations=a.dilations)
    total = call.op("Reshape", total, call.number(call.result.shape, "int64"))
    call.requantized(total, np.float32(arithmetic.ratio(call.scale_of(), call.quant)) / _inside(call))


def _inside(call: Call) -> np.ndarray:
    """How many values each window averages, float32 in the shape of the image."""
    a, counts = call.attributes, []
    for axis, (size, results) in enumerate(zip(call.source().shape[2:], call.result.shape[2:], strict=True)):
        taps = np.arange(results)[:, None] * a.strides[axis] - a.pads[axis] + np.arange(a.kernel[axis]) * a.dilations[axis]
        counts.append((((taps >= 0) & (taps < size)) | a.count_include_pad).sum(axis=1))
    return np.asarray(np.outer(*counts), np.float32)


#: operator → (whether a node of it must be spelled out, how)
FORMS: dict[str, tuple[Callable[[Graph, Node], bool], Callable[[Call], None]]] = {
    "conv": (_is_wide, _conv),
    "conv_transpose": (_always, _conv_transpose),
    "matmul": (_is_wide, _matmul),
    "table": (_is_looked_up, _table),
    "average_pool": (_is_wide, _average_pool),
    "reduce_mean": (_is_no_image_mean, _reduce_mean),
    "reduce_sum": (_always, lambda call: _scaled_sum(call, 1)),
    "softmax": (_always, _softmax),
    "layer_norm": (_always, _layer_norm),
}
