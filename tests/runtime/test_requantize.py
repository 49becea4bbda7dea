"""The modes of requant against their definitions, the published ones where there are, written out on Python integers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isa import CheckError, check, parse_program

from .harness import execute

SETTINGS = settings(max_examples=150, deadline=None)
LOW, HIGH = -(2**31), 2**31 - 1
#: sums at the ends and around zero
EDGES = [LOW, LOW + 1, LOW + 2, HIGH, HIGH - 1, -1, 0, 1, 2, -2, 1 << 30, -(1 << 30)]
sums = st.one_of(st.sampled_from(EDGES), st.integers(LOW, HIGH), st.integers(-70000, 70000))
multipliers = st.one_of(st.sampled_from([0, 1, 1 << 30, (1 << 30) + 1, HIGH, HIGH - 1, 3 << 29]), st.integers(1 << 30, HIGH), st.integers(0, HIGH))


# ---- the definitions ---------------------------------------------------------------------------------------------------


def q31_rne(value: int, multiplier: int, shift: int) -> int:
    """Python's own rounding of an exact fraction: half to even."""
    return round(Fraction(value * multiplier, 1 << shift))


def apply_scale_32(value: int, multiplier: int, shift: int, double_round: bool = False) -> int:
    """TOSA 1.0, section 4.8.3, for shifts of 2 to 62; a shift of 0 rounds nothing here."""
    rounding = 1 << (shift - 1) if shift else 0
    if double_round and shift > 31:
        rounding += (1 << 30) if value >= 0 else -(1 << 30)
    return (value * multiplier + rounding) >> shift


def saturating_rounding_doubling_high_mul(a: int, b: int) -> int:
    """gemmlowp, fixedpoint.h; C++'s division truncates."""
    if a == b == LOW:
        return HIGH
    product = a * b
    nudged = product + ((1 << 30) if product >= 0 else 1 - (1 << 30))
    return nudged // (1 << 31) if nudged >= 0 else -(-nudged // (1 << 31))


def rounding_divide_by_pot(x: int, exponent: int) -> int:
    """gemmlowp, fixedpoint.h."""
    mask = (1 << exponent) - 1
    remainder, threshold = x & mask, (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def multiply_by_quantized_multiplier(x: int, multiplier: int, shift: int) -> int:
    """TensorFlow Lite, kernels/internal/common.h; x << left is undefined there when it overflows, and saturates here."""
    left, right = max(shift, 0), max(-shift, 0)
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(min(max(x << left, LOW), HIGH), multiplier), right)


def float32(value: Fraction) -> Fraction:
    """The nearest number of 24 bits, half to even, and no finer than float32's 2^-149; beyond float32's range it stays as it is."""
    digits = abs(value.numerator).bit_length() - value.denominator.bit_length()
    unit = Fraction(2) ** max(digits - (23 if abs(value) >= Fraction(2) ** digits else 24), -149)
    return round(value / unit) * unit


ORACLES = {
    "q31.rne": q31_rne,
    "q31.tosa": apply_scale_32,
    "q31.tfl": lambda x, m, r: multiply_by_quantized_multiplier(x, m, 31 - r),
}
MODES = list(ORACLES)


def expected(mode: str, values: Any, multipliers: Any, shifts: Any, zero: int, dtype: str, clamp: tuple[int, int]) -> list[int]:
    low, high = clamp if clamp != (-128, 127) or dtype == "s8" else (-(1 << 15), (1 << 15) - 1)
    oracle = ORACLES[mode]
    rows = [zip(row, multipliers, shifts, strict=True) for row in np.asarray(values).tolist()]
    return [min(max(oracle(x, m, r) + zero, low), high) for row in rows for x, m, r in row]


# ---- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@SETTINGS
@given(data=st.data(), zero=st.integers(-128, 127), dtype=st.sampled_from(["s8", "s16"]), clamp=st.sampled_from([(-128, 127), (-20, 90)]),
       constant=st.booleans(), gap=st.sampled_from([0, 3]))  # fmt: skip
def test_per_channel(mode: str, data: Any, zero: int, dtype: str, clamp: tuple[int, int], constant: bool, gap: int) -> None:
    channels = data.draw(st.lists(st.tuples(multipliers, st.integers(0, 63)), min_size=1, max_size=6))
    rows = data.draw(st.lists(st.lists(sums, min_size=len(channels), max_size=len(channels)), min_size=1, max_size=4))
    a, (m, r) = np.array(rows, np.int32), zip(*channels, strict=True)
    operands = {"a": a, "s": np.array(m, np.int32), "r": np.array(r, np.int32)}
    got = execute("requant", operands, result=(a.shape, dtype), gap=gap, constant=("s", "r") * constant, mode=mode, zero=zero, clamp=clamp)
    assert got.reshape(-1).tolist() == expected(mode, a, m, r, zero, dtype, clamp)


@pytest.mark.parametrize("mode", MODES)
def test_every_shift_at_the_edges(mode: str) -> None:
    """Ties are multiples of half a step: powers of two times odd numbers; every shift meets them with the multiplier 2^30."""
    ties = [sign * odd << power for power in range(0, 31) for odd in (1, 3, 5) for sign in (1, -1) if odd << power < 1 << 31]
    values = np.array([[value] for value in sorted({*EDGES, *ties, *range(-260, 261)})], np.int32)
    for shift in range(64):
        for multiplier in (1 << 30, HIGH, (1 << 30) + 1, 0):
            a = np.ascontiguousarray(values)
            got = execute("requant", {"a": a}, result=(a.shape, "s16"), mode=mode, multiplier=multiplier, shift=shift)
            assert got.reshape(-1).tolist() == expected(mode, a, [multiplier], [shift], 0, "s16", (-128, 127)), (shift, multiplier)


@pytest.mark.parametrize("dtype", ["s8", "s16"])
def test_float32_is_two_exact_products_rounded_to_24_bits(dtype: str) -> None:
    """fp32.rne: the sum, then the product, each rounded to float32; then rint. Sums around powers of two, where 24 bits end; scales of every size."""
    near = [sign * ((1 << power) + step) for power in range(32) for step in (-3, -2, -1, 0, 1, 2, 3) for sign in (1, -1)]
    values = sorted({value for value in (*EDGES, *near, *range(-260, 261)) if LOW <= value <= HIGH})
    mantissas = (0x800000, 0x800001, 0xFFFFFF, 0xC00000, 0xAAAAAB)
    powers = (-149, -60, -39, -32, -24, 0, 40)
    scales = [Fraction(sign * mantissa) * Fraction(2) ** power for mantissa in mantissas for power in powers for sign in (1, -1)]
    a = np.repeat(np.array(values, np.int32)[:, None], len(scales), 1)
    s = np.array([float(scale) for scale in scales], np.float32)
    low, high = (-128, 127) if dtype == "s8" else (-(1 << 15), (1 << 15) - 1)
    wanted = [[min(max(round(float32(float32(Fraction(value)) * scale)) + 5, low), high) for scale in scales] for value in values]
    for constant in ((), ("s",)):
        assert execute("requant", {"a": a, "s": s}, result=(a.shape, dtype), constant=constant, zero=5).tolist() == wanted


def test_the_modes_differ_at_ties() -> None:
    """±0.5, ±1.5 and ±2.5: half to even, half up, half away from zero."""
    a = np.array([[1, 3, 5, -1, -3, -5]], np.int32)
    found = {mode: execute("requant", {"a": a}, result=(a.shape, "s8"), mode=mode, multiplier=1 << 30, shift=31).tolist()[0] for mode in MODES}
    assert found["q31.rne"] == [0, 2, 2, 0, -2, -2]
    assert found["q31.tosa"] == [1, 2, 3, 0, -1, -2]
    assert found["q31.tfl"] == [1, 2, 3, 0, -1, -2]  # the high half rounds up; only the division by a power of two rounds away from zero
    halves = {mode: execute("requant", {"a": 2 * a}, result=(a.shape, "s8"), mode=mode, multiplier=1 << 30, shift=32).tolist()[0] for mode in MODES}
    assert halves["q31.tfl"] == [1, 2, 3, -1, -2, -3]
    assert halves["q31.tosa"] == [1, 2, 3, 0, -1, -2]


def test_two_roundings_are_not_one() -> None:
    """0.49999999976…: the high half rounds it up to a tie, which TFLite then rounds up; one rounding does not."""
    a = np.array([[3]], np.int32)
    found = {mode: execute("requant", {"a": a}, result=(a.shape, "s8"), mode=mode, multiplier=1431655765, shift=33).item() for mode in MODES}
    assert found == {"q31.rne": 0, "q31.tosa": 0, "q31.tfl": 1}
    assert apply_scale_32(3, 1431655765, 33, double_round=True) == 1


@SETTINGS
@given(sums, st.integers(1 << 30, HIGH), st.integers(2, 62), st.integers(LOW, -1), st.integers(1, 1 << 20))
@example(LOW, HIGH, 62, LOW, 1)
def test_only_the_low_bits_of_multiplier_and_shift_count(value: int, multiplier: int, shift: int, sign: int, above: int) -> None:
    a = np.array([[value]], np.int32)
    dirty = {"a": a, "s": np.array([multiplier | LOW], np.int64).astype(np.int32), "r": np.array([shift + 64 * above], np.int32)}
    clean = {"a": a, "s": np.array([multiplier], np.int32), "r": np.array([shift], np.int32)}
    assert sign < 0
    for mode in MODES:
        found = [execute("requant", operands, result=(a.shape, "s16"), mode=mode).item() for operands in (dirty, clean)]
        assert found[0] == found[1]


HEAD = '.npu 1\n.target t requantize={}\n.memory dram=0x100 constants=0x0+0x100\n.layer "a" b\n  '
LINES = {
    "requant %0x0:s8[4], $0x0:s32[4], %0x10:s32[4] mode=q31.rne": "s but without r",
    "requant %0x0:s8[4], $0x0:s32[4], %0x10:f32[4] mode=q31.tosa": "operand s of f32",
    "requant %0x0:s8[4], $0x0:s32[4], %0x10:s32[4]": "operand s of s32",
    "requant %0x0:s8[4], $0x0:s32[4], %0x10:f32[4], %0x20:s32[4]": "with operand r",
    "requant %0x0:s8[4], $0x0:s32[4] mode=q31.tfl scale=0.5": "with scale=0.5",
    "requant %0x0:s8[4], $0x0:s32[4] shift=4": "with shift=4",
    "requant %0x0:s8[4], $0x0:s32[4] mode=q31.tfl shift=64": "shift is 64",
    "requant %0x0:s8[4], $0x0:s32[4] mode=q31.tfl multiplier=-1": "multiplier is -1",
}


@pytest.mark.parametrize(("line", "told"), LINES.items(), ids=LINES.values())
def test_what_does_not_go_with_a_mode_is_refused(line: str, told: str) -> None:
    mode = line.partition("mode=")[2].split(" ")[0] or "fp32.rne"
    with pytest.raises(CheckError, match=told):
        check(parse_program(HEAD.format(mode) + line + "\n"))


def test_a_mode_that_the_target_does_not_have_is_refused() -> None:
    with pytest.raises(CheckError, match=r"mode=fp32.rne, but the target has q31.tfl"):
        check(parse_program(HEAD.format("q31.tfl") + "requant %0x0:s8[4], $0x0:s32[4]\n"))
