"""The integers of a model that is quantized already, and the reals that they stand for.

The one big idea: a graph tensor holds reals throughout. What QuantizeLinear makes is remembered as steps (scale and zero point) of the ONNX
tensor, so that whoever dequantizes it reads the graph tensor as it is; only who computes with the integers themselves gets them as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from npucc import scalar
from npucc.graph import Given, Quant
from npucc.ops import Quantize

#: ONNX element type → (how it is stored, what is subtracted from stored values and zero points)
FORMS = {
    TensorProto.INT8: ("s8", 0), TensorProto.UINT8: ("s8", 128), TensorProto.INT16: ("s16", 0), TensorProto.UINT16: ("s16", 1 << 15),
    TensorProto.INT32: ("s32", 0),
    **{getattr(TensorProto, name): ("s8", 0) for name in ("INT4", "UINT4", "INT2", "UINT2") if hasattr(TensorProto, name)},
}  # fmt: skip
ACTIVATIONS = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16})
STORAGE = {"s8": np.int8, "s16": np.int16, "s32": np.int32}
#: steps of what DynamicQuantizeLinear makes: none, as its scale is left to calibration; in reals it does nothing
DYNAMIC = Quant("f32", np.asarray(1.0, np.float32), 0)


def as_attributes(quant: Quant, kind: int) -> Quantize:
    """The graph operator that rounds to these steps of ONNX type `kind`."""
    return Quantize(quant.dtype, float(quant.scale), quant.zero, FORMS[kind][1])


def whole(quant: Quant, kind: int) -> scalar.Expression:
    """From a real to the integer of ONNX type `kind` that stands for it."""
    return ("add", ("round", ("div", "x", float(quant.scale))), float(quant.zero + FORMS[kind][1]))


def real(quant: Quant, kind: int) -> scalar.Expression:
    """From an integer of ONNX type `kind` to what it stands for."""
    return ("mul", ("sub", "x", float(quant.zero + FORMS[kind][1])), float(quant.scale))


def constant(integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, kind: int, *, axis: int, block: int) -> tuple[np.ndarray, Given]:
    """What stored integers stand for (float32), and how they are to be kept. `axis`, `block`: of DequantizeLinear."""
    values = integers.astype(np.int64)
    scales = _broadcast(scale.astype(np.float32), values.shape, axis, block)
    zeros = np.zeros((), np.int64) if zero is None else _broadcast(zero.astype(np.int64), values.shape, axis, block)
    value = ((values - zeros).astype(np.float32) * scales).astype(np.float32)
    dtype, shift = FORMS[kind]
    if np.all(zeros == zeros.flat[0]):
        stored, common = values - shift, int(zeros.flat[0]) - shift
    else:
        stored, common = values - zeros, 0
        dtype = "s8" if stored.min() >= -128 and stored.max() <= 127 else "s16"
    return value, Given(dtype, scales, common, stored.astype(STORAGE[dtype]))


def _broadcast(parameter: np.ndarray, shape: Sequence[int], axis: int, block: int) -> np.ndarray:
    """A scale or zero point per tensor, per entry of `axis` or per block along `axis`, so that it broadcasts against `shape`."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis %= len(shape)
    if parameter.ndim == 1 and parameter.size == shape[axis]:
        return parameter.reshape([-1 if index == axis else 1 for index in range(len(shape))])
    repeated = np.repeat(parameter, block or -(-shape[axis] // parameter.shape[axis]), axis=axis)
    return np.take(repeated, range(shape[axis]), axis=axis)
