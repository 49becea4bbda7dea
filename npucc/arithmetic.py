"""The numbers that stand in integer programs: multipliers, clamps, tables, weights of interpolation.

The one big idea: each is derived from scales in one place, in float32 and in one order of operations, so that the integer
reference, the backend and the exported model cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from npucc import scalar
from npucc.graph import Quant
from npucc.ops import Clamp

RANGES = {"s8": (-128, 127), "u8": (0, 255), "s16": (-32768, 32767), "s32": (-(2**31), 2**31 - 1)}
F32 = np.float32
TIE = F32(1e-6)  # of a position in an image
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def multiplier(left: Quant, right: Quant, result: Quant) -> np.ndarray:
    """float32 factor from an accumulator of left·right to the result's steps: f32(f32(s_l·s_r)/s_y), per channel if right is."""
    return np.asarray((F32(left.scale) * right.scale.astype(F32)).astype(F32) / F32(result.scale), F32)


def mean_multiplier(source: Quant, result: Quant, count: int) -> float:
    """float32 factor from a sum of `count` values to the result's steps: f32(s_x / f32(s_y·count)), as onnxruntime's pooling has it."""
    return float(F32(source.scale) / F32(F32(result.scale) * F32(count)))


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    """What sums are multiplied by when they are requantized, in one of the target's modes (`isa.spec`, requant)."""

    mode: str
    scale: np.ndarray  # fp32.rne: float32 factors; q31: int32 multipliers, 0 or from 2^30 to below 2^31
    shift: np.ndarray  # q31: int32 right shifts, 2 to 62; fp32.rne: 0

    @property
    def rows(self) -> np.ndarray:
        """int32 [1 or 2, outputs]: the bits of the float32 factors; or multipliers and shifts."""
        scale = np.ascontiguousarray(self.scale).view(np.int32)
        return np.stack([scale] if self.mode == "fp32.rne" else [scale, self.shift])

    @property
    def attributes(self) -> dict[str, float | int]:
        """Of a single factor, as requant's attributes."""
        if self.mode == "fp32.rne":
            return {"scale": float(self.scale)}
        return {"multiplier": int(self.scale), "shift": int(self.shift)}

    def spread(self, count: int) -> Factor:
        """One for each of `count` outputs."""
        return Factor(self.mode, np.broadcast_to(self.scale, (count,)), np.broadcast_to(self.shift, (count,)))


def product_factor(left: Quant, right: Quant, result: Quant, mode: str) -> Factor:
    """From an accumulator of left·right to the result's steps, per channel if right is. q31: of s_l·s_r/s_y in float64."""
    if mode == "fp32.rne":
        return _float_factor(multiplier(left, right, result))
    return fixed_point(np.float64(left.scale) * np.asarray(right.scale, np.float64) / np.float64(result.scale), mode)


def mean_factor(source: Quant, result: Quant, count: int, mode: str) -> Factor:
    """From a sum of `count` values to the result's steps. q31: of s_x/(s_y·count) in float64."""
    if mode == "fp32.rne":
        return _float_factor(np.asarray(mean_multiplier(source, result, count), F32))
    return fixed_point(np.asarray(np.float64(source.scale) / (np.float64(result.scale) * count)), mode)


def _float_factor(scale: np.ndarray) -> Factor:
    return Factor("fp32.rne", scale, np.zeros(scale.shape, np.int32))


def fixed_point(real: np.ndarray, mode: str) -> Factor:
    """real = scale · 2^-shift with a multiplier of 31 bits, as TFLite's QuantizeMultiplier chooses it.

    Factors below 2^-32 become 0 (every product of 32 bits rounds to 0 anyway), those from 2^29 the largest.
    """
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    scaled = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)  # positive: half away from zero, as std::round
    carry = scaled == 1 << 31
    scaled, shift = np.where(carry, 1 << 30, scaled), 31 - exponent - carry
    scaled, shift = np.where(shift > 62, 0, scaled), np.where(shift > 62, 31, shift)
    scaled, shift = np.where(shift < 2, (1 << 31) - 1, scaled), np.maximum(shift, 2)
    return Factor(mode, scaled.astype(np.int32), shift.astype(np.int32))


def ratio(source: Quant, result: Quant) -> float:
    """f32(s_x / s_y)."""
    return float(F32(source.scale) / F32(result.scale))


def clamp_bounds(clamp: Clamp, result: Quant) -> tuple[int, int]:
    """Lowest and highest stored value of a result whose real value is clamped."""
    low, high = RANGES[result.dtype]
    if clamp is None:
        return low, high
    return max(low, _stored(clamp[0], result, low)), min(high, _stored(clamp[1], result, high))


def _stored(real: float, quant: Quant, otherwise: int) -> int:
    if not math.isfinite(real):
        return otherwise
    low, high = RANGES[quant.dtype]
    return int(min(max(float(np.rint(F32(real) / F32(quant.scale))) + quant.zero, low), high))


def quantize(real: np.ndarray, quant: Quant) -> np.ndarray:
    """saturate(rint(x / s) + zero) in float32, NaN as the zero point; int64."""
    low, high = RANGES[quant.dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(real.astype(F32) / F32(quant.scale)) + F32(quant.zero)
    steps = np.where(np.isnan(steps), F32(quant.zero), steps)
    return np.asarray(np.clip(steps.astype(np.float64), low, high), np.int64)


@dataclass(frozen=True, slots=True)
class LookUp:
    """A table as the `lut` instruction reads it: entry i stands at x = base + (i << shift); between entries it is interpolated.

    Entries are results in steps of 2^-fraction_bits. `missing`: what is added where interpolation is far off, zero at its ends.
    """

    entries: np.ndarray  # int64
    base: int
    shift: int = 0
    fraction_bits: int = 0
    missing: LookUp | None = None

    def at(self, stored: np.ndarray) -> np.ndarray:
        """Entries at each stored value, int64; between entries, linear interpolation rounded to nearest."""
        position = np.clip(np.asarray(stored, np.int64) - self.base, 0, (len(self.entries) - 1) << self.shift)
        if self.shift:
            index = np.minimum(position >> self.shift, len(self.entries) - 2)
            low, high = self.entries[index], self.entries[index + 1]
            found = low + (((high - low) * (position - (index << self.shift)) + (1 << (self.shift - 1))) >> self.shift)
        else:
            found = self.entries[position]
        return np.asarray(found if self.missing is None else found + self.missing.at(stored))


#: int16 inputs: an entry per 64 values, that is 1,025 instead of 65,536
WIDE_SHIFT = 6
#: a logarithm or reciprocal is far from a line next to zero: the values of x around there that may have entries of their own
EXACT_PART = 512
#: by element type of the result: an error of interpolation that is not worth it, in steps of 16 bits
SMALL_ERROR = {"s8": 128, "s16": 32}


def table(expression: scalar.Expression, source: Quant, result: Quant) -> LookUp:
    """The stored results of a function of one variable: every input of 8 bits, every 64th of 16 bits."""
    low, high = RANGES[source.dtype]
    if source.dtype != "s16":
        return LookUp(quantize(_values(expression, np.arange(low, high + 1), source), result), low)
    entries = _entries(expression, np.arange(low, high + 2, 1 << WIDE_SHIFT), source, result)
    values = LookUp(entries, low, WIDE_SHIFT, 8 if result.dtype == "s8" else 0)
    return replace(values, missing=_missing(values, expression, source, result))


def _entries(expression: scalar.Expression, stored: np.ndarray, source: Quant, result: Quant) -> np.ndarray:
    """Results in their own steps; those of 8 bits with 8 more behind the point."""
    value = _values(expression, stored, source)
    if result.dtype != "s8":
        return quantize(value, result)
    with np.errstate(invalid="ignore", over="ignore"):
        fine = np.rint((value / F32(result.scale) + F32(result.zero)) * F32(256))
    fine = np.where(np.isnan(fine), F32(256 * result.zero), fine)
    return np.asarray(np.clip(fine, *RANGES["s16"]), np.int64)


def _missing(values: LookUp, expression: scalar.Expression, source: Quant, result: Quant) -> LookUp | None:
    """What interpolation lacks in the neighbouring values of x where it lacks most; None where it lacks little, or as much elsewhere."""

    if result.dtype not in SMALL_ERROR:
        return None

    def lacking(stored: np.ndarray) -> np.ndarray:
        return np.asarray(_entries(expression, stored, source, result) - values.at(stored))

    low, high = RANGES["s16"]
    if np.abs(lacking(np.arange(low + (1 << WIDE_SHIFT) // 2, high, 1 << WIDE_SHIFT))).max() <= SMALL_ERROR[result.dtype]:
        return None
    missing = lacking(np.arange(low, high + 1))
    total = np.cumsum(np.concatenate([[0], np.abs(missing)]))
    inside = total[EXACT_PART:] - total[:-EXACT_PART]
    start = int(np.argmax(inside))
    if 2 * inside[start] < total[-1]:
        return None
    first, last = max(start - 1, 0), min(start + EXACT_PART, high - low)
    part = np.clip(missing[first : last + 1], low, high)
    part[: start - first] = 0
    part[start + EXACT_PART - first :] = 0
    return LookUp(part, low + first)


#: expression → the instruction that computes it (mul: of x with itself)
DIRECT: dict[scalar.Expression, str] = {"x": "cvt", ("sqrt", "x"): "sqrt", ("pow", "x", 2.0): "mul", ("mul", "x", "x"): "mul"}


def without_table(expression: scalar.Expression, source: Quant) -> str:
    """The instruction that computes a function of a tensor too wide for a full table, exactly as it is; "" if there is none.

    A mere clip is `cvt` with its limits (see `direct_bounds`).
    """
    if source.dtype in ("s16", "s32"):
        return "cvt" if scalar.is_clip(expression) else DIRECT.get(expression, "")
    return ""


def direct_bounds(expression: scalar.Expression, result: Quant) -> tuple[int, int]:
    """Lowest and highest stored result of an instruction that takes the place of a table."""
    return clamp_bounds(scalar.is_clip(expression), result)


def _values(expression: scalar.Expression, stored: np.ndarray, source: Quant) -> np.ndarray:
    real = (stored - source.zero).astype(F32) * F32(source.scale)
    with np.errstate(all="ignore"):
        value = scalar.evaluate(expression, real)
    return np.array(np.broadcast_to(np.asarray(value, F32), real.shape))


def softmax_exponentials(source: Quant, length: int) -> LookUp:
    """Fixed-point exp(s·d) for differences d ≤ 0, scaled by 2^k so that `length` of them sum within 31 bits."""
    low, high = RANGES[source.dtype]
    shift = WIDE_SHIFT if source.dtype == "s16" else 0
    bits = min(20, 30 - math.ceil(math.log2(max(length, 1))))
    base = low - high - (1 if shift else 0)
    distance = np.arange(base, 1, 1 << shift, dtype=np.float64)
    return LookUp(np.rint(2.0**bits * np.exp(float(source.scale) * distance)).astype(np.int64), base, shift)


def softmax_steps(result: Quant) -> Quant:
    """How an 8-bit softmax rounds: as onnxruntime's kernel, whose steps per 1 are rounded down to a whole number."""
    steps = math.floor(F32(1) / F32(result.scale))
    return Quant(result.dtype, np.asarray(1 / steps, F32), result.zero) if result.dtype == "s8" and steps else result


def interpolation(size: int, result: int, scale: float, coordinates: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per result index: the two source indices and their float32 weights, as onnxruntime computes them."""
    position = np.clip(source_positions(size, result, scale, coordinates), 0, size - 1).astype(F32)
    first = np.minimum(position.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    to_first, to_second = np.abs(position - first.astype(F32)).astype(F32), np.abs(position - second.astype(F32)).astype(F32)
    same = first == second
    to_first[same] = to_second[same] = F32(0.5)
    return first, second, to_second, to_first


def epsilon_in_steps(epsilon: float, scale: np.ndarray | float) -> np.float32:
    """What layer normalization adds to the variance of integers of this scale."""
    in_steps: np.float32 = np.float32(epsilon / float(scale) ** 2)
    return in_steps


def nearest_indices(size: int, result: int, scale: float, coordinates: str, rounding: str) -> np.ndarray:
    """The source index of each result index. Raises KeyError for an unknown rounding."""
    return whole_positions(source_positions(size, result, scale, coordinates), rounding, size)


def whole_positions(position: np.ndarray, rounding: str, size: int) -> np.ndarray:
    """Positions rounded, within 0 … size − 1. Half way is so to a millionth, as in onnxruntime. Raises KeyError for an unknown rounding."""
    below = np.floor(position)
    tie = np.abs(position - below - F32(0.5)) <= TIE
    rounded = {
        "round_prefer_floor": np.where(tie, below, np.floor(position + F32(0.5))),
        "round_prefer_ceil": np.where(tie, below + 1, np.floor(position + F32(0.5))),
        "floor": below,
        "ceil": np.ceil(position),
    }[rounding]
    return np.asarray(np.clip(rounded.astype(np.int64), 0, size - 1))


def source_positions(size: int, result: int, scale: float, coordinates: str) -> np.ndarray:
    """Where each result index lies in the source, in float32 (ONNX Resize, coordinate_transformation_mode)."""
    index, factor = np.arange(result, dtype=F32), F32(scale)
    if coordinates == "asymmetric":
        return np.asarray(index / factor, F32)
    if coordinates == "align_corners":
        return np.asarray(index * F32(size - 1) / F32(result - 1), F32) if result > 1 else np.zeros(1, F32)
    if coordinates == "pytorch_half_pixel":
        return np.asarray((index + F32(0.5)) / factor - F32(0.5), F32) if result > 1 else np.zeros(1, F32)
    if coordinates == "half_pixel":
        return np.asarray((index + F32(0.5)) / factor - F32(0.5), F32)
    raise KeyError(coordinates)
