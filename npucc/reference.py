"""The meaning of an integer graph, in plain numpy: what the NPU must compute, bit by bit.

The one big idea: one small function per operator, written for reading and not for speed, sharing nothing with the machine that runs
programs. Sums are exact integers (products run on float64 BLAS, exact below 2^53, then wrap to 32 bits); every float32 step is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import arithmetic, segments
from npucc.arithmetic import F32, RANGES, clamp_bounds
from npucc.errors import DataError
from npucc.graph import Graph, Node, Quant, Tensor
from npucc.ops import OPS

Array = np.ndarray[Any, np.dtype[Any]]

STORAGE = {stored: np.dtype(name) for name, stored in segments.RAW.items() if name != "bool"}


def run(graph: Graph, inputs: Mapping[str, Array], *, keep: Iterable[str] | None = None, requantize: str = "fp32.rne") -> dict[str, Array]:
    """Stored integers of every tensor (or of those in `keep`) for the ONNX inputs given as arrays in the graph's shapes.

    `requantize` is the target's mode. Raises DataError for a missing input or a wrong shape.
    """
    stored = {name: store_input(graph.tensors[name], inputs) for name in graph.inputs}
    wanted = set(graph.tensors if keep is None else keep)
    last_use = {name: node.name for node in graph for name in node.inputs}
    kept = {name: value for name, value in stored.items() if name in wanted}
    for node in graph:
        result = run_node(graph, node, stored, requantize=requantize)
        stored |= result
        kept |= {name: value for name, value in result.items() if name in wanted}
        for name in {*node.inputs, *node.outputs}:
            if name in stored and last_use.get(name, node.name) == node.name:
                del stored[name]
    return kept


def run_outputs(graph: Graph, inputs: Mapping[str, Array], *, requantize: str = "fp32.rne") -> dict[str, Array]:
    """The graph's outputs as the real numbers that they stand for, float32 (bool stays bool), in graph order."""
    stored = run(graph, inputs, keep=graph.outputs, requantize=requantize)
    return {name: to_real(graph.tensors[name], stored[name]) for name in graph.outputs}


def run_node(graph: Graph, node: Node, stored: Mapping[str, Array], *, requantize: str = "fp32.rne") -> dict[str, Array]:
    """{result: stored integers} of one node, given the stored integers of the tensors that it reads."""
    if OPS[node.op].host:
        return _run_host(graph, node, stored)
    call = _call(graph, node, stored, requantize)
    tensor, value = call.tensor, KERNELS[node.op](call)
    assert value.shape == tensor.shape, f"{node.name}: {value.shape} is not {tensor.shape}"
    return {tensor.name: value.astype(STORAGE[tensor.quant.dtype] if tensor.quant else value.dtype)}


def _run_host(graph: Graph, node: Node, stored: Mapping[str, Array]) -> dict[str, Array]:
    """The segment in onnxruntime, on what its inputs stand for; integers that a float stands for are rounded."""
    inputs = []
    for name, dtype in zip(node.inputs, segments.input_types(node), strict=True):
        tensor = graph.tensors[name]
        real = tensor.data if tensor.data is not None else to_real(tensor, stored[name])
        inputs.append((np.rint(real) if real.dtype.kind == "f" and np.dtype(dtype).kind in "iu" else real).astype(dtype))
    results = segments.run(segments.attributes_of(node).model, inputs)
    return {name: to_stored(graph.tensors[name], value) for name, value in zip(node.outputs, results, strict=True)}


def _call(graph: Graph, node: Node, stored: Mapping[str, Array], requantize: str = "fp32.rne") -> Call:
    operands = tuple(_operand(graph.tensors[name], stored) if name else None for name in node.inputs)
    return Call(node, operands, graph.tensors[node.outputs[0]], requantize)


def store_input(tensor: Tensor, inputs: Mapping[str, Array]) -> Array:
    """A graph input as it is stored: saturate(rint(x / s) + zero) in float32. Raises DataError."""
    if tensor.name not in inputs:
        raise DataError(f"input {tensor.name!r} is missing; found {', '.join(map(repr, inputs)) or 'none'}")
    value = np.asarray(inputs[tensor.name])
    if value.shape != tensor.shape:
        raise DataError(f"input {tensor.name!r} has shape {list(value.shape)}, expected {list(tensor.shape)}")
    return to_stored(tensor, value)


def to_stored(tensor: Tensor, real: Array) -> Array:
    """Real numbers as the tensor stores them."""
    if tensor.quant is None:
        return real
    if segments.is_raw(tensor.quant):
        return (np.rint(real) if real.dtype.kind == "f" and tensor.quant.dtype[0] != "f" else real).astype(STORAGE[tensor.quant.dtype])
    if tensor.quant.dtype == "u8" and tensor.dtype != "uint8":
        return np.asarray(real != 0, np.uint8)
    return arithmetic.quantize(real, tensor.quant).astype(STORAGE[tensor.quant.dtype])


def to_real(tensor: Tensor, stored: Array) -> Array:
    """What the stored integers stand for, float32 (a boolean tensor: bool)."""
    if tensor.quant is None:
        return stored
    if segments.is_raw(tensor.quant) and tensor.dtype != "bool":
        return stored.astype(tensor.dtype)
    return stored.astype(bool) if tensor.dtype == "bool" else _real(stored.astype(np.int64), tensor.quant)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor with its stored integers (int64)."""

    stored: Array
    quant: Quant | None

    @property
    def scaled(self) -> Quant:
        assert self.quant is not None
        return self.quant

    @property
    def steps(self) -> Array:
        """stored − zero, int64."""
        return self.stored - (self.quant.zero if self.quant else 0)

    @property
    def real(self) -> Array:
        """float32(stored − zero) · scale."""
        return _real(self.stored, self.quant) if self.quant else self.stored.astype(F32)


def _real(stored: Array, quant: Quant) -> Array:
    scale = quant.scale.astype(F32)
    if quant.axis is not None:
        scale = scale.reshape([-1 if axis == quant.axis else 1 for axis in range(stored.ndim)])
    return (stored - quant.zero).astype(F32) * scale


def _operand(tensor: Tensor, stored: Mapping[str, Array]) -> Operand:
    value = tensor.data if tensor.data is not None else stored[tensor.name]
    return Operand(value.astype(np.int64) if tensor.quant else value, tensor.quant)


@dataclass(frozen=True, slots=True)
class Call:
    """One node at work."""

    node: Node
    operands: tuple[Operand | None, ...]
    tensor: Tensor
    requantize: str = "fp32.rne"

    @property
    def attributes(self) -> Any:
        return self.node.attributes

    @property
    def quant(self) -> Quant:
        """Of the result."""
        assert self.tensor.quant is not None, f"{self.tensor.name} is not quantized"
        return self.tensor.quant

    def operand(self, index: int = 0) -> Operand:
        operand = self.operands[index]
        assert operand is not None
        return operand

    def bias(self) -> Array | int:
        return self.operand(2).stored if len(self.operands) > 2 and self.operands[2] is not None else 0

    def clamp(self, value: Array) -> Array:
        """The value within the result's range, narrowed by the node's clamp; NaN as the zero point."""
        low, high = clamp_bounds(getattr(self.attributes, "clamp", None), self.quant)
        return np.clip(np.where(np.isnan(value), self.quant.zero, value), low, high).astype(np.int64)

    def quantized(self, real: Array) -> Array:
        """clamp(rint(v / s) + zero), float32."""
        with np.errstate(all="ignore"):
            return self.clamp(np.rint(real.astype(F32) / F32(self.quant.scale)).astype(np.float64) + self.quant.zero)

    def requantized(self, total: Array, factor: Array | float) -> Array:
        """clamp(rint(float32(total) · factor) + zero)."""
        with np.errstate(over="ignore"):  # what overflows float32 is clamped
            return self.clamp(np.rint(total.astype(F32) * np.asarray(factor, F32)).astype(np.float64) + self.quant.zero)

    def rescaled(self, total: Array, factor: arithmetic.Factor, arrange: Callable[[Array], Array] = np.asarray) -> Array:
        """clamp(round(total · factor) + zero) in the factor's mode; `arrange` brings per-channel numbers to the channels' axis."""
        if factor.mode == "fp32.rne":
            return self.requantized(total, arrange(factor.scale))
        multiplier, shift = (arrange(part.astype(np.int64)) for part in (factor.scale, factor.shift))
        return self.clamp(ROUND[factor.mode](total.astype(np.int64), multiplier, shift) + self.quant.zero)


def _nearest_even(total: Array, multiplier: Array, shift: Array) -> Array:
    """q31.rne: total · multiplier / 2^shift, half to even; shift ≥ 2."""
    product = total * multiplier
    below = product >> shift
    rest, half = product - (below << shift), np.int64(1) << (shift - 1)
    return np.asarray(below + ((rest > half) | ((rest == half) & (below & 1 == 1))))


def _tosa(total: Array, multiplier: Array, shift: Array) -> Array:
    """q31.tosa: apply_scale_32, rounded once, half up."""
    return np.asarray((total * multiplier + (np.int64(1) << (shift - 1))) >> shift)


def _tfl(total: Array, multiplier: Array, shift: Array) -> Array:
    """q31.tfl: SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT, as gemmlowp has them; the left shift saturates."""
    widened = np.clip(total << np.maximum(31 - shift, 0), *RANGES["s32"])
    product = widened * multiplier
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.where(nudged >= 0, nudged >> 31, -(-nudged >> 31))  # division that truncates
    mask = (np.int64(1) << np.maximum(shift - 31, 0)) - 1
    return np.asarray((high >> np.maximum(shift - 31, 0)) + ((high & mask) > (mask >> 1) + (high < 0)))


#: mode → total, multiplier, shift (int64) → rounded (int64)
ROUND: dict[str, Callable[[Array, Array, Array], Array]] = {"q31.rne": _nearest_even, "q31.tosa": _tosa, "q31.tfl": _tfl}


def wrap(value: Array) -> Array:
    """The value modulo 2^32 as a signed 32-bit number (int64 array)."""
    return value.astype(np.int64).astype(np.int32).astype(np.int64)


# ---- matrix operators -------------------------------------------------------------------------------------------------


def sums(graph: Graph, node: Node, stored: Mapping[str, Array]) -> Array:
    """The 32-bit sums (bias included) of an operator with the trait `matrix`, before they are requantized; int64."""
    return SUMS[node.op](_call(graph, node, stored))


def from_sums(graph: Graph, node: Node, stored: Mapping[str, Array], total: Array, *, requantize: str = "fp32.rne") -> dict[str, Array]:
    """What `run_node` gives, from sums that are known: {result: stored integers}."""
    call = _call(graph, node, stored, requantize)
    return {call.tensor.name: FINISH[node.op](call, total).astype(STORAGE[call.quant.dtype])}


def _conv_sums(call: Call) -> Array:
    a, x, w = call.attributes, call.operand(0).steps.astype(np.float64), call.operand(1).steps.astype(np.float64)
    top, left, bottom, right = a.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    batch, _, height, width = call.tensor.shape
    total = np.zeros((batch, w.shape[0], height * width))
    for i, j in np.ndindex(*w.shape[2:]):
        rows = _positions(i * a.dilations[0], a.strides[0], height)
        columns = _positions(j * a.dilations[1], a.strides[1], width)
        total += _grouped(w[:, :, i, j], x[:, :, rows, columns], a.groups)
    return wrap(wrap(total.reshape(call.tensor.shape)) + _channels(call.bias()))


def _conv_finish(call: Call, total: Array) -> Array:
    return call.rescaled(total, _product_factor(call), _channels)


def _product_factor(call: Call) -> arithmetic.Factor:
    return arithmetic.product_factor(call.operand(0).scaled, call.operand(1).scaled, call.quant, call.requantize)


def _positions(start: int, stride: int, count: int) -> slice:
    return slice(start, start + (count - 1) * stride + 1, stride)


def _grouped(w: Array, x: Array, groups: int) -> Array:
    """w[N, C/groups] · x[B, C, h, w] per channel group, float64: [B, N, h·w]."""
    batch, channels = x.shape[:2]
    values = x.reshape(batch, groups, channels // groups, -1)
    weights = w.reshape(groups, w.shape[0] // groups, w.shape[1])
    product = values * weights if w.shape[1] == 1 else np.matmul(weights, values)
    return np.asarray(product).reshape(batch, w.shape[0], -1)


def _channels(value: Any) -> Array:
    """Per-channel numbers as [channels, 1, 1]."""
    array = np.asarray(value)
    return array.reshape(-1, 1, 1) if array.ndim else array


def _conv_transpose_sums(call: Call) -> Array:
    a, x, w = call.attributes, call.operand(0).steps.astype(np.float64), call.operand(1).steps.astype(np.float64)
    groups, (top, left, bottom, right) = a.groups, a.pads
    batch, channels, height, width = x.shape
    results = call.tensor.shape[1]
    total = np.zeros((batch, results, call.tensor.shape[2] + top + bottom, call.tensor.shape[3] + left + right))
    per_group = w.reshape(groups, channels // groups, results // groups, *w.shape[2:]).swapaxes(1, 2)
    matrix = per_group.reshape(results, channels // groups, *w.shape[2:])
    for i, j in np.ndindex(*w.shape[2:]):
        rows = _positions(i * a.dilations[0], a.strides[0], height)
        columns = _positions(j * a.dilations[1], a.strides[1], width)
        total[:, :, rows, columns] += _grouped(matrix[:, :, i, j], x, groups).reshape(batch, results, height, width)
    inside = total[:, :, top : total.shape[2] - bottom, left : total.shape[3] - right]
    return wrap(wrap(inside) + _channels(call.bias()))


def _matmul_sums(call: Call) -> Array:
    product = np.matmul(call.operand(0).steps.astype(np.float64), call.operand(1).steps.astype(np.float64))
    return wrap(wrap(product) + call.bias())


def _matmul_finish(call: Call, total: Array) -> Array:
    return call.rescaled(total, _product_factor(call))


def _matrix(call: Call) -> Array:
    return FINISH[call.node.op](call, SUMS[call.node.op](call))


SUMS: dict[str, Callable[[Call], Array]] = {"conv": _conv_sums, "conv_transpose": _conv_transpose_sums, "matmul": _matmul_sums}
FINISH: dict[str, Callable[[Call, Array], Array]] = {"conv": _conv_finish, "conv_transpose": _conv_finish, "matmul": _matmul_finish}


# ---- elementwise ------------------------------------------------------------------------------------------------------


def fused_multiply_add(a: Array, b: Any, c: Any) -> Array:
    """a·b + c rounded to float32 once (the float64 sum is exact for byte-sized a, but for far smaller terms)."""
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(F32)


def _all_bytes(call: Call) -> bool:
    quants = (call.operand(0).quant, call.operand(1).quant, call.quant)
    return all(quant is not None and quant.dtype == "s8" for quant in quants)


def _add(call: Call) -> Array:
    """As onnxruntime's kernels: two fused multiply-adds on unsigned or signed bytes."""
    if not _all_bytes(call):
        return call.quantized(call.operand(0).real + call.operand(1).real)
    a, b, y, offset = call.operand(0).scaled, call.operand(1).scaled, call.quant, call.attributes.offset
    ratio_a, ratio_b = F32(a.scale / y.scale), F32(b.scale / y.scale)
    zeros = fused_multiply_add(ratio_a, F32(a.zero + offset), F32(ratio_b * F32(b.zero + offset)))
    shift = F32(F32(y.zero + offset) - zeros)
    inner = fused_multiply_add(call.operand(1).stored + offset, ratio_b, shift)
    return call.clamp(np.rint(fused_multiply_add(call.operand(0).stored + offset, ratio_a, inner)).astype(np.float64) - offset)


def _mul(call: Call) -> Array:
    """As onnxruntime's kernel: the product of integers, scaled, the zero point of the unsigned byte added before rounding."""
    if not _all_bytes(call):
        return call.quantized(call.operand(0).real * call.operand(1).real)
    factor = F32(arithmetic.multiplier(call.operand(0).scaled, call.operand(1).scaled, call.quant))
    scaled = (call.operand(0).steps * call.operand(1).steps).astype(F32) * factor
    offset = call.attributes.offset
    return call.clamp(np.rint(scaled + F32(call.quant.zero + offset)).astype(np.float64) - offset)


def _on_reals(function: Callable[[Array, Array], Array]) -> Callable[[Call], Array]:
    def kernel(call: Call) -> Array:
        with np.errstate(all="ignore"):
            return call.quantized(function(call.operand(0).real, call.operand(1).real))

    return kernel


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compare(call: Call) -> Array:
    return COMPARISONS[call.attributes.kind](call.operand(0).real, call.operand(1).real).astype(np.uint8)


def _where(call: Call) -> Array:
    return call.quantized(np.where(call.operand(0).stored != 0, call.operand(1).real, call.operand(2).real))


def _table(call: Call) -> Array:
    source, real = call.operand(0).scaled, call.operand(0).real
    direct = arithmetic.without_table(call.attributes.expression, source)
    if direct:
        functions: dict[str, Callable[[Array], Array]] = {"sqrt": lambda x: np.sqrt(np.maximum(x, F32(0))), "mul": lambda x: x * x}
        bounds = arithmetic.direct_bounds(call.attributes.expression, call.quant)
        return np.clip(call.quantized(functions[direct](real) if direct in functions else real), *bounds)
    values = arithmetic.table(call.attributes.expression, source, call.quant)
    found = values.at(call.operand(0).stored)
    return call.clamp(np.rint(found.astype(F32) * F32(2.0**-values.fraction_bits)).astype(np.float64)) if values.fraction_bits else found


# ---- windows and reductions -------------------------------------------------------------------------------------------


def _windows(call: Call, x: Array, fill: int) -> list[Array]:
    """Each tap of the pooling window as an array in the result's shape; `fill` stands outside the input."""
    a, (height, width) = call.attributes, call.tensor.shape[2:]
    top, left, bottom, right = a.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    taps = []
    for i, j in np.ndindex(*a.kernel):
        rows = _positions(i * a.dilations[0], a.strides[0], height)
        taps.append(x[:, :, rows, _positions(j * a.dilations[1], a.strides[1], width)])
    return taps


def _max_pool(call: Call) -> Array:
    source = call.operand(0)
    return np.asarray(np.maximum.reduce(_windows(call, source.stored, RANGES[source.scaled.dtype][0])))


def _average_pool(call: Call) -> Array:
    source, a = call.operand(0), call.attributes
    total = np.sum(_windows(call, source.steps, 0), axis=0)
    inside = np.sum(_windows(call, np.ones_like(source.stored), int(a.count_include_pad)), axis=0)
    return call.requantized(total, F32(arithmetic.ratio(source.scaled, call.quant)) / inside.astype(F32))


def _reduce_mean(call: Call) -> Array:
    source, axes = call.operand(0), call.attributes.axes
    count = int(np.prod([source.stored.shape[axis] for axis in axes]))
    return call.rescaled(source.steps.sum(axis=axes, keepdims=True), arithmetic.mean_factor(source.scaled, call.quant, count, call.requantize))


def _reduce_sum(call: Call) -> Array:
    source = call.operand(0)
    total = source.steps.sum(axis=call.attributes.axes, keepdims=True)
    return call.rescaled(total, arithmetic.mean_factor(source.scaled, call.quant, 1, call.requantize))


def _softmax(call: Call) -> Array:
    source, axis = call.operand(0), call.attributes.axis
    values = arithmetic.softmax_exponentials(source.scaled, source.stored.shape[axis])
    exponential = values.at(source.stored - source.stored.max(axis=axis, keepdims=True))
    total = exponential.sum(axis=axis, keepdims=True)
    probability = exponential.astype(F32) / total.astype(F32)
    return call.clamp(np.rint(probability / F32(arithmetic.softmax_steps(call.quant).scale)).astype(np.float64) + call.quant.zero)


def _layer_norm(call: Call) -> Array:
    """Mean and variance from exact sums, in units of the source's steps, where epsilon is epsilon / s²."""
    source, size = call.operand(0), call.operand(0).stored.shape[-1]
    steps, part = source.steps, F32(1) / F32(size)
    variance, value = (steps * steps).sum(axis=-1, keepdims=True).astype(F32) * part, steps.astype(F32)
    if call.attributes.centered:
        mean = steps.sum(axis=-1, keepdims=True).astype(F32) * part
        variance, value = np.maximum(variance - mean * mean, F32(0)), value - mean
    value = value * (F32(1) / np.sqrt(variance + arithmetic.epsilon_in_steps(call.attributes.epsilon, source.scaled.scale)))
    for index, combine in ((1, np.multiply), (2, np.add)):
        operand = call.operands[index] if len(call.operands) > index else None
        value = value if operand is None else combine(value, operand.real)
    return call.quantized(value)


def _interpolate(call: Call) -> Array:
    a, source = call.attributes, call.operand(0)
    pairs = zip(source.stored.shape[-2:], a.size, a.scales, strict=True)
    (i0, i1, a0, a1), (j0, j1, b0, b1) = (arithmetic.interpolation(n, m, s, a.coordinates) for n, m, s in pairs)
    x, (i0, i1, a0, a1) = source.real, (part[:, None] for part in (i0, i1, a0, a1))
    value = (b0 * a0) * x[..., i0, j0] + (b1 * a0) * x[..., i0, j1]
    value = value + (b0 * a1) * x[..., i1, j0]
    return call.quantized(value + (b1 * a1) * x[..., i1, j1])


# ---- data movement ----------------------------------------------------------------------------------------------------


def _resize(call: Call) -> Array:
    a, stored = call.attributes, call.operand(0).stored
    pairs = zip(stored.shape[-2:], a.size, a.scales, strict=True)
    rows, columns = (arithmetic.nearest_indices(n, m, s, a.coordinates, a.nearest_mode) for n, m, s in pairs)
    return stored[..., rows[:, None], columns]


def _slice(call: Call) -> Array:
    a = call.attributes
    picks = [np.arange(size) * step + start for start, size, step in zip(a.starts, a.sizes, a.steps, strict=True)]
    return call.operand(0).stored[np.ix_(*picks)]


def _gather(call: Call) -> Array:
    """Raises DataError for an index outside the table."""
    axis, (table, indices) = call.attributes.axis, (operand.stored for operand in call.operands if operand is not None)
    rows = table.shape[axis]
    if indices.size and not -rows <= indices.min() <= indices.max() < rows:
        raise DataError(f"{call.node.name}: an index is outside {-rows} to {rows - 1}")
    return np.take(table, indices, axis=axis)


def _pad(call: Call) -> Array:
    a, source = call.attributes, call.operand(0)
    widths = list(zip(a.before, a.after, strict=True))
    if a.mode != "constant":
        return np.pad(source.stored, widths, mode=a.mode)
    fill = int(arithmetic.quantize(np.asarray(a.value, F32), source.scaled)) if source.quant else a.value
    return np.pad(source.stored, widths, constant_values=fill)


def _moving(function: Callable[[Call, list[Array]], Array]) -> Callable[[Call], Array]:
    """A kernel that only moves stored integers: operands and result must share their scale."""

    def kernel(call: Call) -> Array:
        values = [operand for index, operand in enumerate(call.operands) if index not in OPS[call.node.op].indices]
        operands = [operand for operand in values if operand is not None]
        if any(_key(operand.quant) != _key(call.tensor.quant) for operand in operands):
            raise DataError(f"{call.node.name}: operands and result have different scales", hint="the graph is damaged: compile the model again")
        return function(call, [operand.stored for operand in operands])

    return kernel


def _key(quant: Quant | None) -> Any:
    return quant and quant.key


KERNELS: dict[str, Callable[[Call], Array]] = {
    "conv": _matrix,
    "conv_transpose": _matrix,
    "matmul": _matrix,
    "add": _add,
    "sub": _on_reals(np.subtract),
    "mul": _mul,
    "div": _on_reals(np.divide),
    "max": _on_reals(np.maximum),
    "min": _on_reals(np.minimum),
    "compare": _compare,
    "where": _where,
    "table": _table,
    "max_pool": _moving(lambda call, _: _max_pool(call)),
    "average_pool": _average_pool,
    "interpolate": _interpolate,
    "reduce_mean": _reduce_mean,
    "reduce_sum": _reduce_sum,
    "reduce_max": _moving(lambda call, values: values[0].max(axis=call.attributes.axes, keepdims=True)),
    "reduce_min": _moving(lambda call, values: values[0].min(axis=call.attributes.axes, keepdims=True)),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "resize": _moving(lambda call, _: _resize(call)),
    "concat": _moving(lambda call, values: np.concatenate(values, axis=call.attributes.axis)),
    "slice": _moving(lambda call, _: _slice(call)),
    "gather": _moving(lambda call, _: _gather(call)),
    "transpose": _moving(lambda call, values: values[0].transpose(call.attributes.permutation)),
    "reshape": _moving(lambda call, values: values[0].reshape(call.attributes.shape)),
    "expand": _moving(lambda call, values: np.broadcast_to(values[0], np.broadcast_shapes(values[0].shape, call.attributes.shape))),
    "pad": _moving(lambda call, _: _pad(call)),
}
assert KERNELS.keys() == {name for name, record in OPS.items() if not record.host and not record.float_only}
assert SUMS.keys() == {name for name, record in OPS.items() if record.matrix}
