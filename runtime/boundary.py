"""Where real numbers become stored integers and back: the program's inputs and outputs.

The one big idea: the caller speaks the model's shapes and types; the record's tile says where and how the bytes lie. In between
stands one formula in float32: stored = saturate(rint(x / scale) + zero), real = (stored - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from isa.program import TensorRecord
from runtime.errors import RuntimeFault
from runtime.memory import NAMES, Array
from runtime.requantize import DEFAULT_CLAMP, round_and_clamp

FLOATS = ("float16", "float32", "float64")


def check_names(inputs: Mapping[str, Any], records: tuple[TensorRecord, ...]) -> None:
    """Raise RuntimeFault when an input is missing or unknown."""
    expected = [record.name for record in records]
    missing, unknown = [name for name in expected if name not in inputs], [name for name in inputs if name not in expected]
    if missing or unknown:
        told = "; ".join(f"{what} {', '.join(map(repr, names))}" for what, names in (("missing:", missing), ("unknown:", unknown)) if names)
        raise RuntimeFault(f"the inputs do not fit the program: {told}", hint=f"give exactly: {', '.join(map(repr, expected)) or 'none'}")


def to_stored(record: TensorRecord, value: Any, dtype: np.dtype[Any]) -> Array:
    """An input in its logical shape as the integers (or floats) that its tile holds. Raises RuntimeFault."""
    array = np.asarray(value)
    if array.shape != record.tile.shape:
        raise RuntimeFault(f"input {record.name!r} has shape {list(array.shape)}", hint=f"expected {list(record.tile.shape)}")
    if array.dtype.kind not in "fiub":
        raise RuntimeFault(f"input {record.name!r} holds {array.dtype}", hint=f"expected numbers ({record.dtype})")
    if array.dtype.kind == "f" and dtype.kind != "f" and np.isnan(array).any():
        raise RuntimeFault(f"input {record.name!r} has NaN values", hint="a quantized network has no place for them; clean the data")
    if dtype.kind == "f":
        return array.astype(dtype)
    if record.dtype in FLOATS or record.scale != 1.0:
        with np.errstate(over="ignore"):
            reals = array.astype(np.float32)
            reals /= np.float32(record.scale)
        return round_and_clamp(reals, record.zero, NAMES[dtype], DEFAULT_CLAMP)
    return _exact(record, array, dtype)


def _exact(record: TensorRecord, array: Array, dtype: np.dtype[Any]) -> Array:
    """Integers as they are: a value that the tile can't hold is a fault, never a silent change."""
    if array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise RuntimeFault(f"input {record.name!r} has fractions", hint=f"expected integers ({record.dtype})")
    limits = np.iinfo(dtype)
    low, high = int(limits.min) - record.zero, int(limits.max) - record.zero
    if array.size and not low <= min(array.min(), array.max()) <= max(array.min(), array.max()) <= high:
        raise RuntimeFault(f"input {record.name!r} has values from {array.min()} to {array.max()}", hint=f"the program holds {low} to {high}")
    if not record.zero:
        return array.astype(dtype)
    stored: Array = (array.astype(np.int64) + record.zero).astype(dtype)
    return stored


def to_real(record: TensorRecord, stored: Array) -> Array:
    """What the stored values stand for, in the model's element type: float32, or the integer or boolean type outside."""
    if stored.dtype.kind == "f":
        return stored.astype(_outside(record) if stored.dtype == np.float32 else np.dtype(record.dtype))
    if record.dtype not in FLOATS and (record.scale, record.zero) == (1.0, 0):
        return stored.astype(_outside(record))
    steps: Array = stored.astype(np.int64) - record.zero
    if record.dtype in FLOATS or record.scale != 1.0:
        steps = steps.astype(np.float32) * np.float32(record.scale)
    return steps.astype(_outside(record))


def _outside(record: TensorRecord) -> np.dtype[Any]:
    """The element type on the outside; float16 and float64 results come as float32. Raises RuntimeFault for an unknown name."""
    if record.dtype in FLOATS:
        return np.dtype(np.float32)
    try:
        dtype = np.dtype(record.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iub":
        raise RuntimeFault(f"tensor {record.name!r} has the unknown element type {record.dtype!r}", hint="use a name such as float32, int64 or bool")
    return dtype
