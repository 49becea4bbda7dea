"""Ranges of values, and the scales that cover them.

The one big idea: a tensor's values are remembered as a histogram whose bins are a power of two wide. When a value does not fit, pairs of
bins merge; nothing is lost but resolution, and the result does not depend on the order of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npucc import scalar
from npucc.arithmetic import RANGES
from npucc.graph import Quant
from npucc.scalar import Expression

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 4096  # on each side of zero; at least half of the wider side is in use, so a step of 8 bits has 8 bins or more
SAMPLED = 1 << 18  # values counted per array; minimum and maximum always see all
SMALLEST = 1e-12  # a range narrower than this is taken for zero: its scale would leave float32
LARGEST = 1e30  # what lies beyond (a mask of -3.4e38) saturates: its steps would leave float32
STEPS = 255


@dataclass(frozen=True, slots=True)
class Range:
    """low ≤ 0 ≤ high, finite."""

    low: float = 0.0
    high: float = 0.0

    @property
    def width(self) -> float:
        return self.high - self.low

    def joined(self, other: Range) -> Range:
        """The narrowest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def within(self, low: float, high: float) -> Range:
        """The part between two limits (and zero)."""
        return Range(min(0.0, max(self.low, low)), max(0.0, min(self.high, high)))


class Histogram:
    """Counts of values in bins `width` wide around zero; `counts[BINS + i]` holds [i·width, (i+1)·width)."""

    def __init__(self) -> None:
        self.counts = np.zeros(2 * BINS, np.int64)
        self.width = 0.0
        self.low = self.high = 0.0
        self.infinite = 0
        self.lows = self.highs = 0.0  # of each array the least and the largest value, summed
        self.arrays = 0
        self.least_error: dict[Expression, Range] = {}  # found by `least_error_range`, by the function; the search for 16 bits asks many times

    @property
    def observed(self) -> Range:
        return Range(self.low, self.high)

    @property
    def average(self) -> Range:
        """From the least to the largest value of an array, averaged over the arrays."""
        return Range(min(self.lows / max(self.arrays, 1), 0.0), max(self.highs / max(self.arrays, 1), 0.0))

    def add(self, values: Array) -> None:
        """Count the values; infinite ones are only noted. NaN is the caller's to refuse."""
        self.least_error.clear()
        flat = values.reshape(-1).astype(np.float32, copy=False)
        finite = np.isfinite(flat)
        if not finite.all():
            self.infinite += int(flat.size - finite.sum())
            flat = flat[finite]
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        self.lows, self.highs, self.arrays = self.lows + low, self.highs + high, self.arrays + 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-self.low, self.high))
        sampled = flat[:: (flat.size // SAMPLED) | 1]
        if self.width:
            index = np.floor(sampled.astype(np.float64) / self.width).astype(np.int64)
            self.counts += np.bincount(np.clip(index + BINS, 0, 2 * BINS - 1), minlength=2 * BINS)
        else:
            self.counts[BINS] += sampled.size

    def merge(self, other: Histogram) -> None:
        """Count what the other has counted. The other stays as it is."""
        self.least_error.clear()
        average, other_average = self.average, other.average
        joined, self.arrays = average.joined(other_average), max(self.arrays, other.arrays)
        self.lows, self.highs = joined.low * self.arrays, joined.high * self.arrays
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.infinite += other.infinite
        largest = max(-self.low, self.high, other.width * BINS / 2)
        same = Histogram()
        same.counts, same.width = other.counts.copy(), other.width
        self._widen(largest)
        same._widen(largest)
        self.counts += same.counts

    def _widen(self, largest: float) -> None:
        """Make the bins as wide as it takes to hold ±largest."""
        if largest <= 0:
            return
        needed = math.ldexp(1.0, max(math.frexp(largest / BINS)[1], -120))
        if not self.width:
            self.counts[BINS], self.width = self.counts.sum(), needed
        while self.width < needed:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = pairs
            self.width *= 2

    def values(self) -> tuple[Array, Array]:
        """(centres, counts) of the bins that are not empty. The bin that starts at zero counts as zero."""
        index = np.flatnonzero(self.counts)
        centres = (index - BINS + 0.5) * self.width
        centres[index == BINS] = 0.0
        return centres, self.counts[index]


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Of all that they counted; one that several tensors share counts once. The only one is handed back itself."""
    different = list({id(each): each for each in histograms}.values())
    if len(different) == 1:
        return different[0]
    whole = Histogram()
    for each in different:
        whole.merge(each)
    return whole


@dataclass(frozen=True, slots=True)
class RangeMethod:
    """A way to choose what 8 bits cover: of a histogram, what its values go through next (see `Fit`), and the percentile of the options."""

    name: str
    meaning: str
    choose: Callable[[Histogram, Expression, float], Range]


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The range that leaves out the same share of values at either end."""
    centres, counts = histogram.values()
    below = np.cumsum(counts) / counts.sum()
    outside = (1 - percentile / 100) / 2
    low = centres[np.searchsorted(below, outside, side="right").clip(0, len(centres) - 1)]
    high = centres[np.searchsorted(below, 1 - outside, side="left").clip(0, len(centres) - 1)]
    half = histogram.width / 2
    return Range(min(float(low) - half, 0.0), max(float(high) + half, 0.0)).within(histogram.low, histogram.high)


@dataclass(frozen=True, slots=True)
class Fit:
    """Measures how well a range serves the values of a histogram.

    The error is that of `function` of the values: what a tanh or hard-swish flattens anyway need not be told apart. "x" is the values' own.
    """

    centres: Array
    counts: Array
    function: Expression
    wanted: Array

    @classmethod
    def of(cls, histogram: Histogram, function: Expression = "x") -> Fit:
        centres, counts = histogram.values()
        return cls(centres, counts, function, _through(function, centres))

    def error(self, candidate: Range) -> float:
        """Mean squared error when stored as s8 over the candidate."""
        scale, zero = scale_and_zero(candidate, "s8")
        stored = np.minimum(np.maximum(np.rint(self.centres / scale) + zero, -128), 127)
        found = (stored - zero) * scale
        if self.function != "x":
            levels = _through(self.function, (np.arange(-128.0, 128.0) - zero) * scale)
            found = levels[stored.astype(np.int64) + 128]
        error = found - self.wanted
        return float(np.dot(error * error, self.counts) / self.counts.sum())


def _through(function: Expression, values: Array) -> Array:
    """The function of the values, float64; where it has none, zero."""
    if function == "x":
        return values
    return np.nan_to_num(scalar.evaluate(function, values.astype(np.float32)).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def least_error_range(histogram: Histogram, function: Expression = "x") -> Range:
    """The range with the least mean squared error of rounding and clipping: both ends together first, then each alone."""
    if function not in histogram.least_error:
        histogram.least_error[function] = _search_least_error(histogram, function)
    return histogram.least_error[function]


def _search_least_error(histogram: Histogram, function: Expression) -> Range:
    observed, fit = histogram.observed, Fit.of(histogram, function)

    def best_of(candidates: Iterable[Range]) -> Range:
        return min((each.within(observed.low, observed.high) for each in candidates), key=fit.error)

    parts = [0.95**i for i in range(40)]
    best = best_of(Range(observed.low * part, observed.high * part) for part in parts)
    best = best_of([best, *(Range(observed.low * part, best.high) for part in parts)])
    best = best_of([best, *(Range(best.low, observed.high * part) for part in parts)])
    for step in (0.1, 0.03, 0.03, 0.01, 0.01):
        factors = [1 + step * i for i in range(-4, 5)]
        best = best_of([Range(best.low * factor, best.high) for factor in factors])
        best = best_of([Range(best.low, best.high * factor) for factor in factors])
    return best


def entropy_range(histogram: Histogram) -> Range:
    """The range whose 255 steps tell most about the values: least Kullback-Leibler divergence, values cut off at one magnitude.

    Szymon Migacz, 8-bit Inference with TensorRT, GTC 2017.
    """
    observed = histogram.observed
    centres, counts = histogram.values()
    largest = max(-observed.low, observed.high)
    candidates = [observed.within(-largest * 0.95**i, largest * 0.95**i) for i in range(60)]
    return min(candidates, key=lambda each: _divergence(centres, counts, each))


def _divergence(centres: Array, counts: Array, covered: Range) -> float:
    """Of the values as stored in 8 bits (evenly spread over the bins of a step) from the values with those outside moved to the ends."""
    inside = (centres >= covered.low) & (centres <= covered.high)
    if inside.sum() < 2:
        return math.inf
    kept = counts[inside].astype(np.float64)
    clipped = kept.copy()
    clipped[0] += counts[centres < covered.low].sum()
    clipped[-1] += counts[centres > covered.high].sum()
    scale, zero = scale_and_zero(covered, "s8")
    steps = (np.clip(np.rint(centres[inside] / scale) + zero, -128, 127) + 128).astype(np.int64)
    spread = (np.bincount(steps, kept, 256) / np.maximum(np.bincount(steps, minlength=256), 1))[steps]
    share, found = clipped / clipped.sum(), spread / spread.sum()
    return float(np.sum(share * np.log(share / found)))


#: the first is what is used where nothing is measured
METHODS = (
    RangeMethod("mse", "least mean squared error of what reads the values", lambda histogram, function, _: least_error_range(histogram, function)),
    RangeMethod("minmax", "all values seen", lambda histogram, *_: histogram.observed),
    RangeMethod("average", "least and largest value of a sample, averaged over the samples", lambda histogram, *_: histogram.average),
    RangeMethod("percentile", "all but a small share of the values at either end", lambda histogram, _, share: percentile_range(histogram, share)),
    RangeMethod("entropy", "least divergence of the stored distribution from that of the values", lambda histogram, *_: entropy_range(histogram)),
)


def choose_range(histogram: Histogram, method: str, *, percentile: float = 99.99, function: Expression = "x") -> Range:
    """The range to cover with 8 bits by the method with that name. `function`: what the values go through next (see `Fit`)."""
    observed = histogram.observed
    if observed.width < SMALLEST:
        return observed
    (record,) = (record for record in METHODS if record.name == method)
    return record.choose(histogram, function, percentile)


def scale_and_zero(covered: Range, dtype: str) -> tuple[np.float32, int]:
    """Asymmetric: zero is stored exactly. An empty range gets scale 1."""
    low, high = RANGES[dtype]
    covered = covered.within(-LARGEST, LARGEST)
    if covered.width < SMALLEST:
        return np.float32(1.0), low
    scale = np.float32(covered.width / (high - low))
    return scale, int(np.clip(np.rint(low - covered.low / float(scale)), low, high))


def activation_quant(covered: Range, dtype: str = "s8") -> Quant:
    """How a tensor with this range is stored."""
    scale, zero = scale_and_zero(covered, dtype)
    return Quant(dtype, np.asarray(scale), zero)
