"""Fixed-point factors: the closest 31-bit multiplier, its shift, and what lies beyond their range."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npucc import arithmetic
from npucc.graph import Quant


def quantize_multiplier(real: float) -> tuple[int, int]:
    """TensorFlow Lite's QuantizeMultiplier (kernels/internal/quantization_util.cc), for positive factors; the shift goes left."""
    fraction, shift = math.frexp(real)
    fixed = math.floor(Fraction(fraction) * (1 << 31) + Fraction(1, 2))
    if fixed == 1 << 31:
        fixed, shift = fixed // 2, shift + 1
    return (0, 0) if shift < -31 else (fixed, shift)


@given(st.floats(2.0**-40, 2.0**28))
def test_multiplier_and_shift_are_tflites(real: float) -> None:
    factor = arithmetic.fixed_point(np.asarray(real), "q31.tfl")
    assert (int(factor.scale), 31 - int(factor.shift)) == quantize_multiplier(real)


@pytest.mark.parametrize(
    ("real", "expected"),
    [(1.0, (1 << 30, 30)), (0.5, (1 << 30, 31)), (1 - 2.0**-40, (1 << 30, 30)), (2.0**-32, (1 << 30, 62)), (2.0**-33, (0, 31)),
     (2.0**29, ((1 << 31) - 1, 2)), (1e30, ((1 << 31) - 1, 2))],
)  # fmt: skip
def test_factors_at_the_ends(real: float, expected: tuple[int, int]) -> None:
    factor = arithmetic.fixed_point(np.asarray(real), "q31.rne")
    assert factor.attributes == dict(zip(("multiplier", "shift"), expected, strict=True))


@given(st.lists(st.floats(2.0**-20, 2.0**4, width=32), min_size=1, max_size=5), st.floats(2.0**-12, 2.0**3, width=32))
def test_rows_of_a_product(scales: list[float], scale: float) -> None:
    """Per channel: within half a unit of the 31-bit multiplier of s_l·s_r/s_y; float32 bits in the float mode."""
    left, right, result = Quant("s8", np.float32(0.25), 3), Quant("s8", np.array(scales, np.float32), 0, axis=0), Quant("s8", np.float32(scale), 5)
    fixed = arithmetic.product_factor(left, right, result, "q31.rne").rows
    for real, multiplier, shift in zip(scales, *fixed.tolist(), strict=True):
        exact = Fraction(real) / 4 / Fraction(float(np.float32(scale)))
        assert abs(Fraction(multiplier, 1 << shift) / exact - 1) <= Fraction(1, 1 << 30)
    floats = arithmetic.product_factor(left, right, result, "fp32.rne").rows
    assert floats.view(np.float32).tolist() == arithmetic.multiplier(left, right, result)[None].tolist()
