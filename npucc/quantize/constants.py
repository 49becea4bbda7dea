"""Weights, biases and other constants as integers.

The one big idea: a weight's scale is its largest magnitude per output channel over 127, widened only where the bias or the sum would
leave 32 bits. Whatever the data, an accumulator can't wrap, but for those of a model that is quantized already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npucc.arithmetic import RANGES
from npucc.errors import QuantizeError
from npucc.graph import Node, Quant
from npucc.quantize.ranges import LARGEST, SMALLEST, Range, activation_quant

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST_WEIGHT = 127
LARGEST_SUM = 2.0**31 - 2**16
LARGEST_STEP = 255  # of an s8 activation from its zero point
SMALLEST_SCALE = 1e-30  # of an accumulator: below, float32 loses digits


@dataclass(frozen=True, slots=True)
class MatrixConstants:
    """A matrix operator's integer weights and bias (None: it has none) with their scales."""

    weights: Array
    weights_quant: Quant
    bias: Array | None
    bias_quant: Quant


@dataclass(frozen=True, slots=True)
class Axes:
    """Dimensions of a weight. `output`: of the output channels; None where one scale must do. `summed`: that one output sums over, or more."""

    output: int | None
    summed: tuple[int, ...]


def axes_of(node: Node, rank: int, *, per_tensor: bool = False) -> Axes:
    """Those of a matrix operator's weights."""
    if node.op == "conv":
        axes = Axes(0, (1, 2, 3))
    elif node.op == "conv_transpose":
        axes = Axes(1 if node.attributes.groups == 1 else None, (0, 2, 3))  # type: ignore[attr-defined]
    else:
        axes = Axes(1 if rank == 2 else None, (rank - 2,))
    return replace(axes, output=None) if per_tensor else axes


def nearest(steps: Array) -> Array:
    """Weights over their scale as the nearest stored integers."""
    return np.asarray(np.clip(np.rint(steps), -LARGEST_WEIGHT, LARGEST_WEIGHT))


def quantize_matrix(
    weights: Array, bias: Array | None, source: Quant, axes: Axes, *, rounding: Callable[[Array], Array] = nearest
) -> MatrixConstants:
    """Symmetric s8 weights, s32 bias at scale s_x·s_w. `rounding`: from weights over their scale to integers."""
    axis = axes.output
    scale = _guarded_scale(weights.astype(np.float64), bias, source, axes)
    accumulator = (np.float32(source.scale) * scale).astype(np.float32)
    offset = None if bias is None else stored_bias(bias, accumulator)
    steps = weights / _along(scale, axis, weights.ndim)
    rounded = rounding(steps)
    stored = np.where(fits(rounded, offset, source, axes), rounded, nearest(steps)).astype(np.int8)
    bias_quant = Quant("s32", np.asarray(accumulator), 0, None if axis is None else 0)
    return MatrixConstants(stored, Quant("s8", np.asarray(scale), 0, axis), offset, bias_quant)


def fits(stored: Array, bias: Array | None, source: Quant, axes: Axes) -> Array:
    """Per output channel, shaped to broadcast over the weights: whether no input can bring the sum out of 32 bits."""
    worst = np.abs(stored.astype(np.float64)).sum(axis=axes.summed, keepdims=True) * largest_step(source)
    if bias is None or not bias.size:
        return np.asarray(worst <= LARGEST_SUM)
    offset = np.abs(bias.astype(np.float64))
    return np.asarray(worst + (offset.max() if axes.output is None else _along(offset, axes.output, stored.ndim)) <= LARGEST_SUM)


def with_bias(constants: MatrixConstants, weights: Array, bias: Array, source: Quant, axes: Axes) -> MatrixConstants | None:
    """The same weights with another bias; None where that takes a wider scale."""
    if not np.array_equal(_guarded_scale(weights.astype(np.float64), bias, source, axes), constants.weights_quant.scale):
        return None
    return replace(constants, bias=stored_bias(bias, np.asarray(constants.bias_quant.scale)))


def stored_bias(bias: Array, scale: Array) -> Array:
    """The bias in steps of the accumulator, int32."""
    return np.clip(np.rint(bias.astype(np.float64) / scale.astype(np.float64)), -LARGEST_SUM, LARGEST_SUM).astype(np.int32)


def _guarded_scale(weights: Array, bias: Array | None, source: Quant, axes: Axes) -> Array:
    """Per channel (or one): largest magnitude / 127, widened until bias and worst sum fit 32 bits. A channel of zeros gets the median scale."""
    axis = axes.output
    others = tuple(i for i in range(weights.ndim) if i != axis) if axis is not None else None
    largest = np.abs(weights).max(axis=others) if weights.size else np.zeros(())
    scale = np.atleast_1d(largest / LARGEST_WEIGHT).astype(np.float64)
    usable = scale[scale > SMALLEST]
    scale[scale <= SMALLEST] = np.median(usable) if usable.size else 1.0
    sums = np.abs(weights).sum(axis=axes.summed) * largest_step(source) * 1.01
    worst = np.atleast_1d(sums) if axis is not None else np.atleast_1d(np.max(sums, initial=0.0))
    needed = worst / LARGEST_SUM
    if bias is not None and bias.size:
        magnitude = np.abs(bias.astype(np.float64))
        needed = needed + (magnitude if axis is not None else magnitude.max()) / float(source.scale) / LARGEST_SUM
    scale = np.maximum(np.maximum(scale, needed), SMALLEST_SCALE / float(source.scale))
    return scale.astype(np.float32).reshape(largest.shape)


def largest_step(source: Quant) -> int:
    """How far an activation can be from its zero point."""
    low, high = RANGES[source.dtype]
    return LARGEST_STEP if source.dtype == "s8" else max(high - source.zero, source.zero - low)


def _along(scale: Array, axis: int | None, rank: int) -> Array:
    """The scales shaped to broadcast over the weights."""
    return scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(rank)])


def dequantized(constants: MatrixConstants) -> Array:
    """What the stored weights stand for, float64."""
    quant = constants.weights_quant
    return constants.weights.astype(np.float64) * _along(quant.scale.astype(np.float64), quant.axis, constants.weights.ndim)


def source_of(node: Node) -> str:
    """The ONNX node to name in an error."""
    return node.sources[-1] if node.sources else node.name


def finite_constant(node: Node, name: str, data: Array, reach: float) -> Array:
    """A constant operand, float64, with nothing beyond ±reach if it is added or selected: the result saturates there anyway.

    Elsewhere only infinities end there. Raises QuantizeError for NaN.
    """
    values = data.astype(np.float64)
    if np.isnan(values).any():
        raise QuantizeError(f"the constant {name!r} holds NaN", node=source_of(node), hint="NaN has no integer form; correct the model")
    if node.op in ("add", "sub", "where"):
        return np.clip(values, -reach, reach)
    return np.clip(np.where(np.isinf(values), np.sign(values) * reach, values), -LARGEST, LARGEST)


def constant_quant(values: Array, *, wide: bool = False) -> Quant:
    """For an operand that is no weight: exact for whole numbers that fit and for a single value, else asymmetric over its range.

    `wide`: another operand or the result is stored in 16 bits, so this one may be, too.
    """
    covered = Range(min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0))
    if bool((values == np.rint(values)).all()):
        if covered.width <= LARGEST_STEP:
            return Quant("s8", np.asarray(1.0, np.float32), int(np.clip(-128 - covered.low, -128, 127)))
        if wide and max(-covered.low, covered.high) < 2**15:
            return Quant("s16", np.asarray(1.0, np.float32), 0)
    distinct = np.unique(values[values != 0])
    if distinct.size == 1 and abs(float(distinct[0])) > SMALLEST:
        return Quant("s8", np.asarray(abs(distinct[0]) / LARGEST_WEIGHT, np.float32), 0)
    return activation_quant(covered, "s16" if wide else "s8")
